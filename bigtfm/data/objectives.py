"""Objectives: what a model reads of samples of tokens, and what it has to predict. Pure numpy.

Each is a function of Samples. What it draws at random is a function of the seed, the sample's number and the
place in it alone (bigtfm/data/order.py): not of rank, batch, worker or history.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from bigtfm.config.marks import IGNORE
from bigtfm.config.sections import Objective, ObjectiveSection
from bigtfm.data.masking import masked_lm
from bigtfm.data.samples import Examples, Samples
from bigtfm.data.spans import infilling, span_corruption
from bigtfm.data.special import SpecialIds
from bigtfm.data.supervised import (
    classification,
    completion,
    question_answering,
    sequence_to_sequence,
    tagging,
)

MakeExamples = Callable[[Samples], Examples]


def causal_lm(samples: Samples) -> Examples:
    """A position's label is the token after it, unless that begins another document."""
    labels = np.empty_like(samples.tokens)
    labels[:-1] = samples.tokens[1:]
    labels[samples.ends - 1] = samples.behind
    labels[samples.boundaries - 1] = IGNORE
    return Examples(samples.tokens, labels, len(labels) - len(samples.boundaries))


def make_objective(
    options: ObjectiveSection, kind: Objective, special: SpecialIds, seed: int, *, causal: bool = False
) -> MakeExamples:
    """The objective that the config names, as a Loader takes it.

    causal: no token of the model sees what comes behind it.
    """
    plain: dict[str, MakeExamples] = {
        "causal_lm": causal_lm,
        "completion": completion,
        "classification": partial(classification, last=causal),
        "tagging": tagging,
        "question_answering": question_answering,
        "sequence_to_sequence": partial(sequence_to_sequence, special=special),
    }
    if kind in plain:
        return plain[kind]
    function = {"masked_lm": masked_lm, "span_corruption": span_corruption, "infilling": infilling}[kind]
    return partial(function, options=options, special=special, seed=seed)
