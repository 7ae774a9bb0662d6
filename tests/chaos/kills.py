"""The campaign: kill -9 again and again, and hold every resume against the run that nobody killed.

Each kill is a row of OUT/kills.jsonl, written when all about it is known: a campaign that was stopped goes
on from there, and can be checked afterwards.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from chaos import job, processes
from chaos.attempt import Attempt, Plan, attempt, plan
from chaos.job import LAYOUTS, RANKS, SAVE_EVERY
from chaos.marks import BROKEN
from chaos.reference import (
    Reference,
    differing_files,
    differing_rows,
    evaluation_is_due,
    reference_of,
    rows_of,
)

MARGIN = 1.5  # seconds of training over which "any" moment is spread, beside the start-up


@dataclass(frozen=True)
class Settings:
    """kills: to be spent. gone: seconds in which a job has to be gone. broken: of marks.py, for controls."""

    kills: int
    seed: int = 1
    gone: float = 10.0
    broken: str = ""


@dataclass
class Kill:
    """A row of kills.jsonl: a start that was killed. Steps are optimizer steps, times seconds."""

    kill: int
    run: int
    layout: str
    plan: Plan
    attempt: Attempt
    reached: int  # the last step in metrics.jsonl
    rows: int  # compared with the uninterrupted run
    wrong: list[str] = field(default_factory=list)  # everything that is not as promised


@dataclass
class End:
    """A row of kills.jsonl: a run at its end. files: of its last checkpoint, each compared."""

    run: int
    layout: str
    kills: int  # that it survived
    attempt: Attempt
    rows: int
    files: int
    wrong: list[str] = field(default_factory=list)


Row = Kill | End


def campaign(out: Path, settings: Settings) -> Iterator[Row]:
    """Goes on in `out` until all kills are in its kills.jsonl and the last run is at its end.

    Yields each row when it is done, first those that were there already.
    """
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    rows = read_rows(out)
    yield from rows
    processes.adopt()
    job.warm_up()
    while True:
        run = rows[-1].run if rows else 0
        if rows and isinstance(rows[-1], End):
            if count(rows) >= settings.kills:
                return
            run += 1
        reference = reference_of(out, LAYOUTS[run % len(LAYOUTS)])
        row = _start(out, run, reference, rows, settings)
        with (out / "kills.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": type(row).__name__} | asdict(row)) + "\n")
        rows.append(row)
        yield row


def count(rows: Sequence[Row]) -> int:
    return sum(isinstance(row, Kill) for row in rows)


def read_rows(out: Path) -> list[Row]:
    """kills.jsonl; without a last line that is torn."""
    path = out / "kills.jsonl"
    rows: list[Row] = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else ():
        if line.endswith("\n"):
            values = json.loads(line)
            kind = {"Kill": Kill, "End": End}[values.pop("kind")]
            if kind is Kill:
                values["plan"] = Plan(**values["plan"])
            rows.append(kind(**values | {"attempt": Attempt(**values["attempt"])}))
    return rows


def _start(out: Path, run: int, reference: Reference, rows: Sequence[Row], settings: Settings) -> Row:
    """One start of a run: to its kill, or to its end when the kills are spent or come too late."""
    name, number = f"run-{run:03d}", count(rows)
    before = [row for row in rows if row.run == run and isinstance(row, Kill)]
    planned = _fitting(plan(settings.seed, number), reference) if number < settings.kills else None
    done = attempt(
        out,
        job.arguments(out, job.make_data(out / "data"), reference.layout, name),
        planned,
        reference.start_seconds + MARGIN,
        settings.gone,
        {BROKEN: settings.broken} if settings.broken else None,
    )
    found = rows_of(out / "runs" / name)
    due = evaluation_is_due(out / "runs" / name) if done.killed else None
    wrong = [*_of_the_resume(done, before), *differing_rows(found, reference.rows, due)]
    wrong += [f"outlived its job: {orphan}" for orphan in done.orphans]
    if done.killed:
        assert planned is not None
        wrong += _of_the_telling(done, planned)
        return Kill(
            number, run, reference.layout.name, planned, done, max(found, default=0), len(found), wrong
        )
    if any(done.codes):
        wrong.append(f"exit codes {done.codes}: {' '.join(done.lines) or done.output[-500:]}")
    elif len(found) != len(reference.rows):
        wrong.append(f"{len(found)} steps instead of {len(reference.rows)}")
    wrong += differing_files(out / "runs" / name, reference)
    if not wrong:
        shutil.rmtree(out / "runs" / name)
    return End(run, reference.layout.name, len(before), done, len(found), len(reference.files), wrong)


def _fitting(planned: Plan, reference: Reference) -> Plan:
    """A job without data workers has none to kill."""
    if planned.victim == "data worker" and not reference.layout.workers:
        return dataclasses.replace(planned, victim="trainer")
    return planned


def _of_the_resume(done: Attempt, before: Sequence[Kill]) -> list[str]:
    """It goes on from the newest save that was due before the kill; or, if in flight, from the one before."""
    reached = 0
    for kill in before:
        reached = kill.reached if kill.attempt.resumed is not None else max(reached, kill.reached)
    if done.resumed is None or not before:
        return []
    due = reached // SAVE_EVERY * SAVE_EVERY
    if due - SAVE_EVERY <= done.resumed <= reached:
        return []
    return [f"went on from step {done.resumed}, killed at step {reached}, with a save every {SAVE_EVERY}"]


def _of_the_telling(done: Attempt, planned: Plan) -> list[str]:
    """Who is left says in one line what has happened; nothing else is an explanation."""
    wrong = ["a traceback"] if "Traceback" in done.output else []
    most = 1 if done.met else RANKS  # each for itself, where they had not met
    unneeded = not any(done.codes)  # it was leaving already, or a worker whose batches were all there
    # Before it has met the others a rank may be importing still, and SIGTERM ends it without a word.
    least = 0 if unneeded or not done.met or planned.victim in ("all", "launcher") else 1
    if not least <= len(done.lines) <= most:
        wrong.append(f"{len(done.lines)} lines about its end: {' | '.join(done.lines)}")
    return wrong
