"""The decision at a job's end, by what the run directory says."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from bigtfm.slurm.again import Decision, Ended, decide, ended, newest_step, node_of, note_and_decide

JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_TASKS_PER_NODE": "2(x2)"}


def end(code: int = 79, saved: int = 0, node: str | None = None) -> Ended:
    return Ended("7", code, saved, "", node)


@pytest.mark.parametrize("code", [64, 65, 70, 76, 130])
def test_what_would_end_the_same_way_is_final(code: int) -> None:
    assert not decide(end(code), [], 3).again


def test_ranks_that_did_not_meet_get_another_port() -> None:
    assert decide(Ended("7", 64, 0, "environment: the ranks can't meet: ...", None), [], 3).again
    assert not decide(Ended("7", 64, 0, "run config: run.steps is 0", None), [], 3).again


def test_done_is_done() -> None:
    assert decide(end(0), [], 3) == Decision(False, "done")


@pytest.mark.parametrize("code", [1, 74, 75, 79, 137, 143])
def test_the_rest_starts_again_while_it_gets_on(code: int) -> None:
    before = [end(code, saved) for saved in range(0, 1000, 100)]
    assert decide(end(code, 1000), before, 3).again


def test_four_starts_without_a_newer_checkpoint_are_the_end() -> None:
    """Whatever their codes: asked to stop four times before anything is saved, it gets nowhere either."""
    assert decide(end(), [end()] * 2, 3).again
    found = decide(end(), [end(75), end(), end(1)], 3)
    assert not found.again
    assert found.why == "4 starts have ended with no checkpoint: started again 3 times, not more"
    assert decide(end(saved=50), [end()] * 9, 3).again


def test_once_is_once() -> None:
    assert decide(end(), [], 0) == Decision(False, "exit code 79, and it is to be started once only")
    assert not decide(end(75, saved=50), [end(75)], 0).again


def test_a_node_is_excluded_that_two_failures_running_are_about() -> None:
    assert decide(end(node="n2"), [end(node="n1")], 3).exclude == ()
    assert decide(end(node="n2"), [end(node="n2")], 3).exclude == ("n2",)
    assert decide(end(node="n2"), [end(node="n2"), end(75)], 3).exclude == ()


def test_ranks_are_dealt_out_in_blocks() -> None:
    assert [node_of(rank, JOB) for rank in range(5)] == ["n1", "n1", "n2", "n2", None]
    assert node_of(0, {}) is None


def test_a_failure_of_an_earlier_start_is_not_this_ones(tmp_path: Path) -> None:
    failure = {"exit_code": 79, "where": "rank 3", "what": "is gone", "fix": "..."}
    (tmp_path / "failure.json").write_text(json.dumps(failure))
    now = time.time()
    assert ended(tmp_path, 143, JOB, now - 60) == Ended("7", 79, 0, "rank 3: is gone", "n2")
    assert ended(tmp_path, 143, JOB, now + 60) == Ended("7", 143, 0, "", None)
    assert ended(tmp_path, 0, JOB, now - 60).code == 0


def test_a_job_that_found_another_at_work_says_so(tmp_path: Path) -> None:
    """It leaves no failure.json: the run directory is the other's."""
    (tmp_path / "logs").mkdir()
    said = "bigtfm: error: runs/a: another training is at work here: process 1 on n1. Fix: wait"
    (tmp_path / "logs" / "rank-0.log").write_text(f"bigtfm: error: of before\nstep 1\n{said}\nstep 2\n")
    line = "runs/a: another training is at work here: process 1 on n1. Fix: wait"
    assert ended(tmp_path, 64, JOB, 0) == Ended("7", 64, 0, line, None)
    assert ended(tmp_path, 139, JOB, 0).line == ended(tmp_path, 64, JOB, time.time() + 60).line == ""


def test_a_chain_of_jobs_is_one_and_another_job_is_none_of_it(tmp_path: Path) -> None:
    for number, again in enumerate([True, True, True, False]):
        environ = JOB | {"SLURM_JOB_ID": str(7 + number), "BIGTFM_CHAIN": "7"}
        assert note_and_decide(tmp_path, 139, environ, since=0, retries=3)[1].again is again
    assert note_and_decide(tmp_path, 139, JOB | {"SLURM_JOB_ID": "99"}, since=0, retries=3)[1].again


def test_the_newest_checkpoint_by_name(tmp_path: Path) -> None:
    assert newest_step(tmp_path) == 0
    for name in ("step-00000100", "step-00000050", "step-00000200.tmp", "step-x"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert newest_step(tmp_path) == 100
