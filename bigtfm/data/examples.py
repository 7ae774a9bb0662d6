"""A task's examples: rows of a table as tokens, each with a mark that says what is to be learnt there.

What a mark means is the objective's (data/supervised.py):

    classification                    n + 1 on the first and the last token: the example is of label n
    tagging                           n + 1 on the first token of a word: it has label n
    question_answering                bits: 1 the answer may begin or end here, 2 it begins, 4 it ends
    sequence_to_sequence, completion  1: the token is to be written, what has 0 is read
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from bigtfm.config.problems import DataProblem
from bigtfm.data.documents import Row, Where, read_rows
from bigtfm.data.sources import Span
from bigtfm.data.tokenizer import Tokenizer


class Example(NamedTuple):
    """One document: BOS ... EOS, and as many marks."""

    ids: list[int]
    marks: list[int]


class Wrong(ValueError):
    """A value of a row that is no task's: (what is wrong, the fix)."""


@dataclass(frozen=True)
class Reader:
    """What turns text into examples: the tokenizer, the labels in their order, the most tokens."""

    tokenizer: Tokenizer
    max_tokens: int
    labels: tuple[str, ...] = ()
    options: Mapping[str, str] | None = None

    def mark(self, label: str) -> int:
        """The mark of a label.

        Raises:
            Wrong: it is none of them.
        """
        try:
            return self.labels.index(label) + 1
        except ValueError:
            known = ", ".join(self.labels[:8]) + (", ..." if len(self.labels) > 8 else "")
            raise Wrong(f"unknown label '{label}'", f"the labels are {known}") from None

    def document(self, parts: Iterable[tuple[list[int], list[int]]], bos: int = 0, eos: int = 0) -> Example:
        """BOS, the parts (ids, marks), EOS; bos and eos: their marks."""
        ids, marks = [self.tokenizer.bos_id], [bos]
        for part, its_marks in parts:
            ids += part
            marks += its_marks
        return Example([*ids, self.tokenizer.eos_id], [*marks, eos])


@dataclass(frozen=True)
class Format:
    """How a task's rows become examples.

    columns: the task's names of what it reads, by which rows reach the functions below, and the columns that
    hold them unless the user says otherwise; those of `optional` may be missing. texts: what of a row a
    tokenizer is trained on. kinds: objectives that can learn the examples. make: of a row, as many examples
    as it gives (none: it is left out). labels_of: the labels in a row.
    """

    name: str
    columns: Mapping[str, str]
    texts: Callable[[Row], list[str]]
    kinds: tuple[str, ...]
    make: Callable[[Row, Reader], list[Example]]
    labels_of: Callable[[Row], list[str]] | None = None
    optional: frozenset[str] = frozenset()  # columns that may be missing
    learnt: frozenset[str] = frozenset()  # columns that may be missing where nothing is learnt
    share_texts: bool = False  # rows may have nearly the same text, and differ in what is asked of it


@dataclass(frozen=True)
class TaskSetting:
    """A format, and what a user has set: the column of each of its names, the labels in their order (empty:
    those of the data), the most tokens of an example, and what the format has as options.
    """

    format: Format
    columns: Mapping[str, str]
    labels: tuple[str, ...] = ()
    max_tokens: int = 512
    options: Mapping[str, str] = field(default_factory=dict)

    def rows(self, span: Span, unlabelled: bool = False) -> Iterator[tuple[Row, Where]]:
        """The span's rows by the format's names. unlabelled: what is to be learnt need not be there."""
        names = self.format.optional | (self.format.learnt if unlabelled else frozenset())
        optional = {self.columns[name] for name in names}
        for row, where in read_rows(span, list(self.columns.values()), optional):
            yield {name: row[column] for name, column in self.columns.items() if column in row}, where

    def texts(self, span: Span, unlabelled: bool = False) -> Iterator[bytes]:
        """What a tokenizer is trained on."""
        for row, where in self.rows(span, unlabelled):
            with told(where):
                parts = self.format.texts(row)
            yield "\n".join(parts).encode("utf-8", "surrogatepass")

    def labels_in(self, span: Span) -> Counter[str]:
        """The labels of the span's rows, and how often each stands there."""
        found: Counter[str] = Counter()
        if self.format.labels_of is not None:
            for row, where in self.rows(span):
                with told(where):
                    found.update(self.format.labels_of(row))
        return found

    def record(self) -> dict[str, Any]:
        """For the data set's header: what its examples are for."""
        options = {"columns": dict(self.columns), **self.options}
        return {"name": self.format.name, "kinds": self.format.kinds, "labels": self.labels,
                "max_tokens": self.max_tokens, "options": options}  # fmt: skip


def text(row: Row, name: str) -> str:
    """A value that has to be text.

    Raises:
        Wrong: it is not, or there is none.
    """
    value = row.get(name)
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value != value:
        raise Wrong(f"'{name}' is {_kind(value)}, not text", "correct or remove that row, or see --column")
    return str(value)


def label(row: Row, name: str) -> str:
    """A value that has to be a label: text that is not empty, or true or false.

    Raises:
        Wrong: it is none.
    """
    value = row.get(name)
    found = str(value).lower() if isinstance(value, bool) else text(row, name)
    if not found:
        raise Wrong(f"'{name}' is empty", "give the row a label or remove it, or see --column")
    return found


def items(row: Row, name: str) -> list[Any]:
    """A value that has to be a list.

    Raises:
        Wrong: it is not.
    """
    value = row.get(name)
    if not isinstance(value, list | tuple):
        raise Wrong(f"'{name}' is {_kind(value)}, not a list", "correct or remove that row, or see --column")
    return list(value)


def _kind(value: Any) -> str:
    return "missing" if value is None or value != value else f"of type {type(value).__name__}"


@contextmanager
def told(where: Where) -> Iterator[None]:
    """What is wrong in the row that the block looks at becomes its line.

    Raises:
        DataProblem: the block has raised Wrong.
    """
    try:
        yield
    except Wrong as wrong:
        what, fix = wrong.args
        raise DataProblem(what, where=where(), fix=fix) from None
