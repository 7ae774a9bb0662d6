"""A global batch that grows: the curve is plain torch's, whatever the layout, also after a resume within it.

12, then 24, then 32 sequences: 3, 6 and 8 micro-batches of 2 on 2 ranks. None of these steps begins at a
multiple of the next accumulation.
"""

from __future__ import annotations

from pathlib import Path

import broken_ranks
import many_runs
import pytest
import rank_runner
from many_runs import job, losses_after, rows_of
from plain_torch import Trained, difference, read_run, relative, train_plainly

from bigtfm.config.problems import ConfigProblem
from bigtfm.job import check_job

pytestmark = [pytest.mark.launcher, pytest.mark.slow]
GOAL = 1e-5
SIZES = [12, 12, 24, 24, 32, 32]
RUN = (f"steps={len(SIZES)}", "rampup_sizes=12,24", "rampup_steps=2,2", "save.every=3")
ALONE, OTHER = (1, 4, 0), (2, 2, 2)  # ranks, micro batch, stage
CELLS = [ALONE, OTHER, (2, 1, 3), (2, 2, 0), (2, 2, 1), (2, 2, 3)]
Cell = tuple[int, int, int]


def name_of(cell: Cell) -> str:
    return "x".join(map(str, cell))


def made(folder: Path, data: Path, name: str, cell: Cell, *overrides: str) -> list[str]:
    _, micro_batch, stage = cell
    batch = {"train_batch_size": 32, "train_micro_batch_size_per_gpu": micro_batch}
    return job(folder, data, name, *RUN, *overrides, stage=stage, **batch)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Trained:
    path, *overrides = made(tmp_path_factory.mktemp("oracle"), tiny_data, "oracle", ALONE)
    return train_plainly(check_job(None, Path(path), overrides, world_size=1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """Every cell, and two of them gone on, from within the second stage, under the other's layout."""
    folder = tmp_path_factory.mktemp("ramp-up")
    many_runs.train_all([made(folder, tiny_data, name_of(ALONE), ALONE)], folder, 1)
    jobs = [made(folder, tiny_data, name_of(cell), cell) for cell in CELLS if cell != ALONE]
    many_runs.train_all([*jobs, gone_on(folder, tiny_data, ALONE, (2, 1, 3))], folder, 2)
    many_runs.train_all([gone_on(folder, tiny_data, OTHER, ALONE)], folder, 1)
    return folder


def gone_on(folder: Path, data: Path, source: Cell, target: Cell) -> list[str]:
    name = f"{name_of(source)}-resumed"
    many_runs.fork_run(folder / name_of(source), folder / name, 3)
    return made(folder, data, name, target)


@pytest.mark.parametrize("cell", CELLS, ids=name_of)
def test_losses_gradient_norms_and_weights_are_those_of_plain_torch(
    cell: Cell, folder: Path, oracle: Trained
) -> None:
    assert difference(read_run(folder / name_of(cell)), oracle).worst <= GOAL


def test_every_step_reads_on_where_the_last_one_ended(folder: Path) -> None:
    """Tokens and samples are those of the steps' own sizes, the same on all layouts."""
    rows = rows_of(folder / name_of(ALONE))
    assert [row["tokens"] for row in rows] == [32 * sum(SIZES[:step]) for step in range(1, 7)]
    for cell in CELLS:
        digests = [row["sample_digest"] for row in rows_of(folder / name_of(cell))]
        assert digests == [row["sample_digest"] for row in rows]


@pytest.mark.parametrize("cell", [ALONE, OTHER], ids=name_of)
def test_a_resume_within_the_ramp_up_goes_on_as_if_nothing_had_happened(cell: Cell, folder: Path) -> None:
    resumed, whole = folder / f"{name_of(cell)}-resumed", folder / name_of(cell)
    assert relative(losses_after(resumed, 3), losses_after(whole, 3)) <= 1e-6
    assert rows_of(resumed)[-1]["tokens"] == rows_of(whole)[-1]["tokens"]


def test_another_ramp_up_is_another_run(folder: Path, tiny_data: Path, tmp_path: Path) -> None:
    many_runs.fork_run(folder / name_of(ALONE), tmp_path / "other", 3)
    path, *overrides = made(tmp_path, tiny_data, "other", ALONE, "rampup_steps=1,3")
    ended = rank_runner.run(["train", "--deepspeed_config", path, *overrides], tmp_path / "ranks")
    assert ended.code == ConfigProblem.exit_code
    assert "batch.rampup_steps was [2, 2] when this run was saved and is [1, 3] now" in ended.output


def test_an_update_after_too_few_micro_batches_is_seen(
    tmp_path: Path, tiny_data: Path, oracle: Trained
) -> None:
    """The control: DeepSpeed's count of micro-batches, taken modulo an accumulation that has changed."""
    jobs = [made(tmp_path, tiny_data, "broken", ALONE)]
    rank_runner.train_all(jobs, tmp_path, 1, broken_ranks.counting_on_through_a_ramp_up)
    found = [row["loss"] for row in rows_of(tmp_path / "broken")]
    assert found[:3] == pytest.approx(oracle.losses[:3], rel=GOAL), "until the accumulation changes"
    assert relative(found, oracle.losses) > 50 * GOAL
