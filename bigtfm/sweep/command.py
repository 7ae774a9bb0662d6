"""`bigtfm sweep`: trains what is due, shows each result as it comes, and leaves table, pictures, the best."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from bigtfm.bench.results import append
from bigtfm.config.problems import ConfigProblem, Problem, StorageProblem
from bigtfm.console import progress_bar
from bigtfm.mlflow_sender import read_json, write_json
from bigtfm.resilience.claim import claim
from bigtfm.resilience.outcome import FAILURE
from bigtfm.sweep.halving import Work, due
from bigtfm.sweep.plots import draw
from bigtfm.sweep.ranks import Ranks
from bigtfm.sweep.report import (
    BEST,
    line_of,
    read_report,
    require_results,
    require_same_sweep,
    send,
    table_of,
    write,
)
from bigtfm.sweep.runner import RESULTS, Start, known_results, run_sweep
from bigtfm.sweep.space import load_sweep
from bigtfm.sweep.trial import STOPPED, Study, refusal
from bigtfm.tracking import read_metrics


def sweep(file: Path, out: Path, *, jobs: int = 1, as_json: bool = False, start: Start = Ranks) -> None:
    """Runs a sweep on this machine. start: starts the ranks of a trial.

    Raises:
        ConfigProblem: the file is wrong, all trials are refused, or `out` is another sweep's.
        Problem: no trial has a result.
        RequeueRequested: a signal asked to stop; the same command goes on.
    """
    study, terminal = _study(file, out), Console(stderr=as_json, soft_wrap=True, markup=False)
    with progress_bar("steps of the trials that run") as tell:
        for row in run_sweep(study, jobs, start, tell):
            if as_json:
                print(json.dumps(row), flush=True)
            else:
                terminal.print(line_of(study, row), highlight=False, markup=False)
    _report(study, terminal, as_json)


def next_trials(file: Path, out: Path) -> str:
    """What a cluster is to train next, as sbatch's --array takes it; the files lie in the trials' folders.

    Nothing is left: "", and the report is made. What finished trials came to is taken from their folders.

    Raises:
        ConfigProblem: as `sweep`; or none of those that were due has come to an end since.
    """
    study = _study(file, out)
    with claim(out, "sweep", "--out"):
        results, before = known_results(study), read_json(out / "due.json").get("due", [])
        last, ready = len(study.rungs) - 1, list[Work]()
        while not ready and (wanted := due(study.sweep.settings, last, results)):
            for work in wanted:
                came = _came_of(study, work) if list(work) in before else None
                if came is None:
                    try:
                        study.lay_out(work)
                        ready.append(work)
                        continue
                    except Problem as problem:
                        came = refusal(problem)
                row = study.row(work, came[0], why=came[1])
                append(out / RESULTS, row)
                results[work] = row["value"]
        again = [list(work) for work in ready]
        if again and again == before:
            raise ConfigProblem(
                f"none of {len(again)} trials has come to an end since they were submitted",
                where=str(out),
                fix="see the jobs' logs, then submit the sweep again",
            )
        write_json(out / "due.json", {"due": again})
    if not ready:
        _report(study, Console(stderr=True, soft_wrap=True, markup=False), as_json=False)
    return ",".join(str(trial) for trial, _ in ready)


def _study(file: Path, out: Path) -> Study:
    study = Study(load_sweep(file), out)
    require_same_sweep(study)
    if not (out / RESULTS).exists():
        _some_can_be_trained(study)
    return study


def _some_can_be_trained(study: Study) -> None:
    """Raises what the first trial is refused for, if all are: that is no result, but a mistake."""
    first: Problem | None = None
    for trial in range(study.sweep.settings.trials):
        try:
            study.lay_out((trial, 0))
            return
        except Problem as problem:
            first = first or problem
    if first is not None:
        raise first


def _came_of(study: Study, work: Work) -> tuple[int, str] | None:
    """Exit code of a trial that another process has run, and why; None: it has not come to an end."""
    folder, steps = study.folder(work[0]), study.rungs[work[1]]
    failure = read_json(folder / FAILURE)
    if failure:
        code = int(failure.get("exit_code", 1))
        return None if code in (*STOPPED, StorageProblem.exit_code) else (code, "")
    rows = read_metrics(folder / "metrics.jsonl")
    stopped_early = work[1] == 0 and (folder / "curve.png").exists()
    done = bool(rows) and (rows[-1]["step"] >= steps or stopped_early)
    return (0, "") if done else None


def _report(study: Study, terminal: Console, as_json: bool) -> None:
    report = read_report(study)
    best = require_results(report)
    write(report)
    pictures = draw(report)
    if not as_json:
        terminal.print(table_of(report))
    said = send(report, pictures)
    names = " ".join(str(study.out / name) for name in ("sweep.csv", *pictures))
    terminal.print(f"trial {best['trial']} is the best; {names}", highlight=False)
    config, deepspeed = (study.out / name for name in BEST)
    terminal.print(
        f"train it: bigtfm train --deepspeed_config {deepspeed} --config {config}", highlight=False
    )
    if said:
        terminal.print(said, highlight=False)
