"""Metrics are those of the field's own libraries, and intervals contain them."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bigtfm.tasks import (
    chat,
    classification,
    language_modelling,
    question_answering,
    summarisation,
    tagging,
    translation,
)
from bigtfm.tasks.task import interval

SAID = ["The cat sat on the mat.", "He went home early today.", "Nothing works here.", "A good day to you."]
RIGHT = ["The cat sat on a mat.", "He went home early.", "Everything works here.", "A good day to you."]


def test_bleu_is_that_of_sacrebleus_command(tmp_path: Path) -> None:
    said, right = tmp_path / "said", tmp_path / "right"
    said.write_text("\n".join(SAID) + "\n")
    right.write_text("\n".join(RIGHT) + "\n")
    found = translation.score(SAID, RIGHT)
    json.dumps([found.values, found.intervals])  # numbers of Python's own
    for metric in ("bleu", "chrf"):
        command = [
            sys.executable,
            "-m",
            "sacrebleu",
            str(right),
            "-i",
            str(said),
            "-m",
            metric,
            "-b",
            "-w",
            "6",
        ]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert found.values[metric] == pytest.approx(float(out), abs=1e-5)
        low, high = interval(found)[metric]
        assert low < found.values[metric] < high


def test_rouge_is_that_of_rouge_score() -> None:
    from rouge_score import rouge_scorer, scoring

    aggregator = scoring.BootstrapAggregator()
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"], use_stemmer=True)
    for said, right in zip(SAID, RIGHT, strict=True):
        aggregator.add_scores(scorer.score(right, said))
    found = summarisation.score(SAID, RIGHT)
    for name, score in aggregator.aggregate().items():
        assert abs(found.values[name] / 100 - score.mid.fmeasure) < 0.01, "its middle is resampled"
    plain = np.mean([scorer.score(r, s)["rougeLsum"].fmeasure for s, r in zip(SAID, RIGHT, strict=True)])
    assert found.values["rougeLsum"] == pytest.approx(100 * plain)


def random_tags(seed: int) -> list[list[str]]:
    generator = random.Random(seed)
    return [
        [generator.choice(["O", "O", "B-PER", "I-PER", "B-LOC", "I-LOC"]) for _ in range(12)]
        for _ in range(40)
    ]


@pytest.mark.filterwarnings("ignore")
def test_entities_are_those_of_seqeval() -> None:
    from seqeval.metrics import f1_score, precision_score, recall_score

    said, right = random_tags(1), random_tags(2)
    found = tagging.score(said, right)
    assert found.values["f1"] == pytest.approx(f1_score(right, said))
    assert found.values["precision"] == pytest.approx(precision_score(right, said))
    assert found.values["recall"] == pytest.approx(recall_score(right, said))


def test_tags_that_are_no_entities_have_accuracy_alone() -> None:
    found = tagging.score([["NN", "VB"], ["NN"]], [["NN", "NN"], ["NN"]])
    assert found.values == {"accuracy": pytest.approx(2 / 3)}


def test_classes_are_those_of_scikit_learn() -> None:
    from sklearn.metrics import accuracy_score, f1_score

    generator = random.Random(0)
    said, right = ([generator.choice("abc") for _ in range(200)] for _ in range(2))
    found = classification.score(said, right)
    assert found.values["accuracy"] == pytest.approx(accuracy_score(right, said))
    assert found.values["f1"] == pytest.approx(f1_score(right, said, average="macro"))
    low, high = interval(found)["accuracy"]
    error = 1.96 * np.sqrt(found.values["accuracy"] * (1 - found.values["accuracy"]) / 200)
    assert (high - low) / 2 == pytest.approx(error, rel=0.15), "as the binomial has it"


def test_answers_are_measured_as_squad_does() -> None:
    found = question_answering.score(
        ["the Ada Lovelace!", "in 1843", ""], [["Ada Lovelace"], ["1843"], ["x", ""]]
    )
    assert found.values["exact_match"] == pytest.approx(100 * 2 / 3)
    assert found.values["f1"] == pytest.approx(100 * (1 + 2 / 3 + 1) / 3)


def test_perplexity_is_weighted_by_tokens() -> None:
    sums = np.array([[2.0, 1, 4], [6.0, 3, 8]])
    values = language_modelling.score(sums).values
    assert values["perplexity"] == pytest.approx(np.exp(2.0))
    assert values["bits_per_byte"] == pytest.approx(8 / np.log(2) / 12)


def test_chat_compares_answers() -> None:
    assert chat.score(["Hello", "no"], ["Hello", "yes"]).values["exact_match"] == 50


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 40, 41])
@pytest.mark.parametrize(("window", "stride"), [(8, 7), (8, 4), (8, 1), (40, 3)])
def test_windows_score_each_token_once_with_enough_before_it(length: int, window: int, stride: int) -> None:
    scored = []
    for first, last, begin in language_modelling.slide(length, window, stride):
        assert last - first <= window
        scored += range(begin, last)
        assert begin - first >= min(window - stride, begin), "context"
    assert scored == list(range(1, length))
