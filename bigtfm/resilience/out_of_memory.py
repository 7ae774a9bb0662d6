"""Memory that runs out: what is said, and what the next start does about it (guard.halve_micro_batch)."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
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
    planned: str, halve: bool, others: Sequence[str], lasting: bool,
) -> Problem:  # fmt: skip
    """What the user is told.

    planned: what a step was expected to take, and of what. halve: the next start takes a smaller batch.
    others: what else takes less memory and is not used yet. lasting: most of it is weights, gradients and
    optimizer, which no batch makes smaller.
    """
    said = str(error).strip()[:200] or "MemoryError"
    what = f"out of memory with micro batch {micro_batch} of {seq_len} tokens (planned: {planned}): {said}"
    size = smaller(micro_batch)
    if size is None:
        means = _or([*others, "as another recipe a smaller data.seq_len"])
        return ConfigProblem(what, where=where, fix=f"a micro batch can't be smaller: use {means}")
    batch = f"micro batch {size} and accumulation {accumulation * micro_batch // size}"
    if halve:
        fix = f"start the same command again: it goes on with {batch}"
        return RequeueRequested(what, where=where, fix=fix)
    batch += (
        " in the DeepSpeed JSON, which give the same loss (guard.halve_micro_batch=true does so by itself)"
    )
    ways = [*others, batch] if lasting else [batch, *others]
    return ConfigProblem(what, where=where, fix=f"use {_or(ways)}")


def while_building(error: BaseException, *, where: str, planned: str, others: Sequence[str]) -> Problem:
    """What the user is told where the model and its optimizer alone are too much; a batch can't help."""
    said = str(error).strip()[:200] or "MemoryError"
    what = f"out of memory while the model and its optimizer are built (planned: {planned}): {said}"
    return ConfigProblem(what, where=where, fix=f"use {_or(others)}")


def other_means(
    *, stage: int, world_size: int, recompute: str | int | None, offloads: bool, on_cpu: bool
) -> list[str]:
    """What takes less memory at the same loss and is not used yet; recompute: None: activations are few."""
    means = [] if recompute in ("full", None) else ["compute.recompute=full"]
    means += [] if stage == 3 or world_size == 1 else ["ZeRO 3"]
    means += [] if offloads or on_cpu else ["offload to the host"]
    return means if stage == 0 and world_size > 1 else [*means, "more ranks"]


def _or(ways: Sequence[str]) -> str:
    return ", or ".join(ways)


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
