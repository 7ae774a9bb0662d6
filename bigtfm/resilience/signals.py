"""A signal asks for a stop; the loop grants it at a step boundary, on all ranks together."""

from __future__ import annotations

import os
import signal
from collections import Counter, defaultdict
from mmap import mmap
from types import FrameType

from bigtfm.config.problems import Interrupted, RequeueRequested

POLITE = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
ORPHANED = 255  # in place of a signal's number: the launcher is gone
RESUME = "start the same command again: it goes on from there"


def install(receive: signal._HANDLER) -> None:
    """Gives all of them to `receive`; a SIGHUP that is ignored (nohup) stays ignored."""
    for number in POLITE:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, receive)


class StopRequest:
    """What the trainer's loop looks at: whether a signal, or the supervisor, asks it to stop.

    page: memory that the supervisor writes into (byte 0: a signal's number or ORPHANED). Without it a second
    Ctrl-C leaves at once; a supervisor sees to that itself.
    """

    def __init__(self, page: bytearray | mmap | None = None) -> None:
        self._page = bytearray(1) if page is None else page
        self._alone = page is None
        install(self._receive)

    @property
    def signal(self) -> int:
        """Number of the signal, ORPHANED, or 0: none yet."""
        return self._page[0]

    @property
    def flags(self) -> tuple[bool, bool, bool]:
        """Asked to stop; by a Ctrl-C; because the launcher is gone. Ranks add them up."""
        return self.signal > 0, self.signal == signal.SIGINT, self.signal == ORPHANED

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self._alone and number == signal.SIGINT == self.signal:
            os._exit(128 + signal.SIGINT)
        if self.signal != signal.SIGINT:
            self._page[0] = number


class Arrivals:
    """Signals as a supervisor counts them: a terminal sends each to it and to its trainer, which is one."""

    def __init__(self) -> None:
        self._counts: defaultdict[int, Counter[str]] = defaultdict(Counter)  # by number, then receiver
        self.first = 0  # 0: none yet

    def add(self, receiver: str, number: int) -> None:
        if number in POLITE or number == ORPHANED:
            self._counts[number][receiver] += 1
            self.first = self.first or number

    def count(self, number: int) -> int:
        return max(self._counts[number].values(), default=0)

    @property
    def asked(self) -> int:
        """What to tell the trainer: SIGINT if there was one, else the first."""
        return signal.SIGINT if self.count(signal.SIGINT) else self.first


def stopped(step: int, run_dir: object, interrupted: float, orphaned: float) -> RequeueRequested:
    """What ends a run that was asked to stop and has saved."""
    kind = Interrupted if interrupted else RequeueRequested
    why = "Ctrl-C" if interrupted else "the end of its launcher" if orphaned else "a signal"
    return kind(f"saved at step {step} and stopped by {why}", where=str(run_dir), fix=RESUME)
