"""The rows of a benchmark: results.jsonl, and runs of a cell taken together."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import quantiles
from typing import Any

from bigtfm.config.problems import StorageProblem
from bigtfm.whole_files import whole_file

Row = dict[str, Any]
RESULTS = "results.jsonl"
_MEASURED = ("ranks", "micro_batch", "accumulation", "tokens_per_step", "seconds")
AXES = (
    *(
        "model",
        "zero_stage",
        "precision",
        "ranks",
        "threads",
        "micro_batch",
        "accumulation",
        "seq_len",
        "recompute",
    ),
    *("attention", "compile", "overrides", "deepspeed", "deepspeed_config"),
)


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of one value, or more."""
        values = list(values)
        return cls(*(quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3))

    @property
    def relative(self) -> float:
        """Half of what lies between the quartiles, as a share of the median."""
        return (self.high - self.low) / 2 / self.median


@dataclass(frozen=True)
class Result:
    """A cell and all of its runs."""

    rows: tuple[Row, ...]
    label: str  # what tells it from the other cells of its grid

    @property
    def first(self) -> Row:
        """The row that speaks for all in what does not vary: of the run that failed, if one has."""
        return next((row for row in self.rows if row["status"] != "ok"), self.rows[0])

    @property
    def key(self) -> str:
        return str(self.first["key"])

    @property
    def grid(self) -> str:
        return str(self.first["grid"])

    @property
    def ok(self) -> bool:
        return self.first["status"] == "ok"

    @property
    def ranks(self) -> int:
        return int(self.first["ranks"])

    @cached_property
    def rates(self) -> Spread:
        """Tokens a second, over the steps of all runs."""
        return Spread.of(row["tokens_per_step"] / each for row in self.rows for each in row["seconds"])

    @cached_property
    def seconds(self) -> Spread:
        """Of a step, over those of all runs."""
        return Spread.of(each for row in self.rows for each in row["seconds"])

    @property
    def noise(self) -> float:
        """How far the median may lie from the true one, as a share: two standard errors, or as the runs do.

        The standard error of a median is 1.25 standard deviations / sqrt(n), and a standard deviation of
        normal values is 1 / 1.35 of what lies between their quartiles.
        """
        runs = Spread.of(Spread.of(row["seconds"]).median for row in self.rows)
        steps = sum(len(row["seconds"]) for row in self.rows)
        error = 2 * 1.25 * 2 * self.seconds.relative / 1.35 / math.sqrt(steps)
        return max(error, runs.relative)

    def mean(self, name: str) -> float | None:
        """Of a number in the rows, over the runs; None where it is not known."""
        values = [row[name] for row in self.rows if row.get(name) is not None]
        return sum(values) / len(values) if values else None

    @property
    def peak_bytes(self) -> int | None:
        """The most that a rank has held."""
        found = [row["memory"]["peak"] for row in self.rows if row.get("memory", {}).get("peak")]
        return max(found) if found else None

    def axis(self, name: str) -> Any:
        """An axis' value, as something that can be compared and hashed."""
        value = self.first.get(name)
        return json.dumps(value, sort_keys=True) if isinstance(value, list | dict) else value


def read_results(path: Path) -> list[Row]:
    """The rows of a benchmark.

    Raises:
        StorageProblem: as read_rows; or a row lacks what every one has.
    """
    return read_rows(path, ("key", "repeat", "grid", "status", "model"), _MEASURED)


def read_rows(path: Path, needed: tuple[str, ...] = (), if_ok: tuple[str, ...] = ()) -> list[Row]:
    """The rows of results.jsonl, without a last one that a kill has torn; none where there is no file.

    needed: keys of every row. if_ok: more of those whose status is ok.

    Raises:
        StorageProblem: it can't be read, or a row before the last is damaged.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageProblem(
            f"can't be read: {error}", where=str(path), fix="pass a benchmark's folder"
        ) from None
    rows = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or not _is_whole(row, needed, if_ok):
            fix = "remove the damaged line: what it was of is run again"
            raise StorageProblem(f"line {number} is damaged", where=str(path), fix=fix)
        rows.append(row)
    return rows


def _is_whole(row: Row, needed: tuple[str, ...], if_ok: tuple[str, ...]) -> bool:
    return row.keys() >= set(needed) and (row.get("status") != "ok" or row.keys() >= set(if_ok))


def append(path: Path, row: Row) -> None:
    """Adds a row, and sees it on the disk; a torn last line goes.

    Raises:
        StorageProblem: it can't be written.
    """
    with _writable(path), path.open("ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def rewrite(path: Path, rows: Iterable[Row]) -> None:
    """All rows anew.

    Raises:
        StorageProblem: they can't be written.
    """
    write_whole(path, b"".join(json.dumps(row).encode() + b"\n" for row in rows))


def write_whole(path: Path, content: bytes) -> None:
    """A file that is all there, or as it was before.

    Raises:
        StorageProblem: it can't be written.
    """
    with _writable(path), whole_file(path) as building:
        building.write_bytes(content)


@contextmanager
def _writable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        fix = "free space there, then repeat the command: it goes on"
        raise StorageProblem(f"can't be written: {error}", where=str(path), fix=fix) from None


def together(rows: Iterable[Row]) -> list[Result]:
    """The cells, in the order in which they came, each with all of its runs."""
    cells: dict[str, list[Row]] = {}
    for row in rows:
        cells.setdefault(row["key"], []).append(row)
    grids: dict[str, list[Row]] = {}
    for first, *_ in cells.values():
        grids.setdefault(first["grid"], []).append(first)
    differing = {grid: _differing(rows) for grid, rows in grids.items()}
    return [Result(tuple(runs), _label(runs[0], differing[runs[0]["grid"]])) for runs in cells.values()]


def _differing(rows: list[Row]) -> list[str]:
    """The axes in which the cells of a grid differ."""
    return [
        axis for axis in AXES
        if len({json.dumps(row[axis], sort_keys=True) for row in rows if axis in row}) > 1
    ]  # fmt: skip


def _label(row: Row, differing: list[str]) -> str:
    """What tells a cell from the others of its grid; the model, where there is nothing else."""
    said = [_said(axis, row[axis]) for axis in differing if axis in row]
    return ", ".join(said) or str(row["model"])


def _said(axis: str, value: Any) -> str:
    said = {
        "zero_stage": f"ZeRO {value}",
        "ranks": f"{value} rank{'' if value == 1 else 's'}",
        "threads": f"{value or 'shared'} threads",
        "micro_batch": f"micro batch {value}",
        "accumulation": f"accumulation {value}",
        "seq_len": f"T {value}",
        "recompute": f"recompute {value}",
        "attention": f"attention {value}",
        "compile": "compiled" if value else "not compiled",
        "overrides": " ".join(value) if isinstance(value, list) and value else "no overrides",
    }
    return said.get(axis) or (json.dumps(value) if isinstance(value, dict) else str(value))
