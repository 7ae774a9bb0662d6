"""The rows of one H200, each beside its goal, in calls that end in time.

    python benchmarks/gpu_suite.py --out FOLDER [--minutes 8.5] [--only "GPT-2 124M"] [--dry-run]

The cells stand in benchmarks/matrices/h200.toml, a grid a row. A call begins a cell only if it can end in
time, prints a line for each row, and exits with 75 where cells are left: repeat it. `bigtfm bench --out`
makes the report. --dry-run: the first cell of each row with a tiny model in fp32, on any machine.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from bigtfm.bench.matrix import Matrix, load_matrix
from bigtfm.bench.results import RESULTS, Result, read_results, together
from bigtfm.bench.runner import Start, devices_of, environment_row, missing, run_matrix, start_rank
from bigtfm.cli import one_line
from bigtfm.config.problems import ConfigProblem

MATRIX = Path(__file__).parent / "matrices" / "h200.toml"
AGAIN = 75  # exit code: repeat the command


class Goal(NamedTuple):
    """Of a row; None: a ratio to a peer on the same GPU is, or which of several ways is the fastest."""

    tokens_per_second: float | None
    mfu: float | None


GOALS = {
    "GPT-2 124M, T 1024": Goal(468_000, 0.40),
    "GPT-2 1.5B, T 1024": Goal(47_000, 0.49),
    "GPT-3 1.3B, T 2048": Goal(52_000, 0.48),
    "GPT-3 2.7B, T 2048": Goal(27_700, 0.50),
    "GPT-3 6.7B, T 2048": Goal(10_600, 0.46),
    "Llama 8B, T 8192": Goal(7_300, 0.43),
    "BERT base, T 512, packed": Goal(None, None),
    "encoder-decoder, T 512": Goal(None, None),
    "the loss's ways: GPT-2 124M, T 1024": Goal(None, None),
    "kernels, not compiled: Llama 1B, T 2048": Goal(None, None),
    "8-bit products: Llama 8B, T 8192": Goal(None, None),
}
SMALL = ("model.hidden_size=32", "model.num_layers=2", "model.num_attention_heads=2", "model.max_seq_len=64")
_SHAPE = ("model.ffn_hidden_size=64", "model.num_kv_heads=2", "model.head_dim=16")


def main(arguments: Sequence[str] | None = None, start: Start = start_rank) -> int:
    """Runs what fits into the time, and prints the rows. Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--minutes", type=float, default=8.5, help="of this call (default 8.5)")
    parser.add_argument("--only", default="", help="rows whose name holds this text (default: all)")
    parser.add_argument("--dry-run", action="store_true", help="tiny models, on any machine")
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    options = parser.parse_args(arguments)
    matrix = load_matrix(MATRIX)
    matrix = tiny(matrix) if options.dry_run else matrix

    def wanted(grid: str) -> bool:
        return options.only in grid

    _require_sense(options, matrix, wanted)
    for row in run_matrix(matrix, options.out, start=start, seconds=60 * options.minutes, only=wanted):
        print(
            f"# {row['key']}: {row['status']} {row['why'] if row['status'] != 'ok' else ''}".rstrip(),
            flush=True,
        )
    results = together(read_results(options.out / RESULTS))
    for grid, goal in GOALS.items():
        if wanted(grid):
            found = line(grid, goal, [result for result in results if result.grid == grid])
            print(json.dumps(found) if options.json else said(found))
    left = missing(matrix, options.out, wanted)
    if left:
        print(f"# {left} cells are left: repeat the command")
    return AGAIN if left else 0


def _require_sense(options: argparse.Namespace, matrix: Matrix, wanted: Callable[[str], bool]) -> None:
    """Refuses what would measure nothing, or nothing that is meant.

    Raises:
        ConfigProblem: no row is wanted, no cell could end in time, or there is no GPU.
    """
    if not any(map(wanted, GOALS)):
        fix = f"use a part of one of: {'; '.join(GOALS)}"
        raise ConfigProblem(f"no row holds '{options.only}'", where="command line: --only", fix=fix)
    least = matrix.measure.timeout_seconds / 60
    if not options.minutes > least:
        raise ConfigProblem(
            f"no cell is sure to end in {options.minutes:g} minutes",
            where="command line: --minutes",
            fix=f"use more than {least:g}, the time that a cell may take",
        )
    if not options.dry_run and devices_of(environment_row()) == ["cpu"]:
        raise ConfigProblem("no NVIDIA GPU is here", where="this machine", fix="use --dry-run: tiny models")


def tiny(matrix: Matrix) -> Matrix:
    """The first cell of each row, with a model that any machine trains in no time."""
    first = {grid: cell for grid, cell in reversed(matrix.cells)}
    cells = []
    for grid in dict.fromkeys(grid for grid, _ in matrix.cells):
        cell = first[grid]
        kept = tuple(each for each in cell.overrides if "vocab_size" not in each)
        changes = {
            "overrides": (*kept, *SMALL, *(_SHAPE if "llama" in cell.model or "t5" in cell.model else ())),
            "deepspeed_config": "ds_configs/zero1_fp32.json",
            "precision": "fp32",
            "micro_batch": 2,
            "accumulation": 2,
            "global_batch": None,
            "seq_len": None,
            "compile": False,
        }
        cells.append((grid, cell.model_copy(update=changes)))
    return replace(
        matrix, cells=tuple(cells), measure=matrix.measure.model_copy(update={"warm_up": 1, "steps": 3})
    )


def line(grid: str, goal: Goal, results: Sequence[Result]) -> dict[str, object]:
    """A row: the fastest cell beside its goal; why there is none, if all have failed."""
    done = [result for result in results if result.ok]
    if not done:
        failed = "; ".join(f"{result.first['status']}: {result.first['why']}" for result in results)
        return {"row": grid, "cell": None, "why": failed or "not measured yet"}
    best = max(done, key=lambda result: result.rates.median)
    rate = best.rates
    return {
        "row": grid,
        "cell": best.label,
        "device": best.first["device"],
        "tokens_per_second": rate.median,
        "low": rate.low,
        "high": rate.high,
        "goal": goal.tokens_per_second,
        "of_goal": rate.median / goal.tokens_per_second if goal.tokens_per_second else None,
        "mfu": best.mean("mfu"),
        "mfu_goal": goal.mfu,
        "peak_gib": round(best.peak_bytes / 2**30, 1) if best.peak_bytes else None,
    }


def said(found: dict[str, object]) -> str:
    """The row as a line of text."""
    if found["cell"] is None:
        return f"{found['row']}: {found['why']}"
    rates = "{tokens_per_second:,.0f} tokens/s ({low:,.0f} to {high:,.0f})".format(**found)
    goal = ", {of_goal:.2f} of the goal {goal:,.0f}".format(**found) if found["goal"] else ""
    mfu = ", MFU {mfu:.1%}".format(**found) if found["mfu"] else ""
    peak = f", {found['peak_gib']} GiB" if found["peak_gib"] else ""
    return f"{found['row']}: {rates}{goal}{mfu}{peak}, {found['cell']} on {found['device']}"


if __name__ == "__main__":
    with one_line():
        code = main()
    raise SystemExit(code)
