"""A bit that flips in one rank's copy of the weights is found at the next comparison, and named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flipping
import pytest
import rank_runner
from many_runs import job, rows_of, shards_of
from rank_runner import outcomes_of

from bigtfm.engine import checkpoint

pytestmark = [pytest.mark.launcher, pytest.mark.slow]
RANKS, STEPS = 3, 4  # with two no majority tells whose copy is wrong
BF16: dict[str, Any] = {"bf16": {"enabled": True}}
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    **{f"{what}-{stage}": (stage, {}) for what in ("none", "weight") for stage in range(4)},
    "master-0": (0, BF16),
    "each-0": (0, {}),
    "unseen-0": (0, {}),
}
FIX = (
    "memory or a device has changed a bit. Fix: start the same command again: it resumes from the last "
    "checkpoint, before which the copies were the same; if it happens again, take that machine out"
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    folder = tmp_path_factory.mktemp("replicas")
    jobs = [made(folder, tiny_data, name) for name in RUNS]
    finished = rank_runner.train_all(jobs, folder / "first", RANKS, flipping.train_jobs)
    assert finished.codes == [0] * RANKS, finished.output[-3000:]
    return folder


def made(folder: Path, data: Path, name: str) -> list[str]:
    stage, changes = RUNS[name]
    common = (f"steps={STEPS}", "save.every=2", "eval.tokens=64", f"guard.replicas_every={flipping.STEP}")
    return job(folder, data, name, *common, stage=stage, train_batch_size=6, **changes)


@pytest.mark.parametrize("name", ["weight-0", "weight-1", "weight-2", "master-0"])
def test_tensor_and_rank_are_named(name: str, runs: Path) -> None:
    tensor = flipping.PARAMETER if name != "master-0" else f"fp32 of {flipping.PARAMETER}"
    for outcome in outcomes_of(runs / name, RANKS):
        assert outcome["code"] == 70
        said = f"error: step 3: {tensor} of rank 1 is not what the other ranks have: {FIX}"
        assert outcome["line"] == said
    assert checkpoint.newest(runs / name / "checkpoints") == runs / name / "checkpoints/step-00000002"


def test_without_a_majority_the_tensor_is_named(runs: Path) -> None:
    assert outcomes_of(runs / "each-0", RANKS)[0]["line"] == (
        f"error: step 3: the ranks have different values of {flipping.PARAMETER}, and no majority tells "
        f"which are right: {FIX}"
    )


def test_the_same_command_goes_on_as_if_nothing_had_been(runs: Path, tiny_data: Path) -> None:
    resumed = [f"weight-{stage}" for stage in range(3)]
    jobs = [made(runs, tiny_data, name) for name in resumed]
    finished = rank_runner.train_all(jobs, runs / "second", RANKS)
    assert finished.codes == [0] * RANKS, finished.output[-3000:]
    for name in resumed:
        clean = runs / name.replace("weight", "none")
        assert [row["loss"] for row in rows_of(runs / name)] == [row["loss"] for row in rows_of(clean)]
        assert shards_of(runs / name, STEPS) == shards_of(clean, STEPS)


def test_stage_3_has_no_copies_to_compare(runs: Path) -> None:
    """Every weight is on one rank alone: what flips there is trained on."""
    compared = {name: outcomes_of(runs / name, RANKS)[1]["compared"] for name in RUNS}
    assert compared["weight-3"] == []
    assert outcomes_of(runs / "weight-3", RANKS)[1]["code"] == 0
    assert flipping.PARAMETER in compared["weight-2"]
    assert not any(name.startswith("fp32 of ") for name in compared["weight-2"])
    assert f"fp32 of {flipping.PARAMETER}" in compared["master-0"]


def test_without_comparisons_the_ranks_train_on_apart(runs: Path) -> None:
    """The control: exit 0, and another loss."""
    assert outcomes_of(runs / "unseen-0", RANKS)[1]["code"] == 0
    rows, clean = rows_of(runs / "unseen-0"), rows_of(runs / "none-0")
    assert [row["loss"] for row in rows[:3]] == [row["loss"] for row in clean[:3]]
    assert rows[3]["loss"] != clean[3]["loss"]
