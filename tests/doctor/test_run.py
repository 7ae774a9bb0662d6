"""`bigtfm doctor --run`: run directories of every kind of end, and a real one whose next command is run."""

from __future__ import annotations

import fcntl
import json
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rank_runner
from conftest import TINY, losses

from bigtfm.config.run import RunConfig
from bigtfm.doctor.findings import Finding
from bigtfm.doctor.run import examine_run, owner_of
from bigtfm.engine import checkpoint
from bigtfm.engine.checkpoint import Progress
from bigtfm.resilience import events

MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """A run directory of 100 steps that has come to `step`, with checkpoints of some."""

    def make(step: int, *checkpoints: int, failure: dict[str, Any] | None = None) -> Path:
        run_dir = tmp_path / "runs/mine"
        run_dir.mkdir(parents=True)
        (run_dir / "run.toml").write_text("[run]\nsteps = 50\n")
        config = RunConfig.model_validate(
            {"run": {"steps": 100, "name": "mine", "dir": str(tmp_path / "runs")}}
        )
        resolved = {"steps": 100, "world_size": 2, "run_config": config.model_dump(mode="json")}
        (run_dir / "resolved.json").write_text(json.dumps(resolved))
        now = time.time()
        rows = [{"time": now, "step": n, "loss": 5.0, "seconds": 0.1} for n in range(1, step + 1)]
        (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for saved in checkpoints:
            save(run_dir / "checkpoints", saved)
        if failure:
            (run_dir / "failure.json").write_text(json.dumps(failure))
        return run_dir

    return make


def save(root: Path, step: int, **progress: Any) -> None:
    """A checkpoint without a parameter."""
    building = root / ".building"
    building.mkdir(parents=True)
    state = {
        "format": checkpoint.FORMAT,
        "progress": vars(Progress(step=step, **progress)),
        "counters": dict.fromkeys(checkpoint.COUNTERS, step),
        "groups": [],
        "scheduler": None,
        "loss_scaler": None,
    }
    checkpoint.finish(building, checkpoint.folder_of(root, step), [], state)


def by_check(run_dir: Path) -> dict[str, Finding]:
    return {finding.check: finding for finding in examine_run(run_dir)}


def command(run_dir: Path) -> str:
    return (
        f"deepspeed --num_gpus 2 launch/train.py --deepspeed_config {run_dir}/deepspeed.json --config "
        f"{run_dir}/run.toml run.name=mine run.dir={run_dir.parent} run.steps=100"
    )


def same_words(a: str, b: str) -> bool:
    """But for the order of overrides."""
    return sorted(a.split()) == sorted(b.split())


def test_a_run_that_came_to_its_end(make_run: MakeRun) -> None:
    found = by_check(make_run(100, 50, 100))
    assert found["run"] == Finding("run", "ok", "came to its end: step 100 of 100")
    assert found["checkpoints"].found == "2 verified, the newest is of step 100"
    assert all(finding.status == "ok" for finding in found.values())


def test_a_run_that_stopped_early(make_run: MakeRun) -> None:
    run_dir = make_run(42, 40)
    save(run_dir / "checkpoints", 42, stale_evaluations=3)
    resolved = json.loads((run_dir / "resolved.json").read_text())
    resolved["run_config"]["eval"]["patience"] = 3
    (run_dir / "resolved.json").write_text(json.dumps(resolved))
    found = by_check(run_dir)["run"]
    assert found.status == "ok"
    assert (
        found.found == "stopped early, after eval.patience evaluations without a better one: step 42 of 100"
    )


def test_a_run_that_was_killed(make_run: MakeRun) -> None:
    run_dir = make_run(42, 40)
    found = by_check(run_dir)["run"]
    assert found.status == "error"
    assert found.found.startswith("ended at step 42 of 100 without a word: killed (kill -9, out of")
    fix, _, next_command = found.fix.partition("go on: ")
    assert fix == "see `dmesg` for 'Killed process', then "
    assert same_words(next_command, command(run_dir))


def test_a_run_that_failed(make_run: MakeRun) -> None:
    failure = {"exit_code": 74, "what": "the disk is full", "where": "runs/mine", "fix": "free space there"}
    run_dir = make_run(42, 40, failure=failure)
    found = by_check(run_dir)["run"]
    assert found.status == "error"
    assert found.found == "ended at step 42 of 100 with exit code 74: runs/mine: the disk is full"
    assert found.fix.startswith("free space there; deepspeed --num_gpus 2 ")


@pytest.mark.parametrize("code", [75, 130])
def test_a_run_that_was_asked_to_stop(code: int, make_run: MakeRun) -> None:
    failure = {"exit_code": code, "what": "saved at step 42", "where": "runs/mine", "fix": "start it again"}
    run_dir = make_run(42, 42, failure=failure)
    found = by_check(run_dir)["run"]
    assert found.status == "warning"
    assert found.found == f"stopped when asked to (exit code {code}): runs/mine: saved at step 42"
    assert same_words(found.fix.removeprefix("go on: "), command(run_dir))


def test_a_run_that_could_not_write_its_end(make_run: MakeRun) -> None:
    run_dir = make_run(5, 4)
    (run_dir / "failure.json").write_bytes(b"")
    found = by_check(run_dir)["run"]
    assert (found.status, found.found) == (
        "error",
        "ended at step 5 of 100, and could not even write why: a full disk?",
    )
    assert found.fix.startswith("free space, or see why nothing can be written there; then deepspeed ")


def test_a_run_that_hung(make_run: MakeRun) -> None:
    failure = {"exit_code": 79, "what": "rank 1 hangs", "where": "step 43", "fix": "see the stacks"}
    run_dir = make_run(42, 40, failure=failure)
    (run_dir / "logs").mkdir()
    stacks = run_dir / "logs/hang-step-43.txt"
    stacks.touch()
    found = by_check(run_dir)
    assert found["run"].status == "error"
    assert found["hang"].found == f"where every rank stood: {stacks}"


def test_a_run_that_never_began(make_run: MakeRun) -> None:
    found = by_check(make_run(0))
    assert found["run"].found == "ended before its first step, without a word"
    assert found["checkpoints"].status == "ok"


def test_a_run_at_work(make_run: MakeRun) -> None:
    run_dir = make_run(42, 40)
    owner = {"host": "node7", "pid": 4711, "since": "2026-11-24 20:00:00"}
    with (run_dir / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(json.dumps(owner))
        lock.flush()
        found = by_check(run_dir)["run"]
        assert found.status == "ok"
        assert found.found.startswith(
            "a training is at work here: process 4711 on node7 since 2026-11-24 20:00:00; step 42 of 100, "
        )
        rows = [
            json.loads(line) | {"time": 1.0} for line in (run_dir / "metrics.jsonl").read_text().splitlines()
        ]
        (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert by_check(run_dir)["run"].status == "warning", "silent for ages"
    assert by_check(run_dir)["run"].status == "error", "the lock has gone with its owner"


def test_damaged_checkpoints_are_named(make_run: MakeRun) -> None:
    run_dir = make_run(42, 30, 40)
    (run_dir / "checkpoints/step-00000040/index.json").write_text("{ }")
    found = by_check(run_dir)["checkpoints"]
    assert found.status == "warning"
    assert found.found == (
        "1 verified, the newest is of step 30; damaged: step-00000040: index.json has 3 bytes instead of 2"
    )
    (run_dir / "checkpoints/step-00000030/manifest.json").unlink()
    found = by_check(run_dir)["checkpoints"]
    assert found.status == "error"
    assert found.found.startswith("none of 2 verifies: step-00000040: index.json has 3 bytes")


def test_what_else_happened(make_run: MakeRun) -> None:
    run_dir = make_run(42, 40)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    rows[6]["skipped"] = rows[8]["skipped"] = True
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step in (7, 9):
        events.note(run_dir, "skipped step", step=step, rank=1)
    (run_dir / "tracking.json").write_text("{}")
    (run_dir / "mlflow.json").write_text(json.dumps({"error": "connection refused"}))
    found = by_check(run_dir)
    assert found["steps left out"].found == "2 steps took no update, the last: 7, 9"
    assert found["events"].found == "skipped step (2); the last: skipped step (step 9, rank 1)"
    assert found["MLflow"].fix == f"start or mend the server, then bigtfm sync {run_dir}"


def test_no_run_and_torn_files(tmp_path: Path, make_run: MakeRun) -> None:
    assert by_check(tmp_path / "nothing")["run"].found == f"{tmp_path}/nothing is not there"
    (tmp_path / "empty").mkdir()
    assert by_check(tmp_path / "empty")["run"].found == f"{tmp_path}/empty holds no run"
    run_dir = make_run(5, 5)
    for name in ("resolved.json", "failure.json", "mlflow.json", "tracking.json", "run.toml", "events.jsonl"):
        (run_dir / name).write_bytes(b'{"torn": [\xff')
    assert by_check(run_dir)["run"].status == "error", "and no traceback"
    (run_dir / "metrics.jsonl").write_text("{\n{}\n")
    assert by_check(run_dir)["metrics.jsonl"].fix == "remove the line"


@pytest.mark.launcher
@pytest.mark.slow
def test_the_next_command_goes_on(
    tmp_path: Path, tiny_data: Path, deepspeed_json: Callable[..., Path]
) -> None:
    """A real run, killed: what the doctor says to type finishes it."""
    options = ["steps=100000", "save.every=2", f"data.path={tiny_data}", "run.name=run", "seed=7"]
    ranks = rank_runner.start(
        ["train", "--deepspeed_config", str(deepspeed_json()), *TINY, *options], tmp_path
    )
    run_dir = tmp_path / "runs/run"
    deadline = time.monotonic() + 60
    while len(list((run_dir / "checkpoints").glob("step-*"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    working = by_check(run_dir)["run"]
    assert working.found.startswith("a training is at work here: process ")
    ranks[0].kill()
    ranks[0].join()
    while owner_of(run_dir) is not None:  # its trainer ends a moment after it
        time.sleep(0.01)
    killed = by_check(run_dir)["run"]
    program, *args = shlex.split(killed.fix.partition("go on: ")[2])
    assert program == "bigtfm"
    steps = len(losses(run_dir)) + 2
    again = rank_runner.run([*args, f"steps={steps}"], tmp_path)
    assert again.codes == [0], again.output
    assert "resuming" in again.output
    assert len(losses(run_dir)) == steps
