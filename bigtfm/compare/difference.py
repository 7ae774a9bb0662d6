"""Where two runs differ: column by column of their rows, and setting by setting."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from bigtfm.compare.runs import Run
from bigtfm.config.problems import DataProblem

COLUMNS = (
    "sample_digest",
    "tokens",
    "lr",
    "loss",
    "grad_norm",
    "val_loss",
)  # what comes first causes the rest
EXACT = ("sample_digest", "tokens")
NORM = 100.0  # the tolerance of gradient norms, in tolerances: their rounding was 100 times that of losses
RUN_TABLES = (
    *("run.", "model.", "data.", "objective.", "batch.", "compute.", "eval.", "save.", "track.", "resume."),
)

# What may differ between two runs of one curve. Of the run config all else decides the curve, of the
# DeepSpeed JSON nothing else but RECIPE.
FREE = (
    *("run.name", "run.dir", "run.steps", "data.workers", "compute.", "save.", "track."),
    *("resume.", "eval.every"),
)
PRECISION = ("precision", "bf16.", "fp16.", "data_types", "communication_data_type", "fp32_allreduce")
RECIPE = ("train_batch_size", "optimizer.", "scheduler.", "gradient_clipping", "tokenizer.", *PRECISION)
ABSENT = "(unset)"


@dataclass(frozen=True)
class Column:
    """One column, over the steps whose rows both runs have it in."""

    name: str
    differences: dict[int, float]  # step -> relative difference: 0 equal bits, inf where one is no number
    limit: float  # differences up to it count as none

    @cached_property
    def beyond(self) -> list[int]:
        """The steps at which the difference is above the limit."""
        return [step for step, difference in self.differences.items() if difference > self.limit]

    @property
    def first(self) -> int | None:
        """The first of them."""
        return next(iter(self.beyond), None)

    @cached_property
    def first_bit(self) -> int | None:
        """The first step at which the two are not equal to the bit."""
        return next((step for step, difference in self.differences.items() if difference), None)

    @cached_property
    def largest(self) -> float:
        return max(self.differences.values(), default=0.0)

    @cached_property
    def largest_at(self) -> int | None:
        """The step of the largest difference; None where there is no difference."""
        return max(self.differences, key=lambda step: self.differences[step]) if self.largest else None


@dataclass(frozen=True)
class Setting:
    """A setting in which the runs differ."""

    key: str
    a: Any
    b: Any
    decides: bool  # whether it decides the curve, as opposed to what must not matter


@dataclass(frozen=True)
class Comparison:
    """Two runs beside each other."""

    a: Run
    b: Run
    tolerance: float
    columns: dict[str, Column]
    steps: tuple[int, ...]  # that both have
    settings: tuple[Setting, ...]

    @cached_property
    def step(self) -> int | None:
        """The first step at which any column differs; None: the runs are the same."""
        return min((c.first for c in self.columns.values() if c.first is not None), default=None)

    @cached_property
    def differing(self) -> list[str]:
        """The columns that differ at that step."""
        return [column.name for column in self.columns.values() if self.step in column.beyond]

    @property
    def same_within(self) -> float:
        """The smallest tolerance at which the runs are the same, as far as numbers go."""
        scale = {"grad_norm": NORM}
        return max(column.largest / scale.get(column.name, 1.0) for column in self.columns.values())

    def alone(self, run: Run) -> list[int]:
        """Steps that only this one of the two runs has."""
        return sorted(run.rows.keys() - set(self.steps))


def compare(a: Run, b: Run, tolerance: float = 1e-5) -> Comparison:
    """The differences of two runs.

    tolerance: relative difference up to which lr, loss and val_loss count as equal; grad_norm gets a hundred
        times as much. Digests and tokens have to be equal.

    Raises:
        DataProblem: there is no step that both runs have.
    """
    steps = tuple(step for step in a.rows if step in b.rows)
    if not steps:
        fix = "compare runs whose metrics.jsonl have steps in common"
        raise DataProblem("no step is in both runs", where=f"{a.path}, {b.path}", fix=fix)
    columns = {}
    for name in COLUMNS:
        both = [step for step in steps if name in a.rows[step] and name in b.rows[step]]
        limit = 0.0 if name in EXACT else tolerance * (NORM if name == "grad_norm" else 1.0)
        differences = {step: relative(a.rows[step][name], b.rows[step][name]) for step in both}
        columns[name] = Column(name, differences, limit)
    return Comparison(a, b, tolerance, columns, steps, _settings(a, b))


def relative(a: Any, b: Any) -> float:
    """|a - b| over the larger of the two; 0 where they are equal or both NaN, inf where one isn't finite."""
    if a == b or (a != a and b != b):
        return 0.0
    if isinstance(a, str) or isinstance(b, str) or not (math.isfinite(a) and math.isfinite(b)):
        return math.inf
    return abs(a - b) / max(abs(a), abs(b))


def _settings(a: Run, b: Run) -> tuple[Setting, ...]:
    known = bool(a.identity and b.identity)  # then a path is but a path
    left, right = (run.identity | run.settings if known else run.settings for run in (a, b))
    found = [
        Setting(key, left.get(key, ABSENT), right.get(key, ABSENT), decides(key, known))
        for key in dict.fromkeys([*left, *right])
        if left.get(key, ABSENT) != right.get(key, ABSENT)
    ]
    return tuple(sorted(found, key=lambda setting: not setting.decides))


def decides(key: str, known: bool = True) -> bool:
    """Whether a setting decides the curve.

    known: whether data sets go by their SHA-256; without it, by their paths.
    """
    if key.startswith("data.") and key.endswith("path"):
        return not known
    if key.startswith(RUN_TABLES):
        return not key.startswith(FREE)
    return key.startswith(RECIPE)
