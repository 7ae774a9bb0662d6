"""A data set of a task and what a run says that it learns: they fit, or one line says why not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TINY
from task_runs import prepared

from bigtfm.config.problems import ConfigProblem
from bigtfm.job import check_job

BERT = ("model.family=bert", "data.packing=best_fit")


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    rows = [{"text": "a fine film", "label": "good"}, {"text": "dull and long", "label": "bad"}]
    return prepared(tmp_path_factory.mktemp("films"), tiny_data / "tokenizer", "classification", rows * 20)


@pytest.mark.parametrize(
    ("overrides", "what", "fix"),
    [
        (BERT, "holds examples of classification, and objective.kind does not say what is to be learnt",
         "set objective.kind to classification; or to masked_lm, for the text alone"),
        ((*BERT, "objective.kind=tagging"), "objective.kind tagging can't learn examples of classification",
         "set objective.kind to classification"),
        ((*BERT, "objective.kind=classification", "data.seq_len=16"),
         "data.seq_len 16 is less than the 32 tokens that an example may have",
         "set data.seq_len to 32, or prepare with --max-tokens 16"),
        ((*BERT, "objective.kind=classification", "model.max_seq_len=16"),
         "data.seq_len 16 is less than the 32 tokens that an example may have",
         "set model.max_seq_len to 32, or prepare with --max-tokens 16"),
        ((*BERT, "objective.kind=classification", "model.num_labels=1"),
         "model.num_labels 1 is less than the 2 labels of the data", "leave model.num_labels out"),
    ],
)  # fmt: skip
def test_what_does_not_fit(
    overrides: tuple[str, ...], what: str, fix: str, films: Path, deepspeed_json: Callable[..., Path]
) -> None:
    with pytest.raises(ConfigProblem) as caught:
        check_job(None, deepspeed_json(), [*TINY, f"data.path={films}", "steps=1", *overrides], 1)
    assert (caught.value.what, caught.value.fix) == (what, fix)


def test_what_fits(films: Path, deepspeed_json: Callable[..., Path], tiny_data: Path) -> None:
    def job(*overrides: str, data: Path = films) -> object:
        args = [*TINY, f"data.path={data}", "steps=1", *BERT, *overrides]
        return check_job(None, deepspeed_json(), args, 1).run.model.num_labels

    assert job("objective.kind=classification") == 2
    assert job("objective.kind=classification", "model.num_labels=5") == 5
    assert job("objective.kind=masked_lm") is None, "its text alone, as it was asked for"
    with pytest.raises(ConfigProblem, match="classification can't learn text"):
        job("objective.kind=classification", data=tiny_data)
