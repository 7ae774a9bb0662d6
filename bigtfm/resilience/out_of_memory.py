"""Memory that runs out: what is said, and what the next start does about it (guard.halve_micro_batch)."""

from __future__ import annotations

import json
import os
from pathlib import Path

from bigtfm.config.problems import ConfigProblem, Problem, RequeueRequested

REMEMBERED = "micro_batch.json"


def is_out_of_memory(error: BaseException) -> bool:
    """Python's, torch's on a CPU (a RuntimeError) and on GPUs (its OutOfMemoryError, cuBLAS's)."""
    said = str(error)
    return isinstance(error, MemoryError) or any(
        words in said for words in ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    )


def smaller(micro_batch: int) -> int | None:
    """The largest divisor up to half: the accumulation grows by a whole number. None: it is 1."""
    return next((size for size in range(micro_batch // 2, 0, -1) if micro_batch % size == 0), None)


def problem(
    error: BaseException, *, where: str, micro_batch: int, accumulation: int, seq_len: int,
    planned: str, halve: bool,
) -> Problem:  # fmt: skip
    """What the user is told.

    planned: what a step was expected to take, and of what. halve: the next start takes a smaller batch.
    """
    said = str(error).strip()[:200] or "MemoryError"
    what = f"out of memory with micro batch {micro_batch} of {seq_len} tokens (planned: {planned}): {said}"
    size = smaller(micro_batch)
    if size is None:
        more = "compute.recompute=full, a smaller data.seq_len, a higher ZeRO stage or offload"
        return ConfigProblem(what, where=where, fix=f"a micro batch can't be smaller: use {more}")
    batch = f"micro batch {size} and accumulation {accumulation * micro_batch // size}"
    if halve:
        fix = f"start the same command again: it goes on with {batch}"
        return RequeueRequested(what, where=where, fix=fix)
    return ConfigProblem(
        what,
        where=where,
        fix=f"use {batch} in the DeepSpeed JSON, which give the same loss (guard.halve_micro_batch=true does "
        "so by itself), or compute.recompute=full",
    )


def remember(run_dir: Path, stated: int, micro_batch: int) -> None:
    """Keeps the micro batch that later starts begin with, for as long as the JSON states the same one."""
    new = run_dir / f".{REMEMBERED}.{os.getpid()}"
    new.write_text(json.dumps({"stated": stated, "micro_batch": micro_batch}) + "\n")
    new.replace(run_dir / REMEMBERED)


def remembered(run_dir: Path, stated: int) -> int:
    """The micro batch to begin with, where the JSON states `stated`."""
    try:
        if not (run_dir / REMEMBERED).is_file():  # a pipe would be waited for
            return stated
        kept = json.loads((run_dir / REMEMBERED).read_bytes())
        size = int(kept["micro_batch"]) if kept["stated"] == stated else stated
    except (OSError, OverflowError, ValueError, TypeError, KeyError, RecursionError):
        return stated
    return size if 0 < size < stated and stated % size == 0 else stated
