"""What Slurm knows of a run's job: its state in the queue, and which run a job's number stands for."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from bigtfm.config.problems import ConfigProblem
from bigtfm.resilience import events

WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "CONFIGURING")


@dataclass(frozen=True)
class Queued:
    """What Slurm's queue says of a job."""

    state: str  # as Slurm calls it
    where: str  # nodes, or why it waits
    since: float | None = None  # when this start of it began, or is to begin; in Unix seconds


def queue_state(job: str | None) -> Queued | None:
    """None: there is no queue, or it does not know the job."""
    if job is None:
        return None
    command = ["squeue", "-h", "-j", job, "-o", "%T|%S|%R"]
    environ = os.environ | {"SLURM_TIME_FORMAT": "%s"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=20, stdin=subprocess.DEVNULL, env=environ
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    said = done.stdout.strip().split("|", 2)
    if done.returncode or len(said) < 3:
        return None
    state, since, where = said
    return Queued(state, where.strip("()"), float(since) if since.isdigit() else None)


def run_dir_of(run: str) -> Path:
    """A run directory by its path, or by the number of a job that trains in it.

    Raises:
        ConfigProblem: the number is no job's, or the job's script says nothing of a run.
    """
    if not run.isdigit() or Path(run).is_dir():
        return Path(run)
    try:
        command = ["scontrol", "-o", "show", "job", run]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, stdin=subprocess.DEVNULL)
        said = dict(word.split("=", 1) for word in done.stdout.split() if "=" in word)
    except (OSError, subprocess.TimeoutExpired):
        said = {}
    if "WorkDir" not in said:
        fix = "pass the run directory instead: Slurm forgets jobs that have ended"
        raise ConfigProblem(f"Slurm does not know job {run}", where="status", fix=fix)
    work = Path(said["WorkDir"])
    wanted = {said["JobId"], said.get("ArrayJobId", "")}
    for path in sorted(work.glob(f"runs/*/{events.EVENTS}"), key=lambda path: -path.stat().st_mtime):
        if any(str(row.get("job")) in wanted for row in events.read(path.parent)):
            return path.parent
    return work / "runs" / said["JobName"]
