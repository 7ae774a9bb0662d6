"""Units of work in several processes. A killed worker is noticed; none outlives its parent process."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

from bigtfm.config.problems import DataProblem, Problem, StorageProblem
from bigtfm.data.sources import Unit
from bigtfm.data.units import Job, Record, write_unit
from bigtfm.resilience.lifeline import end_with_parent

STORAGE_FIX = "check space and permissions, then run the same command again: it continues"


def run_units(
    job: Job, units: Sequence[Unit], pending: Sequence[int], workers: int, chosen: int | None
) -> Iterator[tuple[int, Record]]:
    """(unit, record) as they are done; in this process where one is enough."""
    if min(workers, len(pending)) <= 1:
        for number in pending:
            yield number, write_unit(job, number, units[number], chosen)
        return
    # spawn: a fork would inherit the threads' locks of whatever library the caller has loaded
    pool = ProcessPoolExecutor(min(workers, len(pending)), get_context("spawn"), _start_worker)
    try:
        futures = [pool.submit(_work, job, number, units[number], chosen) for number in pending]
        for future in as_completed(futures):
            number, result = future.result()
            if not isinstance(result, Record):
                problem, what, where, fix = result
                raise problem(what, where=where, fix=fix)
            yield number, result
    except BrokenProcessPool:
        fix = "run the same command again, it continues; fewer --workers need less memory"
        raise DataProblem(
            "a worker was killed (out of memory?)", where=str(job.units.parent.parent), fix=fix
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Workers die with Ctrl-C, silently, and with the process that started them, however that died."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    end_with_parent()


def _work(job: Job, number: int, spans: Unit, chosen: int | None) -> tuple[int, Any]:
    """The unit's record, or the parts of a Problem (exceptions with keyword arguments don't travel)."""
    try:
        return number, write_unit(job, number, spans, chosen)
    except Problem as problem:
        return number, (type(problem), problem.what, problem.where, problem.fix)
    except OSError as error:
        return number, (
            StorageProblem,
            f"can't be written: {error}",
            str(job.units.parent.parent),
            STORAGE_FIX,
        )
