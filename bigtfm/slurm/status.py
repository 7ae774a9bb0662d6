"""`bigtfm status`: where a run is, from what it writes into its directory and what Slurm's queue says."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigtfm.config.batch import GlobalBatch
from bigtfm.config.problems import ConfigProblem
from bigtfm.console import duration
from bigtfm.mlflow_sender import read_json
from bigtfm.resilience import claim, events
from bigtfm.slurm.again import EVENT, newest_step
from bigtfm.slurm.queue import WAITING, Queued, queue_state
from bigtfm.tracking import iterate_metrics

if TYPE_CHECKING:
    from rich.console import RenderableType

RECENT = 50  # steps that the pace is judged by
QUIET = 20  # steps' time without a row, after which a run that no queue knows has stopped
_REFRESH = 5.0  # seconds


@dataclass(frozen=True)
class Start:
    """One start of the run, times in Unix seconds."""

    began: float
    ended: float  # or the last that was heard of it
    job: str | None
    ranks: int
    first: int  # step that it went on from
    last: int  # step that it came to
    code: int | None  # None: it runs, or has ended without a word
    reason: str


@dataclass(frozen=True)
class Status:
    """A run at a glance; None: not known."""

    run: str
    state: str  # running, waiting, done, stopped, failed, ended without a word
    where: str  # what the state is about: the queue's reason, the failure's line
    step: int
    steps: int | None
    saved: int  # step of the newest checkpoint
    loss: float | None
    tokens_per_second: float | None  # None before a start's first step, which may compile and read for long
    tokens: int | None
    ranks: int | None
    job: str | None
    began: float | None  # the first start
    seconds_left: float | None  # of training, were it to run on
    goodput: float | None  # share of the time since the first start that went into steps that count
    busy: float | None  # the same share of the time in which it ran: without the queue
    starts: tuple[Start, ...]


def status(run_dir: Path) -> Status:
    """Reads the run directory, and asks squeue if there is one.

    Raises:
        ConfigProblem: it is no run's. StorageProblem: metrics.jsonl is damaged.
    """
    if not any((run_dir / name).exists() for name in ("resolved.json", events.EVENTS, "checkpoints")):
        raise ConfigProblem(
            "holds no run", where=str(run_dir), fix="pass a run directory, e.g. runs/quickstart"
        )
    rows = list(iterate_metrics(run_dir / "metrics.jsonl"))
    happened = list(events.read(run_dir))
    resolved, failure = read_json(run_dir / "resolved.json"), read_json(run_dir / "failure.json")
    now = time.time()
    begun = starts(happened, rows)
    job = _job(happened)
    queued = queue_state(job)
    step = int(rows[-1]["step"]) if rows else 0
    seconds = [row["seconds"] for row in rows[-RECENT:] if isinstance(row.get("seconds"), float)]
    pace = statistics.median(seconds) if seconds else None
    steps = resolved.get("steps")
    alive = claim.alive(run_dir, os.environ)
    state, where = judge(queued, happened, begun, failure, now, pace, alive)
    awaited = state == "running" and bool(_awaited(queued, begun[-1] if begun else None, now))
    useful = sum(row["seconds"] for row in rows if isinstance(row.get("seconds"), float))
    until = now if state == "running" else begun[-1].ended if begun else now
    ran = sum(
        (until if start is begun[-1] and start.code is None else start.ended) - start.began for start in begun
    )
    return Status(
        run=str(run_dir),
        state=state,
        where=where,
        step=step,
        steps=steps,
        saved=newest_step(run_dir),
        loss=rows[-1]["loss"] if rows else None,
        tokens_per_second=None
        if awaited
        else _median(row.get("tokens_per_second") for row in rows[-RECENT:]),
        tokens=rows[-1].get("tokens") if rows else None,
        ranks=begun[-1].ranks if begun else resolved.get("world_size"),
        job=job,
        began=begun[0].began if begun else None,
        seconds_left=_pace_of_all(rows)
        * GlobalBatch(**resolved.get("batch", {"final": 1})).steps_left(step, steps)
        if steps and rows and state != "done" and not awaited
        else None,
        goodput=_share(useful, until - begun[0].began) if begun else None,
        busy=_share(useful, ran) if begun else None,
        starts=tuple(begun),
    )


def starts(happened: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> list[Start]:
    """The starts of a run from its events: each ends with its own word, or where the next one found it."""
    begun = [n for n, row in enumerate(happened) if row["event"] == "start"]
    found = []
    for place, following in pairwise([*begun, len(happened)]):
        start = happened[place]
        said = _ends_said(happened[place + 1 : following])
        batch = [row for row in happened[place + 1 : following] if _ends(row, start.get("job"))]
        is_last = following == len(happened)
        limit = float("inf") if is_last else happened[following].get("began", happened[following]["time"])
        own = [row for row in rows if start["time"] <= row.get("time", 0.0) <= limit]
        last = int(own[-1]["step"]) if own else int(start.get("step", 0))
        if said:
            ended, code = float(said[0]["time"]), said[0].get("code")
            last = max(last, int(said[0].get("step", 0)))
            told = (f"{row.get('where')}: {row.get('what')}" for row in said)  # by all that were cut off
            reason = "done" if code == 0 else "; ".join(dict.fromkeys(told))
        elif batch:
            ended, code = float(batch[0]["time"]), batch[0].get("code")
            reason = batch[0].get("line") or "killed: its ranks left no word"
        else:
            ended, code = float(own[-1]["time"] if own else start["time"]), None
            reason = "" if is_last else "it left no word: a lost node, a kill -9"
        found.append(
            Start(
                float(start.get("began", start["time"])), ended, start.get("job"), int(start.get("ranks", 1)),
                int(start.get("step", 0)), last, code, reason,
            )
        )  # fmt: skip
    return found


def _ends_said(after: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Its ranks' words, and not those of a later start of the job that came to no step."""
    found: list[Mapping[str, Any]] = []
    for row in after:
        if row["event"] == "job began" and found:
            break
        if row["event"] == "end":
            found.append(row)
    return found


def _job(happened: Sequence[Mapping[str, Any]]) -> str | None:
    """The newest job of the run, but not one that came second and was sent away."""
    jobs = [str(row.get("number") or row["job"]) for row in happened if row.get("job")]
    begun = {str(row.get("job")) for row in happened if row["event"] == "start"}
    ended = {str(row.get("number")) for row in happened if row["event"] == EVENT and not row.get("again")}
    return next(
        (job for job in reversed(jobs) if job in begun or job not in ended), jobs[-1] if jobs else None
    )


def _ends(row: Mapping[str, Any], job: str | None) -> bool:
    """Whether the batch script of this job has noted its end."""
    return row["event"] == EVENT and (job is None or row.get("number", job) == job)


def judge(
    queued: Queued | None,
    happened: Sequence[Mapping[str, Any]],
    begun: Sequence[Start],
    failure: Mapping[str, Any],
    now: float,
    pace: float | None,
    alive: bool | None = None,
) -> tuple[str, str]:
    """(state, what it is about).

    queued: None: there is no queue, or it does not know the job. alive: whether its process is there.
    """
    last = begun[-1] if begun else None
    if queued is not None and queued.state in WAITING:
        return "waiting", f"in Slurm's queue: {queued.where}"
    at_work = last is None or last.code is None or _starting(queued, last)
    if queued is not None and queued.state in ("RUNNING", "COMPLETING") and at_work:
        return "running", _clauses(f"on {queued.where}", _awaited(queued, last, now))
    decided: Mapping[str, Any] = next((row for row in reversed(happened) if row["event"] == EVENT), {})
    verdict = str(decided["why"]) if decided and not decided.get("again") else ""
    never_began = verdict and decided.get("number") not in {start.job for start in begun}
    if last is None or (never_began and decided["time"] > last.ended):
        said = f"{failure['where']}: {failure['what']}" if failure else decided.get("line", "")
        return (
            ("failed", _clauses(said, verdict)) if failure or decided else ("waiting", "for its first step")
        )
    if last.code == 0:
        return "done", ""
    if last.code in (75, 130):
        return "stopped", last.reason
    if last.code is not None:
        return "failed", _clauses(last.reason, verdict)
    silent = now - last.ended > max(60.0, QUIET * (pace or 0.0))
    if alive is False or (alive is None and queued is None and silent):
        return "ended without a word", f"nothing for {duration(now - last.ended)}: `bigtfm doctor --run`"
    return "running", _awaited(queued, last, now)


def _starting(queued: Queued | None, last: Start | None) -> bool:
    """Whether the job runs again, and has not come so far as to note its start."""
    if queued is None or queued.state != "RUNNING":
        return False
    return last is None or (queued.since is not None and last.ended < queued.since)


def _awaited(queued: Queued | None, last: Start | None, now: float) -> str:
    """What is to be said before the first step of a start; empty after it."""
    if _starting(queued, last) or last is None:
        since = queued.since if queued is not None else None
    elif last.last == last.first:
        since = last.began
    else:
        return ""
    return "no step yet" + (f", {duration(now - since)} after its start" if since is not None else "")


def _clauses(*parts: str) -> str:
    return "; ".join(filter(None, parts))


def render(found: Status) -> RenderableType:
    """Two tables: the run, and its starts."""
    from rich.console import Group
    from rich.table import Table

    facts = Table(show_header=False, box=None)
    for name, value in _facts(found):
        facts.add_row(name, value)
    if not found.starts:
        return facts
    history = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("start", "at", "took", "job", "ranks", "steps", "ended by"):
        history.add_column(heading, overflow="fold", no_wrap=heading != "ended by")
    for number, start in enumerate(found.starts, 1):
        steps = f"{start.first:,} - {start.last:,}"
        code = "" if start.code in (None, 0) else f"{start.code}: "
        values = (_clock(start.began), duration(start.ended - start.began), start.job or "", str(start.ranks))
        history.add_row(str(number), *values, steps, f"{code}{start.reason}")
    return Group(facts, "", history)


def _facts(found: Status) -> Iterable[tuple[str, str]]:
    yield "run", found.run + (f", Slurm job {found.job}" if found.job else "")
    yield "state", found.state + (f", {found.where}" if found.where else "")
    of = f" of {found.steps:,} ({found.step / found.steps:.1%})" if found.steps else ""
    yield "step", f"{found.step:,}{of}, saved at {found.saved:,}"
    if found.loss is not None:
        yield "loss", f"{found.loss:.4f}"
    if found.tokens is not None:
        speed = found.tokens_per_second
        said = f", {speed:,.0f} a second on {found.ranks} ranks" if speed is not None else ""
        yield "tokens", f"{found.tokens:,}{said}"
    if found.began is not None:
        restarts = len(found.starts) - 1
        yield "since", f"{_clock(found.began)}, {restarts} restart{'' if restarts == 1 else 's'}"
    if found.goodput is not None and found.busy is not None:
        yield "goodput", f"{found.goodput:.1%} of the time since then, {found.busy:.1%} of the time it ran"
    if found.seconds_left is not None:
        left = duration(found.seconds_left)
        end = (
            f", about {_clock(time.time() + found.seconds_left)}"
            if found.state == "running"
            else " of training"
        )
        yield "left", left + end


def follow(run_dir: Path) -> None:
    """Shows it anew until a Ctrl-C."""
    from rich.console import Console
    from rich.live import Live

    try:
        with Live(render(status(run_dir)), console=Console(markup=False), auto_refresh=False) as live:
            while True:
                time.sleep(_REFRESH)
                live.update(render(status(run_dir)), refresh=True)
    except KeyboardInterrupt:
        pass


def _pace_of_all(rows: Sequence[Mapping[str, Any]]) -> float:
    """Seconds a step with what lies between the last ones: saves, evaluations; a pause counts as ten."""
    recent = rows[-RECENT:]
    own = statistics.median(float(row.get("seconds", 0.0)) for row in recent)
    times = [row["time"] for row in recent if "time" in row]
    gaps = [min(later - earlier, 10 * own) for earlier, later in pairwise(times)]
    return max(own, statistics.fmean(gaps)) if gaps else own


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _share(part: float, whole: float) -> float | None:
    return min(1.0, part / whole) if whole > 0 else None


def _clock(when: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(when))
