"""What a report shows beside the rows themselves: scaling over ranks, memory against speed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bigtfm.bench.results import AXES, Result

_OVER_RANKS = ("ranks", "threads")  # what a scaling run varies
_RESULTS_OF = ("model", "overrides", "seq_len")  # of a front: these make other trainings, not other ways


@dataclass(frozen=True)
class Scaling:
    """The same work on more ranks. Weak: each has as much as before. Strong: all have."""

    kind: Literal["weak", "strong"]
    what: str  # the rest of the configuration
    results: tuple[Result, ...]  # by ranks

    @property
    def efficiency(self) -> list[float]:
        """Tokens a second per rank, as a share of what a rank does among the fewest."""
        alone = self.results[0].rates.median / self.results[0].ranks
        return [result.rates.median / result.ranks / alone for result in self.results]


def scalings(results: Sequence[Result]) -> list[Scaling]:
    """Every set of cells of a grid that differ in their ranks alone, or in what follows from them."""
    return [*_series("weak", results), *_series("strong", results)]


def _series(kind: Literal["weak", "strong"], results: Sequence[Result]) -> Iterator[Scaling]:
    groups: dict[tuple[Any, ...], dict[int, Result]] = {}
    skipped = (*_OVER_RANKS, "accumulation") if kind == "strong" else _OVER_RANKS
    for result in results:
        if result.ok:
            row = result.first
            step = row["micro_batch"] * row["accumulation"] * (row["ranks"] if kind == "strong" else 1)
            rest = [result.axis(axis) for axis in AXES if axis not in skipped]
            groups.setdefault((result.grid, step, *rest), {})[result.ranks] = result
    for (grid, *_), by_ranks in groups.items():
        if len(by_ranks) > 1:
            ordered = tuple(by_ranks[ranks] for ranks in sorted(by_ranks))
            row = ordered[0].first
            batch = f"micro batch {row['micro_batch']}"
            yield Scaling(kind, f"{grid}: {row['model']}, ZeRO {row['zero_stage']}, {batch}", ordered)


def fronts(results: Sequence[Result]) -> dict[str, list[Result]]:
    """By model and length: the cells that no other beats in both speed a rank and memory, smallest first."""
    groups: dict[tuple[Any, ...], list[Result]] = {}
    for result in results:
        if result.ok and result.peak_bytes:
            groups.setdefault(tuple(result.axis(axis) for axis in _RESULTS_OF), []).append(result)
    found: dict[str, list[Result]] = {}
    for group in groups.values():
        front: list[Result] = []
        for result in sorted(group, key=lambda each: (each.peak_bytes or 0, -_a_rank(each))):
            if not front or _a_rank(result) > _a_rank(front[-1]):
                front.append(result)
        row = group[0].first
        name = " ".join([f"{row['model']}, T {row['seq_len']}", *row["overrides"]])
        found[name] = front
    return found


def _a_rank(result: Result) -> float:
    return result.rates.median / result.ranks
