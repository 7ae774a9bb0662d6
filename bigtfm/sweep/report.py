"""What a sweep leaves: the trials in order, as a table and sweep.csv, and the best one's two files."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigtfm import mlflow_mirror
from bigtfm.bench.results import read_rows
from bigtfm.config.problems import ConfigProblem, Problem, StorageProblem
from bigtfm.config.run import RunConfig, load_run_config
from bigtfm.mlflow_sender import read_json
from bigtfm.sweep.runner import RESULTS
from bigtfm.sweep.trial import Row, Study
from bigtfm.tracking import MetricsLog
from bigtfm.whole_files import whole_file, write_whole

if TYPE_CHECKING:
    from rich.table import Table

CSV = "sweep.csv"
BEST = ("best.toml", "best.json")


@dataclass(frozen=True)
class Report:
    """All trials, the best first: by how far they came, then by the metric; those that failed are last."""

    study: Study
    rows: tuple[Row, ...]  # of each trial its last

    @property
    def best(self) -> Row | None:
        """None: no trial has a result."""
        return self.rows[0] if self.rows and self.rows[0]["value"] is not None else None


def read_report(study: Study) -> Report:
    """From results.jsonl."""
    last: dict[int, Row] = {}
    for row in read_rows(study.out / RESULTS):
        last[row["trial"]] = row
    sign = 1 if study.sweep.settings.goal == "min" else -1

    def place(row: Row) -> tuple[Any, ...]:
        failed = row["value"] is None
        return failed, -row["rung"], 0 if failed else sign * row["value"], row["trial"]

    return Report(study, tuple(sorted(last.values(), key=place)))


def require_results(report: Report) -> Row:
    """The best trial. Raises, with the code of the first that failed, where there is none."""
    if report.best is not None:
        return report.best
    first = min(report.rows, key=lambda row: row["trial"])
    problem = Problem(
        f"no trial has come to an end; the first: {first['status']}: {first['why']}",
        where=str(report.study.out),
        fix=f"see its logs, correct the space or the files, then remove {RESULTS} and repeat the command",
    )
    problem.exit_code = first["exit_code"] or 1  # type: ignore[misc]
    raise problem


def write(report: Report) -> None:
    """sweep.csv, best.toml and best.json.

    Raises:
        StorageProblem: they can't be written.
    """
    study, best = report.study, require_results(report)
    base = _base(study)
    try:
        with (
            whole_file(study.out / CSV) as building,
            building.open("w", newline="", encoding="utf-8") as file,
        ):
            table = csv.writer(file)
            table.writerow([*_columns(study), "seconds", "why"])
            for row in report.rows:
                table.writerow([*_cells(study, row), row["seconds"], row["why"]])
        config, deepspeed = (study.out / name for name in BEST)
        study.write(best["trial"], config, deepspeed, base.run.dir, f"{base.run.name}-best", study.steps)
    except OSError as error:
        raise StorageProblem(
            f"can't be written: {error}", where=str(study.out), fix="free space there, repeat the command"
        ) from None


def _base(study: Study) -> RunConfig:
    settings = study.sweep.settings
    return load_run_config(Path(settings.config) if settings.config else None, settings.overrides)


def _columns(study: Study) -> list[str]:
    return ["trial", "steps", "status", "exit_code", study.sweep.settings.metric, *study.sweep.swept]


def _cells(study: Study, row: Row) -> list[Any]:
    values = [row["point"][key] for key in study.sweep.swept]
    value = "" if row["value"] is None else row["value"]
    return [row["trial"], row["steps"], row["status"], row["exit_code"], value, *values]


def table_of(report: Report, most: int = 30) -> Table:
    """The trials for a terminal, the best `most` of them."""
    from rich.table import Table

    table = Table(box=None, title_justify="left", title=f"{len(report.rows)} trials, the best first")
    columns = _columns(report.study)
    for name in columns:
        last = name.rpartition(".")[2]  # a terminal is narrow
        alone = [each.rpartition(".")[2] for each in columns].count(last) == 1
        title = last if alone else name
        table.add_column(title, justify="left" if name == "status" else "right", overflow="fold")
    for row in report.rows[:most]:
        table.add_row(*(_said(cell) for cell in _cells(report.study, row)))
    return table


def _said(cell: Any) -> str:
    return f"{cell:.5g}" if isinstance(cell, float) else str(cell)


def line_of(study: Study, row: Row) -> str:
    """A result in a line."""
    point = ", ".join(f"{key} {_said(row['point'][key])}" for key in study.sweep.swept)
    came = f"trial {row['trial']} at step {row['steps']} of {study.steps}"
    if row["value"] is None:
        return f"{came}: {row['status']} (exit code {row['exit_code']}): {row['why']}  [{point}]"
    return f"{came}: {study.sweep.settings.metric} {row['value']:.4f}  [{point}]"


def send(report: Report, pictures: Sequence[str]) -> str | None:
    """One MLflow run for the sweep, with the trials' own below it; None: [track] is off. A line to print."""
    study, track = report.study, _base(report.study).track
    if not track.mlflow:
        return None
    log = MetricsLog(study.out / "metrics.jsonl")
    log.truncate_after(-1)
    for row in sorted(report.rows, key=lambda row: row["trial"]):
        if row["value"] is not None:
            numbers = {k: v for k, v in row["point"].items() if isinstance(v, int | float)}
            log.append({"step": row["trial"], study.sweep.settings.metric: row["value"], **numbers})
    log.close()
    best = require_results(report)
    found = [read_json(study.folder(row["trial"]) / "mlflow.json") for row in report.rows]
    mirror = mlflow_mirror.start(
        study.out,
        uri=track.uri,
        experiment=track.experiment,
        name=study.out.name,
        params={
            "sweep": study.sweep.settings.model_dump(mode="json"),
            "space": {axis.key: json.dumps(axis.values) for axis in study.sweep.axes if axis.is_swept},
            "best": {"trial": best["trial"], "value": best["value"], **best["point"]},
        },
        artifacts=(CSV, *BEST, *pictures, RESULTS),
        children=[each["run_id"] for each in found if "run_id" in each],
    )
    run = mirror.finish()
    return f"MLflow run {run}" if run else f"not sent to MLflow in time: bigtfm sync {study.out}"


def require_same_sweep(study: Study) -> None:
    """Notes what is swept in OUT/sweep.json; a folder goes on with the same sweep alone.

    Raises:
        ConfigProblem: the folder is another sweep's.
    """
    settings = study.sweep.settings
    plan = settings.model_dump(mode="json") | {
        "space": {axis.key: [axis.kind, *axis.values] for axis in study.sweep.axes},
        "deepspeed_config": study.base.values,
        "config": _base(study).model_dump(mode="json"),
        "steps": study.steps,
    }
    if settings.method != "halving":
        del plan["trials"]  # more of them leave those there as they are
    plan, path = json.loads(json.dumps(plan)), study.out / "sweep.json"
    before = read_json(path)
    changed = [name for name in {**before, **plan} if before.get(name) != plan.get(name)] if before else []
    if changed:
        raise ConfigProblem(
            f"the folder holds another sweep's trials: {', '.join(changed)} of it differ",
            where=str(study.out),
            fix="pass another --out, or undo the change",
        )
    write_whole(path, json.dumps(plan, indent=1) + "\n")
