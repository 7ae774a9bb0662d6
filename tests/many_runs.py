"""Runs by the dozen in few processes, and resumes of one run under many layouts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import parity
import rank_runner

from bigtfm.resilience import events

SCHEDULE = {"type": "WarmupCosineLR", "params": {"warmup_num_steps": 8, "total_num_steps": 20}}


def job(folder: Path, data: Path, name: str, *overrides: str, stage: int = 0, **changes: Any) -> list[str]:
    """The benchmark's recipe and model; `changes` replace keys of the DeepSpeed JSON."""
    path = folder / f"{name}.json"
    zero = {"zero_optimization": {"stage": stage}}
    path.write_text(json.dumps(parity.RECIPE | zero | changes), encoding="utf-8")
    return [str(path), *parity.TINY, f"run.name={name}", f"run.dir={folder}", f"data.path={data}", *overrides]


def train_all(
    jobs: Iterable[list[str]], folder: Path, world_size: int, program: Callable[[], None] | None = None
) -> None:
    finished = rank_runner.train_all(list(jobs), folder / f"ranks-{world_size}", world_size, program)
    assert finished.codes == [0] * world_size, finished.output[-3000:]


def fork_run(source: Path, target: Path, step: int) -> None:
    """Makes `target` a run directory of `source` as it stood after `step`."""
    name = f"checkpoints/step-{step:08d}"
    shutil.copytree(source / name, target / name)
    rows = (source / "metrics.jsonl").read_text().splitlines(keepends=True)
    (target / "metrics.jsonl").write_text("".join(rows[:step]))


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses_after(run_dir: Path, step: int) -> list[float]:
    """The losses of the steps behind `step`."""
    return [row["loss"] for row in rows_of(run_dir) if row["step"] > step]


def shards_of(run_dir: Path, step: int) -> dict[str, Any]:
    """Size and SHA-256 of every file of weights and moments in a checkpoint."""
    manifest = json.loads((run_dir / f"checkpoints/step-{step:08d}/manifest.json").read_text())
    return {name: file for name, file in manifest["files"].items() if name.endswith(".safetensors")}


def events_of(run_dir: Path, event: str) -> list[dict[str, Any]]:
    """The rows of events.jsonl with this name, oldest first."""
    return [row for row in events.read(run_dir) if row["event"] == event]
