"""metrics.jsonl round-trips and survives kills; MLflow gets each row once; training never waits for it."""

from __future__ import annotations

import contextlib
import http.server
import json
import math
import os
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigtfm.config.problems import DataProblem, StorageProblem
from bigtfm.mlflow_mirror import Mirror, start, sync
from bigtfm.mlflow_sender import Rows, read_json
from bigtfm.tracking import MetricsLog, plot_curve, read_metrics


def steps(path: Path) -> list[int]:
    return [row["step"] for row in read_metrics(path)]


def write_rows(path: Path, first: int, last: int, **more: float) -> None:
    log = MetricsLog(path)
    for step in range(first, last + 1):
        log.append({"step": step, "loss": 10.0 / step, "lr": 1e-3, "sample_digest": "c0ffee"} | more)
    log.close()


# --- metrics.jsonl -----------------------------------------------------------------------------------------


@given(value=st.floats(allow_nan=True, allow_infinity=True))
def test_floats_read_back_exactly_and_the_json_is_valid(
    value: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    log = MetricsLog(path)
    log.append({"step": 1, "loss": value})
    log.close()

    def refuse(word: str) -> float:
        raise AssertionError(f"{word} is no JSON")

    json.loads(path.read_text(), parse_constant=refuse)
    (row,) = read_metrics(path)
    assert row["loss"].hex() == value.hex()


def test_a_row_is_on_disk_before_the_next_one_is_made(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"step": 1})
    assert steps(tmp_path / "metrics.jsonl") == [1]
    log.close()


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b"{", b'{"step": 3, "loss": 1.5}'])
def test_a_torn_last_line_is_skipped_and_then_written_over(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    write_rows(path, 1, 2)
    with path.open("ab") as file:
        file.write(torn)
    assert steps(path) == [1, 2]
    write_rows(path, 3, 4)
    assert steps(path) == [1, 2, 3, 4]


def test_a_damaged_line_within_is_a_problem_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(StorageProblem, match=r"metrics\.jsonl:2"):
        read_metrics(path)


def test_truncate_after_drops_the_rows_past_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_rows(path, 1, 30)
    log = MetricsLog(path)
    log.truncate_after(20)
    log.append({"step": 21, "loss": 0.5})
    log.close()
    assert steps(path) == list(range(1, 22))
    assert not path.with_suffix(".tmp").exists()


def test_the_step_of_the_last_row_is_known_and_rows_are_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    write_rows(path, 1, 3)
    log = MetricsLog(path)
    assert [log.truncate_after(step) for step in (9, 2, 0)] == [3, 2, 0]
    flushed: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.append(os.fstat(handle).st_ino))
    log.flush()
    assert flushed == [path.stat().st_ino]
    log.close()


@pytest.mark.parametrize("line", ["[" * 100_000, "[]", "{}", '{"step": "x"}', "\x00"])
def test_a_damaged_line_is_told_when_a_run_resumes(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n')
    log = MetricsLog(path)
    with pytest.raises(StorageProblem, match=r"metrics\.jsonl: a line is damaged"):
        log.truncate_after(1)
    log.close()


def test_no_file_has_no_rows(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_a_log_that_cannot_be_written_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageProblem, match="can't be written"):
        MetricsLog(tmp_path / "file" / "metrics.jsonl")


def test_rows_are_followed_across_a_replaced_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = Rows(path)
    assert rows.new(10) == []
    write_rows(path, 1, 3)
    assert [row["step"] for row in rows.new(2)] == [1, 2]
    assert [row["step"] for row in rows.new(2)] == [3]
    with path.open("ab") as file:
        file.write(b'{"step": 4')  # half a line is not a row yet
    assert rows.new(2) == []
    log = MetricsLog(path)
    log.truncate_after(1)
    log.append({"step": 2, "loss": 0.0})
    log.close()
    assert [row["step"] for row in rows.new(10)] == [1, 2]


# --- the curve ---------------------------------------------------------------------------------------------


def test_the_curve_shows_training_validation_and_baseline(tmp_path: Path) -> None:
    write_rows(tmp_path / "metrics.jsonl", 1, 20)
    plain = plot_curve(tmp_path).read_bytes()
    assert plain.startswith(b"\x89PNG")
    write_rows(tmp_path / "metrics.jsonl", 21, 21, val_loss=0.7, val_bits_per_byte=0.25)
    with_validation = plot_curve(tmp_path).read_bytes()
    (tmp_path / "resolved.json").write_text('{"unigram_bits_per_byte": 2.5}')
    with_baseline = plot_curve(tmp_path).read_bytes()
    assert len({plain, with_validation, with_baseline}) == 3
    assert sorted(path.name for path in tmp_path.glob("curve*")) == ["curve.png"]


@pytest.mark.parametrize("losses", [[], [1.0], [math.nan, 2.0, math.inf, 1.0], [math.nan]])
def test_the_curve_of_odd_runs_is_drawn(tmp_path: Path, losses: list[float]) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step, loss in enumerate(losses, start=1):
        log.append({"step": step, "loss": loss})
    log.close()
    assert plot_curve(tmp_path).stat().st_size > 1000


# --- MLflow ------------------------------------------------------------------------------------------------

PARAMS = {
    "run": {"model": {"hidden_size": 192}},
    "deepspeed": {"optimizer": {"params": {"betas": [0.9, 0.95]}}},
}


StartMirror = Callable[[Path, str], Mirror]


@pytest.fixture
def mirror() -> Iterator[StartMirror]:
    """Starts mirrors; none outlives the test."""
    started = []

    def begin(run_dir: Path, uri: str) -> Mirror:
        run_dir.mkdir(exist_ok=True)
        (run_dir / "run.toml").write_text("[run]\n")
        files = ["run.toml", "absent.json"]
        started.append(
            start(run_dir, uri=uri, experiment="tests", name="demo", params=PARAMS, artifacts=files)
        )
        return started[-1]

    yield begin
    for one in started:
        one.wait(timeout=0)


def select(database: Path, query: str) -> list[tuple[object, ...]]:
    with contextlib.closing(sqlite3.connect(database)) as connection:
        return connection.execute(query).fetchall()


def stored_steps(database: Path, key: str = "loss") -> list[object]:
    return [
        step for (step,) in select(database, f"SELECT step FROM metrics WHERE key = '{key}' ORDER BY step")
    ]


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


@pytest.mark.slow
def test_every_row_arrives_once_in_one_mlflow_run_across_lost_answers_and_a_resume(
    tmp_path: Path, mirror: StartMirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a relative URI is taken from here, at the start
    run_dir, database, log = tmp_path / "run", tmp_path / "mlflow.db", tmp_path / "run" / "metrics.jsonl"
    first = mirror(run_dir, "sqlite:///mlflow.db")
    write_rows(log, 1, 59)
    write_rows(log, 60, 60, val_loss=1.25, mfu=math.nan)
    plot_curve(run_dir)
    run_id = first.finish()

    assert run_id is not None, (run_dir / "logs" / "mlflow.log").read_text()
    assert stored_steps(database) == list(range(1, 61))
    assert select(database, "SELECT value, step FROM metrics WHERE key = 'val_loss'") == [(1.25, 60)]
    assert select(database, "SELECT is_nan FROM metrics WHERE key = 'mfu'") == [(1,)]
    assert select(
        database, "SELECT count(*) FROM metrics WHERE key IN ('step', 'time', 'sample_digest')"
    ) == [(0,)]
    params = dict(select(database, "SELECT key, value FROM params"))
    assert params["run.model.hidden_size"] == "192"
    assert params["deepspeed.optimizer.params.betas"] == "[0.9, 0.95]"
    tags = dict(select(database, "SELECT key, value FROM tags"))
    assert tags["env.python"] == ".".join(map(str, sys.version_info[:3]))
    assert "env.torch" in tags
    kept = tmp_path / "mlruns" / run_id / "artifacts"
    assert sorted(path.name for path in kept.iterdir()) == ["curve.png", "metrics.jsonl", "run.toml"]
    assert select(database, "SELECT status FROM runs") == [("FINISHED",)]

    # All answers were lost, and the run's id with them: everything is sent again and nothing is stored twice.
    before = select(database, "SELECT * FROM metrics ORDER BY key, step")
    (run_dir / "mlflow.json").unlink()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert sync(run_dir) == run_id
    assert select(database, "SELECT * FROM metrics ORDER BY key, step") == before
    monkeypatch.chdir(tmp_path)

    # Resumed from the checkpoint of step 40, with steps 41 to 60 already sent.
    resumed = MetricsLog(log)
    resumed.truncate_after(40)
    resumed.close()
    second = mirror(run_dir, "sqlite:///mlflow.db")
    write_rows(log, 41, 80)
    assert second.finish("KILLED") == run_id
    assert stored_steps(database) == list(range(1, 81))
    assert select(database, "SELECT status FROM runs") == [("KILLED",)]

    # Gone back from step 80 to 70 after a spike: its rows 71 to 75 are news, although 80 were sent.
    back = MetricsLog(log)
    back.truncate_after(70)
    back.close()
    write_rows(log, 71, 75, rewinds=1)
    assert sync(run_dir) == run_id
    assert stored_steps(database) == sorted([*range(1, 81), *range(71, 76)])
    assert select(database, "SELECT count(*) FROM metrics WHERE key = 'rewinds'") == [(0,)]


class Broken(http.server.BaseHTTPRequestHandler):
    """Answers every request with 500."""

    def do_GET(self) -> None:
        self.send_response(500)
        self.end_headers()

    do_POST = do_GET

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def refused() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    yield port


@contextlib.contextmanager
def black_hole() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(50)  # the system accepts; nobody answers
        yield listener.getsockname()[1]


@contextlib.contextmanager
def broken_server() -> Iterator[int]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Broken) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def connections(port: int) -> int:
    """TCP connections to a local port, from /proc/net/tcp."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return sum(line.split()[2].endswith(f":{port:04X}") for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("server", [refused, black_hole, broken_server])
def test_training_does_not_wait_for_a_bad_server(
    tmp_path: Path, mirror: StartMirror, server: Callable[[], Any]
) -> None:
    run_dir = tmp_path / "run"
    with server() as port:
        began = time.perf_counter()
        sender = mirror(run_dir, f"http://127.0.0.1:{port}")
        taken = [time.perf_counter() - began]
        log = MetricsLog(run_dir / "metrics.jsonl")

        def one_more(step: int) -> float:
            began = time.perf_counter()
            log.append({"step": step, "loss": 1.0})
            return time.perf_counter() - began

        step = 0
        while not (
            read_json(run_dir / "mlflow.json").get("error") or (server is black_hole and connections(port))
        ):
            step += 1
            taken.append(one_more(step))
            assert step < 2000, "the server was never asked"
            time.sleep(0.02)
        log.close()
        assert sorted(taken)[len(taken) // 2] < 0.001
        assert (
            max(taken) < 1
        )  # a busy machine may stop us for a while; a server that is waited for stops us longer
        began = time.perf_counter()
        assert sender.finish(timeout=2) is None
        assert time.perf_counter() - began < 3
    assert steps(run_dir / "metrics.jsonl") == list(range(1, step + 1))


class Proxy:
    """Stands before a server. Its faults can be chosen: pass, refused, hole (never answers), error (500)."""

    def __init__(self, target: int) -> None:
        self._target, self._mode = target, "refused"
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._listener.close()

    def set(self, mode: str) -> None:
        """From now on; connections that are open end."""
        self._mode = mode
        for connection in [self._listener, *self._open]:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        self._open.clear()
        if mode != "refused":
            self._listener = socket.create_server(("127.0.0.1", self.port))
            threading.Thread(target=self._serve, args=(self._listener,), daemon=True).start()

    def _serve(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client = listener.accept()[0]
                self._open.append(client)
                if self._mode == "error":
                    client.recv(65536)
                    client.sendall(b"HTTP/1.1 500 Broken\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                    client.close()
                elif self._mode == "pass":
                    server = socket.create_connection(("127.0.0.1", self._target))
                    self._open.append(server)
                    for pair in ((client, server), (server, client)):
                        threading.Thread(target=_pump, args=pair, daemon=True).start()


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while part := source.recv(65536):
            target.sendall(part)
        target.shutdown(socket.SHUT_WR)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    """A real MLflow server: its port and its database."""
    folder = tmp_path_factory.mktemp("mlflow")
    with refused() as port:
        database = folder / "server.db"
    command = [
        "mlflow",
        "server",
        "--port",
        str(port),
        "--workers",
        "1",
        "--backend-store-uri",
        f"sqlite:///{database}",
    ]
    with (folder / "server.log").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            stdout=output,
            stderr=output,
            cwd=folder,
            start_new_session=True,
        )
    try:
        wait_for(lambda: answers(port))
        yield port, database
    finally:
        process.terminate()
        process.wait(20)


def steps_sent(database: Path, run_id: str | None) -> list[object]:
    query = f"SELECT step FROM metrics WHERE key = 'loss' AND run_uuid = '{run_id}' ORDER BY step"
    return [step for (step,) in select(database, query)]


@pytest.mark.slow
def test_sync_delivers_later_what_a_dead_server_missed(
    tmp_path: Path, mirror: StartMirror, server: tuple[int, Path]
) -> None:
    run_dir, (port, database) = tmp_path / "run", server
    proxy = Proxy(port)
    sender = mirror(run_dir, f"http://127.0.0.1:{proxy.port}")
    write_rows(run_dir / "metrics.jsonl", 1, 50)
    plot_curve(run_dir)
    assert sender.finish() is None
    with pytest.raises(StorageProblem, match=f"127.0.0.1:{proxy.port}"):
        sync(run_dir, timeout=0.5)
    proxy.set("pass")
    run_id = sync(run_dir, timeout=120)
    proxy.set("refused")
    assert steps_sent(database, run_id) == list(range(1, 51))
    assert select(database, f"SELECT status FROM runs WHERE run_uuid = '{run_id}'") == [("FINISHED",)]
    assert len(list(database.parent.rglob(f"{run_id}/artifacts/curve.png"))) == 1


@pytest.mark.slow
def test_a_server_that_dies_hangs_and_breaks_gets_every_row_when_it_is_back(
    tmp_path: Path, mirror: StartMirror, server: tuple[int, Path]
) -> None:
    run_dir, (port, database) = tmp_path / "run", server
    proxy = Proxy(port)
    proxy.set("pass")
    sender = mirror(run_dir, f"http://127.0.0.1:{proxy.port}")
    log, taken, last = MetricsLog(run_dir / "metrics.jsonl"), [], 0

    def steps_until(condition: Callable[[], bool], least: int) -> int:
        """Trains on for so many steps at least, until the condition holds."""
        nonlocal last
        first = last
        while last < first + least or not condition():
            last += 1
            began = time.perf_counter()
            log.append({"step": last, "loss": 1.0 / last})
            taken.append(time.perf_counter() - began)
            assert last < first + 6000, f"it did not come about: {read_json(run_dir / 'mlflow.json')}"
            time.sleep(0.02)
        return last

    def error() -> str:
        return str(read_json(run_dir / "mlflow.json").get("error"))

    def arrived(step: int) -> bool:
        return int(read_json(run_dir / "mlflow.json").get("sent_step", 0)) >= step

    steps_until(lambda: arrived(1), 20)
    for mode, said in (("refused", "NewConnectionError"), ("hole", ""), ("error", "500")):
        proxy.set(mode)
        down = steps_until(lambda said=said: said in error(), 60)
        proxy.set("pass")
        steps_until(lambda down=down: arrived(down), 1)
    log.close()
    run_id = sender.finish(timeout=60)
    proxy.set("refused")
    assert run_id is not None, (run_dir / "logs" / "mlflow.log").read_text()
    assert steps_sent(database, run_id) == list(range(1, last + 1))
    assert sorted(taken)[len(taken) // 2] < 0.001


def test_the_sender_ends_by_itself_after_training_died(tmp_path: Path, mirror: StartMirror) -> None:
    with black_hole() as port:
        mirror(tmp_path / "run", f"http://127.0.0.1:{port}").finish(timeout=0)
        began = time.monotonic()
        command = [sys.executable, "-m", "bigtfm.mlflow_sender", str(tmp_path / "run"), "1"]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, timeout=30, capture_output=True)
    assert done.returncode == 1
    assert time.monotonic() - began < 5


@pytest.mark.skipif(sys.platform != "linux", reason="the signal at a parent's death is Linux's")
def test_a_stopped_sender_ends_after_a_training_that_was_killed(tmp_path: Path) -> None:
    sender = [sys.executable, "-m", "bigtfm.mlflow_sender", str(tmp_path), "1"]
    (tmp_path / "logs").mkdir()
    code = (
        "import subprocess, sys; from subprocess import PIPE;"
        f"print(subprocess.Popen({sender!r}, stdin=PIPE).pid, flush=True); sys.stdin.read()"
    )
    trainer = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert trainer.stdout is not None
    process = psutil.Process(int(trainer.stdout.readline()))
    with trainer:
        wait_for((tmp_path / "logs" / "mlflow.lock").exists)
        process.suspend()
        wait_for(lambda: process.status() == psutil.STATUS_STOPPED)
        trainer.kill()
    wait_for(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE, seconds=30)


@pytest.mark.slow
def test_a_store_whose_making_is_killed_is_made_by_the_next_run(tmp_path: Path) -> None:
    database = tmp_path / "mlflow.db"
    code = f"from bigtfm.mlflow_sender import create_store; create_store('sqlite:///{database}')"

    def half_made() -> bool:
        return any(path.stat().st_size > 50_000 for path in tmp_path.glob("mlflow.db*"))

    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL) as maker:
        wait_for(half_made, seconds=60)
        maker.kill()
    assert not database.exists()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=120)
    with contextlib.closing(sqlite3.connect(database)) as connection:
        assert connection.execute("SELECT name FROM experiments").fetchall() == [("Default",)]


def test_sync_of_a_folder_that_is_no_run_is_a_problem(tmp_path: Path) -> None:
    with pytest.raises(DataProblem, match="runs/quickstart"):
        sync(tmp_path)
