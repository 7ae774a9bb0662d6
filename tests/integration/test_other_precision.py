"""Precision and offload may change at a resume: fp32 masters and moments outlive it to the bit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import broken_ranks
import many_runs
import numpy as np
import pytest
from many_runs import SCHEDULE, job, losses_after
from plain_torch import relative
from safetensors.numpy import load_file

pytestmark = [pytest.mark.launcher, pytest.mark.slow]
BF16 = {"bf16": {"enabled": True}}
OFFLOAD = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
STEPS = (4, 8, 12)
Run = tuple[str, int, np.ndarray]  # parameter|key, the first element's place, consecutive fp32 elements
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
        many_runs.train_all(jobs, folder, 2, broken_ranks.loads_shown)
    return folder


def saved_runs(checkpoint: Path) -> Iterator[Run]:
    """What the shards of a checkpoint hold."""
    for name, entry in json.loads((checkpoint / "index.json").read_text()).items():
        for part in entry["fragments"]:
            tensors = load_file(checkpoint / part["file"])
            yield from ((f"{name}|{key}", part["start"], tensors[f"{name}|{key}"]) for key in entry["keys"])


def loaded_runs(run_dir: Path, checkpoint: Path) -> Iterator[Run]:
    """What the ranks held after they had loaded it."""
    for rank in range(2):
        for name, values in load_file(run_dir / f"{checkpoint.name}-loaded-{rank}.safetensors").items():
            parameter, start, key = name.split("|")
            yield f"{parameter}|{key}", int(start), values


def bits(runs: Iterator[Run]) -> dict[tuple[str, int], int]:
    """The 32 bits at each place of each tensor."""
    return {
        (name, start + place): word
        for name, start, values in runs
        for place, word in enumerate(values.view(np.uint32).ravel().tolist())
    }


@pytest.mark.parametrize("name", CHANGES)
def test_masters_and_moments_are_the_saved_ones(name: str, folder: Path) -> None:
    for step in STEPS[:-1]:
        checkpoint = folder / name / f"checkpoints/step-{step:08d}"
        saved, loaded = bits(saved_runs(checkpoint)), bits(loaded_runs(folder / name, checkpoint))
        assert loaded == saved
        assert {tensor.rpartition("|")[2] for tensor, _ in saved} == {"fp32", "exp_avg", "exp_avg_sq"}
        assert any(word & 0xFFFF for word in saved.values()), "masters hold more than the 16 bits of bf16"


def test_offload_moves_nothing(folder: Path) -> None:
    assert relative(losses_after(folder / "offload", 0), losses_after(folder / "fp32", 0)) <= 1e-6


def test_a_change_of_precision_stays_near_the_curve(folder: Path) -> None:
    """bf16 has 8 bits: its losses are 1e-4 from fp32's, and so are those of a run that changes."""
    fp32, bf16, changed = (losses_after(folder / name, 0) for name in ("fp32", "bf16", "precision"))
    assert changed[:4] == bf16[:4]
    assert relative(bf16, fp32) > 1e-5, "precision does something"
    assert relative(changed, fp32) < 5e-4
    assert relative(changed[4:8], fp32[4:8]) < relative(bf16[4:8], fp32[4:8])
