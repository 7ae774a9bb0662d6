"""Runs the trials of a sweep as processes of this machine, some at a time; each result is a row.

One JSON object a line in OUT/results.jsonl; what stands there already is not trained again.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Protocol

from bigtfm.bench.results import append, read_rows
from bigtfm.config.problems import ConfigProblem, Interrupted, Problem, RequeueRequested, StorageProblem
from bigtfm.resilience.claim import alive, claim
from bigtfm.resilience.signals import POLITE
from bigtfm.sweep.halving import Work, due
from bigtfm.sweep.ranks import Ranks, places
from bigtfm.sweep.trial import STOPPED, Row, Study, refusal

RESULTS = "results.jsonl"
_POLL = 0.1  # seconds
_SAVING = 120.0  # seconds that trials have to save when the sweep is asked to stop
_DYING = 60.0  # seconds that a trial which a killed sweep has left has to end
_AGAIN = "start the same command again: it goes on"
_TAIL = 1 << 14  # bytes: some lines of metrics
_STARTS = 3  # of a trial that somebody else stops again and again


class Training(Protocol):
    """The ranks of a trial; see `Ranks`."""

    def poll(self) -> int | None: ...
    def stop(self) -> None: ...
    def kill(self) -> None: ...


Start = Callable[[Path, Path, int, Path, Sequence[str], int], Training]  # as Ranks


@dataclass(frozen=True)
class _Running:
    ranks: Training
    place: int
    began: float


def known_results(study: Study) -> dict[Work, float | None]:
    """What stands in results.jsonl."""
    return {(row["trial"], row["rung"]): row["value"] for row in read_rows(study.out / RESULTS)}


def run_sweep(
    study: Study, jobs: int, start: Start = Ranks, tell: Callable[[int, int], None] = lambda *_: None
) -> Iterator[Row]:
    """Trains what is due, `jobs` trials at a time, and yields each row once it is on the disk.

    tell: hears of the trials that run how many steps they have taken, and of how many.

    Raises:
        ConfigProblem: another sweep, or a training that is none of its own, is at work there; or a trial's
            metrics lack the one it is compared by.
        RequeueRequested, Interrupted: a signal asked to stop; the trials have saved.
        StorageProblem: `out` can't be written, by the sweep or by a trial.
    """
    settings, last = study.sweep.settings, len(study.rungs) - 1
    spots = places(jobs, settings.ranks)
    running: dict[Work, _Running] = {}
    starts: Counter[Work] = Counter()
    with claim(study.out, "sweep", "--out"), _asked() as signals:
        results = known_results(study)
        try:
            while not signals:
                waiting = due(settings, last, results, running)
                while waiting and len(running) < jobs:
                    work = waiting.pop(0)
                    try:
                        study.lay_out(work)
                    except StorageProblem:
                        raise
                    except Problem as problem:
                        row = study.row(work, *_first(problem))
                        break
                    place = min(set(range(jobs)) - {each.place for each in running.values()})
                    running[work] = _started(study, work, place, spots[place], start)
                    starts[work] += 1
                else:
                    if not running:
                        return
                    ended = _ended(running)
                    if ended is None:
                        tell(*_steps(study, running))
                        time.sleep(_POLL)
                        continue
                    work, code = ended
                    seconds = time.monotonic() - running.pop(work).began
                    if code in STOPPED and starts[work] < _STARTS:
                        continue  # somebody has stopped it: it goes on from what it saved
                    row = study.row(work, code, seconds)
                    if code == StorageProblem.exit_code:  # the disk's fault, not the point's
                        raise StorageProblem(
                            row["why"], where=str(study.out), fix=f"free space there, then {_AGAIN}"
                        )
                append(study.out / RESULTS, row)
                results[work] = row["value"]
                yield row
            _save(running, signals)
            raise _stopped(study, running, signals[0])
        finally:
            for each in running.values():
                each.ranks.kill()


def _first(problem: Problem) -> tuple[int, None, str]:
    code, why = refusal(problem)
    return code, None, why


def _started(study: Study, work: Work, place: int, spot: tuple[list[str], int], start: Start) -> _Running:
    folder, (gpus, threads) = study.folder(work[0]), spot
    until = time.monotonic() + _DYING
    while alive(folder, os.environ):
        if time.monotonic() > until:
            fix = f"wait until it has ended, then {_AGAIN}"
            raise ConfigProblem("another training is at work here", where=str(folder), fix=fix)
        time.sleep(_POLL)
    files = folder / "run.toml", folder / "deepspeed.json"
    ranks = start(*files, study.sweep.settings.ranks, folder / "logs", gpus, threads)
    return _Running(ranks, place, time.monotonic())


def _ended(running: dict[Work, _Running]) -> tuple[Work, int] | None:
    for work, each in running.items():
        code = each.ranks.poll()
        if code is not None:
            return work, code
    return None


def _steps(study: Study, running: Collection[Work]) -> tuple[int, int]:
    """Taken by these trials, and of how many."""
    taken = sum(_last_step(study.folder(trial) / "metrics.jsonl") for trial, _ in running)
    return taken, sum(study.rungs[rung] for _, rung in running)


def _last_step(metrics: Path) -> int:
    """Of a training that goes on: its log may be long, and its last line unfinished."""
    try:
        with metrics.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
            return int(json.loads(file.read().rsplit(b"\n", 2)[-2])["step"])
    except (OSError, ValueError, LookupError, TypeError):
        return 0


def _save(running: dict[Work, _Running], signals: list[int]) -> None:
    """Lets the trials save and stop, until a second Ctrl-C or the time's end; the caller ends the rest."""
    until = time.monotonic() + _SAVING
    for each in running.values():
        each.ranks.stop()
    while any(each.ranks.poll() is None for each in running.values()) and time.monotonic() < until:
        if signals.count(signal.SIGINT) > 1:
            return
        time.sleep(_POLL)


def _stopped(study: Study, running: dict[Work, _Running], number: int) -> RequeueRequested:
    kind = Interrupted if number == signal.SIGINT else RequeueRequested
    saved = all(each.ranks.poll() in (0, *STOPPED) for each in running.values())
    what = "the trials that ran have saved" if saved else "not every trial that ran has saved"
    return kind(
        f"stopped by {signal.Signals(number).name}; {what}",
        where=str(study.out),
        fix=_AGAIN,
    )


@contextmanager
def _asked() -> Iterator[list[int]]:
    """The signals that asked for a stop, as they come."""
    arrived: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        arrived.append(number)

    before = {number: signal.getsignal(number) for number in POLITE}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, note)
    try:
        yield arrived
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
