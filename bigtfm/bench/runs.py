"""Finished runs as rows of a benchmark: what a run directory says of its speed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bigtfm.bench.results import Row, Spread
from bigtfm.config.problems import ConfigProblem
from bigtfm.mlflow_sender import read_json
from bigtfm.resilience.outcome import FAILURE
from bigtfm.tracking import read_metrics

RUNS = "runs"  # their grid
WARM_UP = 5  # steps that compile, allocate and read for the first time


def rows_of_runs(folder: Path) -> Iterator[Row]:
    """A row for every run directory in `folder`; one that failed, or did not come far, says why.

    Raises:
        ConfigProblem: there is no such folder.
    """
    if not folder.is_dir():
        raise ConfigProblem("no such folder", where=str(folder), fix="name one that holds run directories")
    for run in sorted(path for path in folder.iterdir() if (path / "logs").is_dir()):
        resolved, failure = read_json(run / "resolved.json"), read_json(run / FAILURE)
        row: Row = {"key": run.name, "repeat": 0, "matrix": folder.resolve().name, "grid": RUNS}
        row |= {"model": run.name, "status": "crash", "why": "it has not come far; see its logs"}
        steps = read_metrics(run / "metrics.jsonl")[WARM_UP:]
        if failure:
            why = f"{failure.get('where', run)}: {failure.get('what', 'it has failed')}"
            yield row | {"status": "oom" if "out of memory" in why else "crash", "why": why}
        elif not resolved or not steps:
            yield row
        else:
            try:
                yield row | _measured(resolved, steps)
            except (KeyError, TypeError, ZeroDivisionError):
                yield row | {"why": "its files are damaged, or another version's"}


def _measured(resolved: dict[str, Any], steps: list[dict[str, Any]]) -> Row:
    """What the files of a run say of its speed."""
    axes = ("zero_stage", "precision", "micro_batch", "accumulation", "seq_len", "recompute")
    rates, shares = [each["tokens_per_second"] for each in steps], [e["mfu"] for e in steps if "mfu" in e]
    spreads = {
        "tokens_per_second": Spread.of(rates),
        "step_seconds": Spread.of(e["seconds"] for e in steps),
    }
    return {
        "status": "ok",
        "why": "",
        **{name: resolved[name] for name in axes},
        "ranks": resolved["world_size"],
        "parameters": resolved["parameters"],
        "tokens_per_step": resolved["tokens_per_step"],
        "seconds": [each["seconds"] for each in steps],
        "tokens_per_second_per_rank": spreads["tokens_per_second"].median / resolved["world_size"],
        "mfu": Spread.of(shares).median if shares else None,
        "loss": steps[-1]["loss"],
        **{name: vars(spread) for name, spread in spreads.items()},
    }
