"""The trainer's end of the line to its supervisor."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from mmap import mmap
from multiprocessing import parent_process
from typing import Any

from bigtfm.config.problems import Hang, Problem, known_cause
from bigtfm.resilience.lines import Lines
from bigtfm.resilience.outcome import Outcome
from bigtfm.resilience.pulse import Pulse
from bigtfm.resilience.signals import StopRequest

_PR_SET_PDEATHSIG = 1


class Restart(Exception):
    """Asks the supervisors of all ranks to end all trainers and to start them again with `changes`."""

    def __init__(self, **changes: Any) -> None:
        super().__init__(changes)
        self.changes = changes


class Enough(Exception):
    """Ends a training before its end, without a save: whoever started it has seen what it wanted to see."""


class Lifeline:
    """What training asks and tells its supervisor. Made without arguments it leads nowhere.

    page: memory shared with the supervisor: byte 0 as in StopRequest, byte 1: a step has been taken.
    pulse: what the trainer is doing, for the supervisor to see; None: nobody looks.
    saves: whether training is to come to a checkpoint; a benchmark ends it before, and needs no room for one.
    hub: where this rank's supervisor can be reached by the others: address, port, token.
    """

    def __init__(
        self,
        lines: Lines | None = None,
        page: mmap | None = None,
        pulse: Pulse | None = None,
        hub: list[Any] | None = None,
    ) -> None:
        self._lines, self._page, self._hub = lines, page, hub
        self.pulse = pulse
        self.saves = True
        self._said = False
        self.stop = StopRequest(page)

    @property
    def supervised(self) -> bool:
        """Whether there is somebody to start the ranks again."""
        return self._lines is not None

    def meet(self, from_first: Callable[[Any], Any]) -> None:
        """Tells the supervisors of all ranks where rank 0's listens; a collective of all trainers."""
        if self._lines is not None:
            self._lines.send(meet=from_first(self._hub))

    def stepped(self) -> None:
        """A step has been taken: from here on, stopping means saving first."""
        if self._page is not None:
            self._page[1] = 1

    def report(self, error: BaseException | None) -> None:
        """Says how training ended; None: well. What was said first counts.

        A fault of the program is shown first: whoever hears of it may end this process at once.
        """
        if self._lines is not None and not self._said:
            self._said = True
            outcome = _outcome(error)
            if outcome.said:
                traceback.print_exception(error)
            self._lines.send(outcome=outcome.to_json())

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """Reports what the block raises before anything around it is closed, which may take its time."""
        try:
            yield
        except Enough:
            raise
        except BaseException as error:
            self.report(error)
            raise


def _outcome(error: BaseException | None) -> Outcome:
    if error is None:
        return Outcome(0)
    if isinstance(error, Restart):
        return Outcome(1, restart=error.changes)
    problem = known_cause(error) if isinstance(error, Exception) else None
    if problem is None:
        what = f"{type(error).__name__}: {error}".partition("\n")[0][:500]
        fix = "this is a fault of the program: report it with the traceback on stderr"
        return Outcome(1, what, "training", fix, said=True)
    return Outcome.of(problem, cause=not isinstance(problem, Hang))


def die_with(parent: int) -> None:
    """Ends this process when its parent ends, however that happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    if os.getppid() != parent:
        os._exit(1)


def wake_when_parent_ends() -> None:
    """Lets this process go on when its parent ends, should it have been stopped (SIGSTOP) meanwhile."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGCONT)


def end_with_parent() -> None:
    """For a process of multiprocessing, whatever started it: ends it with the process that wanted it."""
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        threading.Event().wait(1.0)
    os._exit(1)


def run_trainer(trainer: Callable[[Lifeline], None], lifeline: Lifeline) -> int:
    """Trains, reports, and returns the exit code. What is not understood is a traceback."""
    try:
        trainer(lifeline)
    except Restart as wish:
        lifeline.report(wish)
        return 1
    except Exception as error:
        lifeline.report(error)
        problem: Problem | None = known_cause(error)
        if problem is None and not lifeline.supervised:
            raise
        return problem.exit_code if problem is not None else 1
    lifeline.report(None)
    return 0
