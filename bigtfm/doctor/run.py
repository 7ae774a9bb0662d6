"""`bigtfm doctor --run RUN`: what stopped a run, where it stands, and what to do next."""

from __future__ import annotations

import shlex
import statistics
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigtfm.config.problems import Interrupted, Problem, RequeueRequested, StorageProblem
from bigtfm.config.run import load_run_config
from bigtfm.doctor.findings import Finding, error, examine, ok, warning
from bigtfm.doctor.storage import check_folder
from bigtfm.engine.checkpoint import defect, steps_in
from bigtfm.mlflow_sender import read_json
from bigtfm.resilience import events
from bigtfm.tracking import iterate_metrics

SECONDS = 9.0  # for everything together
HASHED = 2 * 2**30  # bytes of a checkpoint up to which its SHA-256 are computed
RECENT = 50  # steps that the pace is judged by
STOPS = (RequeueRequested.exit_code, Interrupted.exit_code)  # ends that were asked for


@dataclass(frozen=True)
class Standing:
    """What the files of a run say of it."""

    resolved: dict[str, Any]  # resolved.json; empty: none
    failure: dict[str, Any]  # failure.json; empty: none
    owner: str | None  # who trains in it now
    step: int  # the last one in metrics.jsonl; 0: none
    last_at: float | None  # when that was, in Unix seconds
    pace: float | None  # seconds a step, the median of the last ones
    skipped: tuple[int, ...]  # steps whose update was left out


def examine_run(run_dir: Path) -> list[Finding]:
    """What stopped it first, then what else is to be known.

    A directory that is no run's is an error of one line.
    """
    if not run_dir.is_dir() or not any(
        (run_dir / name).exists() for name in ("resolved.json", "checkpoints", "failure.json", ".lock")
    ):
        fix = "pass the directory of a run, for example runs/quickstart"
        what = "holds no run" if run_dir.is_dir() else "is not there"
        return [error("run", f"{run_dir} {what}", fix)]
    try:
        standing = read(run_dir)
    except StorageProblem as problem:
        return [error("metrics.jsonl", f"{problem.where}: {problem.what}", problem.fix)]
    checks = {
        "run": lambda: [judge(run_dir, standing)],
        "checkpoints": lambda: check_checkpoints(run_dir, standing),
        "steps left out": lambda: _left_out(standing),
        "events": lambda: _events(run_dir),
        "hang": lambda: _hang(run_dir, standing),
        "MLflow": lambda: _mlflow(run_dir),
        "disk": lambda: check_folder("run", run_dir),
    }
    return examine(checks, SECONDS)


def read(run_dir: Path) -> Standing:
    """Raises StorageProblem when metrics.jsonl is damaged."""
    rows = list(iterate_metrics(run_dir / "metrics.jsonl"))
    seconds = [row["seconds"] for row in rows[-RECENT:] if isinstance(row.get("seconds"), float)]
    return Standing(
        resolved=read_json(run_dir / "resolved.json"),
        failure=read_json(run_dir / "failure.json"),
        owner=owner_of(run_dir),
        step=int(rows[-1]["step"]) if rows else 0,
        last_at=rows[-1].get("time") if rows else None,
        pace=statistics.median(seconds) if seconds else None,
        skipped=tuple(int(row["step"]) for row in rows if row.get("skipped")),
    )


def judge(run_dir: Path, standing: Standing) -> Finding:
    """What stopped it, in one finding with the next command."""
    steps = standing.resolved.get("steps")
    place = f"step {standing.step} of {steps}" if steps else f"step {standing.step}"
    if standing.owner is not None:
        return _of_a_running_one(standing, place)
    command = next_command(run_dir, standing.resolved)
    if standing.failure:
        code = standing.failure.get("exit_code")
        said = f"{standing.failure.get('where')}: {standing.failure.get('what')}"
        if code in STOPS:
            return warning("run", f"stopped when asked to (exit code {code}): {said}", f"go on: {command}")
        return error(
            "run",
            f"ended at {place} with exit code {code}: {said}",
            f"{standing.failure.get('fix')}; {command}",
        )
    if (run_dir / "failure.json").exists():
        fix = f"free space, or see why nothing can be written there; then {command}"
        return error("run", f"ended at {place}, and could not even write why: a full disk?", fix)
    if steps and standing.step >= steps:
        return ok("run", f"came to its end: {place}")
    if _out_of_patience(run_dir, standing.resolved):
        return ok("run", f"stopped early, after eval.patience evaluations without a better one: {place}")
    if not standing.step:
        return error("run", "ended before its first step, without a word", f"start it again: {command}")
    why = "killed (kill -9, out of memory, a power cut)"
    fix = f"see `dmesg` for 'Killed process', then go on: {command}"
    return error("run", f"ended at {place} without a word: {why}", fix)


def _of_a_running_one(standing: Standing, place: str) -> Finding:
    said = f"a training is at work here: {standing.owner}; {place}"
    if standing.last_at is None or standing.pace is None:
        return ok("run", said)
    silent = time.time() - standing.last_at
    said += f", {silent:.0f} s ago ({standing.pace:.2g} s a step)"
    if silent > max(60.0, 20 * standing.pace):
        fix = "it may be saving, evaluating or hanging: see its own line, which names a hang by itself"
        return warning("run", said, fix)
    return ok("run", said)


def _out_of_patience(run_dir: Path, resolved: dict[str, Any]) -> bool:
    patience = resolved.get("run_config", {}).get("eval", {}).get("patience", 0)
    newest = next(iter(steps_in(run_dir / "checkpoints").values()), run_dir)
    progress = read_json(newest / "state.json").get("progress", {})
    return 0 < patience <= progress.get("stale_evaluations", 0)


def next_command(run_dir: Path, resolved: dict[str, Any]) -> str:
    """What starts it again as it was: its own copies of both files, and the values that were replaced."""
    ranks = resolved.get("world_size", 1)
    program = "bigtfm train" if ranks == 1 else f"deepspeed --num_gpus {ranks} launch/train.py"
    files = f"--deepspeed_config {shlex.quote(str(run_dir / 'deepspeed.json'))}"
    files += f" --config {shlex.quote(str(run_dir / 'run.toml'))}"
    return " ".join([program, files, *map(shlex.quote, _overrides(run_dir, resolved.get("run_config", {})))])


def _overrides(run_dir: Path, was: dict[str, Any]) -> list[str]:
    """key=value for everything that the run had otherwise than its run.toml says."""
    place = {"run.dir": str(run_dir.parent), "run.name": run_dir.resolve().name}
    try:
        stated = load_run_config(run_dir / "run.toml", []).model_dump(mode="json")
    except (Problem, OSError):
        return [f"{key}={value}" for key, value in place.items()]
    changed = {
        f"{table}.{key}": value
        for table, section in was.items()
        for key, value in section.items()
        if stated.get(table, {}).get(key) != value and key != "sources" and value is not None
    }
    return [f"{key}={_value(value)}" for key, value in (changed | place).items()]


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def check_checkpoints(run_dir: Path, standing: Standing) -> list[Finding]:
    """The newest that verifies, and those that do not."""
    found = steps_in(run_dir / "checkpoints")
    if not found:
        if standing.owner or not standing.step:
            return [ok("checkpoints", "none yet")]
        return [error("checkpoints", "none: it begins anew", "save more often (save.every)")]
    damaged, sound = [], None
    for step, folder in found.items():
        large = sum(path.stat().st_size for path in folder.glob("*")) > HASHED
        problem = defect(folder, (1, 1) if large else (0, 1))  # (1, 1): no file is read in full
        if problem is None and sound is None:
            sound = f"the newest is of step {step}{', of which only the sizes were checked' if large else ''}"
        if problem is not None and folder.exists():  # a training may have removed it meanwhile
            damaged.append(f"{folder.name}: {problem}")
    if sound is None:
        fix = "restore one of these folders from a backup, or start anew with another run.name"
        return [error("checkpoints", f"none of {len(found)} verifies: {'; '.join(damaged)}", fix)]
    said = f"{len(found) - len(damaged)} verified, {sound}"
    if damaged:
        fix = "nothing need be done: a resume passes over them; check the disk (dmesg, smartctl)"
        return [warning("checkpoints", f"{said}; damaged: {'; '.join(damaged)}", fix)]
    return [ok("checkpoints", said)]


def owner_of(run_dir: Path) -> str | None:
    """Who holds the run directory's lock; None: nobody on this machine.

    It is looked up in /proc/locks: to try the lock would keep a training out that starts at this moment.
    """
    lock = run_dir / ".lock"
    try:
        status, held = lock.stat(), Path("/proc/locks").read_text().splitlines()
    except OSError:
        return None
    inode = f":{status.st_ino}"
    pids = [
        row[4] for row in map(str.split, held) if len(row) > 5 and "FLOCK" in row and row[5].endswith(inode)
    ]
    if not pids:
        return None
    written = read_json(lock)
    since = f" on {written['host']} since {written['since']}" if {"host", "since"} <= written.keys() else ""
    return f"process {written.get('pid', pids[0])}{since}"


def _left_out(standing: Standing) -> list[Finding]:
    if not standing.skipped:
        return []
    last = ", ".join(map(str, standing.skipped[-5:]))
    text = f"{len(standing.skipped)} steps took no update, the last: {last}"
    fix = "see their events in events.jsonl: rank, parameter and samples; lower the lr, or look at the data"
    return [warning("steps left out", text, fix)]


def _events(run_dir: Path) -> list[Finding]:
    rows = list(events.read(run_dir))
    if not rows:
        return []
    counted = ", ".join(
        f"{name} ({number})" for name, number in Counter(row["event"] for row in rows).items()
    )
    last = {key: value for key, value in rows[-1].items() if key not in ("time", "event")}
    details = ", ".join(f"{key} {value}" for key, value in last.items())
    return [
        ok("events", f"{counted}; the last: {rows[-1]['event']}{f' ({details})' if details else ''}"[:500])
    ]


def _hang(run_dir: Path, standing: Standing) -> list[Finding]:
    """The stacks of a hang that this run has left."""
    files = sorted((run_dir / "logs").glob("hang-step-*.txt"), key=lambda path: path.stat().st_mtime)
    if not files:
        return []
    if standing.failure.get("exit_code") == 79:
        return [
            warning(
                "hang", f"where every rank stood: {files[-1]}", "read it from the rank that is named first"
            )
        ]
    return [ok("hang", f"of an earlier one: {files[-1]}")]


def _mlflow(run_dir: Path) -> list[Finding]:
    """Whether all rows have been sent."""
    if not (run_dir / "tracking.json").exists():
        return []
    sent = read_json(run_dir / "mlflow.json")
    if sent.get("error"):
        command = f"bigtfm sync {shlex.quote(str(run_dir))}"
        return [warning("MLflow", str(sent["error"])[:300], f"start or mend the server, then {command}")]
    return [ok("MLflow", f"run {sent.get('run_id', 'not begun')}")]
