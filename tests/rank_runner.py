"""Starts ranks of the real command as real processes, without paying for their heavy imports in each of them.

A fork server imports torch, deepspeed and matplotlib once per test session; every rank is a fresh fork
of it, so nothing leaks from one run to the next.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(
    [
        "deepspeed",
        "deepspeed.runtime.zero.muon.original_muon",  # DeepSpeed imports it for every ZeRO optimizer
        "matplotlib.backends.backend_agg",
        "matplotlib.figure",
        "rank_runner",
    ]
)


@dataclass(frozen=True)
class Finished:
    """What the ranks left: exit codes and output, by rank."""

    codes: list[int]
    outputs: list[str]  # stdout and stderr together

    @property
    def code(self) -> int:
        return self.codes[0]

    @property
    def output(self) -> str:
        return self.outputs[0]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(
    args: Sequence[str],
    folder: Path,
    world_size: int = 1,
    environ: Mapping[str, str] | None = None,
    program: Callable[[], None] | None = None,
) -> list[multiprocessing.process.BaseProcess]:
    """Starts `bigtfm ARGS`, or another `program` of sys.argv, as `world_size` ranks in `folder`.

    Their output goes to folder/rank-N.out.
    """
    port = str(free_port())
    processes = []
    for rank in range(world_size):
        rendezvous = {
            "RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
        }
        process = _server.Process(
            target=_rank,
            args=(list(args), str(folder), rendezvous | dict(environ or {}), program or _bigtfm),
            daemon=True,
        )
        process.start()
        processes.append(process)
    return processes


def train_all(
    jobs: Sequence[Sequence[str]],
    folder: Path,
    world_size: int,
    program: Callable[[], None] | None = None,
) -> Finished:
    """Trains one job after the other in the same processes; a job is a DeepSpeed JSON and overrides.

    program: what the ranks do instead of `train_jobs`, such as breaking something and then calling it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    args = [json.dumps([list(job) for job in jobs])]
    return finish(start(args, folder, world_size, program=program or train_jobs), folder, timeout=280)


def finish(
    processes: Sequence[multiprocessing.process.BaseProcess], folder: Path, timeout: float = 120
) -> Finished:
    """Waits for the ranks; kills what outlives the timeout and fails."""
    late = []
    for process in processes:
        process.join(timeout)
        if process.is_alive():
            late.append(process.pid)
            process.kill()
            process.join()
    outputs = [(folder / f"rank-{rank}.out").read_text(errors="replace") for rank in range(len(processes))]
    assert not late, f"ranks {late} still ran after {timeout} s:\n{outputs[0][-3000:]}"
    return Finished([int(process.exitcode or 0) for process in processes], outputs)


def run(
    args: Sequence[str], folder: Path, world_size: int = 1, environ: Mapping[str, str] | None = None
) -> Finished:
    """`bigtfm ARGS` on `world_size` ranks, to the end."""
    folder.mkdir(parents=True, exist_ok=True)
    return finish(start(args, folder, world_size, environ), folder)


def _rank(args: list[str], folder: str, environ: dict[str, str], program: Callable[[], None]) -> None:
    os.environ.update(environ)
    os.chdir(folder)
    output = os.open(f"rank-{environ['RANK']}.out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    sys.argv = ["bigtfm", *args]
    program()


def _bigtfm() -> None:
    from bigtfm.cli import app

    app()


def train_jobs() -> None:
    """The program of `train_all`."""
    from bigtfm.config.launch import Launch
    from bigtfm.engine import distributed
    from bigtfm.job import check_job
    from bigtfm.train import train

    launch = Launch.from_environment(os.environ, None)
    ranks = distributed.start(launch)
    for deepspeed_json, *overrides in json.loads(sys.argv[1]):
        train(check_job(None, Path(deepspeed_json), overrides, launch.world_size), launch, ranks)
    ranks.close()


def train_broken_jobs(broken: Callable[[Any], AbstractContextManager[dict[str, Any]]]) -> None:
    """A program as `train_jobs`, but each job may end in a Problem; how, it writes to RUN/outcome-RANK.json.

    broken: of a job; what it breaks holds until the job has ended, what it yields is written, too.
    """
    from bigtfm import recorder
    from bigtfm import train as module
    from bigtfm.config.launch import Launch
    from bigtfm.config.problems import Problem
    from bigtfm.engine import distributed
    from bigtfm.job import check_job

    gc.freeze()  # stage 3 collects garbage when it is built: a second, for all that is imported
    recorder.plot_curve = lambda run_dir: run_dir / "curve.png"
    recorder.peak_flops = lambda *_: None
    launch = Launch.from_environment(os.environ, None)
    ranks = distributed.start(launch)
    for deepspeed_json, *overrides in json.loads(sys.argv[1]):
        job = check_job(None, Path(deepspeed_json), overrides, launch.world_size)
        outcome: dict[str, Any] = {"code": 0, "line": ""}
        with broken(job) as found:
            try:
                module.train(job, launch, ranks)
            except Problem as problem:
                outcome = {"code": problem.exit_code, "line": problem.line}
        (job.run.run_dir / f"outcome-{launch.rank}.json").write_text(json.dumps(outcome | found))
    ranks.close()


def outcomes_of(run_dir: Path, world_size: int = 2) -> list[dict[str, Any]]:
    """What `train_broken_jobs` has written, by rank."""
    return [json.loads((run_dir / f"outcome-{rank}.json").read_text()) for rank in range(world_size)]
