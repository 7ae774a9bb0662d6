"""Objectives: what the model reads of a window of tokens, and what it has to predict. Pure numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

IGNORE = -100  # label of a position that predicts nothing: torch's own ignore_index


def causal_lm(
    windows: NDArray[Any], boundaries: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Next-token prediction: a position's label is the token after it, unless that begins another document.

    Args:
        windows: [n, L + 1] token ids: L positions and the token after the last. boundaries: flat positions in
        1 .. n * L before which a document ends: the position before each gets no label.

    Returns:
        input_ids [n * L] and labels [n * L], int64.
    """
    input_ids = windows[:, :-1].astype(np.int64).reshape(-1)
    labels = windows[:, 1:].astype(np.int64).reshape(-1)
    labels[boundaries - 1] = IGNORE
    return input_ids, labels
