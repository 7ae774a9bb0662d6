"""The run that nobody kills, and what another must have in common with it: everything, to the bit."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chaos import job
from chaos.attempt import attempt
from chaos.job import STEPS, Layout

COMPARED = ("loss", "grad_norm", "lr", "val_loss", "tokens", "sample_digest")


@dataclass(frozen=True)
class Reference:
    """rows: of metrics.jsonl by step; files: of the last checkpoint, name -> SHA-256."""

    layout: Layout
    rows: dict[int, dict[str, Any]]
    files: dict[str, str]
    start_seconds: float  # until its first step


def reference_of(out: Path, layout: Layout) -> Reference:
    """Trained once, in out/runs/reference-LAYOUT."""
    name = f"reference-{layout.name}"
    run_dir = out / "runs" / name
    if not (run_dir / "seconds.json").exists():
        done = attempt(out, job.arguments(out, job.make_data(out / "data"), layout, name), None, 0.0, 10.0)
        assert done.codes == [0] * job.RANKS, done.output
        rows = list(rows_of(run_dir).values())
        seconds = done.seconds - (rows[-1]["time"] - rows[0]["time"])
        (run_dir / "seconds.json").write_text(json.dumps(seconds), encoding="utf-8")
    seconds = json.loads((run_dir / "seconds.json").read_text())
    return Reference(layout, rows_of(run_dir), files_of(run_dir), seconds)


def rows_of(run_dir: Path) -> dict[int, dict[str, Any]]:
    """metrics.jsonl by step, without a last line torn by a kill."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return {row["step"]: row for row in rows}


def differing_rows(
    found: dict[int, dict[str, Any]], expected: dict[int, dict[str, Any]], unevaluated: int | None = None
) -> list[str]:
    """The first value of each column that is not the same, floats by their bits.

    unevaluated: the step that may lack its evaluation.
    """
    wrong = []
    for column in COMPARED:
        for step, row in found.items():
            if (column, step) == ("val_loss", unevaluated) and column not in row:
                continue
            a, b = (_bits(values.get(column)) for values in (row, expected.get(step, {})))
            if a != b:
                wrong.append(f"step {step}: {column} {a} instead of {b}")
                break
    return wrong


def evaluation_is_due(run_dir: Path) -> int | None:
    """The step whose evaluation the next start makes up for: a signal, or a launcher's end, cut it short."""
    for folder in sorted((run_dir / "checkpoints").glob("step-*"), reverse=True):
        try:
            progress = json.loads((folder / "state.json").read_text())["progress"]
        except (OSError, ValueError):  # gone, or not whole
            continue
        return int(progress["step"]) if progress["unevaluated"] else None
    return None


def _bits(value: Any) -> Any:
    return value.hex() if isinstance(value, float) else value


def files_of(run_dir: Path) -> dict[str, str]:
    """Files of the last step's checkpoint (weights, moments, counters, data position): name -> SHA-256."""
    folder = run_dir / f"checkpoints/step-{STEPS:08d}"
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*"))}


def differing_files(run_dir: Path, reference: Reference) -> list[str]:
    """Files of the last checkpoint that are not the same, or not there."""
    found = files_of(run_dir)
    names = sorted(found.keys() | reference.files.keys())
    return [f"{name} differs" for name in names if found.get(name) != reference.files.get(name)]
