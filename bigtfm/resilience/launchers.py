"""The launchers above a rank: what started it, and whether it still lives."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
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
        name = launcher_in(words)
        if name is not None:
            found.append(Launcher(name, pid, process[1]))
        pid = process[0]
    return found


def launcher_in(words: Sequence[str]) -> str | None:
    """The launcher that a command line starts; an argument that is only called like one does not count."""
    name, rest = os.path.basename(words[0]), words[1:]
    if name in _PROGRAMS:
        return name
    if not re.match(r"python|(ba|da)?sh$", name):
        return None
    for word, following in pairwise([*rest, ""]):
        if word == "-m":
            return following if following.startswith(_MODULES) else None
        if not word.startswith("-") or word == "-c":
            script = os.path.basename(word)
            return script if script in _PROGRAMS else None
    return None


def _stat(pid: int) -> tuple[int, str, str] | None:
    """(parent, start time, state) of a process; None: it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return int(fields[1]), fields[19], fields[0]
