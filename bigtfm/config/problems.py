"""A failure that the user can act on: one line (what, where, the fix) and a documented exit code."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable
from functools import partial
from typing import Any, ClassVar


class Problem(Exception):
    """A failure with a known cause. Subclasses carry the exit code; `line` is what the user reads."""

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, where: str, fix: str) -> None:
        super().__init__(what)
        self.what = " ".join(what.split())  # one line, whatever a library's message held
        self.where = " ".join(where.split())
        self.fix = " ".join(fix.split())

    def __reduce__(self) -> tuple[object, ...]:  # crosses from rank to rank with all of its parts
        return partial(type(self), self.what, where=self.where, fix=self.fix), ()

    @property
    def line(self) -> str:
        return f"error: {self.where}: {self.what}. Fix: {self.fix}"

    def __str__(self) -> str:
        return self.line


class ConfigProblem(Problem):
    """The run config, the DeepSpeed JSON or the command line is wrong."""

    exit_code = 64


class DataProblem(Problem):
    """Input files, a prepared data set or a tokenizer is missing, damaged or does not fit."""

    exit_code = 65


class NumericsProblem(Problem):
    """A loss, gradient or weight is not finite."""

    exit_code = 70


class StorageProblem(Problem):
    """Writing or reading the run directory failed."""

    exit_code = 74


class RequeueRequested(Problem):
    """The run saved and stopped because it was asked to; starting it again continues it."""

    exit_code = 75


class NoCheckpoint(Problem):
    """No valid checkpoint where one is needed."""

    exit_code = 76


class Hang(Problem):
    """A rank stopped making progress."""

    exit_code = 79


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The fix for an unknown name: the closest known one, or the list of all."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else f"use one of: {', '.join(known)}"


def shown(value: Any) -> str:
    """A value from a config as a message quotes it: short, and on one line."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
