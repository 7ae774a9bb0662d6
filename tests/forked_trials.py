"""The ranks of a trial as forks of the test session's fork server, which has imported what takes its time."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path

import rank_runner


class ForkedRanks:
    """As bigtfm.sweep.ranks.Ranks."""

    started: list[str] = []  # noqa: RUF012  # names of run directories, for the tests to look at

    def __init__(
        self, config: Path, deepspeed: Path, count: int, logs: Path, gpus: Sequence[str], threads: int
    ) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        ForkedRanks.started.append(config.parent.name)
        arguments = ["train", "--deepspeed_config", str(deepspeed), "--config", str(config)]
        self.processes = rank_runner.start(arguments, logs, count)

    def poll(self) -> int | None:
        codes = [process.exitcode for process in self.processes]
        if None in codes:
            return None
        code = next((code for code in codes if code), 0)
        return 128 - code if code < 0 else code

    def stop(self) -> None:
        for process in self.processes:
            process.terminate()

    def kill(self) -> None:
        for process in self.processes:
            if process.is_alive() and process.pid:
                os.kill(process.pid, signal.SIGKILL)
                process.join()
