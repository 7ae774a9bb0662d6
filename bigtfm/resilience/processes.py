"""Processes of this machine, as /proc shows them (proc(5)); nothing where there is no /proc."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """What /proc/PID/stat says of one."""

    pid: int
    parent: int
    group: int  # the process that leads its group
    state: str  # R, S, D (in the kernel, deaf), T or t (stopped by a signal, by a debugger), Z
    started: int  # clock ticks since the machine's start: tells it from a later one of the same number

    @property
    def lives(self) -> bool:
        """Whether this very process still runs."""
        now = process(self.pid)
        return now is not None and now.started == self.started and now.state not in "ZX"

    @property
    def words(self) -> list[str]:
        """Its command line; empty: it is gone, or the kernel's."""
        with suppress(OSError):
            return Path(f"/proc/{self.pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
        return []


def process(pid: int) -> Process | None:
    """None: there is none of this number."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return Process(pid, int(fields[1]), int(fields[2]), fields[0], int(fields[19]))
    except (OSError, ValueError, IndexError):
        return None


def state(pid: int) -> str:
    """The state of a process, "" when it is gone."""
    found = process(pid)
    return found.state if found is not None else ""


def descendants(pid: int) -> list[Process]:
    """The processes below this one, by their numbers; zombies, too."""
    children: dict[int, list[Process]] = {}
    with suppress(OSError):
        for name in os.listdir("/proc"):
            found = process(int(name)) if name.isdigit() else None
            if found is not None:
                children.setdefault(found.parent, []).append(found)
    below: list[Process] = []
    todo = [pid]
    while todo:
        found_below = children.get(todo.pop(), [])
        below += found_below
        todo += [child.pid for child in found_below]
    return sorted(below, key=lambda child: child.pid)
