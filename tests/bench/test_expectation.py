"""What stands beside a measurement: memory always, a step where it is known how fast the device is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TINY

from bigtfm.bench.expectation import Expectation
from bigtfm.job import Job, check_job
from bigtfm.planner.step_time import Rates

ZERO = dict.fromkeys(
    ("attention", "traffic", "operations", "update", "tensors", "sent", "between_nodes", "calls", "moved"),
    0.0,
)


@pytest.fixture
def job(deepspeed_json: Callable[..., Path], tiny_data: Path) -> Job:
    return check_job(None, deepspeed_json(stage=1), [*TINY, "steps=10", f"data.path={tiny_data}"], 1)


def test_a_step_is_expected_where_there_are_rates(job: Job) -> None:
    here = Expectation("cpu").of(job)
    assert "step_seconds" not in here
    assert here["memory"]["peak"] == sum(bytes_ for name, bytes_ in here["memory"].items() if name != "peak")
    steps_alone = Rates(products=0.0, **ZERO, steps=0.25, source="a test", measured=True)
    assert Expectation("cpu", steps_alone).of(job)["step_seconds"] == 0.25
    assert 0 < Expectation("NVIDIA H200").of(job)["step_seconds"] < 0.25
