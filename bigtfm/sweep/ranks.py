"""The processes of a training that another program starts: its ranks on this machine, by `bigtfm train`."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from bigtfm.config.launch import RENDEZVOUS
from bigtfm.config.problems import ConfigProblem

_GPUS = "CUDA_VISIBLE_DEVICES"


class Ranks:
    """All ranks of one training. They die with the process that started them, however that dies."""

    def __init__(
        self, config: Path, deepspeed: Path, count: int, logs: Path, gpus: Sequence[str], threads: int
    ):
        logs.mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        program = (
            f"from bigtfm.resilience.lifeline import die_with; die_with({os.getpid()}); "
            "from bigtfm.cli import app; app()"
        )
        files = ["--deepspeed_config", str(deepspeed), "--config", str(config)]
        own = {name: value for name, value in os.environ.items() if name not in RENDEZVOUS}
        own |= {_GPUS: ",".join(gpus)} if gpus else {"OMP_NUM_THREADS": str(threads)}
        self._processes = []
        for rank in range(count):
            place = dict(zip(RENDEZVOUS, (str(rank), str(count), str(rank), "127.0.0.1", port), strict=True))
            with (logs / f"rank-{rank}.log").open("ab") as log:
                self._processes.append(
                    subprocess.Popen(
                        [sys.executable, "-c", program, "train", *files],
                        env=own | place | {"LOCAL_WORLD_SIZE": str(count)},
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,  # a Ctrl-C is for the program, which asks them to stop
                    )
                )

    def poll(self) -> int | None:
        """The exit code, as a shell has it, of the first rank that failed; 0: all are done; None: not yet."""
        codes = [process.poll() for process in self._processes]
        if None in codes:
            return None
        code = next((code for code in codes if code), 0)
        return 128 - code if code < 0 else code

    def stop(self) -> None:
        """Asks them to save and to stop."""
        for process in self._processes:
            if process.poll() is None:
                process.terminate()

    def kill(self) -> None:
        """Ends what still runs, with all that it has started: its session is its own."""
        for process in self._processes:
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def places(jobs: int, ranks: int) -> list[tuple[list[str], int]]:
    """For each of `jobs` trainings at a time: its GPUs (none on a CPU), and the threads of a rank.

    Raises:
        ConfigProblem: there are fewer GPUs.
    """
    stated = os.environ.get(_GPUS)
    gpus = [name for name in stated.split(",") if name] if stated is not None else _all_gpus()
    if gpus and len(gpus) < jobs * ranks:
        what = (
            f"{jobs} trainings of {ranks} ranks at a time need {jobs * ranks} GPUs, and there are {len(gpus)}"
        )
        raise ConfigProblem(what, where="command line", fix=f"pass --jobs {max(1, len(gpus) // ranks)}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, cores // (jobs * ranks)))
    return [(gpus[place * ranks : (place + 1) * ranks], threads) for place in range(jobs)]


def _all_gpus() -> list[str]:
    found = [path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*")]
    return sorted(found, key=int)
