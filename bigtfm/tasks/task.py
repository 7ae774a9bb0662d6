"""What a task consists of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigtfm.config.optional import library
from bigtfm.data.documents import Row
from bigtfm.data.examples import Format, Reader
from bigtfm.tasks.predictor import Predictor

Sums = NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """How good predictions are.

    values: the metrics, by name, the main one first. sums [examples, K]: what each example adds to the sums
    that `of_sums` makes the metrics of, for their confidence intervals; None: `intervals` are there.
    """

    values: Mapping[str, float]
    sums: Sums | None = None
    of_sums: Callable[[Sums], Mapping[str, float]] | None = None
    intervals: Mapping[str, tuple[float, float]] | None = None


@dataclass(frozen=True)
class Task:
    """A format and what belongs to it.

    predict: of rows in their order, what the model says. reference: what a row says itself. score: of both
    lists. baseline: what would be said without a model, and what that is.
    """

    format: Format
    predict: Callable[[Predictor, Sequence[Row], Reader], list[Any]]
    reference: Callable[[Row], Any]
    score: Callable[[Sequence[Any], Sequence[Any]], Scores]
    baseline: tuple[str, Callable[[Sequence[Row]], list[Any]]]


def metric_library(name: str, package: str) -> Any:
    """A library that measures.

    Raises:
        ConfigProblem: it is not installed.
    """
    return library(name, f"{package} is not installed", where="bigtfm evaluate", extra="tasks")


def interval(scores: Scores, samples: int = 1000, seed: int = 0) -> Mapping[str, tuple[float, float]]:
    """95 % confidence intervals: percentiles of the metrics of examples drawn anew (Efron 1979)."""
    if scores.sums is None or scores.of_sums is None:
        return scores.intervals or {}
    count = len(scores.sums)
    generator = np.random.default_rng(seed)
    drawn = [scores.of_sums(scores.sums[generator.integers(0, count, count)].sum(0)) for _ in range(samples)]
    return {
        name: (float(low), float(high))
        for name in scores.values
        for low, high in [np.percentile([values[name] for values in drawn], [2.5, 97.5])]
    }


def ratio(part: float, whole: float) -> float:
    """part / whole; 0 where there is nothing."""
    return float(part / whole) if whole else 0.0


def f1(true_positives: float, predicted: float, gold: float) -> float:
    """The harmonic mean of precision and recall."""
    return ratio(2 * true_positives, predicted + gold)
