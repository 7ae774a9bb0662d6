"""All weights of a checkpoint in one safetensors file: what DeepSpeed's zero_to_fp32.py does for its own."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigtfm.config.problems import ConfigProblem, NoCheckpoint, NumericsProblem
from bigtfm.engine import checkpoint, weights
from bigtfm.whole_files import whole_file

TRIES = 5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def export(
    run_dir: Path,
    out: Path,
    *,
    dtype: str = "fp32",
    step: int | None = None,
    best: bool = False,
    force: bool = False,
) -> str:
    """Writes `out`, one tensor at a time, and returns what is to be told.

    dtype: fp32 (what was trained), bf16 or fp16. step: which checkpoint; None: the newest. best: the one of
    the best evaluation. force: `out` may be there already. A failure leaves nothing behind.

    Raises:
        ConfigProblem: `out` is taken, or a value is wrong.
        NoCheckpoint: there is no such checkpoint, or it is damaged.
        NumericsProblem: a weight is too large for fp16.
    """
    if dtype not in DTYPES:
        raise ConfigProblem(
            f"no dtype {dtype}", where="command line", fix=f"pass --dtype {', '.join(DTYPES)}"
        )
    _require_place(out, run_dir / "checkpoints", force)
    for _ in range(TRIES - 1):
        seen = _last_change(run_dir)
        try:
            return _write(chosen(run_dir, step, best), out, dtype)
        except (NoCheckpoint, FileNotFoundError):
            if _last_change(run_dir) == seen:  # else a training saved and pruned what was being read
                raise
    return _write(chosen(run_dir, step, best), out, dtype)


def _require_place(out: Path, checkpoints: Path, force: bool) -> None:
    """Raises ConfigProblem where no file of weights is to be put."""
    real, fix = Path(os.path.realpath(out.parent)), "choose another OUT"
    if real.is_relative_to(os.path.realpath(checkpoints)):
        raise ConfigProblem("lies among the run's checkpoints", where=str(out), fix=fix)
    there = not out.name or os.path.lexists(out)
    if there and not out.is_file():
        raise ConfigProblem("is there already, and no plain file", where=str(out), fix=fix)
    if there and not force:
        raise ConfigProblem("is there already", where=str(out), fix=f"{fix}, or pass --force")


def _last_change(run_dir: Path) -> int:
    """When a checkpoint was last added or removed."""
    try:
        return (run_dir / "checkpoints").stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _write(folder: Path, out: Path, dtype: str) -> str:
    shapes, metadata = weights.weight_shapes(folder), _metadata(folder)
    with whole_file(out) as building:
        tensors = _fitting(weights.read_weights(folder, shapes), DTYPES[dtype], folder)
        weights.write_safetensors(building, shapes, tensors, DTYPES[dtype], metadata)
    return f"{out}: {len(shapes)} tensors, {out.stat().st_size:,} bytes of {dtype}, step {metadata['step']}"


def chosen(run_dir: Path, step: int | None, best: bool) -> Path:
    """The checkpoint of that step, of the best evaluation, or the newest; verified.

    Raises:
        ConfigProblem: both are asked for.
        NoCheckpoint: it is not there, or damaged.
    """
    root = run_dir / "checkpoints"
    if step is not None and best:
        raise ConfigProblem("--step and --best at once", where="command line", fix="pass one of them")
    fix = "pass the directory of a run that has saved one"
    if step is None:
        found = checkpoint.newest(root)
        if found is None:
            raise NoCheckpoint("no checkpoint", where=str(run_dir), fix=fix)
        if not best:
            return found
        step = checkpoint.read_state(found)["progress"]["best_step"]
        if step is None:
            raise NoCheckpoint("no evaluation yet, so none is the best", where=str(run_dir), fix=fix)
    found = checkpoint.folder_of(root, step)
    problem = checkpoint.defect(found) if found.is_dir() else "is not there"
    if problem is not None:
        known = ", ".join(sorted(path.name for path in root.glob("step-*"))) or "none"
        raise NoCheckpoint(f"{found.name}: {problem}", where=str(run_dir), fix=f"there are: {known}")
    return found


def _metadata(folder: Path) -> dict[str, str]:
    """What a reader needs to make the model; safetensors' metadata are strings."""
    progress = checkpoint.read_state(folder)["progress"]
    try:
        model: dict[str, Any] = dict(progress["identity"]["model"])
        vocab_size, tied = model["vocab_size"], model["tied_embeddings"]
    except (KeyError, TypeError, ValueError) as error:
        raise NoCheckpoint(
            f"state.json describes no model: {error}", where=str(folder), fix="use a run of this version"
        ) from None
    return {
        "made_by": "bigtfm export",
        "step": str(progress["step"]),
        "vocab_size": str(vocab_size),
        "model": json.dumps(model),
        "tied": json.dumps({"lm_head.weight": "embed_tokens.weight"} if tied else {}),
    }


def _fitting(
    tensors: Iterator[tuple[str, Tensor]], dtype: torch.dtype, folder: Path
) -> Iterator[tuple[str, Tensor]]:
    """The same tensors, as long as none becomes infinite in `dtype`."""
    most = torch.finfo(dtype).max
    for name, tensor in tensors:
        if dtype == torch.float16 and tensor.numel() and float(tensor.abs().max()) > most:
            raise NumericsProblem(
                f"{name} has a weight beyond {most:.0f}, the largest in fp16",
                where=str(folder),
                fix="pass --dtype bf16 or fp32",
            )
        yield name, tensor
