"""A short text of a long one: ROUGE (Lin 2004), by rouge-score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from bigtfm.data.documents import Row
from bigtfm.data.examples import Format, text
from bigtfm.tasks import pairs
from bigtfm.tasks.task import Scores, Sums, Task, metric_library, ratio

KINDS = ("rougeLsum", "rouge1", "rouge2", "rougeL")


def score(predicted: Sequence[str], gold: Sequence[str]) -> Scores:
    """F-measures in percent, the mean over examples; with stemming, as is the custom."""
    scorer = metric_library("rouge_score.rouge_scorer", "rouge-score").RougeScorer(
        list(KINDS), use_stemmer=True
    )
    found = [scorer.score(right, said) for said, right in zip(predicted, gold, strict=True)]
    sums = np.array([[one[kind].fmeasure for kind in KINDS] + [1.0] for one in found])
    return Scores(_metrics(sums.sum(0)), sums, _metrics)


def _metrics(sums: Sums) -> Mapping[str, float]:
    return {kind: 100 * ratio(total, sums[-1]) for kind, total in zip(KINDS, sums, strict=False)}


def first_words(rows: Sequence[Row]) -> list[str]:
    """Of each document, as many as the summaries have on the average."""
    count = round(np.mean([len(text(row, "target").split()) for row in rows]))
    return [" ".join(text(row, "source").split()[:count]) for row in rows]


TASK = Task(
    Format(
        "summarisation",
        columns={"source": "document", "target": "summary"},
        texts=pairs.texts,
        kinds=("sequence_to_sequence", "completion"),
        make=partial(pairs.make, cut=True),
        learnt=frozenset({"target"}),
    ),
    pairs.predict,
    pairs.reference,
    score,
    ("as many first words as a summary has", first_words),
)
