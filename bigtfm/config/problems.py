"""A failure that the user can act on: one line (what, where, the fix) and a documented exit code."""

from __future__ import annotations

import difflib
import errno
import json
import math
import os
import sys
from collections.abc import Iterable
from functools import partial
from typing import Any, ClassVar

DIVERGED = (  # advice
    "lower the lr or warm up longer (DeepSpeed JSON), and look for extreme values in the run config"
)


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


class Occupied(ConfigProblem):
    """The run directory is another process's; nothing may be written there, not even of this failure."""


class DataProblem(Problem):
    """Input files, a prepared data set or a tokenizer is missing, damaged or does not fit."""

    exit_code = 65


class NumericsProblem(Problem):
    """A loss, gradient or weight is not finite, or two models that should be the same differ."""

    exit_code = 70


def loss_scale_floor() -> NumericsProblem:
    """What DeepSpeed means by "Current loss scale already at minimum"."""
    return NumericsProblem(
        "gradients overflow fp16 at the smallest loss scale too: no update is possible",
        where="DeepSpeed JSON: fp16",
        fix=f"use bf16 if the GPU has it; else {DIVERGED}; what was saved is finite",
    )


class StorageProblem(Problem):
    """Writing or reading the run directory failed."""

    exit_code = 74


class RequeueRequested(Problem):
    """The run saved and stopped because it was asked to; starting it again continues it."""

    exit_code = 75


class Interrupted(RequeueRequested):
    """The run saved and stopped because of a Ctrl-C."""

    exit_code = 130


class NoCheckpoint(Problem):
    """No valid checkpoint where one is needed."""

    exit_code = 76


class Hang(Problem):
    """A rank stopped making progress, or is gone."""

    exit_code = 79


def known_cause(error: Exception) -> Problem | None:
    """What a library's or the system's exception means to the user; None: that is ours to find out."""
    said, kind = str(error).strip().partition("\n")[0][:200], type(error).__name__
    if isinstance(error, Problem):
        return error
    if too_many_files(error) is not None:
        return too_many_files(error)
    if isinstance(error, BrokenPipeError):
        return None
    if isinstance(error, OSError):
        if error.args and isinstance(error.args[0], list):  # shutil.copytree's, a (from, to, why) each
            said = str(error.args[0][0][-1])
        return StorageProblem(
            error.strerror or said,
            where=str(error.filename or "output"),
            fix="check that it is there, its permissions, and the free space",
        )
    if said.startswith("Current loss scale already at minimum"):
        return loss_scale_floor()
    if isinstance(error, MemoryError) or "out of memory" in said or "can't allocate memory" in said:
        return ConfigProblem(
            f"out of memory: {said}",
            where="this machine",
            fix="use a smaller micro batch, sequence or model, or compute.recompute=full",
        )
    if said == "can't start new thread":
        return ConfigProblem(
            "the system starts no more threads",
            where="this machine",
            fix="leave more memory for them (a smaller micro batch or model), or raise the limit on "
            "processes: ulimit -u, or the job's pids.max",
        )
    if kind == "DistNetworkError" and "EADDRINUSE" in str(error):
        return ConfigProblem(
            "the ranks can't meet: another program has the port MASTER_PORT names",
            where="environment",
            fix="name a free one: deepspeed --master_port N, torchrun --master_port N, or MASTER_PORT=N",
        )
    if kind in ("DistNetworkError", "DistStoreError"):  # torch.distributed's, when ranks meet
        return ConfigProblem(
            f"the ranks don't meet: {said}",
            where="environment",
            fix="MASTER_ADDR must be rank 0's machine, and MASTER_PORT a port that is free there",
        )
    if kind == "DistBackendError" or (isinstance(error, RuntimeError) and "/gloo/" in said):
        return Hang(
            f"another rank has ended or can't be reached: {said}",
            where="communication",
            fix="see what that rank said; then start the same command again: it resumes",
        )
    return None


def say(line: str) -> None:
    """A line on stderr. A terminal, pipe or disk that does not take it is no reason to end anything."""
    if sys.stderr is None:
        return
    try:
        print(f"bigtfm: {line}", file=sys.stderr, flush=True)
    except OSError:  # what is kept for a later flush would change the exit code
        sys.stderr = open(os.devnull, "w", encoding="utf-8")


def too_many_files(error: Exception) -> StorageProblem | None:
    """What EMFILE and ENFILE mean, also in a library's words; None: it is neither."""
    if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE) or "Too many open files" in str(error):
        return StorageProblem(
            "too many files and connections are open at once",
            where="this machine",
            fix="raise `ulimit -n`, then start the same command again",
        )
    return None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The fix for an unknown name: the closest known one, or the list of all."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else f"use one of: {', '.join(known)}"


def first_change(name: str, before: Any, now: Any) -> tuple[str, Any, Any]:
    """The first value below `name` that differs, with its full name."""
    while isinstance(now, dict) and isinstance(before, dict):
        key = next(key for key in now | before if now.get(key) != before.get(key))
        name, before, now = f"{name}.{key}", before.get(key), now.get(key)
    return name, before, now


def counted(number: int, noun: str) -> str:
    """1 document, 2 documents."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def shown(value: Any) -> str:
    """A value from a config as a message quotes it: short, and on one line."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
