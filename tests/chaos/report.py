"""What a campaign comes to: numbers, a Markdown report, a picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from chaos.job import SAVE_EVERY
from chaos.kills import End, Kill, Row
from rich import box
from rich.console import Console
from rich.table import Table

from bigtfm.environment import environment


@dataclass(frozen=True)
class Group:
    """What kills of one kind came to. Times are seconds, steps optimizer steps."""

    name: str
    kills: int
    told: int  # kills after which the rest of the job said in exactly one line what had happened
    left: int  # kills after which somebody was left to say it
    gone_median: float
    gone_longest: float
    lost_median: float  # steps computed again
    lost_most: int
    wrong: int

    @classmethod
    def of(cls, name: str, kills: Sequence[Kill], lost: dict[int, int]) -> Group:
        gone = [kill.attempt.gone for kill in kills]
        steps = [lost[kill.kill] for kill in kills if kill.kill in lost] or [0]
        left = [kill for kill in kills if kill.attempt.met and kill.plan.victim != "all"]
        return cls(
            name=name,
            kills=len(kills),
            told=sum(len(kill.attempt.lines) == 1 for kill in left),
            left=len(left),
            gone_median=statistics.median(gone),
            gone_longest=max(gone),
            lost_median=statistics.median(steps),
            lost_most=max(steps),
            wrong=sum(bool(kill.wrong) for kill in kills),
        )


@dataclass(frozen=True)
class Summary:
    """A campaign in numbers."""

    kills: int
    resumes: int  # starts that went on from a checkpoint (or from the beginning, where none was saved yet)
    runs: int  # that came to their end
    rows: int  # steps compared, over all starts; each in six columns, floats by their bits
    files: int  # of last checkpoints, compared by SHA-256
    inside: dict[str, int]  # kills that hit a rank inside a phase
    orphans: int
    victims: list[Group]
    moments: list[Group]
    wrong: list[str]


def lost_steps(rows: Sequence[Row]) -> dict[int, int]:
    """By the kill's number: steps that the next start which got to resuming had to compute again."""
    lost: dict[int, int] = {}
    last: Kill | None = None
    for row in rows:
        if last is not None and row.run == last.run and row.attempt.resumed is not None:
            lost[last.kill] = last.reached - row.attempt.resumed
            last = None
        if isinstance(row, End):
            last = None
        elif row.attempt.resumed is not None or last is None:
            last = row
    return lost


def summarize(rows: Sequence[Row]) -> Summary:
    kills = [row for row in rows if isinstance(row, Kill)]
    ends = [row for row in rows if isinstance(row, End)]
    lost = lost_steps(rows)

    def groups(names: Iterable[str], attribute: str) -> list[Group]:
        chosen = {name: [k for k in kills if getattr(k.plan, attribute) == name] for name in names}
        return [Group.of(name, members, lost) for name, members in chosen.items() if members]

    victims = ("all", "rank 0", "rank 1", "trainer", "supervisor", "data worker", "launcher")
    moments = ("any", "resume", "save", "write", "evaluate", "launcher")
    phases = [phase for kill in kills for phase in kill.attempt.inside]
    starts = [
        first
        for first, second in zip(rows, [None, *rows], strict=False)
        if second is not None and second.run == first.run
    ]
    return Summary(
        kills=len(kills),
        resumes=sum(row.attempt.resumed is not None for row in starts),
        runs=len(ends),
        rows=sum(row.rows for row in rows),
        files=sum(end.files for end in ends),
        inside={phase: phases.count(phase) for phase in sorted(set(phases))},
        orphans=sum(len(kill.attempt.orphans) for kill in kills),
        victims=groups(victims, "victim"),
        moments=groups(moments, "moment"),
        wrong=[f"{_name(row)}: {text}" for row in rows for text in row.wrong],
    )


def _name(row: Row) -> str:
    return f"kill {row.kill + 1}" if isinstance(row, Kill) else f"end of run {row.run}"


HEADINGS = ("killed", "kills", "one line", "gone after s (longest)", "steps again (most)", "not as promised")


def _cells(group: Group) -> tuple[str, ...]:
    return (
        group.name,
        str(group.kills),
        f"{group.told} of {group.left}" if group.left else "nobody left",
        f"{group.gone_median:.2f} ({group.gone_longest:.2f})",
        f"{group.lost_median:g} ({group.lost_most})",
        str(group.wrong),
    )


def verdict(s: Summary) -> str:
    """The campaign in a line."""
    bits = sum(" instead of " in text or text.endswith(" differs") for text in s.wrong)
    most = max((group.lost_most for group in s.victims), default=0)
    return (
        f"{s.kills} kills, {s.resumes} resumes, {s.runs} runs at their end: {bits} differing values in "
        f"{s.rows:,} steps and {s.files} files; at most {most} steps computed again (a save every "
        f"{SAVE_EVERY}); {s.orphans} orphans; {len(s.wrong) or 'nothing'} not as promised"
    )


def show(s: Summary, console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "killed" else "right")
    for group in s.victims:
        table.add_row(*_cells(group))
    table.add_section()
    for group in s.moments:
        table.add_row(*_cells(group))
    console.print(table)
    console.print(verdict(s), style="bold red" if s.wrong else "bold green", soft_wrap=True, highlight=False)


def markdown(s: Summary, seed: int) -> str:
    """chaos-report.md."""
    ran = environment()
    where = ", ".join(
        f"{key} {ran[key]}" for key in ("python", "torch", "deepspeed", "cpu_cores") if key in ran
    )
    parts = ["# A campaign of kills", "", f"{verdict(s)}.", "", f"Seed {seed}. {where}.", ""]
    for title, groups in (("whom", s.victims), ("when", s.moments)):
        parts += [f"| {' | '.join((title, *HEADINGS[1:]))} |", f"|{'---|' * len(HEADINGS)}"]
        parts += [f"| {' | '.join(_cells(group))} |" for group in groups] + [""]
    hit = ", ".join(f"{phase} {number}" for phase, number in s.inside.items())
    parts += [f"A rank was inside of: {hit or 'none'}.", "", "![the campaign](chaos-report.png)", ""]
    parts += [f"- {text}" for text in s.wrong]
    return "\n".join(parts).rstrip() + "\n"


def write(rows: Sequence[Row], seed: int, out: Path) -> Summary:
    """chaos-report.md, .json and .png in `out`."""
    from chaos.picture import draw

    summary = summarize(rows)
    (out / "chaos-report.md").write_text(markdown(summary, seed), encoding="utf-8")
    values: dict[str, Any] = asdict(summary) | {"seed": seed, "environment": environment()}
    (out / "chaos-report.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    draw(rows, lost_steps(rows), out / "chaos-report.png", verdict(summary))
    return summary
