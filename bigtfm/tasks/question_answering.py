"""An answer that stands in a text: where it begins and ends (Rajpurkar et al. 2016, SQuAD)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from bigtfm.config.marks import BEGINS, ENDS, SELECTABLE
from bigtfm.data.documents import Row
from bigtfm.data.examples import Example, Format, Reader, Wrong, text
from bigtfm.tasks.predictor import Predictor
from bigtfm.tasks.task import Scores, Sums, Task, ratio

LONGEST_ANSWER = 30  # words
OVERLAP = 0.25  # of a window, with the one before
_WORD = re.compile(r"\s*(?:\w+|[^\w\s])")  # with the blanks before it


class Window(NamedTuple):
    """A part of a context that fits: its example, and where its words stand."""

    example: Example
    first_tokens: list[int]  # place of each word's first token in the example
    last_tokens: list[int]
    spans: list[tuple[int, int]]  # characters of each word in the context


def windows(row: Row, reader: Reader) -> list[Window]:
    """BOS question EOS context EOS, as many as the context needs; marks are SELECTABLE on the context."""
    question = reader.tokenizer.encode(text(row, "question"))[: reader.max_tokens // 2]
    context = text(row, "context")
    words = [match.span() for match in _WORD.finditer(context)]
    pieces = [context[start:stop].encode("utf-8", "surrogatepass") for start, stop in words]
    ids = [
        list(map(int, encoded)) or [reader.tokenizer.eos_id]
        for encoded in reader.tokenizer.encode_batch(pieces)
    ]
    room = reader.max_tokens - len(question) - 3
    found, first = list[Window](), 0
    while first < len(words):
        sizes = list(accumulate(map(len, ids[first:])))
        count = max(1, int(np.searchsorted(sizes, room, side="right")))
        tokens = [token for word in ids[first : first + count] for token in word][:room]
        lead = [*question, reader.tokenizer.eos_id]
        example = reader.document([(lead, [0] * len(lead)), (tokens, [SELECTABLE] * len(tokens))])
        ends = [1 + len(lead) + min(size, room) for size in sizes[:count]]
        starts = [1 + len(lead), *ends[:-1]]
        spans = [_without_blanks(context, *words[first + n]) for n in range(count)]
        found.append(Window(example, starts, [end - 1 for end in ends], spans))
        if first + count >= len(words):
            break
        first += max(1, count - int(count * OVERLAP))
    return found


def _without_blanks(context: str, start: int, stop: int) -> tuple[int, int]:
    return stop - len(context[start:stop].lstrip()), stop


def make(row: Row, reader: Reader) -> list[Example]:
    """The windows that hold an answer, its first and last token marked, everywhere that it stands."""
    wanted = [span for span in _answer_spans(row)]
    made = []
    for window in windows(row, reader):
        begins = {start: place for (start, _), place in zip(window.spans, window.first_tokens, strict=True)}
        ends = {stop: place for (_, stop), place in zip(window.spans, window.last_tokens, strict=True)}
        marks, answered = list(window.example.marks), False
        for start, stop in wanted:
            if start in begins and stop in ends:
                marks[begins[start]] |= BEGINS
                marks[ends[stop]] |= ENDS
                answered = True
        if answered:
            made.append(Example(window.example.ids, marks))
    return made


def texts(row: Row) -> list[str]:
    return [text(row, "question"), text(row, "context")]


def answers_of(row: Row) -> list[str]:
    """The right answers: a text, a list of texts, or SQuAD's {"text": [...], ...}."""
    value = row.get("answers")
    if isinstance(value, Mapping):
        value = value.get("text")
    found = [text({"answers": one}, "answers") for one in (value if isinstance(value, list) else [value])]
    if not found:
        raise Wrong("no answer", "give one, or remove that row")
    return found


def _answer_spans(row: Row) -> list[tuple[int, int]]:
    """Characters of the answers in the context: where SQuAD says so, else everywhere that they stand."""
    context, answers, value = text(row, "context"), answers_of(row), row.get("answers")
    starts = value.get("answer_start") if isinstance(value, Mapping) else None
    if isinstance(starts, list) and len(starts) == len(answers):
        spans = [(int(start), int(start) + len(one)) for start, one in zip(starts, answers, strict=True)]
        for (start, stop), one in zip(spans, answers, strict=True):
            if context[start:stop] != one:
                raise Wrong(
                    f"the answer '{one[:40]}' does not stand at {start} of the context", "correct that row"
                )
        return spans
    spans = [found.span() for one in answers if one for found in re.finditer(re.escape(one), context)]
    if not spans:
        raise Wrong(f"the answer '{answers[0][:40]}' does not stand in the context", "correct that row")
    return spans


def predict(predictor: Predictor, rows: Sequence[Row], reader: Reader) -> list[str]:
    """The likeliest answer of each row, of LONGEST_ANSWER words at most."""
    made = [windows(row, reader) for row in rows]
    scores = iter(predictor.scores([window.example for found in made for window in found]))
    answers = []
    for row, found in zip(rows, made, strict=True):
        best, answer = -np.inf, ""
        for window in found:
            both = next(scores)
            total = both[window.first_tokens, 0][:, None] + both[window.last_tokens, 1][None, :]
            allowed = np.triu(np.ones(total.shape, bool)) & ~np.triu(
                np.ones(total.shape, bool), LONGEST_ANSWER
            )
            total = np.where(allowed, total, -np.inf)
            begin, end = np.unravel_index(int(total.argmax()), total.shape)
            if total[begin, end] > best:
                best = float(total[begin, end])
                answer = text(row, "context")[window.spans[int(begin)][0] : window.spans[int(end)][1]]
        answers.append(answer)
    return answers


def score(predicted: Sequence[str], gold: Sequence[Sequence[str]]) -> Scores:
    """exact_match and f1 of words, in percent, after SQuAD's normalisation; the best of several answers."""
    sums = np.array(
        [
            [
                max(_normal(said) == _normal(one) for one in right),
                max(_overlap(said, one) for one in right),
                1,
            ]
            for said, right in zip(predicted, gold, strict=True)
        ],
        dtype=float,
    )
    return Scores(_metrics(sums.sum(0)), sums, _metrics)


def _metrics(sums: Sums) -> Mapping[str, float]:
    return {"f1": 100 * ratio(sums[1], sums[2]), "exact_match": 100 * ratio(sums[0], sums[2])}


def _normal(answer: str) -> str:
    """As SQuAD's evaluation: lower case, without punctuation, articles and surplus blanks."""
    bare = "".join(letter for letter in answer.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def _overlap(said: str, right: str) -> float:
    a, b = _normal(said).split(), _normal(right).split()
    if not a or not b:
        return float(a == b)
    common = sum((Counter(a) & Counter(b)).values())
    return 2 * common / (len(a) + len(b))


def reference(row: Row) -> Any:
    return answers_of(row)


def first_words(rows: Sequence[Row]) -> list[str]:
    return [" ".join(text(row, "context").split()[:3]) for row in rows]


TASK = Task(
    Format(
        "question_answering",
        columns={"question": "question", "context": "context", "answers": "answers"},
        texts=texts,
        kinds=("question_answering",),
        make=make,
        learnt=frozenset({"answers"}),
        share_texts=True,
    ),
    predict,
    reference,
    score,
    ("the first words of the context", first_words),
)
