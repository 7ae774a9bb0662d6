"""When a rank is named and when the job is ended: with a clock that the test moves."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from bigtfm.config.sections import GuardSection
from bigtfm.resilience import events
from bigtfm.resilience.diagnosis import Report
from bigtfm.resilience.processes import state
from bigtfm.resilience.pulse import OWN_WORK, Pulse
from bigtfm.resilience.stacks import Frame
from bigtfm.resilience.watch import FIRST_NOTICE, NOTICE, Beat, Doctor, Stragglers, Watch

GUARD = GuardSection()


def train_a_step(pulse: Pulse, step: int) -> None:
    pulse.enter("data", step=step)
    for phase in ("forward", "backward", "update", "record"):
        pulse.enter(phase)


def watch(pulse: Pulse, **guard: float) -> Watch:
    return Watch(pulse, 0, GUARD.model_copy(update=guard))


def test_standing_still_is_measured_from_the_last_thing_that_was_done() -> None:
    pulse = Pulse()
    supervisor = watch(pulse)
    assert [supervisor.beat(now).seconds for now in (100.0, 101.0, 102.5)] == [0.0, 1.0, 2.5]
    pulse.enter("data", step=1)
    assert [supervisor.beat(now).seconds for now in (103.0, 104.0)] == [0.0, 1.0]
    pulse.wait(lane=0)
    assert supervisor.beat(105.0).seconds == 0.0
    assert supervisor.beat(106.0).waits
    pulse.go_on(lane=0)
    beat = supervisor.beat(107.0)
    assert (beat.seconds, beat.waits, beat.step, beat.phase) == (0.0, False, 1, "data")


def test_a_suspended_machine_or_a_stopped_job_is_not_a_hang() -> None:
    supervisor = watch(Pulse())
    supervisor.beat(0.0)
    supervisor.beat(1.0)
    assert supervisor.beat(50_000.0).seconds <= 3.0  # nobody looked in between, and nobody can tell


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs Linux")
def test_a_stopped_trainer_stays_stopped_until_its_time_is_over() -> None:
    """Stacks of a stopped process cost it a moment of life: each look would give it new time, for ever."""
    program = "from bigtfm.resilience import stacks; stacks.register(); print(flush=True); input()"
    pulse = Pulse()
    for step in (1, 2, 3):
        train_a_step(pulse, step)
    eye = watch(pulse, hang_seconds=30.0)
    command = [sys.executable, "-c", program]
    trainer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert trainer.stdin is not None
    assert trainer.stdout is not None
    try:
        trainer.stdout.readline()
        os.kill(trainer.pid, signal.SIGSTOP)
        while state(trainer.pid) != "T":
            time.sleep(0.01)
        for second in range(22):
            eye.beat(float(second))
        early = eye.report(trainer.pid)
        assert (early.state, early.seconds, early.threads) == ("T", 21.0, ())
        for second in range(22, 33):
            eye.beat(float(second))
        assert eye.report(trainer.pid).threads, "at the end it is seen where it stood"
    finally:  # before it is waited for: a stopped process never ends
        trainer.kill()
        trainer.wait()
        trainer.stdin.close()
        trainer.stdout.close()


def test_what_is_done_for_the_first_time_has_longer() -> None:
    pulse = Pulse()
    supervisor = watch(pulse)

    def patience() -> tuple[float, float]:
        beat = supervisor.beat(0.0)
        return beat.notice, beat.limit

    assert patience() == (FIRST_NOTICE, 1800.0)
    pulse.enter("data", step=1)
    assert patience() == (FIRST_NOTICE, 1800.0)
    for phase in ("forward", "backward", "forward"):  # the second micro-batch of the first step
        pulse.enter(phase)
    assert patience() == (FIRST_NOTICE, 1800.0)
    train_a_step(pulse, 2)
    pulse.enter("forward")
    assert patience() == (NOTICE, 120.0)
    pulse.enter("evaluate")
    assert patience() == (FIRST_NOTICE, 1800.0)
    pulse.enter("data", step=3)
    pulse.enter("evaluate")
    assert patience() == (NOTICE, 120.0)


def test_what_usually_takes_long_has_longer() -> None:
    pulse = Pulse()
    train_a_step(pulse, 1)
    pulse.took("forward", 30.0)  # the first step compiles: that is no reason to name a rank late
    train_a_step(pulse, 2)
    pulse.enter("forward")
    beat = watch(pulse).beat(0.0)
    assert (beat.notice, beat.limit) == (NOTICE, 300.0)
    pulse.took("forward", 25.0)
    beat = watch(pulse).beat(0.0)
    assert (beat.notice, beat.limit) == (75.0, 300.0)


def test_a_save_is_as_long_as_its_writing() -> None:
    """The loop's own part is a copy: that it was short says nothing about the wait for the disk."""
    pulse = Pulse()
    train_a_step(pulse, 1)
    pulse.enter("save")
    train_a_step(pulse, 2)
    pulse.enter("save")
    assert watch(pulse).beat(0.0).limit == 1800.0
    pulse.took("save", 40.0)
    pulse.enter("save")
    assert watch(pulse).beat(0.0).limit == 1800.0  # still the step of the first one
    train_a_step(pulse, 3)
    pulse.enter("save")
    assert watch(pulse).beat(0.0).limit == 400.0


def test_never() -> None:
    pulse = Pulse()
    assert watch(pulse, start_seconds=0).beat(0.0).limit == math.inf
    train_a_step(pulse, 1)
    train_a_step(pulse, 2)
    assert watch(pulse, hang_seconds=0).beat(0.0).limit == math.inf


def test_a_writer_that_waits_for_another_rank_s_disk_waits() -> None:
    pulse = Pulse()
    pulse.wait(lane=1)
    assert not watch(pulse).beat(0.0).waits  # training goes on beside it
    pulse.enter("save")
    assert watch(pulse).beat(0.0).waits


def test_a_writer_that_moves_is_no_hang_and_hides_none() -> None:
    pulse = Pulse()
    train_a_step(pulse, 1)
    eye = watch(pulse)
    eye.beat(0.0)
    pulse.moves()  # beside a loop that stands still
    assert eye.beat(1.0).seconds == 1.0
    pulse.enter("save")
    seen = []
    for second in range(2, 6):
        pulse.moves()
        seen.append(eye.beat(float(second)).seconds)
    assert seen == [0.0] * 4
    assert eye.beat(6.0).seconds == 1.0, "a disk that stands still"


# --- the doctor


def beat(rank: int, seconds: float, **changes: object) -> Beat:
    usual = Beat(rank, 7, "data", 100 + rank, False, seconds, NOTICE, 120.0, dict.fromkeys(OWN_WORK, 0.0))
    return replace(usual, **changes)


def report(rank: int, seconds: float, **changes: object) -> Report:
    main = (Frame("bigtfm/data/loader.py", 88, "batch", True),)
    usual = Report(
        *(rank, "n1", 4711 + rank, "S", 7, "data", "bigtfm/train.py:85", seconds, False, ()),
        waits_in=None,
        threads=(main,),
        workers=(),
        text=f"stack of rank {rank}",
    )
    return replace(usual, **changes)


class Case:
    """A doctor, and what it says."""

    def __init__(self, folder: Path, **guard: float) -> None:
        self.said: list[str] = []
        self.folder = folder
        self.doctor = Doctor(GUARD.model_copy(update=guard), folder, self.said.append)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def test_a_rank_is_named_first_and_ended_later(case: Case) -> None:
    doctor = case.doctor
    waiting = {"waits": True}
    assert not doctor.look([beat(0, 19.0, **waiting), beat(1, 19.0)], 19.0)
    assert doctor.look([beat(0, 20.0, **waiting), beat(1, 20.0)], 20.0)
    assert doctor.judge([report(0, 20.0, **waiting), report(1, 20.0)]) is None
    assert case.said == [
        "note: rank 1 (host n1, pid 4712): no progress for 20 s in data at step 7 "
        "(bigtfm/data/loader.py:88, in batch); rank 0 waits in a collective; the job ends after 120 s"
    ]
    for now in range(21, 120):  # named once, and not asked again
        assert not doctor.look([beat(0, now, **waiting), beat(1, now)], float(now))
    assert doctor.look([beat(0, 120.0, **waiting), beat(1, 120.0)], 120.0)
    hang = doctor.judge([report(0, 120.0, **waiting), report(1, 120.0)])
    assert hang is not None
    assert hang.exit_code == 79
    file = case.folder / "logs" / "hang-step-7.txt"
    assert hang.line == (
        "error: rank 1 (host n1, pid 4712): no progress for 120 s in data at step 7 "
        f"(bigtfm/data/loader.py:88, in batch); rank 0 waits in a collective; all stacks: {file}. Fix: look "
        "at that line and at the disk or network that the data come from, or allow more time "
        "(guard.hang_seconds, guard.start_seconds); start the same command again: it resumes from the last "
        "checkpoint"
    )
    assert all(f"stack of rank {rank}" in file.read_text() for rank in (0, 1))
    assert [(row["event"], row["rank"]) for row in events.read(case.folder)] == [
        ("slow rank", 1),
        ("hang", 1),
    ]
    assert len(case.said) == 1


def test_a_rank_that_goes_on_is_named_again_when_it_stands_still_again(case: Case) -> None:
    assert case.doctor.look([beat(0, 20.0)], 20.0)
    case.doctor.judge([report(0, 20.0)])
    assert not case.doctor.look([beat(0, 5.0, changes=200)], 30.0)
    assert case.doctor.look([beat(0, 20.0, changes=200)], 50.0)
    case.doctor.judge([report(0, 20.0)])
    assert len(case.said) == 2


def test_those_who_wait_for_a_first_save_wait_as_long_as_it_may_take(case: Case) -> None:
    """On a GPU a rank that waits for another looks busy: the one behind decides how long."""
    behind = {"phase": "save", "limit": 1800.0, "notice": FIRST_NOTICE}
    doctor = case.doctor
    for now in range(1, 1800):
        if doctor.look([beat(0, now, phase="update"), beat(1, now, **behind)], float(now)):
            reports = [report(0, now, phase="update", collectives=calls(9)), report(1, now, phase="save")]
            assert doctor.judge(reports) is None
    assert len(case.said) == 1
    assert case.said[0].startswith("note: rank 1")
    assert doctor.look([beat(0, 1800.0, phase="update"), beat(1, 1800.0, **behind)], 1800.0)
    assert doctor.judge(reports) is not None


def calls(count: int, skipped: int = 0) -> tuple:
    from bigtfm.resilience.pulse import Collective

    names = [f"call-{number}" for number in range(1, count + 1) if number != skipped]
    return tuple(
        Collective(number, 1, 7, 0, "data", name, "", "bigtfm/train.py:1", "")
        for number, name in enumerate(names, 1)
    )


def test_a_left_out_collective_is_no_matter_of_first_times(case: Case) -> None:
    """It can't come right; a slow network, which would look alike, may."""
    first = {"waits": True, "limit": 1800.0, "notice": FIRST_NOTICE}
    now = 130.0
    assert case.doctor.look([beat(rank, now, **first) for rank in range(3)], now)
    together = [report(rank, now, waits=True, collectives=calls(5)) for rank in range(3)]
    assert case.doctor.judge(together) is None
    divided = [*together[:2], report(2, now, waits=True, collectives=calls(6, skipped=5))]
    hang = case.doctor.judge(divided)
    assert hang is not None
    assert "has left out call-5" in hang.line


def test_one_process_alone(case: Case) -> None:
    assert case.doctor.look([beat(0, 121.0)], 121.0)
    hang = case.doctor.judge([report(0, 121.0)])
    assert hang is not None
    assert hang.what.startswith(
        "no progress for 121 s in data at step 7 (bigtfm/data/loader.py:88, in batch); all"
    )


def test_a_rank_that_never_joined_is_waited_for_no_longer_than_was_said(case: Case) -> None:
    waiting = {"waits": True, "limit": 1800.0, "notice": FIRST_NOTICE}
    assert case.doctor.look([beat(0, 60.0, **waiting), None], 60.0)
    assert case.doctor.judge([report(0, 60.0, waits=True), None]) is None
    assert case.said[0].startswith("note: rank 1: neither it nor its supervisor answers")
    assert case.said[0].endswith("the job ends after 1800 s")
    assert not case.doctor.look([beat(0, 1799.0, **waiting), None], 1799.0)
    assert case.doctor.look([beat(0, 1800.0, **waiting), None], 1800.0)
    hang = case.doctor.judge([report(0, 1800.0, waits=True), None])
    assert hang is not None
    assert hang.where == "rank 1"


def test_without_a_limit_a_rank_is_named_only(tmp_path: Path) -> None:
    case = Case(tmp_path, hang_seconds=0)
    endless = beat(0, 1e6, limit=math.inf)
    assert case.doctor.look([endless], 0.0)
    assert case.doctor.judge([report(0, 1e6)]) is None
    assert not case.said[0].endswith("s")  # no end is announced
    assert not case.doctor.look([endless], 100.0)


def test_a_run_directory_that_takes_no_file_does_not_keep_the_verdict(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("in the way")
    case = Case(tmp_path)
    case.doctor.look([beat(0, 121.0)], 121.0)
    assert case.doctor.judge([report(0, 121.0)]) is not None


def test_beats_and_reports_travel_as_json() -> None:
    sent = beat(1, 2.5)
    assert Beat.from_json(json.loads(json.dumps(sent.to_json()))) == sent
    call = calls(3)
    written = report(1, 2.5, collectives=call, waits_in=call[-1])
    assert Report.from_json(json.loads(json.dumps(written.to_json()))) == written


# --- stragglers


def run_at(seconds: dict[int, float], factor: float = 1.5, until: int = 100) -> list[tuple[float, str]]:
    """Notes on ranks that take so many seconds a step of their own, with a step a second."""
    stragglers, notes = Stragglers(factor), []
    for now in range(until):
        beats = {
            rank: beat(
                rank, 0.0, step=now, own=dict.fromkeys(OWN_WORK, 0.0) | {"forward": now * own, "data": 0.0}
            )
            for rank, own in seconds.items()
        }
        found = stragglers.look(beats, float(now))
        if found is not None:
            notes.append((now, found.line))
    return notes


def test_a_straggler_is_named_once_a_minute() -> None:
    notes = run_at({0: 0.11, 1: 0.31, 2: 0.1, 3: 0.12})
    assert [now for now, _ in notes] == [10, 70]
    assert notes[0][1] == (
        "note: rank 1 is slow: its own work takes 0.31 s a step, the median rank's 0.11 s; "
        "most of it in forward"
    )


@pytest.mark.parametrize(
    ("seconds", "factor"),
    [
        ({0: 0.1, 1: 0.11, 2: 0.14, 3: 0.1}, 1.5),  # not that much slower
        ({0: 0.001, 1: 0.009}, 1.5),  # nobody would notice
        ({0: 0.1, 1: 0.3}, 0.0),  # not wanted
        ({0: 0.3}, 1.5),  # alone
    ],
)
def test_no_straggler(seconds: dict[int, float], factor: float) -> None:
    assert run_at(seconds, factor) == []


def test_of_two_the_quicker_one_is_the_measure() -> None:
    assert "rank 0 is slow" in run_at({0: 0.16, 1: 0.1}, until=12)[0][1]
