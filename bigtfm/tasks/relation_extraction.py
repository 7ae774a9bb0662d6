"""The relation between two entities of a text: classification of the text with both of them marked.

The markers are written around the entities, as characters that need no vocabulary of their own (Wu & He 2019,
R-BERT; Zhou & Chen 2021, section 3.1).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from bigtfm.data.documents import Row
from bigtfm.data.examples import Example, Format, Reader, Wrong, label, text
from bigtfm.tasks import classification
from bigtfm.tasks.task import Scores, Sums, Task, f1, ratio

NONE = ("no_relation", "Other", "NA")  # what TACRED, SemEval-2010 task 8 and NYT call it
MARKERS = {"head": "$", "tail": "#"}


def make(row: Row, reader: Reader) -> list[Example]:
    """BOS ... $ head $ ... # tail # ... EOS; the label's mark stands on the first and the last token.

    What is too long loses text before and behind both entities, from the ends; where they alone are too far
    from each other, no example.
    """
    before, middle, behind = (reader.tokenizer.encode(part) for part in marked(row))
    room = reader.max_tokens - 2 - len(middle)
    if room < 0:
        return []
    left = min(len(before), max(room // 2, room - len(behind)))
    ids = before[len(before) - left :] + middle + behind[: room - left]
    mark = reader.mark(reference(row)) if "relation" in row else 0
    return [reader.document([(ids, [0] * len(ids))], bos=mark, eos=mark)]


def marked(row: Row) -> tuple[str, str, str]:
    """The text before both entities; from the one to the other, with markers; behind them.

    Raises:
        Wrong: an entity does not stand in the text, or the two overlap.
    """
    whole = text(row, "text")
    spans = sorted((*_span(row, name, whole), mark) for name, mark in MARKERS.items())
    (first, first_end, one), (second, second_end, other) = spans
    if second < first_end:
        raise Wrong("head and tail overlap", "correct or remove that row")
    middle = (
        f"{one} {whole[first:first_end]} {one}{whole[first_end:second]}"
        f"{other} {whole[second:second_end]} {other}"
    )
    return whole[:first], middle, whole[second_end:]


def _span(row: Row, name: str, whole: str) -> tuple[int, int]:
    """Characters [start, stop) of an entity: those given, or where its words first stand as such."""
    value = row.get(name)
    if isinstance(value, list | tuple):
        if len(value) != 2 or not all(isinstance(n, int) for n in value):
            raise Wrong(f"'{name}' is no [start, stop]", "give two characters' numbers, or the entity's text")
        start, stop = value
        if not 0 <= start < stop <= len(whole):
            raise Wrong(
                f"'{name}' goes from {start} to {stop} of {len(whole)} characters", "correct that row"
            )
        return start, stop
    entity = text(row, name)
    found = re.search(rf"(?<!\w){re.escape(entity)}(?!\w)", whole)
    if not entity or found is None:
        raise Wrong(
            f"the {name} '{entity[:40]}' does not stand in the text", "correct that row, or see --column"
        )
    return found.span()


def texts(row: Row) -> list[str]:
    return ["".join(marked(row))]


def reference(row: Row) -> str:
    return label(row, "relation")


def labels_of(row: Row) -> list[str]:
    return [reference(row)]


def score(predicted: Sequence[Any], gold: Sequence[Any]) -> Scores:
    """f1, precision, recall: micro, of all relations but that there is none (as TACRED's: Zhang et al. 2017);
    accuracy.
    """
    said = np.array([one is not None and one not in NONE for one in predicted])
    there = np.array([one not in NONE for one in gold])
    same = np.array([p == g for p, g in zip(predicted, gold, strict=True)])
    sums = np.stack([same & there, said, there, same, np.ones_like(same)], 1).astype(float)
    return Scores(_metrics(sums.sum(0)), sums, _metrics)


def _metrics(sums: Sums) -> Mapping[str, float]:
    right, said, there, same, count = sums
    return {
        "f1": f1(right, said, there),
        "precision": ratio(right, said),
        "recall": ratio(right, there),
        "accuracy": ratio(same, count),
    }


def most_frequent(rows: Sequence[Row]) -> list[str]:
    """One relation for every row: the most frequent that is one."""
    relations = [reference(row) for row in rows]
    some = sorted({*relations} - {*NONE}) or relations[:1]
    return [max(some, key=relations.count)] * len(rows)


TASK = Task(
    Format(
        "relation_extraction",
        columns={name: name for name in ("text", "head", "tail", "relation")},
        texts=texts,
        kinds=("classification",),
        make=make,
        learnt=frozenset({"relation"}),
        share_texts=True,
        labels_of=labels_of,
    ),
    partial(classification.predict, make=make),
    reference,
    score,
    ("the most frequent relation", most_frequent),
)
