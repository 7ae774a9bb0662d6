"""Precision and offload may change at a resume: fp32 masters and moments outlive it to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import broken_ranks
import many_runs
import numpy as np
import pytest
from many_runs import SCHEDULE, job, losses_after
from plain_torch import relative
from safetensors.numpy import load_file

from bigtfm.engine.weights import read_weights, weight_shapes

pytestmark = [pytest.mark.launcher, pytest.mark.slow]
BF16 = {"bf16": {"enabled": True}}
OFFLOAD = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
STEPS = (4, 8, 12)
CHANGES = {  # under what until each of these steps
    "precision": (BF16 | {"stage": 2}, {"stage": 0}, BF16 | {"stage": 3}),
    "offload": ({"zero_optimization": OFFLOAD}, {"stage": 2}, {"zero_optimization": OFFLOAD}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """Runs that change at every resume, beside some that never do."""
    folder = tmp_path_factory.mktemp("changed")

    def until(steps: int, name: str, setting: dict[str, Any]) -> list[str]:
        overrides = ("model.dropout=0.1", "save.keep=9", f"steps={steps}")
        return job(folder, tiny_data, name, *overrides, scheduler=SCHEDULE, **setting)

    for part, steps in enumerate(STEPS):
        jobs = [until(steps, name, settings[part]) for name, settings in CHANGES.items()]
        if part == 0:
            jobs += [until(12, "fp32", {"stage": 2}), until(12, "bf16", BF16 | {"stage": 2})]
        many_runs.train_all(jobs, folder, 2, broken_ranks.masters_shown)
    return folder


@pytest.mark.parametrize("name", CHANGES)
def test_masters_and_moments_are_the_saved_ones(name: str, folder: Path) -> None:
    for step in STEPS[:-1]:
        saved = folder / name / f"checkpoints/step-{step:08d}"
        wanted = {key: tensor.numpy().ravel() for key, tensor in read_weights(saved, weight_shapes(saved))}
        seen = dict.fromkeys(wanted, 0)
        for rank in range(2):
            for key, values in load_file(folder / name / f"{saved.name}-loaded-{rank}.safetensors").items():
                parameter, start, kind = key.split("|")
                if kind == "fp32":
                    place = slice(int(start), int(start) + values.size)
                    assert np.array_equal(values.view(np.int32), wanted[parameter][place].view(np.int32))
                    seen[parameter] += values.size
        assert all(seen[parameter] >= weight.size for parameter, weight in wanted.items())
        rounded = [weight.view(np.int32) & 0xFFFF for weight in wanted.values()]
        assert any(low.any() for low in rounded), "masters hold more than bf16 does"


def test_offload_moves_nothing(folder: Path) -> None:
    assert relative(losses_after(folder / "offload", 0), losses_after(folder / "fp32", 0)) <= 1e-6


def test_a_change_of_precision_stays_near_the_curve(folder: Path) -> None:
    """bf16 has 8 bits: its losses are 1e-4 from fp32's, and so are those of a run that changes."""
    fp32, bf16, changed = (losses_after(folder / name, 0) for name in ("fp32", "bf16", "precision"))
    assert changed[:4] == bf16[:4]
    assert relative(bf16, fp32) > 1e-5, "precision does something"
    assert relative(changed, fp32) < 5e-4
    assert relative(changed[4:8], fp32[4:8]) < relative(bf16[4:8], fp32[4:8])
