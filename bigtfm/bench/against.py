"""A benchmark beside an earlier one: which cells have become slower, or larger, beyond what is noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from bigtfm.bench.results import Result

FLOOR = 0.02  # no machine repeats itself better from process to process
MEMORY_FLOOR = 0.01

Verdict = Literal["same", "faster", "slower", "larger", "smaller", "broken", "mended", "new", "gone"]
REGRESSIONS = ("slower", "larger", "broken", "gone")


@dataclass(frozen=True)
class Change:
    """A cell then and now."""

    grid: str
    label: str
    verdict: Verdict
    speed: float | None  # tokens a second, now / then
    noise: float | None  # a speed within 1 +- this is the same
    memory: float | None  # peak bytes of a rank, now / then

    @property
    def is_regression(self) -> bool:
        return self.verdict in REGRESSIONS


def changes(old: Sequence[Result], new: Sequence[Result]) -> list[Change]:
    """Every cell of both, in the order of the new one.

    The noise of a ratio is that of both medians: the root of the sum of their squares, at least 2 %.
    """
    before = {result.key: result for result in old}
    found = [_change(before.pop(result.key, None), result) for result in new]
    return found + [_change(result, None) for result in before.values()]


def _change(old: Result | None, new: Result | None) -> Change:
    there = new or old
    assert there is not None
    if old is None or new is None:
        return Change(there.grid, there.label, "gone" if new is None else "new", None, None, None)
    if not (old.ok and new.ok):
        verdict: Verdict = "same" if old.ok == new.ok else "broken" if old.ok else "mended"
        return Change(new.grid, new.label, verdict, None, None, None)
    speed = new.rates.median / old.rates.median
    noise = max(FLOOR, math.hypot(old.noise, new.noise))
    memory = new.peak_bytes / old.peak_bytes if new.peak_bytes and old.peak_bytes else None
    verdict = "same"
    if memory is not None and abs(memory - 1) > MEMORY_FLOOR:
        verdict = "larger" if memory > 1 else "smaller"
    if abs(math.log(speed)) > math.log1p(noise):
        verdict = "slower" if speed < 1 else "faster" if verdict != "larger" else verdict
    return Change(new.grid, new.label, verdict, speed, noise, memory)
