"""Units of work in several processes. A killed worker is noticed; none outlives its parent process."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar, cast

from bigtfm.config.problems import DataProblem, Problem, StorageProblem
from bigtfm.data.sources import Unit
from bigtfm.data.units import Job, Record, write_unit
from bigtfm.resilience.lifeline import end_with_parent

R = TypeVar("R")
STORAGE_FIX = "check space and permissions, then run the same command again: it continues"


def run_units(
    job: Job, units: Sequence[Unit], pending: Sequence[int], workers: int, chosen: int | None
) -> Iterator[tuple[int, Record]]:
    """(unit, record) as they are done."""
    calls = {number: (job, number, units[number], chosen) for number in pending}
    return run_all(write_unit, calls, workers, job.units.parent.parent)


def run_all(
    work: Callable[..., R], calls: Mapping[int, tuple[Any, ...]], workers: int, out: Path
) -> Iterator[tuple[int, R]]:
    """(number, work(*arguments)) of every call as they are done; in this process where one is enough."""
    if min(workers, len(calls)) <= 1:
        for number, arguments in calls.items():
            yield number, work(*arguments)
        return
    # spawn: a fork would inherit the threads' locks of whatever library the caller has loaded
    pool = ProcessPoolExecutor(min(workers, len(calls)), get_context("spawn"), _start_worker)
    try:
        futures = [pool.submit(_work, work, number, arguments, out) for number, arguments in calls.items()]
        for future in as_completed(futures):
            number, result, problem = future.result()
            if problem is not None:
                kind, what, where, fix = problem
                raise kind(what, where=where, fix=fix)
            yield number, cast(R, result)
    except BrokenProcessPool:
        fix = "run the same command again, it continues; fewer --workers need less memory"
        raise DataProblem("a worker was killed (out of memory?)", where=str(out), fix=fix) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Workers die with Ctrl-C, silently, and with the process that started them, however that died."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    end_with_parent()


def _work(
    work: Callable[..., R], number: int, arguments: tuple[Any, ...], out: Path
) -> tuple[int, R | None, tuple[type[Problem], str, str, str] | None]:
    """The result, or the parts of a Problem (exceptions with keyword arguments don't travel)."""
    try:
        return number, work(*arguments), None
    except Problem as problem:
        return number, None, (type(problem), problem.what, problem.where, problem.fix)
    except OSError as error:
        return number, None, (StorageProblem, f"can't be written: {error}", str(out), STORAGE_FIX)
