"""A label of each word: parts of speech, named entities in BIO."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bigtfm.data.documents import Row
from bigtfm.data.examples import Example, Format, Reader, Wrong, items
from bigtfm.tasks.predictor import Predictor
from bigtfm.tasks.task import Scores, Sums, Task, f1, metric_library, ratio


def make(row: Row, reader: Reader) -> list[Example]:
    """BOS words EOS. A word's first token has the mark of its label; what does not fit is another example.

    A word is tokenised by itself, with a blank before it unless it is the first.
    """
    words = words_of(row)
    marks = [reader.mark(tag) for tag in labels_of(row)] if "tags" in row else [1] * len(words)
    if len(marks) != len(words):
        raise Wrong(f"{len(words)} words, but {len(marks)} tags", "give one tag for each word")
    room, examples, parts, used = reader.max_tokens - 2, list[Example](), list[Any](), 0
    for number, (word, mark) in enumerate(zip(words, marks, strict=True)):
        ids = reader.tokenizer.encode(word if number == 0 else f" {word}")[:room]
        ids = ids or [reader.tokenizer.eos_id]  # of a word that is empty
        if used + len(ids) > room:
            examples.append(reader.document(parts))
            parts, used = [], 0
        parts.append((ids, [mark] + [0] * (len(ids) - 1)))
        used += len(ids)
    return [*examples, reader.document(parts)] if parts else []


def texts(row: Row) -> list[str]:
    return [" ".join(words_of(row))]


def words_of(row: Row) -> list[str]:
    value = row.get("words")
    return value.split() if isinstance(value, str) else [str(word) for word in items(row, "words")]


def labels_of(row: Row) -> list[str]:
    value = row.get("tags")
    return value.split() if isinstance(value, str) else [str(tag) for tag in items(row, "tags")]


def predict(predictor: Predictor, rows: Sequence[Row], reader: Reader) -> list[list[str]]:
    """The likeliest label of each word, whatever it is labelled."""
    made = [make({"words": row.get("words")}, reader) for row in rows]
    every = [example for examples in made for example in examples]
    scores = iter(predictor.scores(every))
    found = []
    for examples in made:
        tags: list[str] = []
        for example in examples:
            places = np.flatnonzero(example.marks)
            tags += [reader.labels[n] for n in next(scores)[places].argmax(-1).tolist()]
        found.append(tags)
    return found


def score(predicted: Sequence[Any], gold: Sequence[Any]) -> Scores:
    """accuracy of the words; where tags are BIO, first precision, recall and f1 of whole entities.

    An entity counts where its kind and both its borders are right (Tjong Kim Sang & De Meulder 2003), as
    seqeval's get_entities finds them.
    """
    words = [sum(p == g for p, g in zip(ps, gs, strict=True)) for ps, gs in zip(predicted, gold, strict=True)]
    sums = np.array([[right, len(tags), 0, 0, 0] for right, tags in zip(words, gold, strict=True)], float)
    bio = all(tag == "O" or tag[:2] in ("B-", "I-") for tags in gold for tag in tags)
    if bio:
        labeling = metric_library("seqeval.metrics.sequence_labeling", "seqeval")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for row, said, tags in zip(sums, predicted, gold, strict=True):
                found, right = set(labeling.get_entities(said)), set(labeling.get_entities(tags))
                row[2:] = len(found & right), len(found), len(right)
    of_sums = _entities if bio else _words
    return Scores(of_sums(sums.sum(0)), sums, of_sums)


def _words(sums: Sums) -> Mapping[str, float]:
    return {"accuracy": ratio(sums[0], sums[1])}


def _entities(sums: Sums) -> Mapping[str, float]:
    both, said, right = sums[2:]
    precision, recall = ratio(both, said), ratio(both, right)
    return {"f1": f1(both, said, right), "precision": precision, "recall": recall, **_words(sums)}


def most_frequent(rows: Sequence[Row]) -> list[list[str]]:
    """One tag for every word."""
    tags = [labels_of(row) for row in rows]
    [(tag, _)] = Counter(tag for one in tags for tag in one).most_common(1)
    return [[tag] * len(one) for one in tags]


TASK = Task(
    Format(
        "tagging",
        columns={"words": "words", "tags": "tags"},
        texts=texts,
        kinds=("tagging",),
        make=make,
        learnt=frozenset({"tags"}),
        labels_of=labels_of,
    ),
    predict,
    labels_of,
    score,
    ("the most frequent tag", most_frequent),
)
