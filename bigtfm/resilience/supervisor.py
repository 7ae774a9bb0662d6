"""The process beside each rank's trainer: it passes signals on, says how training ended, and ends the rest.

It is forked off before torch is there, and imports little: what can go wrong in training can't go wrong here.
The supervisors of all ranks agree (bigtfm/resilience/council.py), so that one line is printed and no process
stays.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from mmap import mmap
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from typing import Any

from bigtfm.config.launch import Launch
from bigtfm.config.problems import Interrupted, RequeueRequested, say
from bigtfm.config.sections import GuardSection
from bigtfm.host_memory import keep_pages
from bigtfm.resilience import stacks
from bigtfm.resilience.council import Council
from bigtfm.resilience.events import note
from bigtfm.resilience.launchers import launchers
from bigtfm.resilience.lifeline import Lifeline, die_with, run_trainer
from bigtfm.resilience.lines import Lines
from bigtfm.resilience.outcome import FAILURE, Outcome, of_silent_end
from bigtfm.resilience.pulse import Pulse
from bigtfm.resilience.signals import ORPHANED, Arrivals, install

Trainer = Callable[[Lifeline, dict[str, Any]], None]
_CLOSING = 5.0  # seconds that a trainer has to close what it has open, once it has said that it ends
_ORPHANED = 30.0  # seconds to save once the launcher is gone
_ASLEEP = 2.0  # seconds between two looks that mean that this process was stopped


def supervise(launch: Launch, run_dir: Path, guard: GuardSection, trainer: Trainer) -> int:
    """Runs `trainer(lifeline, changes)` in a child process and stays beside it; returns the exit code.

    changes: what a trainer has asked for by raising Restart; empty at first. In the child this does not
    return.
    """
    changes: dict[str, Any] = {}
    if launch.rank == 0:
        (run_dir / FAILURE).unlink(missing_ok=True)  # an earlier start's: what ends this one is news
    with _signals() as wakeups:
        arrivals = Arrivals()
        while True:
            supervisor = Supervisor(launch, run_dir, guard, arrivals, wakeups)
            supervisor.start(trainer, changes)
            outcome = supervisor.run()
            if outcome.restart is None:
                return outcome.code
            changes = changes | outcome.restart
            note(run_dir, "restart", rank=launch.rank, **changes)
            attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
            os.environ["TORCHELASTIC_RESTART_COUNT"] = str(attempt + 1)  # torchrun's store is used anew


@contextmanager
def _signals() -> Iterator[int]:
    """Signals to this process become bytes that can be read from a pipe."""
    read, write = _pipe()
    install(lambda *_: None)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    try:
        yield read
    finally:
        signal.set_wakeup_fd(before)
        os.close(read)
        os.close(write)


class Supervisor:
    """One life of a trainer."""

    def __init__(
        self, launch: Launch, run_dir: Path, guard: GuardSection, arrivals: Arrivals, wakeups: int
    ) -> None:
        self._rank, self._run_dir = launch.rank, run_dir
        self._arrivals, self._wakeups = arrivals, wakeups
        self._page, self._pulse = mmap(-1, 4096), Pulse()
        self._selector = DefaultSelector()
        self._council = Council(launch, run_dir, guard, self._pulse, self._selector)
        self._launchers = launchers()
        self._pid = 0
        self._exited = False
        self._own: Outcome | None = None  # how the trainer has ended, or has to
        self._orphaned = self._closing = math.inf  # when these have lasted too long

    def start(self, trainer: Trainer, changes: dict[str, Any]) -> None:
        """Forks. The child trains, and leaves by SystemExit."""
        ours, theirs = socket.socketpair()
        wake_read, wake_write = _pipe()
        parent = os.getpid()
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                with suppress(OSError):
                    stream.flush()
        self._pid = os.fork()
        if self._pid:
            theirs.close()
            os.close(wake_write)
            self._lines, self._wake = Lines(ours), wake_read
            for source in (self._wakeups, self._wake, self._lines):
                self._selector.register(source, EVENT_READ)
            return
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        die_with(parent)
        ours.close()
        os.close(wake_read)
        address = self._council.address
        self._council.leave()
        self._selector.close()
        stacks.register()
        keep_pages()
        lifeline = Lifeline(Lines(theirs), self._page, self._pulse, address)
        raise SystemExit(run_trainer(lambda line: trainer(line, changes), lifeline))

    def run(self) -> Outcome:
        """Until the trainer is gone, and it is known how the job ended."""
        last = time.monotonic()
        while self._council.verdict is None or not self._exited:
            self._selector.select(0.5 if self._own is None else 0.1)
            now = time.monotonic()
            if now - last > _ASLEEP:
                self._council.woke(now)
            self._listen()
            self._look_at_trainer(now)
            self._look_at_launchers(now)
            self._pass_on(now)
            self._council.attend(now, self._pid, self._own, told=bool(self._arrivals.first))
            if now > self._closing or (self._council.verdict is not None and self._own is None):
                self._kill()
            last = now
        return self._leave(self._council.verdict)

    def _listen(self) -> None:
        for receiver, pipe in (("supervisor", self._wakeups), ("trainer", self._wake)):
            for number in _drain(pipe):
                self._arrivals.add(receiver, number)
        for message in self._lines.read():
            if "outcome" in message:
                self._own = self._own or Outcome(**message["outcome"])
            elif message.get("meet") is not None:
                self._council.meet(message["meet"])
        if self._lines.closed and self._lines in self._selector.get_map():  # else it wakes us all the time
            self._selector.unregister(self._lines)

    def _look_at_trainer(self, now: float) -> None:
        if not self._exited:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                self._exited = True
                self._listen()  # to its last words
                self._selector.unregister(self._wake)
                self._own = self._own or of_silent_end(
                    self._rank, os.waitstatus_to_exitcode(status), self._council.last_seen
                )
        if self._own is not None:
            self._closing = min(self._closing, now + _CLOSING)

    def _look_at_launchers(self, now: float) -> None:
        for launcher in self._launchers:
            if not launcher.lives:
                note(self._run_dir, "launcher gone", rank=self._rank, name=launcher.name)
                self._launchers = []
                self._arrivals.add("launcher", ORPHANED)
                self._orphaned = now + _ORPHANED
                break

    def _pass_on(self, now: float) -> None:
        """Tells the trainer to stop, or ends it where it could not save anything."""
        asked = self._arrivals.asked
        if not asked or self._own is not None:
            return
        if self._page[0] not in (asked, signal.SIGINT):
            self._page[0] = asked
        self._own = self._at_once(now)
        if self._own is not None:
            self._kill()

    def _at_once(self, now: float) -> Outcome | None:
        """What ends a trainer that is asked to stop without waiting for it; None: it will save."""
        interrupted = self._arrivals.count(signal.SIGINT)
        fix = "start the same command again: it goes on from the last checkpoint"
        if interrupted > 1:
            what = "stopped at once by a second Ctrl-C, without saving"
        elif not self._page[1]:
            what, fix = "stopped before a step was done: there was nothing to save", "start it again"
        elif now > self._orphaned:
            what = f"its launcher is gone, and it could not save within {_ORPHANED:.0f} s"
        else:
            return None
        kind = Interrupted if interrupted else RequeueRequested
        return Outcome.of(kind(what, where=str(self._run_dir), fix=fix))

    def _kill(self) -> None:
        if not self._exited:
            os.kill(self._pid, signal.SIGKILL)

    def _leave(self, ended: Outcome) -> Outcome:
        self._council.leave()
        self._selector.close()
        self._lines.close()
        os.close(self._wake)
        if self._council.speaks and ended.code and not ended.said and ended.restart is None:
            say(ended.line)
        return ended


def _pipe() -> tuple[int, int]:
    """Neither end waits."""
    read, write = os.pipe()
    os.set_blocking(read, False)
    os.set_blocking(write, False)
    return read, write


def _drain(pipe: int) -> bytes:
    try:
        return os.read(pipe, 4096)
    except BlockingIOError:
        return b""
