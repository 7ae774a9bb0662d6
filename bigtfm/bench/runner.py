"""Runs the cells of a matrix, each in processes of its own: out of memory, a crash, a hang are results.

One JSON object a line in OUT/results.jsonl; what stands there already is not run again.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Protocol

from bigtfm.bench.cell import MEASURED, SPLIT_STEPS, Trial
from bigtfm.bench.expectation import Expectation
from bigtfm.bench.matrix import Cell, Matrix
from bigtfm.bench.results import RESULTS, Row, Spread, append, read_results
from bigtfm.config.problems import ConfigProblem, Problem, StorageProblem
from bigtfm.environment import environment
from bigtfm.job import Job, check_job
from bigtfm.mlflow_sender import read_json
from bigtfm.planner.step_time import Rates
from bigtfm.planner.throughput import flops_per_token, peak_flops
from bigtfm.resilience.claim import claim
from bigtfm.resilience.outcome import FAILURE

_POLL = 0.05  # seconds


class Process(Protocol):
    """A rank that runs."""

    def poll(self) -> int | None: ...
    def kill(self) -> None: ...


Start = Callable[[Path, Mapping[str, str], Path], Process]  # a trial's file, rank's environment, log


@dataclass(frozen=True)
class _Rank:
    process: subprocess.Popen[bytes]

    def poll(self) -> int | None:
        return self.process.poll()

    def kill(self) -> None:
        """With all that it has started: its session is its own. One that has ended has left nothing."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def start_rank(trial: Path, rank: Mapping[str, str], log: Path) -> Process:
    """A fresh process that runs one rank of a trial."""
    with log.open("wb") as output:
        return _Rank(
            subprocess.Popen(
                [sys.executable, "-m", "bigtfm.bench.cell", str(trial), str(os.getpid())],
                env=os.environ | dict(rank),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        )


def run_matrix(
    matrix: Matrix,
    out: Path,
    *,
    start: Start = start_rank,
    rates: Rates | None = None,
    seconds: float | None = None,
    only: Callable[[str], bool] = lambda _: True,
) -> Iterator[Row]:
    """Runs what is not in `out` yet, and yields each row once it is there.

    start: starts a rank. rates: this machine's, for the step that the planner expects; None: of a GPU its
    data sheet's. seconds: no cell is begun that could last longer than what is left of them.
    only: of a grid's name, whether its cells are run.

    Raises:
        ConfigProblem: a file that the matrix names is wrong, or another benchmark is at work in `out`.
        StorageProblem: `out` can't be written.
    """
    began, here = time.monotonic(), environment_row()
    expectation = Expectation(devices_of(here)[0], rates)
    cells = [(key, grid, cell) for key, grid, cell in matrix.keys() if only(grid)]
    with claim(out, "benchmark", "--out"):
        there = {(row["key"], row["repeat"]) for row in read_results(out / RESULTS)}
        data = _prepared(matrix.data, out)
        for repeat in range(matrix.measure.repeats):
            for key, grid, cell in cells:
                spent = time.monotonic() - began
                late = seconds is not None and spent + matrix.measure.timeout_seconds > seconds
                if (key, repeat) in there or late:
                    continue
                row: Row = {"key": key, "repeat": repeat, "matrix": matrix.name, "grid": grid}
                row |= _row_of(cell, matrix, data, out / "cells" / key, start, expectation)
                row |= {"time": round(time.time(), 3), **here}
                append(out / RESULTS, row)
                yield row


def missing(matrix: Matrix, out: Path, only: Callable[[str], bool] = lambda _: True) -> int:
    """How many trials of the matrix have no row yet."""
    there = {(row["key"], row["repeat"]) for row in read_results(out / RESULTS)}
    wanted = [(key, n) for key, grid, _ in matrix.keys() if only(grid) for n in range(matrix.measure.repeats)]
    return len([each for each in wanted if each not in there])


def environment_row() -> Row:
    """Commit, versions and hardware."""
    found = environment()
    dirty = "+" if found.get("git_dirty") == "yes" else ""
    names = ("bigtfm", "python", "torch", "deepspeed")
    return {
        "commit": found["git_commit"][:12] + dirty if "git_commit" in found else None,
        "versions": {name: found[name] for name in names if name in found},
        "hardware": {"cpu": _cpu_name(), "cores": len(os.sched_getaffinity(0)), "gpus": found.get("gpus")},
    }


def devices_of(row: Row) -> list[str]:
    """The GPUs of the machine by their names, one each; without any: cpu."""
    gpus = row["hardware"]["gpus"]
    return gpus.split(", ") if gpus else ["cpu"]


def _cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _prepared(data: str, out: Path) -> Path:
    """The data set; where the one that the matrix names is not there, the embedded text becomes one."""
    if (Path(data) / "dataset.json").is_file():
        return Path(data).resolve()
    if data != "data/quickstart":
        raise ConfigProblem(
            "no prepared data set", where=data, fix="`bigtfm prepare` it, or leave `data` out of the matrix"
        )
    own = (out / "data").resolve()
    if not (own / "dataset.json").is_file():
        from bigtfm.data.prepare import prepare

        prepare(["embedded"], str(own), progress=False)
    return own


def _row_of(
    cell: Cell, matrix: Matrix, data: Path, folder: Path, start: Start, expectation: Expectation
) -> Row:
    """One trial: its configuration, what was expected of it, and what came of it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    began = time.monotonic()
    row: Row = {"status": "refused", "why": "", **cell.config}
    try:
        job, trial = _checked(cell, matrix, data, folder)
    except Problem as problem:
        return row | {"why": f"{problem.where}: {problem.what}"}
    run = job.run
    flops = flops_per_token(run.model, job.resolved.vocab_size, run.seq_len, run.objective, run.tune)
    row |= {
        "seq_len": job.run.seq_len,
        "parameters": job.resolved.parameters,
        "tokens_per_step": job.resolved.tokens_per_step,
        "flops_per_token": flops,
        "predicted": expectation.of(job),
    }
    row |= _trained(trial, cell, matrix.measure.timeout_seconds, start)
    if row["status"] == "ok":
        row |= _speed(row)
    return row | {"cell_seconds": round(time.monotonic() - began, 3)}


def _checked(cell: Cell, matrix: Matrix, data: Path, folder: Path) -> tuple[Job, Trial]:
    """The cell's files, written and checked as training will."""
    deepspeed = folder / "deepspeed.json"
    deepspeed.write_text(json.dumps(cell.deepspeed_values, indent=1) + "\n", encoding="utf-8")
    measure = matrix.measure
    needed = measure.warm_up + measure.steps + SPLIT_STEPS + 1
    horizon = cell.deepspeed_values.get("scheduler", {}).get("params", {}).get("total_num_steps")
    if isinstance(horizon, int) and horizon < needed:
        raise ConfigProblem(
            f"its scheduler has {horizon} steps, and {needed} are run", where=cell.deepspeed_config, fix=""
        )
    overrides = [
        *cell.run_overrides,
        f"data.path={data}",
        f"run.dir={folder.parent.resolve()}",
        f"run.name={folder.name}",
        f"run.steps={horizon if isinstance(horizon, int) else 10**6}",
        *("eval.every=0", "eval.tokens=1", "save.every=0", "track.mlflow=false", "guard.replicas_every=0"),
    ]
    config = Path(cell.model).resolve()
    job = check_job(config, deepspeed, overrides, cell.ranks)
    trial = Trial(
        str(config), str(deepspeed.resolve()), overrides, str(folder.resolve()),
        measure.warm_up, measure.steps, measure.memory, measure.hang_seconds, measure.memory_gib,
    )  # fmt: skip
    return job, trial


def _trained(trial: Trial, cell: Cell, timeout: float, start: Start) -> Row:
    """Status, why, and what was measured.

    Raises:
        StorageProblem: a rank could not write.
    """
    folder, ranks = Path(trial.run_dir), cell.ranks
    path, killed_before = folder / "trial.json", _kernel_kills()
    trial.write(path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes: list[Process] = []
    logs = [folder / f"rank-{rank}.log" for rank in range(ranks)]
    deadline = time.monotonic() + timeout
    try:
        for rank, log in enumerate(logs):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            place |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            place |= {"OMP_NUM_THREADS": str(cell.threads)} if cell.threads else {}
            processes.append(start(path, place, log))
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            time.sleep(_POLL)
        codes = [process.poll() for process in processes]
    finally:
        for process in processes:
            process.kill()
    measured = read_json(folder / MEASURED)
    if codes == [0] * ranks and measured:
        return {"status": "ok", **measured}
    if None in codes:
        return {"status": "hang", "why": f"no end after {timeout:g} s: {_came_to(folder)}"}
    failed = _failure(codes, read_json(folder / FAILURE), logs, _kernel_kills() > killed_before)
    if StorageProblem.exit_code in codes:  # the disk's, not the cell's: a row would say that it was measured
        fix = "free space there, then repeat the command: it goes on"
        raise StorageProblem(f"a rank could not write: {failed['why']}", where=str(folder), fix=fix)
    return failed


def _failure(codes: list[int | None], failure: Row, logs: list[Path], killed_for_memory: bool) -> Row:
    """oom, refused, hang or crash, and the line that says why."""
    code = next((code for code in codes if code), 0)
    why = f"{failure['where']}: {failure['what']}" if failure else _last_line(logs)
    what = str(failure.get("what", why))
    silent = "was killed by signal" in what or "left with exit code" in what
    if what.startswith("out of memory") or "out of memory" in what.lower() or killed_for_memory:
        status = "oom"
    elif code in (64, 65):
        status = "refused"
    elif code == 79 and not silent:
        status = "hang"
    else:
        status = "crash"
    return {"status": status, "why": why, "exit_codes": codes}


def _came_to(folder: Path) -> str:
    try:
        rows = (folder / "metrics.jsonl").read_bytes().count(b"\n")
    except OSError:
        return "before the first step"
    return f"after step {rows}" if rows else "in the first step"


def _last_line(logs: list[Path]) -> str:
    for log in logs:
        with suppress(OSError):
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            if lines:
                return lines[-1][:500]
    return "it left no word"


def _kernel_kills() -> int:
    """Processes that Linux has ended so far because memory ran out."""
    with suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text(encoding="utf-8").splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def _speed(row: Row) -> Row:
    """Tokens a second, the share of the device's peak (MFU), and of the matrix products measured beside."""
    tokens, seconds = row["tokens_per_step"], row["seconds"]
    rates = [tokens / each for each in seconds]
    a_rank = median(rates) / row["ranks"]
    peak = peak_flops(row["device"], row["precision"]) if row["device"] != "cpu" else None
    return {
        "tokens_per_second": vars(Spread.of(rates)),
        "tokens_per_second_per_rank": a_rank,
        "step_seconds": vars(Spread.of(seconds)),
        "mfu": a_rank * row["flops_per_token"] / peak.flops if peak else None,
        "peak_source": peak.source if peak else None,
        "matmul_share": a_rank * row["flops_per_token"] / row["ceiling"],
    }
