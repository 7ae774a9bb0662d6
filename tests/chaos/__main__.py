"""Faults, by command: `make chaos` is `python -m chaos kills`, and then the report."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from chaos import faults, kills, report, table
from chaos.kills import End, Kill, Settings
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
        "--gone", type=float, default=10.0, help="seconds that a job has to be gone after a kill"
    )
    killing.add_argument(
        "--broken", default="", help="break the resume, for the campaign to find it (marks.py)"
    )
    meeting = commands.add_parser("faults", help="have bigtfm and raw DeepSpeed meet the table's faults")
    meeting.add_argument("out", type=Path, help="folder; what is in its faults.json already is replaced")
    meeting.add_argument(
        "names", nargs="*", metavar="FAULT", help=f"default: all of {', '.join(faults.FAULTS)}"
    )
    meeting.add_argument("--side", choices=("bigtfm", "raw"), help="default: both")
    writing = commands.add_parser("table", help="write what the faults came to into docs/reliability.md")
    writing.add_argument("out", type=Path, help="folder of `chaos faults`")
    writing.add_argument("document", type=Path)
    options = parser.parse_args()
    if options.command == "table":
        text = options.document.read_text(encoding="utf-8")
        options.document.write_text(table.written_into(text, faults.read(options.out)), encoding="utf-8")
        return 0
    if options.command == "faults":
        sides = [options.side] if options.side else ["bigtfm", "raw"]
        return run_faults(options.out, options.names or list(faults.FAULTS), sides)
    return run_kills(options.out, Settings(options.n, options.seed, options.gone, options.broken))


def run_faults(out: Path, names: list[str], sides: list[str]) -> int:
    """The faults, a line each side; 1 if bigtfm does not do what it promises."""
    console, kept = Console(), True
    for name, side, seen in faults.meet(out, names, sides):
        mark = "ok " if seen.well else "NOT"
        said = f"{mark} {name:24} {side:7} {seen.what}" + (f"; exit code {seen.code}" if seen.code else "")
        console.print(
            said + (f"\n      {seen.line}" if seen.line else ""),
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        kept = kept and (seen.well or side == "raw")
    return 0 if kept else 1


def run_kills(out: Path, settings: Settings) -> int:
    """The campaign, a line each start, and its report; 1 if something is not as promised."""
    console = Console()
    rows: list[kills.Row] = []
    columns = (TextColumn("kills"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=settings.kills)
        for row in kills.campaign(out, settings):
            rows.append(row)
            progress.update(task, completed=kills.count(rows))
            said = "".join(f"\n    WRONG: {text}" for text in row.wrong)
            progress.console.print(_line(row) + said, markup=False, highlight=False, soft_wrap=True)
    summary = report.write(rows, settings.seed, out)
    report.show(summary, console)
    console.print(f"report: {out / 'chaos-report.md'}", soft_wrap=True, highlight=False)
    return 1 if summary.wrong else 0


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
