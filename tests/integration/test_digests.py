"""Which samples a step takes depends on nothing but their number: 1, 2, 4 and 1 ranks, with three resumes."""

from __future__ import annotations

import json
from pathlib import Path

import many_runs
import pytest
from many_runs import job, losses_after
from plain_torch import relative

from bigtfm.data.prepare import prepare

pytestmark = [pytest.mark.launcher, pytest.mark.slow]
PARTS = ((3, 1, 0), (6, 2, 2), (9, 4, 3), (12, 1, 1))  # until which step, on how many ranks, at which stage


@pytest.fixture(scope="module")
def small_data(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, corpus_lines: list[str]) -> Path:
    """A data set with an epoch of four to five steps."""
    folder = tmp_path_factory.mktemp("small-data")
    (folder / "speech.txt").write_text(corpus_lines[0][:2_700], encoding="utf-8")
    tokenizer = next(path for path in tiny_data.iterdir() if path.name.startswith("tokenizer"))
    prepare(
        [str(folder / "speech.txt")], folder / "tokens", tokenizer=tokenizer, validation_fraction=0.0,
        workers=1, progress=False,
    )  # fmt: skip
    return folder / "tokens"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, small_data: Path) -> Path:
    """An uninterrupted run on one rank, and one that moves on three times."""
    folder = tmp_path_factory.mktemp("moved")
    for part, (steps, ranks, stage) in enumerate(PARTS):
        jobs = [job(folder, small_data, "moved", "model.dropout=0.1", f"steps={steps}", stage=stage)]
        if part == 0:
            jobs.append(job(folder, small_data, "whole", "model.dropout=0.1", "steps=12"))
        many_runs.train_all(jobs, folder, ranks)
    return folder


def test_samples_and_losses_are_those_of_the_uninterrupted_run(folder: Path) -> None:
    whole, moved = (many_runs.rows_of(folder / name) for name in ("whole", "moved"))
    digests = [row["sample_digest"] for row in whole]
    assert [row["sample_digest"] for row in moved] == digests
    assert len(set(digests)) == 12, "no step takes what another has taken"
    assert relative(losses_after(folder / "moved", 0), losses_after(folder / "whole", 0)) <= 1e-5


def test_a_resume_falls_into_the_second_epoch(folder: Path) -> None:
    """And the run goes on beyond two epochs."""
    steps_per_epoch = json.loads((folder / "whole/resolved.json").read_text())["steps_per_epoch"]
    assert steps_per_epoch + 0.5 < PARTS[1][0] < 2 * steps_per_epoch - 0.5
    assert PARTS[-1][0] > 2 * steps_per_epoch


def test_the_digest_can_tell(folder: Path, small_data: Path) -> None:
    """The control: another seed, other samples."""
    many_runs.train_all([job(folder, small_data, "other", "seed=1", "steps=12")], folder, 1)
    digests = [
        {row["sample_digest"] for row in many_runs.rows_of(folder / name)} for name in ("whole", "other")
    ]
    assert not digests[0] & digests[1]
