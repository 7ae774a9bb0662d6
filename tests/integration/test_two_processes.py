"""Kills and signals, to each process of real ranks: what is saved, what is said, and that nothing stays."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import many_runs
import pytest
import rank_runner
import ranks_with_workers
from chaos import processes
from conftest import TINY, losses

Json = Callable[..., Path]
pytestmark = [pytest.mark.launcher, pytest.mark.slow]
SAVES = int(os.environ.get("CONSENSUS_SAVES", "3"))
POLITE = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)


def slow_disk() -> None:
    """`bigtfm` with a disk that takes a second to flush."""
    flush = os.fsync
    os.fsync = lambda file: (time.sleep(1.0), flush(file))[1]
    rank_runner._bigtfm()


class Ranks:
    """Two ranks, each a supervisor and a trainer with a data worker, of one run that goes on and on."""

    def __init__(self, folder: Path, args: list[str]) -> None:
        self.folder, self._args = folder, args
        self.run_dir = folder / "runs/run"
        self._supervisors: list[BaseProcess] = []
        self._everything: dict[int, str] = {}

    def start(self, *overrides: str, program: Callable[[], None] = ranks_with_workers.command) -> None:
        self._everything = {}
        self._supervisors = rank_runner.start([*self._args, *overrides], self.folder, 2, program=program)

    def start_first(self) -> None:
        """Rank 0 of two, alone."""
        environ = {"WORLD_SIZE": "2"}
        self._supervisors = rank_runner.start(self._args, self.folder, 1, environ)

    def until_steps(self, more: int = 3) -> None:
        """Waits for so many further rows."""
        before = len(self.rows)
        wait_for(lambda: len(self.rows) >= before + more)

    @property
    def rows(self) -> list[float]:
        return losses(self.run_dir) if (self.run_dir / "metrics.jsonl").exists() else []

    def pid(self, role: str, rank: int) -> int:
        supervisor = self._supervisors[rank].pid or 0
        if role == "supervisor":
            return supervisor
        [trainer] = processes.children(supervisor)
        return trainer.pid

    def send(self, number: signal.Signals, role: str, rank: int) -> None:
        """A signal to one process; `end` looks whether all that live now are gone."""
        pid, self._everything = self.pid(role, rank), {pid: command(pid) for pid in self.all}
        os.kill(pid, number)

    @property
    def all(self) -> set[int]:
        found, below = set[int](), [rank.pid or 0 for rank in self._supervisors]
        while below:
            found.add(pid := below.pop())
            below += [child.pid for child in processes.children(pid)]
        return found

    def end(self, seconds: float) -> tuple[list[int], list[str]]:
        """Exit codes, and the lines about the end, once all processes are gone."""
        began = time.monotonic()
        finished = rank_runner.finish(self._supervisors, self.folder, timeout=seconds)
        assert time.monotonic() - began < seconds, finished.outputs
        deadline = time.monotonic() + 2
        while left := [about for pid, about in self._everything.items() if alive(pid)]:
            assert time.monotonic() < deadline, left
            time.sleep(0.02)
        said = [line for output in finished.outputs for line in output.splitlines() if "error: " in line]
        assert "Traceback" not in "".join(finished.outputs), finished.outputs
        return finished.codes, said


def command(pid: int) -> str:
    return f"{pid}: " + Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)


@pytest.fixture
def ranks(tmp_path: Path, tiny_data: Path, deepspeed_json: Json) -> Iterator[Ranks]:
    args = ["train", "--deepspeed_config", str(deepspeed_json(stage=2)), f"data.path={tiny_data}", *TINY]
    made = Ranks(tmp_path, [*args, "run.name=run", "steps=100000", "save.every=5", "data.workers=1"])
    yield made
    processes.kill(made.all)


def test_whoever_is_killed_all_are_gone_in_ten_seconds_and_the_run_resumes(ranks: Ranks) -> None:
    """One run, started again after each kill: no lock and no port of the last start is in the way."""
    for role, rank in (("trainer", 0), ("supervisor", 1), ("trainer", 1), ("supervisor", 0)):
        ranks.start()
        ranks.until_steps(8)
        os.kill(ranks.pid(role, rank), signal.SIGKILL)
        codes, said = ranks.end(seconds=10)
        assert codes == [-9 if (role, at) == ("supervisor", rank) else 79 for at in (0, 1)], said
        assert len(said) == 1, said
        how = "was killed by signal 9 (SIGKILL)" if role == "trainer" else "is gone"
        assert said[0].startswith(f"bigtfm: error: rank {rank}: {how}"), said
        assert json.loads((ranks.run_dir / "failure.json").read_text())["where"] == f"rank {rank}"
        assert list((ranks.run_dir / "checkpoints").glob("step-*"))


def test_one_process_is_told_and_all_ranks_save_the_same_step(ranks: Ranks) -> None:
    """A signal to any of the four, at any moment of a step. CONSENSUS_SAVES=20 for the long campaign."""
    draw = random.Random(5)
    for turn in range(SAVES):
        number = (signal.SIGUSR1, *POLITE)[turn % 5]
        role, rank = draw.choice(("trainer", "supervisor")), turn % 2
        ranks.start("save.every=0")
        ranks.until_steps(3)
        time.sleep(draw.random() * 0.2)
        ranks.send(number, role, rank)
        codes, said = ranks.end(seconds=20)
        code, why = (130, "Ctrl-C") if number == signal.SIGINT else (75, "a signal")
        assert codes == [code, code], said
        step = max(int(path.name[5:]) for path in (ranks.run_dir / "checkpoints").glob("step-*"))
        assert [line.partition(". Fix")[0] for line in said] == [
            f"bigtfm: error: runs/run: saved at step {step} and stopped by {why}"
        ]
        assert len(ranks.rows) == step


def told_in_evaluation() -> None:
    """`bigtfm` whose rank 1 gets a signal as the evaluation after step 2 begins."""
    import bigtfm.train

    validation_loss = bigtfm.train.validation_loss

    def interrupted(*args: Any) -> float | None:
        if os.environ["RANK"] == "1" and len(losses(Path("runs/run"))) == 1:
            os.kill(os.getpid(), signal.SIGUSR2)
        return validation_loss(*args)

    bigtfm.train.validation_loss = interrupted
    rank_runner._bigtfm()


def test_an_evaluation_is_cut_short_and_made_up_for(ranks: Ranks, deepspeed_json: Json) -> None:
    """Its result counts as if nothing had happened: for the lr, the best checkpoint, the metrics."""
    schedule = {"type": "ReduceOnPlateau", "params": {"factor": 0.5, "patience": 0, "threshold": 0.5}}
    deepspeed_json(stage=2, scheduler=schedule)
    args = ["eval.every=1", "steps=4", "save.every=0", "data.workers=0"]
    ranks.start(*args, "run.name=whole")
    assert ranks.end(seconds=60) == ([0, 0], [])
    ranks.start(*args, program=told_in_evaluation)
    codes, said = ranks.end(seconds=60)
    assert codes == [75, 75], said
    assert "saved at step 2 and stopped by a signal" in said[0]
    rows = many_runs.rows_of(ranks.run_dir)
    assert [row["step"] for row in rows] == [1, 2]
    assert "val_loss" not in rows[-1]
    ranks.start(*args)
    assert ranks.end(seconds=60) == ([0, 0], [])
    whole, cut = (
        [
            {key: row.get(key) for key in ("step", "loss", "lr", "val_loss", "val_bits_per_byte")}
            for row in rows
        ]
        for rows in map(many_runs.rows_of, (ranks.folder / "runs/whole", ranks.run_dir))
    )
    assert cut == whole
    assert whole[2]["lr"] < whole[1]["lr"], "the evaluation moves the lr"


def test_a_save_in_flight_is_waited_for(ranks: Ranks) -> None:
    ranks.start("save.every=2", "data.workers=0", program=slow_disk)
    building = ranks.run_dir / "checkpoints/.building-step-00000002"
    wait_for(building.exists)
    ranks.send(signal.SIGTERM, "supervisor", 1)
    codes, said = ranks.end(seconds=30)
    assert codes == [75, 75], said
    saved = sorted(path.name for path in (ranks.run_dir / "checkpoints").glob("step-*"))
    assert saved[0] == "step-00000002"
    assert f"saved at step {int(saved[-1][5:])} and stopped by a signal" in said[0]


def test_the_rendezvous_is_left_at_once(ranks: Ranks) -> None:
    """Rank 1 never comes; nobody waits half an hour for it."""
    ranks.start_first()
    wait_for(lambda: processes.children(ranks.pid("supervisor", 0)))
    time.sleep(2)
    ranks.send(signal.SIGINT, "supervisor", 0)
    codes, said = ranks.end(seconds=5)
    assert codes == [130]
    assert [line.partition(". Fix")[0] for line in said] == [
        "bigtfm: error: runs/run: stopped before a step was done: there was nothing to save"
    ]
