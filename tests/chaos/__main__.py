"""Faults, by command: `make chaos` is `python -m chaos kills`, and then the report."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from chaos import kills
from chaos.kills import End, Kill
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


def main() -> int:
    parser = argparse.ArgumentParser(prog="chaos", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    killing = commands.add_parser(
        "kills", help="kill a training again and again, and compare what comes of it"
    )
    killing.add_argument("out", type=Path, help="folder; a campaign that is there already goes on")
    killing.add_argument("-n", type=int, default=40, help="kills")
    killing.add_argument("--seed", type=int, default=1, help="of what is killed, and when")
    killing.add_argument(
        "--broken", default="", help="break the resume, to see the campaign find it (marks.py)"
    )
    options = parser.parse_args()
    return run_kills(options.out, options.n, options.seed, options.broken)


def run_kills(out: Path, number: int, seed: int, broken: str) -> int:
    console = Console()
    wrong = 0
    columns = (
        TextColumn("kills"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=number)
        for row in kills.campaign(out, number, seed, broken):
            wrong += len(row.wrong)
            text = _line(row)
            if isinstance(row, Kill):
                progress.update(task, advance=1)
            for said in row.wrong:
                text += f"\n    WRONG: {said}"
            progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
    return 1 if wrong else 0


def _line(row: Kill | End) -> str:
    if isinstance(row, End):
        compared = f"{row.rows} steps and {row.files} files compared"
        return f"run {row.run} {row.layout}: its end, after {row.kills} kills; {compared}"
    a = row.attempt
    where = f" in {','.join(a.inside)}" if a.inside else ""
    what = f"{row.plan.victim}, {row.plan.moment}{where}, at {a.seconds:.1f} s"
    came = f"resumed {a.resumed}, reached {row.reached}, gone after {a.gone:.2f} s, {len(a.lines)} line"
    return f"kill {row.kill + 1:3} run {row.run} {row.layout}: {what}: {came}"


if __name__ == "__main__":
    sys.exit(main())
