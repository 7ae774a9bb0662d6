"""Programs for rank_runner: the real `bigtfm`, which notes where it stands, or with one thing broken.

A rank's marks-RANK.txt gets a line "+phase" when a phase begins and "-phase" when it ends: kills are aimed
with it, and it tells afterwards where they hit.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rank_runner

BROKEN = "CHAOS_BROKEN"  # environment: what `marked` breaks


def marked() -> None:
    """`bigtfm ARGS`."""
    multiprocessing.current_process().daemon = False  # rank_runner's are, and may have no children
    import bigtfm.train
    from bigtfm.engine.saver import Saver

    path = f"marks-{os.environ['RANK']}.txt"
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def phase(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            os.write(file, f"+{name}\n".encode())
            try:
                return function(*args, **kwargs)
            finally:
                os.write(file, f"-{name}\n".encode())

        return noted

    def resume(*args: Any) -> Any:
        progress, probe = bigtfm_resume(*args)
        os.write(file, f"resumed {progress.step}\n".encode())
        return progress, probe

    bigtfm_resume = bigtfm.train.resume
    bigtfm.train.resume = phase("resume", resume)
    bigtfm.train.validation_loss = phase("evaluate", bigtfm.train.validation_loss)
    Saver.save = phase("save", Saver.save)
    Saver._write = phase("write", Saver._write)
    for name in filter(None, os.environ.get(BROKEN, "").split(",")):
        _break(name)
    rank_runner._bigtfm()


def _break(name: str) -> None:
    """For a campaign to find: "orphan", or what each resume leaves out (broken_ranks.BROKEN_LOADS)."""
    import broken_ranks

    from bigtfm.engine import loading

    if name == "orphan":
        subprocess.Popen(["sleep", "60"], start_new_session=True)
        return
    load = loading.load

    def broken_load(found: Path, engine: Any, *args: Any, **kwargs: Any) -> Any:
        fresh_schedule = engine.lr_scheduler.state_dict() if engine.lr_scheduler is not None else {}
        progress = load(found, engine, *args, **kwargs)
        broken_ranks.BROKEN_LOADS[name](engine, progress, fresh_schedule)
        return progress

    loading.load = broken_load
