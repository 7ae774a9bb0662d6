"""Adapters on a frozen model: equal losses in every layout, resumes under any, frozen weights to the bit."""

from __future__ import annotations

import itertools
from pathlib import Path

import many_runs
import pytest
import torch
from many_runs import SCHEDULE, fork_run, job, losses_after, rows_of, shards_of
from plain_torch import relative

from bigtfm.engine import checkpoint
from bigtfm.engine.shards import Shards
from bigtfm.model.lora import is_adapter

pytestmark = [pytest.mark.launcher, pytest.mark.slow]
SAVED, STEPS = 3, 6
STAGES = (0, 1, 2, 3)
LAYOUTS = list(itertools.product((1, 2), STAGES))  # ranks, stage
Layout = tuple[int, int]
SPLIT = {"train_micro_batch_size_per_gpu": 2, "scheduler": SCHEDULE}
LORA = ("tune.lora_rank=4", "tune.lora_alpha=8", "model.dropout=0.1", f"save.every={SAVED}", f"steps={STEPS}")


def name_of(*layouts: Layout) -> str:
    return "-to-".join(f"{ranks}x{stage}" for ranks, stage in layouts)


def elsewhere(layout: Layout) -> Layout:
    ranks, stage = layout
    return 3 - ranks, (stage + 2) % 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """A base run; adapters on it in every layout; each gone on from the middle under the same and another."""
    folder = tmp_path_factory.mktemp("lora")
    begin = (*LORA, f"run.init_from={folder / 'base'}")
    many_runs.train_all([job(folder, tiny_data, "base", "steps=4", **SPLIT)], folder, 1)
    for ranks in (1, 2):
        runs = [
            job(folder, tiny_data, name_of((ranks, stage)), *begin, stage=stage, **SPLIT) for stage in STAGES
        ]
        if ranks == 2:
            runs += [
                job(folder, tiny_data, f"bf16-{stage}", *begin, "compute.recompute=full", stage=stage,
                    bf16={"enabled": True}, **SPLIT)
                for stage in STAGES
            ]  # fmt: skip
        many_runs.train_all(runs, folder, ranks)
    for ranks in (1, 2):
        resumed = []
        for saved in LAYOUTS:
            for target in (saved, elsewhere(saved)):
                if target[0] == ranks:
                    fork_run(folder / name_of(saved), folder / name_of(saved, target), SAVED)
                    name, stage = name_of(saved, target), target[1]
                    resumed.append(job(folder, tiny_data, name, *begin, stage=stage, **SPLIT))
        many_runs.train_all(resumed, folder, ranks)
    return folder


def stored(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Weights of a checkpoint as they are in it."""
    path, found = checkpoint.folder_of(run / "checkpoints", step), {}
    with Shards(path, merged=False) as shards:
        for name, entry in checkpoint.read_index(path).items():
            found[name] = torch.empty(entry["shape"])
            shards.fill(found[name].view(-1), name, "fp32", 0)
    return found


def test_every_layout_has_the_same_losses(folder: Path) -> None:
    curves = {layout: losses_after(folder / name_of(layout), 0) for layout in LAYOUTS}
    for curve in curves.values():
        assert relative(curve, curves[1, 0]) <= 1e-6
    assert curves[1, 0][0] < rows_of(folder / "base")[0]["loss"] - 0.02, "it begins where the base ended"


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_frozen_weights_stay_to_the_bit_and_have_no_moments(layout: Layout, folder: Path) -> None:
    base, after = stored(folder / "base", 4), stored(folder / name_of(layout), STEPS)
    assert base.keys() == {name for name in after if not is_adapter(name)}
    index = checkpoint.read_index(checkpoint.folder_of(folder / name_of(layout) / "checkpoints", STEPS))
    for name, values in after.items():
        if is_adapter(name):
            assert index[name]["keys"] == ["exp_avg", "exp_avg_sq", "fp32"]
            assert values.any(), "it learns: B begins at 0"
        else:
            assert index[name]["keys"] == ["fp32"]
            assert torch.equal(values, base[name]), name


@pytest.mark.parametrize("saved", LAYOUTS, ids=name_of)
def test_it_goes_on_under_the_same_layout_to_the_bit_and_under_another(saved: Layout, folder: Path) -> None:
    whole = folder / name_of(saved)
    same, other = folder / name_of(saved, saved), folder / name_of(saved, elsewhere(saved))
    assert losses_after(same, SAVED) == losses_after(whole, SAVED)
    assert shards_of(same, STEPS) == shards_of(whole, STEPS)
    assert relative(losses_after(other, SAVED), losses_after(whole, SAVED)) <= 1e-6


def test_bf16_freezes_what_it_has_rounded(folder: Path) -> None:
    base, curves = stored(folder / "base", 4), [losses_after(folder / f"bf16-{stage}", 0) for stage in STAGES]
    for stage in STAGES:
        assert relative(curves[stage], curves[0]) <= 2e-3
        for name, values in stored(folder / f"bf16-{stage}", STEPS).items():
            if not is_adapter(name):
                assert torch.equal(values, base[name].bfloat16().float()), name
