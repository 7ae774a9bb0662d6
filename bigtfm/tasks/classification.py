"""A label of each text, or pair of texts: sentiment, topic, entailment."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from bigtfm.data.documents import Row
from bigtfm.data.examples import Example, Format, Reader, label, text
from bigtfm.tasks.predictor import Predictor
from bigtfm.tasks.task import Scores, Sums, Task, f1, ratio

LABELS = {"label", "relation"}  # columns that a prediction does not look at


def make(row: Row, reader: Reader) -> list[Example]:
    """BOS text EOS, or BOS text EOS second EOS, cut to max_tokens: the longer of the two gives way first.

    The label's mark stands on the first and the last token.
    """
    encode, room = reader.tokenizer.encode, reader.max_tokens - 2
    first = encode(text(row, "text"))
    if not first:
        return []
    mark = reader.mark(reference(row)) if "label" in row else 0
    second = encode(text(row, "second")) if row.get("second") is not None else []
    if not second:
        first = first[:room]
        return [reader.document([(first, [0] * len(first))], bos=mark, eos=mark)]
    while len(first) + len(second) + 1 > room:
        longer = first if len(first) >= len(second) else second
        longer.pop()
    parts = [(ids, [0] * len(ids)) for ids in (first, [reader.tokenizer.eos_id], second)]
    return [reader.document(parts, bos=mark, eos=mark)]


def texts(row: Row) -> list[str]:
    return [text(row, name) for name in ("text", "second") if row.get(name) is not None]


def labels_of(row: Row) -> list[str]:
    return [reference(row)]


def predict(
    predictor: Predictor,
    rows: Sequence[Row],
    reader: Reader,
    make: Callable[[Row, Reader], list[Example]] = make,
) -> list[str | None]:
    """The likeliest label of each row, whatever it is labelled; None of one that makes no example."""
    made = [make({name: row[name] for name in row.keys() - LABELS}, reader) for row in rows]
    scores = iter(predictor.scores([example for examples in made for example in examples]))
    place = -1 if predictor.causal else 0
    return [reader.labels[int(next(scores)[place].argmax())] if examples else None for examples in made]


def score(predicted: Sequence[Any], gold: Sequence[Any]) -> Scores:
    """accuracy; f1: of the labels, the mean of each one's (macro); of two labels also each one's."""
    labels = sorted({*gold} | {one for one in predicted if one is not None})
    sums = np.zeros((len(gold), 2 + 3 * len(labels)))
    sums[:, 0] = [p == g for p, g in zip(predicted, gold, strict=True)]
    sums[:, 1] = 1
    for n, one in enumerate(labels):
        said, right = np.array([p == one for p in predicted]), np.array([g == one for g in gold])
        sums[:, 2 + 3 * n : 5 + 3 * n] = np.stack([said & right, said, right], 1)
    of_sums = partial(_metrics, len(labels))
    return Scores(of_sums(sums.sum(0)), sums, of_sums)


def _metrics(count: int, sums: Sums) -> Mapping[str, float]:
    each = [f1(*sums[2 + 3 * n : 5 + 3 * n]) for n in range(count)]
    return {"accuracy": ratio(sums[0], sums[1]), "f1": float(np.mean(each))}


def reference(row: Row) -> str:
    return label(row, "label")


def most_frequent(rows: Sequence[Row]) -> list[str]:
    labels = [reference(row) for row in rows]
    return [max(sorted({*labels}), key=labels.count)] * len(rows)


TASK = Task(
    Format(
        "classification",
        columns={"text": "text", "second": "second", "label": "label"},
        texts=texts,
        kinds=("classification",),
        make=make,
        learnt=frozenset({"label"}),
        labels_of=labels_of,
        optional=frozenset({"second"}),
    ),
    predict,
    reference,
    score,
    ("the most frequent label", most_frequent),
)
