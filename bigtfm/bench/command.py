"""`bigtfm bench`: runs matrices, shows each result as it comes, and makes the report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table as Shown

from bigtfm import mlflow_mirror
from bigtfm.bench.matrix import load_matrix
from bigtfm.bench.report import Report, Table, make_report, results_of
from bigtfm.bench.results import RESULTS, Row, read_results, rewrite
from bigtfm.bench.runner import run_matrix
from bigtfm.bench.runs import RUNS, rows_of_runs
from bigtfm.config.problems import Interrupted
from bigtfm.planner.step_time import Rates
from bigtfm.tracking import MetricsLog

EXPERIMENT = "bigtfm-bench"
_ARTIFACTS = ("report.html", "report.md", "results.csv", "results.jsonl")


def bench(
    matrices: Sequence[Path],
    out: Path,
    *,
    runs: Path | None = None,
    against: Path | None = None,
    calibration: Path | None = None,
    mlflow: str = "",
    as_json: bool = False,
) -> bool:
    """Measures, reports, and says whether something is worse than in `against`.

    calibration: a file of rates, for the step that the planner expects of each cell.

    Raises:
        ConfigProblem: a matrix is wrong, or there is nothing to report.
        Interrupted: a Ctrl-C; no rank is left.
        StorageProblem: `out` can't be written or read.
    """
    terminal = Console(stderr=as_json, soft_wrap=True, markup=False)
    for folder, read in ((against, results_of), (runs, rows_of_runs)):  # before hours are spent
        if folder is not None:
            list(read(folder))
    rates = Rates.read(calibration) if calibration is not None else None
    try:
        for matrix in [load_matrix(path) for path in matrices]:
            for row in run_matrix(matrix, out, rates=rates):
                said = json.dumps(row) if as_json else line_of(row)
                print(said, flush=True) if as_json else terminal.print(said, highlight=False)
    except KeyboardInterrupt:
        what, fix = "stopped by a Ctrl-C; what has been measured stands", "repeat the command: it goes on"
        raise Interrupted(what, where=str(out), fix=fix) from None
    if runs is not None:
        measured = [row for row in read_results(out / RESULTS) if row["grid"] != RUNS]
        rewrite(out / RESULTS, [*measured, *rows_of_runs(runs)])
    report = make_report(out, against)
    if not as_json:
        for table in report.tables:
            if any(map(table.is_brief, table.columns)):
                terminal.print(shown(table))
    terminal.print(f"report: {out / 'report.html'}", highlight=False)
    if mlflow:
        _send(report, out, mlflow, terminal)
    return any(change.is_regression for change in report.changes)


def line_of(row: Row) -> str:
    """A result in a line."""
    if row["status"] != "ok":
        return f"{row['key']}: {row['status']}: {row['why']}"
    mfu = (
        f", MFU {row['mfu']:.1%}"
        if row.get("mfu")
        else f", {row['matmul_share']:.1%} of the matrix products'"
    )
    rate = row["tokens_per_second"]
    return f"{row['key']}: {rate['median']:,.0f} tokens/s ({rate['low']:,.0f} to {rate['high']:,.0f}){mfu}"


def shown(table: Table) -> Shown:
    """A table for a terminal."""
    title, caption = f"\n{table.title}", table.note or None
    result = Shown(title=title, caption=caption, title_justify="left", caption_justify="left", box=None)
    for place in (places := [n for n, name in enumerate(table.columns) if table.is_brief(name)]):
        name = table.columns[place].strip()
        result.add_column(name, justify="left" if place == 0 or name == "why" else "right")
    for row in table.rows:
        result.add_row(*(row[place] for place in places))
    return result


def _send(report: Report, out: Path, uri: str, terminal: Console) -> None:
    """One MLflow run for the folder: its cells are the steps, the report its artifacts."""
    log = MetricsLog(out / "metrics.jsonl")
    log.truncate_after(0)
    for number, result in enumerate(report.results, 1):
        if result.ok:
            row = result.first
            split = {f"{name}_seconds": value for name, value in (row.get("split") or {}).items()}
            memory = {f"{name}_bytes": value for name, value in (row.get("memory") or {}).items()}
            rates = {"tokens_per_second": result.rates.median, "step_seconds": result.seconds.median}
            shares = {name: row[name] for name in ("mfu", "matmul_share") if row.get(name)}
            log.append({"step": number, **rates, **shares, **split, **memory})
    log.close()
    cells = {f"cell.{number}": result.key for number, result in enumerate(report.results, 1)}
    pictures = [path.name for path in sorted(out.glob("*.png"))]
    mirror = mlflow_mirror.start(
        out, uri=uri, experiment=EXPERIMENT, name=report.name, params=dict(report.about) | cells,
        artifacts=(*_ARTIFACTS, *pictures),
    )  # fmt: skip
    run = mirror.finish()
    said = f"MLflow run {run}" if run else f"not sent to MLflow in time: bigtfm sync {out}"
    terminal.print(said, highlight=False)
