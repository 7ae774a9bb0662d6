"""The launchers above a rank: what started it, and whether it still lives."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from bigtfm.resilience.processes import Process, process

_PROGRAMS = ("deepspeed", "deepspeed.pt", "ds", "torchrun", "accelerate")
_BELOW_RUNNER = "deepspeed.launcher.launch"
_MODULES = ("deepspeed.launcher.", "torch.distributed.", "accelerate.commands.")


@dataclass(frozen=True)
class Launcher:
    """process: None: it was gone already when this process looked for it."""

    name: str
    process: Process | None

    @property
    def lives(self) -> bool:
        return self.process is not None and self.process.lives


def launchers() -> list[Launcher]:
    """Those among this process's ancestors; a user's shell is none. Empty where there is no /proc."""
    found, at = [], process(os.getppid())
    while at is not None and at.pid > 0:
        name = launcher_in(at.words or [""])
        if name is not None:
            found.append(Launcher(name, at))
            if name == _BELOW_RUNNER and _left_behind(at):
                found.append(Launcher("deepspeed", None))
        at = process(at.parent)
    return found


def _left_behind(launch: Process) -> bool:
    """Whether the `deepspeed` command that started this launcher of ranks is gone.

    Who is left behind has a new parent: init, or a subreaper, in another process group. On other machines of
    the job ssh or srun have started it, and it leads its group or is in that of the shell above it.
    """
    parent = process(launch.parent)
    if parent is not None and launcher_in(parent.words or [""]) is not None:
        return False
    return process(launch.group) is None or (launch.parent == 1 and launch.group != 1)


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
