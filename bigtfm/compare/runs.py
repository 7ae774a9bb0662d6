"""What a run directory tells: the rows of its steps, its settings, and where it was started anew."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from bigtfm.config.deepspeed import BATCH_KEYS, load_deepspeed_json
from bigtfm.config.problems import DataProblem, Problem
from bigtfm.config.run import RunConfig
from bigtfm.config.sections import ModelSection
from bigtfm.resilience import events
from bigtfm.tracking import read_metrics

NUMBERS = ("lr", "loss", "grad_norm", "val_loss", "time", "seconds", "mfu", "tokens_per_second")
LARGEST = 2**53  # of an integer: beyond it a float, which all is compared and drawn as, leaves some out
PRECISIONS = ("bf16.enabled", "fp16.enabled")  # resolved.json says it in one word
PAUSE = 5.0  # seconds between two steps: a start takes longer, for its imports alone


@dataclass(frozen=True)
class Run:
    """A run directory, read."""

    path: Path
    rows: dict[int, dict[str, Any]]  # of metrics.jsonl, by step, ascending
    settings: dict[str, Any]  # "table.key" -> value
    identity: dict[str, Any]  # SHA-256 of data and tokenizer, if a checkpoint tells
    starts: tuple[int, ...]  # steps before which a process was started anew, as far as the rows tell
    spikes: tuple[dict[str, Any], ...] = ()  # after which it went back to a checkpoint; of events.jsonl


def read_run(path: Path) -> Run:
    """Reads metrics.jsonl, resolved.json, deepspeed.json and the newest checkpoint's state.json.

    Raises:
        DataProblem: the folder is no run directory, or one of its files is damaged.
    """
    for name in ("metrics.jsonl", "resolved.json", "deepspeed.json"):
        if not (path / name).is_file():
            lacks = f"{name} is missing" if path.is_dir() else "no such folder"
            fix = "pass a directory that `bigtfm train` has written, such as runs/quickstart"
            raise DataProblem(f"not a run directory: {lacks}", where=str(path), fix=fix)
    rows = _rows(path / "metrics.jsonl")
    by_step = {row["step"]: row for row in rows}
    identity, starts = _identity(path / "checkpoints"), _starts(rows)
    return Run(path, by_step, _settings(path), identity, starts, _spikes(path))


def _spikes(path: Path) -> tuple[dict[str, Any], ...]:
    names = ("step", "back_to", "first_sample", "end_sample")
    rows = (row for row in events.read(path) if row["event"] == "spike")
    return tuple(
        {name: row[name] for name in names} for row in rows if all(_is_integer(row.get(n)) for n in names)
    )


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        rows = read_metrics(path)
    except Problem as problem:  # whatever is wrong with the file, it is what was to be read
        raise DataProblem(problem.what, where=problem.where, fix=problem.fix) from None
    last = 0
    for number, row in enumerate(rows, start=1):
        if not _is_step(row) or row["step"] <= last:
            fix = "remove the line, or compare a copy of the run that is whole"
            raise DataProblem("this line is no step, or out of order", where=f"{path}:{number}", fix=fix)
        last = row["step"]
    return rows


def _is_step(row: dict[str, Any]) -> bool:
    """Whether a row has what every step has, and all that is read of it in its type and range."""
    return (
        {"step", "loss", "lr", "sample_digest"} <= row.keys()
        and isinstance(row["sample_digest"], str)
        and all(_is_integer(row[name]) and row[name] >= 0 for name in ("step", "tokens") if name in row)
        and all(isinstance(row[name], float) or _is_integer(row[name]) for name in NUMBERS if name in row)
    )


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST


def _settings(path: Path) -> dict[str, Any]:
    """All that is recorded of what was run, each truth once, under the name that the user knows it by."""
    resolved = _object(path / "resolved.json")
    defaults, stated = RunConfig().model_dump(mode="json"), resolved.get("run_config", {})
    try:
        run = {table: keys | stated.get(table, {}) for table, keys in defaults.items()}
        run["run"]["steps"], run["data"]["seq_len"] = resolved["steps"], resolved["seq_len"]
        run["objective"]["kind"] = resolved["objective"]
        run["model"]["vocab_size"] = resolved["vocab_size"]
        batch = [resolved[name] for name in ("global_batch", "micro_batch", "accumulation")]
        rest = {"precision": resolved["precision"], "ranks": resolved["world_size"]}
    except (KeyError, TypeError, AttributeError):
        raise _damaged(path / "resolved.json") from None
    deepspeed = _deepspeed(path / "deepspeed.json", run["model"], resolved["steps"])
    deepspeed |= dict(zip(BATCH_KEYS, batch, strict=True)) | rest
    return {key: value for key, value in _flat(run | deepspeed).items() if key not in PRECISIONS}


def _deepspeed(path: Path, model: dict[str, Any], steps: int) -> dict[str, Any]:
    """The DeepSpeed JSON with its defaults; as it stands if this version would not take it any more."""
    try:
        return load_deepspeed_json(path).resolved(ModelSection.model_validate(model), steps)
    except (Problem, ValueError):
        return _object(path)


def _identity(checkpoints: Path) -> dict[str, Any]:
    """What the newest checkpoint says of data and tokenizer; nothing where there is none to read."""
    for state in sorted(checkpoints.glob("step-*/state.json"), reverse=True):
        try:
            identity = _object(state)["progress"]["identity"]
            parts = _flat({"data": identity["data"], "tokenizer.sha256": identity["tokenizer"]})
            return {key: value for key, value in parts.items() if key.endswith("sha256")}
        except (DataProblem, KeyError, TypeError, ValueError):
            continue
    return {}


def _object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise _damaged(path) from None
    if not isinstance(values, dict):
        raise _damaged(path)
    return values


def _damaged(path: Path) -> DataProblem:
    return DataProblem("is damaged", where=str(path), fix="restore it from a backup of the run")


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """Nested tables as one, with "table.key"; a list of tables as "list[0].key"."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            value = {f"[{number}]": item for number, item in enumerate(value)}
        if isinstance(value, dict):
            flat |= {f"{name}.{key}".replace(".[", "["): item for key, item in _flat(value).items()}
        elif value != []:
            flat[name] = value
    return flat


def _starts(rows: list[dict[str, Any]]) -> tuple[int, ...]:
    """The first row of a process shows in two ways: a pause before it, or another yardstick.

    The yardstick of mfu, the device's peak, is measured anew at each start on a CPU; on a GPU it changes with
    the number of ranks.
    """
    usual = statistics.median(row.get("seconds", 0.0) for row in rows) if rows else 0.0
    starts = []
    for before, row in pairwise(rows):
        pause = row.get("time", 0.0) - before.get("time", 0.0) - row.get("seconds", 0.0)
        paused = "val_loss" not in row and pause > max(PAUSE, 10 * usual)
        if paused or not math.isclose(_yardstick(before), _yardstick(row), rel_tol=1e-9):
            starts.append(row["step"])
    return tuple(starts)


def _yardstick(row: dict[str, Any]) -> float:
    return row.get("mfu", 0.0) / (row.get("tokens_per_second", 0.0) or 1.0)
