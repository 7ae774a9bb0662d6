"""A run goes on under any ZeRO stage and number of ranks as if nothing had happened.

With dropout, a warm-up that the resume falls into, weight decay and clipping, so that all that must be
restored matters. 1e-6 of the loss is some ten units in the last place of an fp32 number, and layouts add up
their gradients in other orders: the recipe is the benchmark's, whose updates don't blow up rounding.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import broken_ranks
import many_runs
import pytest
from many_runs import SCHEDULE, job, losses_after, shards_of
from plain_torch import relative

pytestmark = [pytest.mark.launcher, pytest.mark.slow]
SAVED, STEPS = 5, 10
SPLIT = {"train_micro_batch_size_per_gpu": 2, "scheduler": SCHEDULE}
RUN = ("model.dropout=0.1", f"save.every={SAVED}", f"steps={STEPS}")
LAYOUTS = list(itertools.product((1, 2), (0, 1, 2, 3)))  # ranks, stage
Layout = tuple[int, int]


def name_of(*layouts: Layout) -> str:
    return "-to-".join(f"{ranks}x{stage}" for ranks, stage in layouts)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """Uninterrupted runs of every layout, and each of them gone on from the middle under every layout."""
    folder = tmp_path_factory.mktemp("resumes")
    for ranks in (1, 2):
        whole = [
            job(folder, tiny_data, name_of((ranks, stage)), *RUN, stage=stage, **SPLIT) for stage in range(4)
        ]
        many_runs.train_all(whole, folder, ranks)
    for ranks in (1, 2):
        resumed = []
        for saved, stage in itertools.product(LAYOUTS, range(4)):
            name = name_of(saved, (ranks, stage))
            many_runs.fork_run(folder / name_of(saved), folder / name, SAVED)
            resumed.append(job(folder, tiny_data, name, *RUN, stage=stage, **SPLIT))
        many_runs.train_all(resumed, folder, ranks)
    return folder


@pytest.mark.parametrize("loaded", LAYOUTS, ids=name_of)
@pytest.mark.parametrize("saved", LAYOUTS, ids=name_of)
def test_the_next_losses_are_those_of_the_uninterrupted_run(
    saved: Layout, loaded: Layout, folder: Path
) -> None:
    whole, resumed = folder / name_of(saved), folder / name_of(saved, loaded)
    assert relative(losses_after(resumed, SAVED), losses_after(whole, SAVED)) <= 1e-6
    if saved == loaded:
        exactly = [
            [(row["loss"], row["grad_norm"], row["lr"]) for row in many_runs.rows_of(run)]
            for run in (whole, resumed)
        ]
        assert exactly[0] == exactly[1]
        assert shards_of(resumed, STEPS) == shards_of(whole, STEPS)


def test_the_layouts_agree_before_any_resume(folder: Path) -> None:
    curves = [losses_after(folder / name_of(layout), 0) for layout in LAYOUTS]
    for curve in curves:
        assert relative(curve, curves[0]) <= 1e-6
    assert curves[0][-1] < curves[0][0] - 0.02, "it learns, so equal curves mean something"


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory, folder: Path, tiny_data: Path) -> Path:
    """The same cells with something left out of the load."""
    broken = tmp_path_factory.mktemp("broken")
    jobs = []
    for name in broken_ranks.BROKEN_LOADS:
        many_runs.fork_run(folder / name_of((1, 2)), broken / name, SAVED)
        jobs.append(job(broken, tiny_data, name, *RUN, stage=2, **SPLIT))
    many_runs.train_all(jobs, broken, 1, broken_ranks.load_as_named)
    return broken


@pytest.mark.parametrize("name", broken_ranks.BROKEN_LOADS)
def test_what_a_load_leaves_out_is_seen(name: str, broken: Path, folder: Path) -> None:
    """The control: schedule, moments, update count or data position not restored, or off by one sample."""
    far = relative(losses_after(broken / name, SAVED), losses_after(folder / name_of((1, 2)), SAVED))
    if name == "intact":
        assert far == 0.0
    else:
        assert far > 1e-4


def test_dropout_of_the_process_is_seen(tmp_path: Path, tiny_data: Path) -> None:
    """The control: drawn from a generator, dropout depends on the resume and on the ranks."""
    jobs = {name: job(tmp_path, tiny_data, name, *RUN, **SPLIT) for name in ("whole", "resumed", "ranks")}
    many_runs.train_all([jobs["whole"]], tmp_path, 1, broken_ranks.dropout_of_the_process)
    many_runs.train_all([jobs["ranks"]], tmp_path, 2, broken_ranks.dropout_of_the_process)
    many_runs.fork_run(tmp_path / "whole", tmp_path / "resumed", SAVED)
    many_runs.train_all([jobs["resumed"]], tmp_path, 1, broken_ranks.dropout_of_the_process)
    whole = losses_after(tmp_path / "whole", SAVED)
    assert relative(losses_after(tmp_path / "resumed", SAVED), whole) > 1e-4
    assert relative(losses_after(tmp_path / "ranks", SAVED), whole) > 1e-4
