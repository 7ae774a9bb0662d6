"""8-bit products, emulated, through the loop: another curve, the same at every stage and split."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import rank_runner
from conftest import TINY, losses

pytestmark = [pytest.mark.launcher, pytest.mark.slow]
if importlib.util.find_spec("torchao") is None:
    pytest.skip("needs torchao", allow_module_level=True)
RUNS = {  # stage, micro batch, what the run config says
    "plain": (0, 2, []),
    "stage 0": (0, 2, ["fp8=rowwise_with_gw_hp"]),
    "stage 1": (1, 2, ["fp8=rowwise_with_gw_hp"]),
    "stage 2, other split": (2, 4, ["fp8=rowwise_with_gw_hp"]),
    "stage 3": (3, 2, ["fp8=rowwise_with_gw_hp", "recompute=full"]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """The runs, on two ranks."""
    folder, jobs = tmp_path_factory.mktemp("float8"), []
    for number, (stage, micro_batch, overrides) in enumerate(RUNS.values()):
        write_json(folder, stage, micro_batch)
        fixed = [f"data.path={tiny_data}", *TINY, "steps=5", f"run.name={number}", *overrides]
        jobs.append([f"zero{stage}-{micro_batch}.json", *fixed])
    finished = rank_runner.train_all(jobs, folder, world_size=2)
    assert finished.codes == [0, 0], finished.output[-3000:]
    return folder


def write_json(folder: Path, stage: int, micro_batch: int) -> None:
    content = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": micro_batch,
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "weight_decay": 0.1}},
        "zero_optimization": {"stage": stage},
    }
    (folder / f"zero{stage}-{micro_batch}.json").write_text(json.dumps(content))


def test_it_is_another_curve_and_the_same_everywhere(folder: Path) -> None:
    """Where rounding tips a value over the edge between two of 8 bits, curves part a little."""
    plain, first, *others = (losses(folder / f"runs/{number}") for number in range(len(RUNS)))
    moved = max(abs(one - other) for one, other in zip(plain, first, strict=True))
    assert 1e-4 < moved < 0.05
    for curve in others:
        apart = [abs(one - other) for one, other in zip(curve, first, strict=True)]
        assert max(apart[:2]) < 1e-5
        assert max(apart) < moved / 3


def test_going_on_without_it_is_another_recipe_with_the_same_names(folder: Path, tiny_data: Path) -> None:
    args = ["train", "--deepspeed_config", "zero0-2.json", f"data.path={tiny_data}", *TINY, "steps=6"]
    refused = rank_runner.run([*args, "run.name=1"], folder)
    assert refused.code == 64
    assert "recipe.fp8 was rowwise_with_gw_hp when this run was saved and is unset now" in refused.output
    allowed = rank_runner.run([*args, "run.name=1", "resume.allow=recipe"], folder)
    assert allowed.code == 0, allowed.output[-3000:]
    assert len(losses(folder / "runs/1")) == 6
