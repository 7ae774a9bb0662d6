"""A step is split into the phases that the loop enters, and the training ends after the last one."""

from __future__ import annotations

import time

import pytest

from bigtfm.bench.clock import SPLIT, StepClock
from bigtfm.resilience.lifeline import Enough
from bigtfm.resilience.pulse import Pulse


def a_step(clock: StepClock, number: int) -> None:
    clock.enter("data", step=number)
    time.sleep(0.01)
    clock.enter("forward")
    time.sleep(0.02)
    clock.enter("backward")
    clock.wait(lane=0)
    time.sleep(0.03)
    clock.go_on(lane=0)
    clock.enter("update")
    clock.enter("record")


def test_phases_add_up_to_the_step_and_collectives_are_apart() -> None:
    clock = StepClock(None, steps=2, split_from=9, synchronize=lambda: None)
    clock.enter("build")
    a_step(clock, 1)
    a_step(clock, 2)
    with pytest.raises(Enough):
        clock.enter("data", step=3)
    assert len(clock.steps) == 2
    for step in clock.steps:
        assert set(step.phases) == set(SPLIT)
        assert sum(step.phases.values()) == pytest.approx(step.seconds)
        assert step.phases["data"] >= 0.01
        assert step.phases["forward"] >= 0.02
        assert step.phases["collectives"] >= 0.03
        assert step.phases["backward"] < 0.03 <= step.seconds


def test_the_device_is_waited_for_in_the_steps_that_are_split_alone() -> None:
    waits: list[int] = []
    clock = StepClock(None, steps=3, split_from=2, synchronize=lambda: waits.append(len(clock.steps)))
    a_step(clock, 1)
    assert waits == []
    a_step(clock, 2)
    a_step(clock, 3)
    assert waits == [1] * 5 + [2] * 4, "the end of step 2 is waited for, too"


def test_a_supervisor_sees_it_as_any_pulse() -> None:
    seen = Pulse()
    clock = StepClock(seen.memory, steps=5, split_from=9, synchronize=lambda: None)
    a_step(clock, 4)
    reading = seen.read()
    assert (reading.step, reading.phase) == (4, "record")
    assert reading.site.startswith("test_clock.py:") or "test_clock.py:" in reading.site


def test_another_training_in_the_same_process_is_told_to_its_listener() -> None:
    heard: list[tuple[str, int | None]] = []
    clock = StepClock(None, steps=1, split_from=9, synchronize=lambda: None)
    a_step(clock, 1)
    with pytest.raises(Enough):
        clock.enter("data", step=2)
    clock.anew(2, lambda phase, step: heard.append((phase, step)))
    a_step(clock, 1)
    a_step(clock, 2)
    with pytest.raises(Enough):
        clock.enter("data", step=3)
    assert heard[:2] == [("data", 1), ("forward", None)]
    assert len(heard) == 11
