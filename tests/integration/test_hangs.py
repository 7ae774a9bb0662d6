"""Jobs of two ranks in which one hangs or goes another way: the right rank and line, exit code 79."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import hanging
import pytest
from hanging import Hung

from bigtfm.resilience import events

pytestmark = [pytest.mark.slow, pytest.mark.launcher]
CELLS = [  # fault, victim, ZeRO stage
    ("stopped", 1, 0),
    ("sleeping_reader", 0, 2),
    ("sleeping_worker", 1, 0),
    ("held_gil", 0, 2),
    ("left_out_sum", 1, 2),
    ("left_out_reduction", 0, 0),
    ("exited", 1, 2),
]


@pytest.fixture(scope="module")
def hung(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> dict[str, Hung]:
    """All of them, some at a time: most of it is waiting. "": the one with the guard's default values."""
    folder = tmp_path_factory.mktemp("hung")
    jobs = [hanging.hang(*cell, folder / cell[0], tiny_data, "guard.hang_seconds=4") for cell in CELLS]
    by_default = _until_named(hanging.hang("sleeping_reader", 1, 0, folder / "default", tiny_data))
    return {done.fault: done for done in hanging.all_of([by_default, *jobs], at_once=3)}


def _until_named(job: Iterator[Hung]) -> Iterator[Hung]:
    for result in job:
        if result.named > 0:
            result.lines = hanging.said(result.folder)
            result.fault = ""
            job.close()
        yield result


@pytest.mark.parametrize("fault", [fault for fault, *_ in CELLS])
def test_the_right_rank_and_line_are_named(hung: dict[str, Hung], fault: str) -> None:
    assert hung[fault].wrong == [], hung[fault].lines


@pytest.mark.parametrize("fault", [fault for fault, *_ in CELLS if fault != "exited"])
def test_all_stacks_are_kept(hung: dict[str, Hung], fault: str) -> None:
    run_dir = hung[fault].folder / "runs" / "quickstart"
    text = (run_dir / "logs" / "hang-step-7.txt").read_text()
    assert all(f"rank {rank} (host " in text for rank in (0, 1))
    assert "last collectives:" in text
    assert json.loads((run_dir / "failure.json").read_text())["exit_code"] == 79
    assert [row["rank"] for row in events.read(run_dir) if row["event"] == "hang"] == [hung[fault].victim]


def test_the_line_of_a_sleeping_reader_word_for_word(hung: dict[str, Hung]) -> None:
    (line,) = hung["sleeping_reader"].lines
    line = re.sub(r"host \S+, pid \d+", "host H, pid P", line).replace(
        str(Path(hanging.__file__)), "hanging.py"
    )
    line = re.sub(r"for \d+ s|:\d+", lambda hit: re.sub(r"\d+", "N", hit[0]), line)
    assert line == (
        "bigtfm: error: rank 0 (host H, pid P): no progress for N s in data at step 7 (hanging.py:N, in "
        "batch); rank 1 waits in all_reduce (bigtfm/train.py:N); all stacks: "
        "runs/quickstart/logs/hang-step-7.txt. Fix: look at that line and at the disk or network that the "
        "data come from, or allow more time (guard.hang_seconds, guard.start_seconds); start the same "
        "command again: it resumes from the last checkpoint"
    )


def test_a_slow_rank_is_named_and_the_job_goes_on(tmp_path: Path, tiny_data: Path) -> None:
    (done,) = hanging.all_of([hanging.hang("slow", 1, 0, tmp_path / "slow", tiny_data, "run.steps=70")])
    assert done.codes == [0, 0]
    (line,) = done.lines
    assert re.fullmatch(
        r"bigtfm: note: rank 1 is slow: its own work takes 0\.\d\d s a step, the median rank's 0\.\d\d s; "
        r"most of it in forward",
        line,
    )


def test_by_default_a_rank_is_named_within_half_a_minute(hung: dict[str, Hung]) -> None:
    """The job would end after 120 s; the line comes long before."""
    done = hung[""]
    assert done.named < 30
    (line,) = done.lines
    assert line.startswith("bigtfm: note: rank 1 (host ")
    assert line.endswith("; the job ends after 120 s")
    assert hanging.line_of("sleeping_reader") in line
