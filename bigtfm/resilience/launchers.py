"""The launchers above a rank: what started it, and whether it still lives."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_PROGRAMS = ("deepspeed", "deepspeed.pt", "ds", "torchrun", "accelerate")
_MODULES = ("deepspeed.launcher.", "torch.distributed.", "accelerate.commands.")


@dataclass(frozen=True)
class Launcher:
    """A process, told from a later one with the same number by when it started."""

    name: str
    pid: int
    started: str

    @property
    def lives(self) -> bool:
        found = _stat(self.pid)
        return found is not None and found[1] == self.started and found[2] != "Z"


def launchers() -> list[Launcher]:
    """Those among this process's ancestors; a user's shell is none. Empty where there is no /proc."""
    found, pid = [], os.getppid()
    while pid > 1 and (process := _stat(pid)) is not None:
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:5]
        except OSError:
            break
        for word in words:
            name = os.path.basename(word)
            if name in _PROGRAMS or word.startswith(_MODULES):
                found.append(Launcher(name, pid, process[1]))
                break
        pid = process[0]
    return found


def _stat(pid: int) -> tuple[int, str, str] | None:
    """(parent, start time, state) of a process; None: it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return int(fields[1]), fields[19], fields[0]
