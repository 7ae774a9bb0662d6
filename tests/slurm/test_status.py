"""What `bigtfm status` makes of a run directory."""

from __future__ import annotations

import io
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bigtfm.config.problems import ConfigProblem
from bigtfm.resilience.claim import claim
from bigtfm.slurm import status as module
from bigtfm.slurm.queue import Queued, queue_state, run_dir_of
from bigtfm.slurm.status import judge, render, starts, status

NOW = time.time() - 1000


def write(run: Path, rows: list[tuple[int, float]], happened: list[dict[str, Any]], steps: int = 100) -> None:
    """rows: step, and seconds after NOW at which it was done; each took a second."""
    (run / "checkpoints" / "step-00000020").mkdir(parents=True)
    (run / "resolved.json").write_text(json.dumps({"steps": steps, "world_size": 2}))
    lines = [
        {"step": s, "time": NOW + at, "loss": 2.0, "seconds": 1.0, "tokens": 8 * s, "tokens_per_second": 8.0}
        for s, at in rows
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in happened))


def start(at: float, step: int = 0) -> dict[str, Any]:
    return {"time": NOW + at, "event": "start", "began": NOW + at - 5, "step": step, "ranks": 2, "job": "7"}


def end(at: float, code: int, what: str = "", **more: Any) -> dict[str, Any]:
    return {"time": NOW + at, "event": "end", "code": code, "where": "rank 1", "what": what} | more


def test_a_story_of_three_starts(tmp_path: Path) -> None:
    """Warned, then lost without a word, then done: 40 steps of a second each in 100 s."""
    rows = [(s, 5 + s) for s in range(1, 21)] + [(s, 60 + s - 20) for s in range(21, 41)]
    happened = [start(5), end(25.5, 75, "saved"), start(50, 20), start(60, 20), end(100, 0, step=40)]
    write(tmp_path, rows, happened, steps=40)
    found = status(tmp_path)
    assert (found.state, found.step, found.saved, found.tokens_per_second) == ("done", 40, 20, 8.0)
    assert [(s.first, s.last, s.code) for s in found.starts] == [(0, 20, 75), (20, 20, None), (20, 40, 0)]
    assert found.starts[1].reason == "it left no word: a lost node, a kill -9"
    assert found.goodput == pytest.approx(40 / 100, abs=0.01)
    assert found.busy == pytest.approx(40 / (25.5 + 5 + 45), abs=0.01)
    assert found.seconds_left is None
    shown = io.StringIO()
    Console(file=shown, width=120).print(render(found))
    assert "40 of 40 (100.0%), saved at 20" in shown.getvalue()
    assert "75: rank 1: saved" in shown.getvalue()


def test_a_start_that_came_to_no_step_says_nothing_of_the_one_before(tmp_path: Path) -> None:
    began = {"time": NOW + 30, "event": "job began", "job": "7"}
    happened = [began | {"time": NOW}, start(5), end(25, 75, "saved"), began, end(35, 75, "nothing to save")]
    write(tmp_path, [(1, 6.0)], happened)
    assert [found.reason for found in status(tmp_path).starts] == ["rank 1: saved"]


def test_the_time_left_is_that_of_the_last_steps(tmp_path: Path) -> None:
    write(tmp_path, [(s, 2.0 * s) for s in range(1, 41)], [start(0)])
    assert status(tmp_path).seconds_left == pytest.approx(60 * 2.0)


def test_in_a_ramp_up_of_the_batch_the_steps_to_come_are_longer(tmp_path: Path) -> None:
    """50 steps of 8, then 50 of 32, which take four times as long."""
    write(tmp_path, [(s, 2.0 * s) for s in range(1, 41)], [start(0)])
    resolved = tmp_path / "resolved.json"
    batch = {"batch": {"final": 32, "sizes": [8], "steps": [50]}}
    resolved.write_text(json.dumps(json.loads(resolved.read_text()) | batch))
    assert status(tmp_path).seconds_left == pytest.approx((10 + 50 * 4) * 2.0)


@pytest.mark.parametrize(
    ("queued", "code", "state"),
    [
        (Queued("PENDING", "BeginTime"), 75, "waiting"),
        (Queued("RUNNING", "n[1-2]", NOW), None, "running"),
        (Queued("RUNNING", "n[1-2]", NOW), 75, "stopped"),
        (Queued("RUNNING", "n[1-2]", NOW + 20), 75, "running"),  # it starts again
        (Queued("COMPLETING", "n[1-2]", NOW), 79, "failed"),
        (None, None, "ended without a word"),
        (None, 75, "stopped"),
        (None, 79, "failed"),
        (None, 0, "done"),
    ],
)
def test_states(queued: Queued | None, code: int | None, state: str) -> None:
    happened = [start(0)] + ([end(10, code)] if code is not None else [])
    assert judge(queued, happened, starts(happened, []), {}, NOW + 900, 1.0)[0] == state


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("noted", [True, False])
def test_before_the_first_step_of_a_start_no_speed_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noted: bool, steps: int
) -> None:
    """Which may compile for minutes, on another number of ranks than before."""
    rows = [(s, 5.0 + s) for s in range(1, 21)] + [(21, 990.0)] * (steps if noted else 0)
    happened = [start(5), end(25.5, 75, "saved")] + ([start(705, 20)] if noted else [])
    write(tmp_path, rows, happened)
    queued = Queued("RUNNING", "n[1-2]", NOW + 700)
    monkeypatch.setattr(time, "time", lambda: NOW + 1000)
    monkeypatch.setattr(module, "queue_state", lambda job: queued)
    found = status(tmp_path)
    shown = io.StringIO()
    Console(file=shown, width=120).print(render(found))
    assert found.state == "running"
    if noted and steps:
        assert "8 a second" in shown.getvalue()
        assert found.seconds_left is not None
    else:
        assert found.where == "on n[1-2]; no step yet, 5m00s after its start"
        assert (found.tokens_per_second, found.seconds_left, found.tokens) == (None, None, 160)
        assert "a second" not in shown.getvalue()
        assert found.busy is not None
        assert found.busy == pytest.approx(20 / (25.5 + 300 * noted), rel=0.02)


@pytest.mark.parametrize("living", [True, False])
def test_a_long_first_compile_on_this_machine_is_told_from_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, living: bool
) -> None:
    monkeypatch.setattr(time, "time", lambda: NOW + 1000)
    write(tmp_path, [], [start(0)])
    with claim(tmp_path):
        if living:
            found = status(tmp_path)
            assert (found.state, found.where) == ("running", "no step yet, 16m45s after its start")
        left = (tmp_path / ".lock").read_text()
    if not living:
        (tmp_path / ".lock").write_text(left.replace(str(os.getpid()), "4194303"))
        assert status(tmp_path).state == "ended without a word"


def test_a_job_that_is_not_started_again_says_why(tmp_path: Path) -> None:
    given = {
        "time": NOW,
        "event": "job ended",
        "job": "7",
        "code": 139,
        "line": "",
        "again": False,
        "why": "4 starts",
    }
    write(tmp_path, [], [given])
    found = status(tmp_path)
    assert (found.state, found.where) == ("failed", "4 starts")


def job_ended(at: float, number: str, code: int, again: bool) -> dict[str, Any]:
    told = {"job": "7", "number": number, "code": code, "line": "", "again": again, "why": f"{code} it is"}
    return {"time": NOW + at, "event": "job ended"} | told


def test_a_job_that_came_second_was_sent_away_and_the_first_runs_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted = {"time": NOW + 10, "event": "submitted", "job": "8"}
    write(tmp_path, [(1, 5.0)], [start(0), submitted, job_ended(20, "8", 64, again=False)])
    monkeypatch.setattr(module, "queue_state", {"7": Queued("RUNNING", "n1", NOW)}.get)
    found = status(tmp_path)
    assert (found.state, found.job, found.starts[0].code) == ("running", "7", None)


def test_a_job_that_never_began_after_one_that_did(tmp_path: Path) -> None:
    happened = [start(0), end(10, 75, "saved"), *(job_ended(at, "9", 139, at == 30) for at in (30, 40))]
    write(tmp_path, [(1, 5.0)], happened)
    found = status(tmp_path)
    assert (found.state, found.where) == ("failed", "139 it is")


def test_what_is_no_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigProblem, match="holds no run"):
        status(tmp_path)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigProblem, match="Slurm does not know job 4711"):
        run_dir_of("4711")
    assert queue_state("4711") is None
