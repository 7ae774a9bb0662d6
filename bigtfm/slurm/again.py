"""Whether a job is started again after its ranks have ended: what slurm/train.sbatch asks at its end."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bigtfm.config.launch import hosts, tasks_per_node
from bigtfm.config.problems import (
    ConfigProblem,
    DataProblem,
    Hang,
    Interrupted,
    NoCheckpoint,
    NumericsProblem,
    RequeueRequested,
)
from bigtfm.mlflow_sender import read_json
from bigtfm.resilience import events

EVENT = "job ended"
# Another start would end the same way, or (a Ctrl-C) is not wanted.
FINAL = {
    kind.exit_code: why
    for kind, why in (
        (ConfigProblem, "the configuration is wrong"),
        (DataProblem, "the data are wrong"),
        (NumericsProblem, "the numbers are"),
        (NoCheckpoint, "no checkpoint can be read"),
        (Interrupted, "somebody has interrupted it"),
    )
}


@dataclass(frozen=True)
class Ended:
    """How one start of a job ended."""

    job: str  # number of the job; of a chain of jobs: of the first
    code: int  # of srun
    saved: int  # step of the newest checkpoint; 0: none
    line: str  # what failure.json says; empty: nothing, so the ranks were killed
    node: str | None  # that the line is about


@dataclass(frozen=True)
class Decision:
    again: bool
    why: str
    exclude: tuple[str, ...] = ()  # nodes that the next start is to do without


def decide(now: Ended, before: Sequence[Ended], retries: int) -> Decision:
    """before: the earlier ends of this job, oldest first.

    An end that was asked for, a lost rank, a full disk, a kill, or ranks that did not meet (the next start
    has another port) is followed by another start, unless the last `retries` starts have brought no newer
    checkpoint: then another one will not, either. A node that the last two failures are about is excluded.
    """
    if now.code == 0:
        return Decision(False, "done")
    if now.code in FINAL and not now.line.startswith("environment:"):
        return Decision(
            False, f"{FINAL[now.code]} (exit code {now.code}): another start would end the same way"
        )
    if not retries:
        return Decision(False, f"exit code {now.code}, and it is to be started once only")
    stuck = 1
    for earlier in reversed(before):
        if earlier.saved != now.saved:
            break
        stuck += 1
    where = f"no checkpoint newer than that of step {now.saved}" if now.saved else "no checkpoint"
    if stuck > retries:
        return Decision(
            False, f"{stuck} starts have ended with {where}: started again {retries} times, not more"
        )
    why = "it was asked to stop" if now.code == RequeueRequested.exit_code else f"exit code {now.code}"
    if stuck > 1:
        why += f"; start {stuck} of at most {retries + 1} with {where}"
    last = before[-1].node if before else None
    exclude = (now.node,) if now.node is not None and now.node == last else ()
    return Decision(True, why, exclude)


def ended(run_dir: Path, code: int, environ: Mapping[str, str], since: float) -> Ended:
    """What the run directory says of the start that has just ended.

    since: when it began (Unix seconds); a failure.json of before is another's.
    """
    path = run_dir / "failure.json"
    failure = read_json(path) if path.exists() and path.stat().st_mtime >= since else {}
    said = code
    if isinstance(failure.get("exit_code"), int):  # srun has killed ranks that were slower to say it
        said = failure["exit_code"]
    node = None
    rank = re.fullmatch(r"rank (\d+)", str(failure.get("where")))
    if said == Hang.exit_code and rank is not None:
        node = node_of(int(rank[1]), environ)
    job = environ.get("BIGTFM_CHAIN") or environ.get("SLURM_JOB_ID", "")
    line = f"{failure['where']}: {failure['what']}" if {"where", "what"} <= failure.keys() else ""
    if code == ConfigProblem.exit_code and not failure:
        line = _last_error(run_dir / "logs" / "rank-0.log", since)
    return Ended(job, said if code else 0, newest_step(run_dir), line, node)


def _last_error(log: Path, since: float) -> str:
    """For a job that found another one at work: it may write nothing but its ranks' logs."""
    try:
        lines = (
            []
            if log.stat().st_mtime < since
            else log.read_text(encoding="utf-8", errors="replace").splitlines()
        )
    except OSError:
        return ""
    told = "bigtfm: error: "
    return next((line.removeprefix(told) for line in reversed(lines) if line.startswith(told)), "")


def node_of(rank: int, environ: Mapping[str, str]) -> str | None:
    """The node that a rank ran on, ranks being dealt out in blocks; None: not known."""
    try:
        names = list(hosts(environ["SLURM_JOB_NODELIST"]))
        for name, tasks in zip(names, tasks_per_node(environ["SLURM_TASKS_PER_NODE"]), strict=True):
            if rank < tasks:
                return name
            rank -= tasks
    except (KeyError, ValueError):
        pass
    return None


def newest_step(run_dir: Path) -> int:
    """Step of the newest checkpoint by its name; 0: none."""
    names = (path.name.removeprefix("step-") for path in (run_dir / "checkpoints").glob("step-*"))
    return max((int(name) for name in names if name.isdigit()), default=0)


def earlier(run_dir: Path, job: str) -> list[Ended]:
    """The ends of this job that `note_and_decide` has noted, oldest first."""
    names = Ended.__dataclass_fields__.keys()
    rows = (row for row in events.read(run_dir) if row["event"] == EVENT and row.get("job") == job)
    return [Ended(**{name: row[name] for name in names}) for row in rows if names <= row.keys()]


def note_and_decide(
    run_dir: Path, code: int, environ: Mapping[str, str], *, since: float, retries: int
) -> tuple[Ended, Decision]:
    """Decides, and notes it in events.jsonl: the next end is judged by it."""
    now = ended(run_dir, code, environ, since)
    decision = decide(now, earlier(run_dir, now.job), retries)
    run_dir.mkdir(parents=True, exist_ok=True)
    number = environ.get("SLURM_JOB_ID")
    events.note(run_dir, EVENT, number=number, **asdict(now), **asdict(decision))
    return now, decision
