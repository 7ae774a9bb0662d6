"""Compares short runs by their speed: `python benchmarks/report_runs.py FOLDER` reads every run in FOLDER.

Writes FOLDER/report.md and prints it. slurm/bench.sbatch calls it when its runs have ended.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from bigtfm.tracking import read_metrics

WARM_UP = 5  # steps that compile, allocate and read for the first time


def report(folder: Path) -> str:
    """A table in Markdown, the fastest run first; a run that failed says why."""
    rows, failed = [], []
    for run in sorted(path for path in folder.iterdir() if path.is_dir()):
        resolved, failure = _json(run / "resolved.json"), _json(run / "failure.json")
        steps = read_metrics(run / "metrics.jsonl")[WARM_UP:]
        if not steps or failure:
            why = (
                f"{failure['where']}: {failure['what']}"
                if failure
                else "it has not come to a step; see its logs"
            )
            failed.append(f"- {run.name}: {why}")
            continue
        rate = statistics.median(row["tokens_per_second"] for row in steps)
        mfu = statistics.median(row["mfu"] for row in steps) if "mfu" in steps[0] else None
        rows.append((rate, run.name, resolved, steps, mfu))
    lines = [
        f"# {folder.name}", "", f"Medians of the steps after the first {WARM_UP}.", "",
        "| run | ZeRO | precision | ranks | batch | tokens/s | a rank | MFU | s a step | last loss |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for rate, name, resolved, steps, mfu in sorted(rows, key=lambda row: -row[0]):
        ranks = resolved["world_size"]
        batch = (
            f"{resolved['global_batch']} = {resolved['micro_batch']} x {resolved['accumulation']} x {ranks}"
        )
        seconds = statistics.median(row["seconds"] for row in steps)
        share = "" if mfu is None else f"{mfu:.1%}"
        lines.append(
            f"| {name} | {resolved['zero_stage']} | {resolved['precision']} | {ranks} | {batch} | "
            f"{rate:,.0f} | {rate / ranks:,.0f} | {share} | {seconds:.3f} | {steps[-1]['loss']:.4f} |"
        )
    return "\n".join(lines + (["", "Failed:", *failed] if failed else [])) + "\n"


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}


if __name__ == "__main__":
    target = Path(sys.argv[1])
    text = report(target)
    (target / "report.md").write_text(text, encoding="utf-8")
    print(text, end="")
