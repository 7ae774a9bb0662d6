"""Sweeps with real trainings: what fails is a result, halving resumes, and a kill costs no finished trial."""

from __future__ import annotations

import csv
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import rank_runner
from conftest import TINY, losses
from forked_trials import ForkedRanks

from bigtfm.bench.results import read_rows
from bigtfm.cli import app
from bigtfm.config.problems import ConfigProblem, Interrupted, Problem, RequeueRequested, StorageProblem
from bigtfm.resilience.claim import Owner, alive
from bigtfm.resilience.processes import process
from bigtfm.sweep.command import next_trials, sweep
from bigtfm.sweep.runner import RESULTS, run_sweep
from bigtfm.sweep.space import load_sweep
from bigtfm.sweep.trial import Study, why_ended

Write = Callable[..., Path]
SCHEDULE = {
    "type": "WSD",
    "params": {"total_num_steps": "auto", "warmup_num_steps": 1, "decay_num_steps": 1},
}


@pytest.fixture
def space(tmp_path: Path, tiny_data: Path, deepspeed_json: Callable[..., Path]) -> Write:
    """Writes a sweep of a tiny model; its schedule has "auto" steps."""

    def write(axes: str, top: str = "", overrides: tuple[str, ...] = ()) -> Path:
        deepspeed = deepspeed_json(scheduler=SCHEDULE)
        words = json.dumps([*TINY, f"data.path={tiny_data}", *overrides])
        path = tmp_path / "sweep.toml"
        path.write_text(f'deepspeed_config = "{deepspeed}"\noverrides = {words}\n{top}\n[space]\n{axes}\n')
        return path

    return write


@pytest.fixture(autouse=True)
def nothing_started() -> None:
    ForkedRanks.started.clear()


def rows_of(out: Path) -> dict[tuple[int, int], dict[str, Any]]:
    return {(row["trial"], row["rung"]): row for row in read_rows(out / RESULTS)}


@pytest.mark.launcher
@pytest.mark.slow
def test_halving_goes_on_by_resuming_and_the_best_is_a_straight_run(space: Write, tmp_path: Path) -> None:
    """One of four trials diverges: a result. The winner's eight steps are those of best.toml, to the bit."""
    file = space(
        '"optimizer.params.lr" = [1e-4, 3e-3, 1e30, 1e-3]',
        'method = "halving"\ntrials = 4\nsteps = 8\neta = 2',
    )
    out = tmp_path / "out"
    sweep(file, out, start=ForkedRanks)
    rows = rows_of(out)
    assert [len([at for _, at in rows if at == rung]) for rung in range(3)] == [4, 2, 1]
    (diverged,) = [row for row in rows.values() if row["value"] is None]
    assert (diverged["status"], diverged["exit_code"]) == ("diverged", 70)
    assert diverged["point"]["optimizer.params.lr"] == 1e30
    assert "not finite" in diverged["why"]
    (best,) = [trial for trial, rung in rows if rung == 2]
    assert rows[best, 2]["steps"] == 8
    first = {t: row["value"] for (t, rung), row in rows.items() if rung == 0 and row["value"] is not None}
    assert rows[best, 0]["value"] in sorted(first.values())[:2]

    table = list(csv.DictReader((out / "sweep.csv").read_text().splitlines()))
    assert [row["status"] for row in table] == ["ok", "ok", "ok", "diverged"]
    assert int(table[0]["trial"]) == best
    for name in ("space.png", "curves.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")

    words = ["--deepspeed_config", str(out / "best.json"), "--config", str(out / "best.toml")]
    done = rank_runner.run(["train", *words, f"run.dir={tmp_path}"], tmp_path / "straight")
    assert done.code == 0, done.output
    (straight,) = tmp_path.glob("*-best")
    assert losses(straight) == losses(out / f"trial-{best:03d}")
    assert len(losses(straight)) == 8

    ForkedRanks.started.clear()
    sweep(file, out, start=ForkedRanks)
    assert ForkedRanks.started == [], "nothing is trained twice"
    file.write_text(file.read_text().replace("eta = 2", "eta = 4"))
    with pytest.raises(ConfigProblem, match="another sweep's trials: eta of it differ"):
        sweep(file, out, start=ForkedRanks)


@pytest.mark.launcher
@pytest.mark.slow
def test_what_is_refused_or_crashes_is_a_result(space: Write, tmp_path: Path) -> None:
    file = space(
        '"train_batch_size" = [8, 9]\n"optimizer.params.lr" = [1e-3, 1e-2]',
        "trials = 4\nsteps = 2\nmetric = 'loss'",
    )
    out, number = tmp_path / "out", 0

    class Crashing(ForkedRanks):
        def __init__(self, *arguments: Any) -> None:
            nonlocal number
            number += 1
            super().__init__(*arguments)
            if number == 1:
                os.kill(self.processes[0].pid or 0, signal.SIGKILL)

    found = list(run_sweep(Study(load_sweep(file), out), 2, Crashing))
    assert sorted(row["status"] for row in found) == ["crashed", "ok", "refused", "refused"]
    crashed = next(row for row in found if row["status"] == "crashed")
    assert crashed["exit_code"] == 128 + signal.SIGKILL
    refused = next(row for row in found if row["status"] == "refused")
    assert (refused["exit_code"], refused["value"]) == (64, None)
    assert "train_batch_size 9" in refused["why"]


@pytest.mark.launcher
@pytest.mark.slow
def test_after_kill_9_finished_trials_are_read(space: Write, tmp_path: Path) -> None:
    """The real command and processes: the trial that ran dies with it, and goes on from its checkpoint."""
    file = space('"optimizer.params.lr" = [1e-3, 3e-3]', "trials = 2\nsteps = 80", ("save.every=10",))
    out = tmp_path / "out"
    log = tmp_path / "sweep.log"
    program = "import sys; from bigtfm.cli import app; app()"
    with log.open("wb") as errors:
        started = subprocess.Popen(
            [sys.executable, "-c", program, "sweep", str(file), "--out", str(out)],
            cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True,
        )  # fmt: skip
    second: dict[str, Any] = {}
    deadline = time.monotonic() + 200
    while not second.get("pid"):
        assert time.monotonic() < deadline
        assert started.poll() is None, log.read_text()
        time.sleep(0.05)
        if rows_of(out) and (out / "trial-001" / "checkpoints").is_dir():
            saved = list((out / "trial-001" / "checkpoints").glob("step-*"))
            second = json.loads((out / "trial-001" / ".lock").read_text() or "{}") if saved else {}
    started.kill()
    started.wait()
    while process(second["pid"]) is not None:
        assert time.monotonic() < deadline, "the trial outlived its sweep"
        time.sleep(0.05)
    ForkedRanks.started.clear()
    sweep(file, out, start=ForkedRanks)
    assert ForkedRanks.started == ["trial-001"]
    events = (out / "trial-001" / "events.jsonl").read_text().splitlines()
    starts = [row["step"] for row in map(json.loads, events) if row["event"] == "start"]
    assert starts[0] == 0
    assert starts[1] >= 10
    assert len(losses(out / "trial-001")) == 80


@pytest.mark.launcher
@pytest.mark.slow
def test_a_signal_lets_the_trials_save(space: Write, tmp_path: Path) -> None:
    file = space('"optimizer.params.lr" = [1e-3, 3e-3]', "trials = 2\nsteps = 3000")
    out = tmp_path / "out"

    class Stopping(ForkedRanks):
        def poll(self) -> int | None:
            metrics = out / "trial-000" / "metrics.jsonl"
            if metrics.exists() and metrics.read_bytes().count(b"\n") > 3 and not asked:
                asked.append(True)
                os.kill(os.getpid(), signal.SIGTERM)
            return super().poll()

    asked: list[bool] = []
    with pytest.raises(RequeueRequested, match="stopped by SIGTERM; the trials that ran have saved"):
        sweep(file, out, start=Stopping)
    assert rows_of(out) == {}
    assert ForkedRanks.started == ["trial-000"]
    (saved,) = (out / "trial-000" / "checkpoints").glob("step-*")
    assert (saved / "manifest.json").is_file()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.launcher
@pytest.mark.slow
def test_in_mlflow_the_trials_stand_below_the_sweep(space: Write, tmp_path: Path) -> None:
    store = tmp_path / "mlflow.db"
    on = ("track.mlflow=true", f"track.uri=sqlite:///{store}")
    file, out = space('"optimizer.params.lr" = [1e-3, 3e-3]', "trials = 1\nsteps = 2", on), tmp_path / "out"
    sweep(file, out, start=ForkedRanks)
    ids = [json.loads((out / f"{name}mlflow.json").read_text())["run_id"] for name in ("", "trial-000/")]
    with closing(sqlite3.connect(store)) as database:
        below = database.execute(
            "select run_uuid, value from tags where key = 'mlflow.parentRunId'"
        ).fetchall()
        params = dict(
            database.execute("select key, value from params where run_uuid = ?", ids[:1]).fetchall()
        )
    assert below == [(ids[1], ids[0])]
    assert params["best.trial"] == "0"
    assert params["space.optimizer.params.lr"] == "[0.001, 0.003]"


@pytest.mark.launcher
@pytest.mark.slow
def test_a_cluster_is_told_what_is_next(space: Write, tmp_path: Path) -> None:
    """--due lays trials out, takes in what came of them, and notices when nothing comes."""
    file = space(
        '"optimizer.params.lr" = [1e-3, 3e-3, 1e-2, 1e30]',
        'method = "halving"\ntrials = 4\nsteps = 8\neta = 2',
    )
    out = tmp_path / "out"

    def train(due: str) -> None:
        for trial in due.split(","):
            folder = out / f"trial-{int(trial):03d}"
            files = [
                "--deepspeed_config",
                str(folder / "deepspeed.json"),
                "--config",
                str(folder / "run.toml"),
            ]
            rank_runner.run(["train", *files], folder / "logs")

    assert next_trials(file, out) == "0,1,2,3"
    with pytest.raises(ConfigProblem, match="none of 4 trials has come to an end"):
        next_trials(file, out)
    train("0,1,2,3")
    second = next_trials(file, out)
    assert len(second.split(",")) == 2
    train(second)
    third = next_trials(file, out)
    assert third in second.split(",")
    train(third)
    assert next_trials(file, out) == ""
    assert (out / "best.toml").is_file()
    assert [row["exit_code"] for row in rows_of(out).values() if row["value"] is None] == [70]


class Ending:
    """Trials that train nothing, and end with an exit code; None: only when they are killed."""

    code: int | None = 0
    ends: list[str] = []  # noqa: RUF012

    def __init__(self, config: Path, deepspeed: Path, count: int, logs: Path, *more: Any) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        (logs / "rank-0.log").write_text("bigtfm: error: out: No space left. Fix: free space")

    def poll(self) -> int | None:
        return self.code

    def stop(self) -> None:
        self.ends.append("asked")

    def kill(self) -> None:
        self.ends.append("killed")


def test_a_full_disk_is_no_result(space: Write, tmp_path: Path) -> None:
    class Full(Ending):
        code = 74

    file = space('"optimizer.params.lr" = [1e-3, 3e-3]', "trials = 2\nsteps = 2")
    with pytest.raises(StorageProblem, match=r"No space left\. Fix: free space there, then start") as caught:
        sweep(file, tmp_path / "out", start=Full)
    assert caught.value.exit_code == 74
    assert rows_of(tmp_path / "out") == {}


def test_steps_of_what_runs_are_told(space: Write, tmp_path: Path) -> None:
    """Two trials at a time; a line that is being written is no step yet."""
    told: list[tuple[int, int]] = []

    class Slow(Ending):
        def __init__(self, config: Path, *more: Any) -> None:
            super().__init__(config, *more)
            (config.parent / "metrics.jsonl").write_text('{"step": 1}\n{"step": 3}\n{"step": 4')

        def poll(self) -> int | None:
            return 70 if told else None

    file = space('"optimizer.params.lr" = [1e-3, 3e-3]', "trials = 2\nsteps = 5")
    study = Study(load_sweep(file), tmp_path / "out")
    assert len(list(run_sweep(study, 2, Slow, lambda *steps: told.append(steps)))) == 2
    assert told[0] == (6, 10)


def test_a_second_ctrl_c_does_not_wait_for_trials(space: Write, tmp_path: Path) -> None:
    class Deaf(Ending):
        ends: list[str] = []  # noqa: RUF012

        def poll(self) -> int | None:
            os.kill(os.getpid(), signal.SIGINT)
            return None

    began = time.monotonic()
    file = space('"optimizer.params.lr" = [1e-3, 3e-3]', "trials = 2\nsteps = 2")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    with pytest.raises(Interrupted, match="stopped by SIGINT; not every trial that ran has saved"):
        sweep(file, tmp_path / "out", start=Deaf)
    assert Deaf.ends == ["asked", "killed"]
    assert time.monotonic() - began < 60


def test_a_trial_that_a_killed_sweep_has_left_is_waited_for(space: Write, tmp_path: Path) -> None:
    """Else it would hold the folder, and be called refused."""
    out = tmp_path / "out"
    with subprocess.Popen(["sleep", "0.5"]) as left:
        (out / "trial-000").mkdir(parents=True)
        owner = Owner(socket.gethostname(), left.pid, process(left.pid).started, "", None, "0")  # type: ignore[union-attr]
        (out / "trial-000" / ".lock").write_text(json.dumps(asdict(owner)))

        class Waiting(Ending):
            code = 130

            def __init__(self, *arguments: Any) -> None:
                super().__init__(*arguments)
                assert alive(out / "trial-000", {}) is False

        file = space('"optimizer.params.lr" = [1e-3, 3e-3]', "trials = 1\nsteps = 2")
        threading.Thread(target=left.wait).start()
        with pytest.raises(Problem, match="no trial has come to an end"):
            sweep(file, out, start=Waiting)


def test_why_a_trial_has_ended(tmp_path: Path) -> None:
    assert why_ended(tmp_path, 137) == "killed by signal 9"
    assert why_ended(tmp_path, 1) == f"see {tmp_path / 'logs'}"
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank-0.log").write_text("x\nbigtfm: error: ds.json: wrong. Fix: it\n")
    assert why_ended(tmp_path, 64) == "ds.json: wrong"
    (tmp_path / "failure.json").write_text('{"where": "step 3", "what": "not finite"}')
    assert why_ended(tmp_path, 70) == "step 3: not finite"


def test_a_metric_that_is_not_there(space: Write, tmp_path: Path) -> None:
    file = space(
        '"optimizer.params.lr" = [1e-3, 3e-3]', 'trials = 1\nsteps = 2\nmetric = "val_los"', ("eval.every=1",)
    )
    with pytest.raises(ConfigProblem, match=r"metric 'val_los' is not in .* did you mean 'val_loss'"):
        sweep(file, tmp_path / "out", start=ForkedRanks)


@pytest.mark.parametrize(
    ("axes", "top", "line"),
    [
        ("model.hidden_size = [33, 35]", "trials = 2\nsteps = 4", "hidden_size 3[35] is not a multiple"),
        ("model.dropout = [0.0, 0.1]", "trials = 2", "steps is missing, and the schedule has none"),
        (
            "model.dropout = [0.0, 0.1]\nscheduler.params.total_num_steps = 8",
            "trials = 2\nsteps = 9",
            "steps 9 is larger than the schedule's total_num_steps 8",
        ),
        (
            "model.dropout = [0.0, 0.1]\neval.patience = 2\neval.every = 3",
            'trials = 2\nsteps = 8\nmethod = "halving"\neta = 2',
            "every rung of halving has one, at 4, 8 steps",
        ),
    ],
)
def test_what_can_not_be_trained_at_all_is_one_line(
    space: Write, tmp_path: Path, axes: str, top: str, line: str
) -> None:
    with pytest.raises(ConfigProblem, match=line):
        sweep(space(axes, top), tmp_path / "out", start=ForkedRanks)
    assert ForkedRanks.started == []
    assert not (tmp_path / "out" / RESULTS).exists()


def test_without_a_validation_split_there_is_no_val_loss(
    space: Write, tmp_path: Path, corpus_lines: list[str]
) -> None:
    from bigtfm.data.prepare import prepare

    (tmp_path / "a.txt").write_text("\n\n".join(corpus_lines)[:60_000])
    data = tmp_path / "data"
    prepare([str(tmp_path / "a.txt")], data, vocab_size=400, validation_fraction=0, workers=1, progress=False)
    file = space("model.dropout = [0.0, 0.1]", "trials = 2\nsteps = 4", (f"data.path={data}",))
    with pytest.raises(
        ConfigProblem, match=r"metric val_loss needs evaluations, and .* has no validation split"
    ):
        sweep(file, tmp_path / "out", start=ForkedRanks)


def test_no_trial_with_a_result_ends_with_the_first_ones_code(
    space: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Study, "rungs", [2])
    file = space('"optimizer.params.lr" = [1e29, 1e30]', "trials = 1\nsteps = 2")
    with pytest.raises(Problem, match="no trial has come to an end; the first: diverged") as caught:
        sweep(file, tmp_path / "out", start=ForkedRanks)
    assert caught.value.exit_code == 70


def test_the_command_says_it_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        app(["sweep", str(tmp_path / "nope.toml")])
    assert left.value.code == 64
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "nope.toml: no such file" in said
