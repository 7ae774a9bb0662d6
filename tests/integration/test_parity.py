"""Every split of a recipe is what plain torch does with the batch whole: benchmarks/parity.py."""

from __future__ import annotations

from pathlib import Path

import broken_ranks
import many_runs
import parity
import pytest
from parity import GOAL, Cell
from plain_torch import Difference, Trained, batch_of, difference, read_run

from bigtfm.job import check_job

pytestmark = [pytest.mark.launcher, pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parity")


@pytest.fixture(scope="module")
def data(folder: Path) -> Path:
    return parity.make_data(folder)


@pytest.fixture(scope="module")
def oracles(folder: Path, data: Path) -> dict[str, tuple[Trained, Trained]]:
    return parity.oracles(data, folder)


@pytest.fixture(scope="module")
def differences(
    folder: Path, data: Path, oracles: dict[str, tuple[Trained, Trained]]
) -> dict[Cell, Difference]:
    for ranks in parity.RANKS:
        cells = [cell for cell in parity.cells() if cell.ranks == ranks]
        many_runs.train_all((parity.arguments_of(cell, data, folder) for cell in cells), folder, ranks)
    return {cell: difference(read_run(folder / cell.name), oracles[cell.task][0]) for cell in parity.cells()}


@pytest.mark.parametrize("cell", parity.cells(), ids=lambda cell: cell.name)
def test_loss_gradient_norm_and_weights_are_those_of_plain_torch(
    cell: Cell, differences: dict[Cell, Difference]
) -> None:
    far = differences[cell]
    assert far.loss <= GOAL
    assert far.grad_norm is not None
    assert far.grad_norm <= GOAL
    assert far.weights <= GOAL


def test_the_recipe_can_tell(folder: Path, data: Path, oracles: dict[str, tuple[Trained, Trained]]) -> None:
    """Labels differ between micro-batches, and clipping acts in every step."""
    for task, (oracle, _) in oracles.items():
        path, *overrides = parity.arguments_of(Cell(task, 0, 1, 1, "none"), data, folder)
        job = check_job(None, Path(path), overrides, world_size=1)
        labels = [batch_of(job, sample, 1).num_labels for sample in range(40)]
        assert max(labels) >= 1.5 * min(labels)
        assert min(oracle.grad_norms) > 1.0


def test_a_mean_of_means_is_seen(
    folder: Path, data: Path, oracles: dict[str, tuple[Trained, Trained]]
) -> None:
    """The control: the same with the loss weighted as DeepSpeed does it."""
    broken = folder / "broken"
    broken.mkdir()
    cells = [Cell(task, 2, 2, 4, "none") for task in parity.TASKS]
    jobs = [parity.arguments_of(cell, data, broken) for cell in cells]
    many_runs.train_all(jobs, broken, 2, broken_ranks.mean_of_means)
    for cell in cells:
        far = difference(read_run(broken / cell.name), oracles[cell.task][0])
        assert far.weights > 100 * GOAL, cell
        assert far.loss > 10 * GOAL, cell
