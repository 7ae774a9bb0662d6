"""The processes of a job, seen from outside.

`adopt` makes this process a child subreaper (prctl(2)): what a job starts stays in this process's tree,
however many of its parents die. A mark in the environment would not do: /proc/PID/environ is what a process
was executed with, and a fork of a fork server shows nothing of what was set later.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Process:
    """A line of /proc/PID/stat; started: clock ticks since boot, which tells a number that is used again."""

    pid: int
    parent: int
    state: str  # R, S, D, T, Z ...
    started: int

    @property
    def command(self) -> str:
        """What it was executed as; empty when it is gone."""
        try:
            return (
                Path(f"/proc/{self.pid}/cmdline")
                .read_bytes()
                .replace(b"\0", b" ")
                .decode(errors="replace")
                .strip()
            )
        except OSError:
            return ""


def adopt() -> None:
    """Orphans below this process become its children from now on."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def living(besides: Collection[int] = ()) -> list[Process]:
    """Every process below this one that is not a zombie, but for those of `besides` (not their children)."""
    table = _table()
    found, below = [], [os.getpid()]
    while below:
        parent = below.pop()
        for process in table.get(parent, ()):
            below.append(process.pid)
            if process.state not in "ZX" and process.pid not in besides:
                found.append(process)
    return found


def children(pid: int) -> list[Process]:
    """The children of a process that are no zombies."""
    return [process for process in _table().get(pid, ()) if process.state not in "ZX"]


def kill(pids: Collection[int], number: int = signal.SIGKILL) -> None:
    """Sends a signal to each that is still there."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass


def wait_until_gone(besides: Collection[int], seconds: float) -> list[Process]:
    """What still lives after so many seconds; returns as soon as nothing does."""
    deadline = time.monotonic() + seconds
    while (left := living(besides)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def _table() -> dict[int, list[Process]]:
    """Processes by their parents."""
    table: dict[int, list[Process]] = {}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            text = Path(f"/proc/{name}/stat").read_text(errors="replace")
        except OSError:
            continue  # it has gone meanwhile
        fields = text.rpartition(")")[2].split()
        process = Process(int(name), int(fields[1]), fields[0], int(fields[19]))
        table.setdefault(process.parent, []).append(process)
    return table
