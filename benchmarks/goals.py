"""Every goal for CPUs beside what was measured; the end of `make bench`.

    python benchmarks/goals.py FOLDER [--keep]

FOLDER has peers.jsonl of bench_peers.py, planner.jsonl of bench_planner.py, and the report of `bigtfm bench`.
Printed, and written to FOLDER/goals.md: a row for each goal. --keep: the report, its pictures and the rows go
to benchmarks/results/, named by hardware and month.
"""

from __future__ import annotations

import argparse
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bigtfm.bench.results import Spread, read_rows

Row = dict[str, Any]
PEERS, PLANNER, GOALS = "peers.jsonl", "planner.jsonl", "goals.md"
RESULTS = Path(__file__).resolve().parent / "results"
KEPT = ("*.jsonl", "*.png", "report.html", "report.md", "results.csv", GOALS)
SAID = {
    "bare": "a bare loop in nanoGPT's manner",
    "hf": "HF Trainer",
    "litgpt": "litgpt's model",
    "hf-deepspeed-0": "HF Trainer + DeepSpeed, stage 0",
    "hf-deepspeed-1": "HF Trainer + DeepSpeed, stage 1",
    "plain": "the same model and optimizer, no engine",
}
WORST = 0.10  # of activations and peaks
MEDIANS = {"states": 0.01, "activations": 0.05, "peak": 0.05, "seconds": 0.10}
SEARCH = 0.95


@dataclass(frozen=True)
class Goal:
    """What was to be reached, and what was measured."""

    what: str
    goal: str
    measured: str
    reached: bool

    def __str__(self) -> str:
        return f"{self.what}: {self.measured}, goal {self.goal}: {'reached' if self.reached else 'MISSED'}"


def of_peers(rows: Iterable[Row]) -> Iterator[Goal]:
    """Of bench_peers.py's rows, which say their goals themselves."""
    for row in rows:
        where, ratio = row["row"], Spread(**row["ratio"])
        if row["other"] == "matmul":
            if goal := row["goal"]:
                said = _spread(ratio, "{:.0%}")
                yield Goal(
                    f"{where}: share of the matmul limit", f">= {goal:.0%}", said, ratio.median >= goal
                )
            wait, goal = Spread(**row["data_wait"]), row["data_wait_goal"]
            said = _spread(wait, "{:.2%}")
            yield Goal(f"{where}: data wait, share of a step", f"< {goal:.1%}", said, wait.median < goal)
            continue
        pair = f"{row['ours']} / {SAID[row['other']]}"
        goal = row["goal"]
        yield Goal(
            f"{where}: tokens/s, {pair}", f">= {goal:.2f}", _spread(ratio, "{:.2f}"), ratio.median >= goal
        )
        if goal := row["peak_goal"]:
            peak = row["peak_ratio"]
            yield Goal(f"{where}: peak memory, {pair}", f"<= {goal:.2f}", f"{peak:.2f}", peak <= goal)


def of_planner(rows: Iterable[Row]) -> Iterator[Goal]:
    """Of bench_planner.py's rows."""
    rows = list(rows)
    by_what = {what: [row for row in rows if row["what"] == what] for what in ("memory", "time", "search")}
    if memory := by_what["memory"]:
        states = [abs(row["states_error"]) for row in memory]
        limit = MEDIANS["states"]
        name = f"planner: error of model states, {len(memory)} configurations"
        yield Goal(name, f"worst <= {limit:.0%}", f"worst {max(states):.2%}", max(states) <= limit)
        for key in ("activations", "peak"):
            errors, limit = [abs(row[f"{key}_error"]) for row in memory], MEDIANS[key]
            yield Goal(
                f"planner: error of {key}",
                f"median <= {limit:.0%}, worst <= {WORST:.0%}",
                f"median {median(errors):.2%}, worst {max(errors):.2%}",
                median(errors) <= limit and max(errors) <= WORST,
            )
        false = sum(row["false_fit"] for row in memory)
        yield Goal('planner: false "fits"', "0", str(false), not false)
    if timed := by_what["time"]:
        errors, limit = [abs(row["seconds_error"]) for row in timed], MEDIANS["seconds"]
        yield Goal(
            f"planner: error of a step's seconds, {len(timed)} configurations",
            f"median <= {limit:.0%}",
            f"median {median(errors):.1%}, worst {max(errors):.1%}",
            median(errors) <= limit,
        )
    for row in by_what["search"]:
        share = row["share"]
        yield Goal(
            f"search: {row['name']}, of the grid's best", f">= {SEARCH:.0%}", f"{share:.1%}", share >= SEARCH
        )


def _spread(values: Spread, form: str) -> str:
    low, middle, high = (form.format(value) for value in (values.low, values.median, values.high))
    return f"{middle} ({low} to {high})"


def table(goals: Iterable[Goal]) -> list[str]:
    """In Markdown."""
    lines = ["| row | measured | goal | |", "|---|---|---|---|"]
    return lines + [
        f"| {each.what} | {each.measured} | {each.goal} | {'reached' if each.reached else '**missed**'} |"
        for each in goals
    ]


def of_folder(folder: Path) -> list[Goal]:
    """All goals of which the folder has rows."""
    return [*of_peers(read_rows(folder / PEERS)), *of_planner(read_rows(folder / PLANNER))]


def name_of(hardware: Row, month: str) -> str:
    """xeon-2-cores-2026-11: hardware and month as a folder's name."""
    device = (hardware["gpus"] or hardware["cpu"]).split(",")[0]
    noise = r"\((R|TM)\)|\b(Intel|AMD|NVIDIA|Processor|CPU|\d+-Core)\b|@.*"
    words = re.sub(noise, " ", device, flags=re.IGNORECASE).lower()
    slug = "-".join(re.findall(r"[a-z0-9.]+", words)) or "cpu"
    return f"{slug}-{hardware['cores']}-cores-{month}"


def keep(folder: Path, results: Path = RESULTS) -> Path:
    """Copies what is to be checked in; returns where to."""
    first = next(iter(read_rows(folder / PEERS) + read_rows(folder / PLANNER)))
    kept = results / name_of(first["hardware"], time.strftime("%Y-%m"))
    kept.mkdir(parents=True, exist_ok=True)
    for pattern in KEPT:
        for path in sorted(folder.glob(pattern)):
            shutil.copyfile(path, kept / path.name)
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--keep", action="store_true", help="copy what is to be checked in")
    given = parser.parse_args()
    goals = of_folder(given.folder)
    if not goals:
        raise SystemExit(f"{given.folder}: neither {PEERS} nor {PLANNER} is there. Fix: make bench")
    text = "\n".join(table(goals))
    (given.folder / GOALS).write_text(text + "\n", encoding="utf-8")
    print(text)
    if given.keep:
        print(f"kept in {keep(given.folder)}")


if __name__ == "__main__":
    main()
