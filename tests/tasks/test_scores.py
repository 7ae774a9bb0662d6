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
    likelihood,
    question_answering,
    relation_extraction,
    summarisation,
    tagging,
    translation,
)
from bigtfm.tasks.likelihood import Foretold
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


def test_that_there_is_no_relation_is_no_class() -> None:
    from sklearn.metrics import precision_recall_fscore_support

    generator = random.Random(0)
    said, right = ([generator.choice(["a", "b", "no_relation"]) for _ in range(200)] for _ in range(2))
    found = relation_extraction.score(said, right).values
    theirs = precision_recall_fscore_support(right, said, labels=["a", "b"], average="micro")
    assert [found[name] for name in ("precision", "recall", "f1")] == pytest.approx(theirs[:3])
    assert relation_extraction.score([None], ["a"]).values["f1"] == 0
    rows = [{"relation": one} for one in ("no_relation", "no_relation", "b")]
    assert relation_extraction.most_frequent(rows) == ["b"] * 3, "what counts"


def test_answers_are_measured_as_squad_does() -> None:
    found = question_answering.score(
        ["the Ada Lovelace!", "in 1843", ""], [["Ada Lovelace"], ["1843"], ["x", ""]]
    )
    assert found.values["exact_match"] == pytest.approx(100 * 2 / 3)
    assert found.values["f1"] == pytest.approx(100 * (1 + 2 / 3 + 1) / 3)


def foretold(ids: list[int], loss: float, hits: int, size: int) -> Foretold:
    return Foretold(np.array(ids), loss, hits, size)


def test_perplexity_is_weighted_by_tokens() -> None:
    found = [foretold([1], 2.0, 1, 4), foretold([1, 2, 3], 6.0, 0, 8)]
    values = likelihood.score(found, "perplexity", "bits_per_byte", "accuracy").values
    assert values["perplexity"] == pytest.approx(np.exp(2.0))
    assert values["bits_per_byte"] == pytest.approx(8 / np.log(2) / 12)
    assert values["accuracy"] == 1 / 4


def test_frequency_gives_the_entropy_of_the_tokens() -> None:
    found = [foretold([5, 5], 9.0, 0, 4), foretold([5, 2], 9.0, 0, 8), likelihood.NOTHING]
    values = likelihood.score(likelihood.by_frequency(found), "loss", "accuracy", "bits_per_byte").values
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    assert values["loss"] == pytest.approx(entropy)
    assert values["accuracy"] == 0.75
    assert values["bits_per_byte"] == pytest.approx(4 * entropy / np.log(2) / 12)


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
