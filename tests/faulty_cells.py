"""Ranks of a benchmark's cells, some of which crash or hang: the micro batch of a cell says which."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import rank_runner

CRASHES, HANGS, RAISES = 3, 5, 6  # micro batches


class ForkedRank:
    """A rank as the runner wants it, from the tests' fork server."""

    def __init__(self, process: Any) -> None:
        self._process = process

    def poll(self) -> int | None:
        return None if self._process.is_alive() else int(self._process.exitcode)

    def kill(self) -> None:
        if self._process.is_alive():
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.join()


def start(trial: Path, rank: Mapping[str, str], log: Path) -> ForkedRank:
    process = rank_runner._server.Process(target=_rank, args=(str(trial), dict(rank), str(log)), daemon=True)
    process.start()
    return ForkedRank(process)


def _rank(trial: str, environ: dict[str, str], log: str) -> None:
    os.setsid()
    os.environ.update({"OMP_NUM_THREADS": "1"} | environ)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    sys.argv = ["cell", trial, str(os.getppid())]
    from bigtfm.bench.cell import main

    deepspeed = json.loads(Path(json.loads(Path(trial).read_text())["deepspeed_json"]).read_text())
    _break(deepspeed["train_micro_batch_size_per_gpu"])
    main()


def _break(micro_batch: int) -> None:
    """In the second step of its forward pass."""
    from bigtfm.bench.clock import StepClock

    faults: dict[int, Callable[[], Any]] = {
        CRASHES: lambda: os.kill(os.getpid(), signal.SIGSEGV),
        HANGS: lambda: time.sleep(1000),
        RAISES: lambda: [].pop(),
    }
    fault, enter = faults.get(micro_batch), StepClock._enter
    if fault is None:
        return

    def faulty(self: StepClock, phase: str, step: int | None, site: str) -> None:
        enter(self, phase, step, site)
        if phase == "forward" and len(self.steps) == 1:
            fault()

    StepClock._enter = faulty  # type: ignore[method-assign]
