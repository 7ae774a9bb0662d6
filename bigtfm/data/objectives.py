"""Objectives: what a model reads of windows of tokens, and what it has to predict. Pure numpy.

Each is a function of Windows. What it draws at random is a function of the seed, the sample's number and the
place in its window alone (bigtfm/data/order.py): not of rank, batch, worker or history.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from bigtfm.config.sections import Objective, ObjectiveSection
from bigtfm.data.masking import masked_lm
from bigtfm.data.spans import infilling, span_corruption
from bigtfm.data.special import SpecialIds
from bigtfm.data.windows import IGNORE, Examples, Windows

MakeExamples = Callable[[Windows], Examples]


def causal_lm(windows: Windows) -> Examples:
    """A position's label is the token after it, unless that begins another document."""
    total = int(windows.cu_seqlens[-1])
    labels = windows.rows[:, 1:].astype(np.int64).reshape(-1)
    labels[windows.boundaries - 1] = IGNORE
    return Examples(windows.tokens, labels[:total], total - len(windows.boundaries))


def make_objective(
    options: ObjectiveSection, kind: Objective, special: SpecialIds, seed: int
) -> MakeExamples:
    """The objective that the config names, as a Loader takes it."""
    if kind == "causal_lm":
        return causal_lm
    function = {"masked_lm": masked_lm, "span_corruption": span_corruption, "infilling": infilling}[kind]
    return partial(function, options=options, special=special, seed=seed)
