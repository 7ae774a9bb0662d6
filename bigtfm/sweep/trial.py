"""A trial: an ordinary run directory with both of its files, and what came of it."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bigtfm.config.deepspeed import DeepSpeedConfig, load_deepspeed_json
from bigtfm.config.problems import ConfigProblem, Problem, did_you_mean
from bigtfm.config.run import load_run_config, to_toml
from bigtfm.job import Job, check_job
from bigtfm.mlflow_sender import read_json
from bigtfm.resilience.outcome import FAILURE
from bigtfm.sweep import halving
from bigtfm.sweep.halving import Work
from bigtfm.sweep.space import HORIZON, Sweep
from bigtfm.tracking import read_metrics
from bigtfm.whole_files import write_whole

Row = dict[str, Any]
STOPPED = (75, 130)  # exit codes of a run that was asked to stop, and goes on when it is started again


@dataclass(frozen=True)
class Study:
    """A sweep in its folder."""

    sweep: Sweep
    out: Path

    @cached_property
    def base(self) -> DeepSpeedConfig:
        """The DeepSpeed JSON that trials change."""
        return load_deepspeed_json(Path(self.sweep.settings.deepspeed_config))

    @cached_property
    def steps(self) -> int:
        """Optimizer steps of a whole training.

        Raises:
            ConfigProblem: neither the sweep nor the schedule says, or the schedule has fewer.
        """
        asked, stated = self.sweep.settings.steps, self.base.horizon
        horizon = next((axis.values[0] for axis in self.sweep.axes if axis.key == HORIZON), stated)
        steps = asked or (horizon if isinstance(horizon, int) else None)
        if steps is None:
            fix = "set steps to the optimizer steps of a whole training"
            raise ConfigProblem(
                "steps is missing, and the schedule has none", where=str(self.sweep.path), fix=fix
            )
        if isinstance(horizon, int) and steps > horizon:
            fix = f"set steps to {horizon} or less, or write {HORIZON} = {steps} below [space]"
            what = f"steps {steps} is larger than the schedule's total_num_steps {horizon}"
            raise ConfigProblem(what, where=str(self.sweep.path), fix=fix)
        return steps

    @cached_property
    def rungs(self) -> list[int]:
        """Optimizer steps at which trials are compared."""
        return halving.rungs(self.sweep.settings, self.steps)

    def folder(self, trial: int) -> Path:
        """The run directory of a trial."""
        return self.out / f"trial-{trial:03d}"

    def lay_out(self, work: Work) -> Job:
        """Writes both files of a trial that is to come to a rung, and checks them as training will.

        Raises:
            ConfigProblem, DataProblem: they can't be trained.
        """
        trial, rung = work
        folder = self.folder(trial)
        folder.mkdir(parents=True, exist_ok=True)
        name, steps = folder.name, self.rungs[rung]
        paths = self.write(trial, folder / "run.toml", folder / "deepspeed.json", str(self.out), name, steps)
        job = check_job(*paths, (), self.sweep.settings.ranks)
        _comparable(self, job)
        return job

    def write(
        self, trial: int, config: Path, deepspeed: Path, run_dir: str, name: str, steps: int
    ) -> tuple[Path, Path]:
        """Both files of a trial's recipe, for a run of that name and length."""
        settings, point = self.sweep.settings, self.sweep.point(trial)
        values = copy.deepcopy(self.base.values)
        if values.get("scheduler", {}).get("params", {}).get("total_num_steps") == "auto":
            put(values, HORIZON, self.steps)  # not those of a rung: a resume would find another recipe
        ours = [*settings.overrides]
        for axis in self.sweep.axes:
            if axis.of_run_config:
                ours.append(f"{axis.key}={json.dumps(point[axis.key])}")
            else:
                put(values, axis.key, point[axis.key])
        ours += [f"run.dir={run_dir}", f"run.name={name}", f"run.steps={steps}"]
        run = load_run_config(Path(settings.config) if settings.config else None, ours)
        said = ", ".join(f"{key} = {json.dumps(value)}" for key, value in point.items())
        write_whole(config, to_toml(run, f"# Trial {trial} of {self.sweep.path.name}: {said}"))
        write_whole(deepspeed, json.dumps(values, indent=2) + "\n")
        return config, deepspeed

    def row(self, work: Work, code: int, seconds: float | None = None, why: str = "") -> Row:
        """What came of a trial at a rung: a line of results.jsonl.

        Raises:
            ConfigProblem: the trial has no such metric.
        """
        trial, rung = work
        folder = self.folder(trial)
        why = why or (why_ended(folder, code) if code else "")
        value, step = self._value(folder, required=code == 0)
        return {
            "trial": trial,
            "rung": rung,
            "steps": step,
            "status": status_of(code, why),
            "exit_code": code,
            "value": value if code == 0 else None,
            "why": why,
            "seconds": None if seconds is None else round(seconds, 3),
            "point": self.sweep.point(trial),
        }

    def _value(self, folder: Path, required: bool) -> tuple[float | None, int]:
        """The metric where it was last measured, and the last step."""
        metric, rows = self.sweep.settings.metric, read_metrics(folder / "metrics.jsonl")
        for row in reversed(rows):
            if isinstance(row.get(metric), int | float):
                return float(row[metric]), rows[-1]["step"]
        if required:
            names = {name for row in rows for name, value in row.items() if isinstance(value, int | float)}
            what = f"metric '{metric}' is not in {folder / 'metrics.jsonl'}"
            raise ConfigProblem(what, where=str(self.sweep.path), fix=did_you_mean(metric, names - {"step"}))
        return None, rows[-1]["step"] if rows else 0


def why_ended(folder: Path, code: int) -> str:
    """What a trial that has failed says of it: failure.json, else its exit code, else its logs."""
    failure = read_json(folder / FAILURE)
    if failure:
        return f"{failure.get('where')}: {failure.get('what')}"
    if code > 128:
        return f"killed by signal {code - 128}"
    said = ""
    for log in sorted((folder / "logs").glob("rank-*.log")):
        for line in log.read_text("utf-8", "replace").splitlines():
            said = line.partition("error: ")[2].partition(". Fix: ")[0] or said
    return said or f"see {folder / 'logs'}"


def status_of(code: int, why: str) -> str:
    """An exit code in a word."""
    if code and "out of memory" in why.lower():
        return "out of memory"
    known = {0: "ok", 64: "refused", 65: "refused", 70: "diverged", 79: "lost"}
    return known.get(code, "crashed")


def _comparable(study: Study, job: Job) -> None:
    """Raises ConfigProblem where the metric can't be measured, or evaluations change what they measure."""
    settings = study.sweep.settings
    if settings.metric.startswith("val_") and not job.dataset.header.splits["validation"].tokens:
        raise ConfigProblem(
            f"metric {settings.metric} needs evaluations, and {job.dataset.path} has no validation split",
            where=str(study.sweep.path),
            fix='prepare the data set with a --validation-fraction above 0, or set metric = "loss"',
        )
    every = job.run.eval.every
    counts = [job.deepspeed.scheduler_type == "ReduceOnPlateau", job.run.eval.patience > 0]
    if any(counts) and any(every == 0 or steps % every for steps in study.rungs[:-1]):
        raise ConfigProblem(
            "eval.patience and ReduceOnPlateau count evaluations, and every rung of "
            f"{settings.method} has one, at {', '.join(map(str, study.rungs))} steps",
            where=str(study.sweep.path),
            fix="set eval.every to a divisor of these, or leave both out",
        )


def put(values: dict[str, Any], key: str, value: Any) -> None:
    """Enters a dotted key into nested objects."""
    *tables, name = key.split(".")
    for table in tables:
        values = values.setdefault(table, {})
    values[name] = value


def refusal(problem: Problem) -> tuple[int, str]:
    """Exit code and words of a trial that was not started."""
    return problem.exit_code, f"{problem.where}: {problem.what}"
