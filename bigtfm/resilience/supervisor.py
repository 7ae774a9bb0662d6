"""The process beside each rank's trainer: it passes signals on, says how training ended, and ends the rest.

It is forked off before torch is there, and imports the standard library only: what can go wrong in training
can't go wrong here. Supervisors of all ranks agree (bigtfm/resilience/hub.py), so that one line is printed
and no process stays.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from mmap import mmap
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from typing import Any

from bigtfm.config.launch import Launch
from bigtfm.config.problems import Interrupted, RequeueRequested
from bigtfm.config.sections import GuardSection
from bigtfm.resilience import stacks
from bigtfm.resilience.events import note
from bigtfm.resilience.hub import Hub, Peer, join
from bigtfm.resilience.launchers import launchers
from bigtfm.resilience.lifeline import Lifeline, die_with, run_trainer
from bigtfm.resilience.lines import Lines
from bigtfm.resilience.outcome import Outcome, lost, of_silent_end, verdict
from bigtfm.resilience.pulse import Pulse
from bigtfm.resilience.signals import ORPHANED, Arrivals, install

Trainer = Callable[[Lifeline, dict[str, Any]], None]
SILENCE = 5.0  # seconds; launchers notice an end within one
_TOLD = 3.0  # seconds for all ranks to say how they ended, once one has
_CLOSING = 5.0  # seconds that a trainer has to close what it has open, once it has said that it ends
_BEAT = 1.0  # seconds between two signs of life
_ASLEEP = 5.0  # seconds between two looks that mean that this process was stopped
_ORPHANED = 30.0  # seconds to save once the launcher is gone


def supervise(launch: Launch, run_dir: Path, guard: GuardSection, trainer: Trainer) -> int:
    """Runs `trainer(lifeline, changes)` in a child process and stays beside it; returns the exit code.

    changes: what a trainer has asked for by raising Restart; empty at first. In the child this does not
    return.
    """
    read, write = os.pipe()
    os.set_blocking(read, False)
    os.set_blocking(write, False)
    arrivals = Arrivals()
    install(lambda *_: None)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    old = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    try:
        changes: dict[str, Any] | None = {}
        while changes is not None:
            supervisor = Supervisor(launch, run_dir, guard, arrivals, read)
            supervisor.start(trainer, changes)
            outcome = supervisor.run()
            changes = None if outcome.restart is None else changes | outcome.restart
            attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
            os.environ["TORCHELASTIC_RESTART_COUNT"] = str(attempt + 1)  # torchrun's store is used anew
        return outcome.code
    finally:
        signal.set_wakeup_fd(old)
        os.close(read)
        os.close(write)


class Supervisor:
    """One life of a trainer."""

    def __init__(
        self, launch: Launch, run_dir: Path, guard: GuardSection, arrivals: Arrivals, wakeups: int
    ) -> None:
        self._launch, self._run_dir, self._guard = launch, run_dir, guard
        self._arrivals, self._wakeups = arrivals, wakeups
        self._page, self._pulse = mmap(-1, 4096), Pulse()
        self._launchers = launchers()
        self._hub: Hub | None = None
        self._peer: Peer | None = None  # another rank's connection to the hub
        self._met = False
        self._pid = 0
        self._exited = False
        self._own: Outcome | None = None
        self._all: dict[int, Outcome] = {}
        self._verdict: Outcome | None = None
        self._speaks = False
        self._deadlines: dict[str, float] = {}
        self._selector = DefaultSelector()

    # --- the child

    def start(self, trainer: Trainer, changes: dict[str, Any]) -> None:
        """Forks. The child trains, and leaves by SystemExit."""
        if self._launch.rank == 0 and self._launch.world_size > 1:
            try:
                self._hub = Hub(os.environ.get("MASTER_ADDR", "127.0.0.1"))
            except OSError:
                pass  # the trainer says what is wrong with that address
        ours, theirs = socket.socketpair()
        wake_read, wake_write = os.pipe()
        os.set_blocking(wake_read, False)
        os.set_blocking(wake_write, False)
        parent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        self._pid = os.fork()
        if self._pid:
            theirs.close()
            os.close(wake_write)
            self._lines, self._wake = Lines(ours), wake_read
            return
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        die_with(parent)
        ours.close()
        os.close(wake_read)
        stacks.register()
        address = self._hub.address if self._hub is not None else None
        lifeline = Lifeline(Lines(theirs), self._page, self._pulse, address)
        if self._hub is not None:
            self._hub.close()
        raise SystemExit(run_trainer(lambda line: trainer(line, changes), lifeline))

    # --- the parent

    def run(self) -> Outcome:
        """Until the trainer is gone, and it is known how the job ended."""
        for source in (self._wakeups, self._wake, self._lines, self._hub):
            if source is not None:
                self._selector.register(source, EVENT_READ)
        last = time.monotonic()
        while self._verdict is None or not self._exited:
            self._selector.select(0.1 if self._deadlines else 0.5)
            now = time.monotonic()
            if now - last > _ASLEEP:
                self._wake_up(now)
            last = now
            self._listen()
            self._look(now)
            self._agree(now)
        return self._leave()

    def _listen(self) -> None:
        for receiver, pipe in (("supervisor", self._wakeups), ("trainer", self._wake)):
            for number in _drain(pipe):
                self._arrivals.add(receiver, number)
        for message in self._lines.read():
            if "outcome" in message:
                self._own = self._own or Outcome.from_json(message["outcome"])
            elif message.get("meet") is not None:
                self._meet(message["meet"])
        if self._hub is not None:
            for rank, message in self._hub.read():
                if "outcome" in message:
                    self._all.setdefault(rank, Outcome.from_json(message["outcome"]))
        if self._peer is not None:
            for message in self._peer.lines.read():
                self._peer.heard = time.monotonic()
                self._obey(message)

    def _meet(self, address: list[Any]) -> None:
        """The process group is up: from here on the supervisors are one, if they can reach each other."""
        self._met = True
        if self._hub is None:
            try:
                self._peer = join(address, self._launch.rank)
                self._selector.register(self._peer.lines, EVENT_READ)
            except OSError as error:
                note(self._run_dir, "no hub", rank=self._launch.rank, error=str(error))

    def _obey(self, message: dict[str, Any]) -> None:
        """What rank 0's supervisor says."""
        if "verdict" in message:
            self._verdict = Outcome.from_json(message["verdict"])
            self._speaks = message["speaker"] == self._launch.rank
            self._part()
        elif "done" in message:
            self._part()

    def _part(self) -> None:
        """Leaves the hub: what comes now is this rank's alone."""
        assert self._peer is not None
        self._selector.unregister(self._peer.lines)
        self._peer.lines.close()
        self._peer = None

    def _look(self, now: float) -> None:
        """At the trainer, the launchers, and the signals that have come."""
        if not self._exited:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                self._exited = True
                self._listen()  # to its last words
                self._selector.unregister(self._lines)
                self._selector.unregister(self._wake)
                self._own = self._own or of_silent_end(self._launch.rank, os.waitstatus_to_exitcode(status))
        for launcher in self._launchers:
            if not launcher.lives:
                note(self._run_dir, "launcher gone", rank=self._launch.rank, **vars(launcher))
                self._launchers = []
                self._arrivals.add("launcher", ORPHANED)
                self._deadlines["orphaned"] = now + _ORPHANED
                break
        asked = self._arrivals.asked
        if asked and self._page[0] not in (asked, signal.SIGINT):
            self._page[0] = asked
        if asked and self._own is None:
            self._own = self._at_once(now)
            if self._own is not None:
                self._kill()

    def _at_once(self, now: float) -> Outcome | None:
        """What ends a trainer that is asked to stop without waiting for it; None: it will save."""
        interrupted = self._arrivals.count(signal.SIGINT)
        if interrupted > 1:
            what = "stopped at once by a second Ctrl-C, without saving"
        elif not self._page[1]:
            what = "stopped before the first step: there was nothing to save"
        elif now > self._deadlines.get("orphaned", now):
            what = f"its launcher is gone, and it could not save within {_ORPHANED:.0f} s"
        else:
            return None
        kind = Interrupted if interrupted else RequeueRequested
        fix = "start the same command again: it goes on from the last checkpoint"
        return Outcome.of(kind(what, where=str(self._run_dir), fix=fix))

    def _agree(self, now: float) -> None:
        """With the other ranks, on how the job has ended."""
        if now > self._deadlines.setdefault("beat", 0.0):
            self._deadlines["beat"] = now + _BEAT
            if self._hub is not None:
                self._hub.tell(beat=None)
            if self._peer is not None:
                self._peer.lines.send(beat=None)
        if self._own is not None and self._launch.rank not in self._all:
            self._all[self._launch.rank] = self._own
            self._deadlines["closing"] = now + _CLOSING
            if self._peer is not None:
                self._peer.lines.send(outcome=self._own.to_json())
        if self._verdict is None:
            if self._hub is not None and self._met:
                self._agree_as_hub(now)
            elif self._peer is not None:
                self._agree_as_peer(now)
            elif self._own is not None:
                self._agree_alone(now)
        if not self._exited and (
            now > self._deadlines.get("closing", now) or (self._verdict is not None and self._own is None)
        ):
            self._kill()

    def _agree_as_hub(self, now: float) -> None:
        assert self._hub is not None
        for peer in self._hub.peers:
            if peer.rank not in self._all and peer.gone(now):
                self._all[peer.rank] = lost(
                    peer.rank, "is gone: its processes were killed, or its machine failed"
                )
                peer.kill()
        if all(outcome.code == 0 for outcome in self._all.values()):
            if self._own is not None:
                self._hub.tell(done=True)
                self._verdict = self._own
            return
        until = self._deadlines.setdefault("told", now + _TOLD)
        if len(self._all) == self._launch.world_size or now > until:
            speaker, self._verdict = verdict(self._all)
            self._hub.tell(verdict=self._verdict.to_json(), speaker=speaker)
            reachable = {peer.rank for peer in self._hub.peers if not peer.lines.closed}
            self._speaks = speaker not in reachable
            self._verdict.write(self._run_dir)

    def _agree_as_peer(self, now: float) -> None:
        assert self._peer is not None
        if self._own is not None and self._own.code == 0:
            self._verdict = self._own
        elif self._peer.gone(now):
            self._peer.kill()
            self._part()
            if self._own is None or not self._own.cause:
                self._own = lost(0, "is gone: its processes were killed, or its machine failed")
            self._verdict = self._own
            self._speaks = self._verdict.write(self._run_dir, only_first=True) or not self._run_dir.is_dir()
            self._kill()

    def _agree_alone(self, now: float) -> None:
        """Before the hub is there. The first rank of a machine speaks first; its end ends the others."""
        assert self._own is not None
        if self._own.code and self._launch.local_rank and not self._met and not self._arrivals.asked:
            if now < self._deadlines.setdefault("silence", now + SILENCE):
                return
            self._speaks = True
        else:
            self._speaks = not self._launch.local_rank or self._met or "silence" not in self._deadlines
        self._verdict = self._own
        if self._speaks and self._own.code:
            self._own.write(self._run_dir)

    def _kill(self) -> None:
        if not self._exited:
            os.kill(self._pid, signal.SIGKILL)

    def _wake_up(self, now: float) -> None:
        """This process has been stopped (Ctrl-Z): its silence, and the others', mean nothing."""
        if self._hub is not None:
            self._hub.woke(now)
        if self._peer is not None:
            self._peer.heard = now

    def _leave(self) -> Outcome:
        assert self._verdict is not None
        if self._hub is not None:
            until = time.monotonic() + _TOLD
            while time.monotonic() < until and not all(peer.lines.closed for peer in self._hub.peers):
                time.sleep(0.01)  # closed earlier, the connection could lose what was said last
                self._hub.read()
            self._hub.close()
        if self._peer is not None:
            self._part()
        self._selector.close()
        self._lines.close()
        os.close(self._wake)
        ended = self._verdict
        if self._speaks and ended.what and not ended.said and ended.restart is None:
            print(f"bigtfm: {ended.line}", file=sys.stderr, flush=True)
        return ended


def _drain(pipe: int) -> bytes:
    try:
        return os.read(pipe, 4096)
    except BlockingIOError:
        return b""
