"""What stands beside a measurement: memory always, a step where it is known how fast the device is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
from conftest import TINY

from bigtfm.bench.expectation import Expectation
from bigtfm.config.problems import ConfigProblem
from bigtfm.job import Job, check_job
from bigtfm.planner.step_time import Rates, Work

ZERO = dict.fromkeys((field.name for field in fields(Work)), 0.0)
RATES = Rates(**ZERO | {"steps": 0.25}, source="a test", device="cpu", precision="fp32", ranks=1)


@pytest.fixture
def job(deepspeed_json: Callable[..., Path], tiny_data: Path) -> Job:
    return check_job(None, deepspeed_json(stage=1), [*TINY, "steps=10", f"data.path={tiny_data}"], 1)


def test_a_step_is_expected_where_there_are_rates(job: Job) -> None:
    here = Expectation("cpu").of(job)
    assert "step_seconds" not in here
    assert here["memory"]["peak"] == sum(bytes_ for name, bytes_ in here["memory"].items() if name != "peak")
    assert Expectation("cpu", RATES).of(job)["step_seconds"] == 0.25
    assert "step_seconds" not in Expectation("cpu", replace(RATES, precision="bf16")).of(job)
    assert "step_seconds" not in Expectation("cpu", replace(RATES, ranks=2)).of(job), "its ranks share it"
    with pytest.raises(ConfigProblem, match="those of cpu in fp32, not of NVIDIA H200"):
        Expectation("NVIDIA H200", RATES)
    assert 0 < Expectation("NVIDIA H200").of(job)["step_seconds"] < 0.25
