"""Objectives on marked tokens (data/examples.py): what is to be learnt stands in the data. Pure numpy.

N segments, each a whole example, T tokens of all together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bigtfm.config.marks import BEGINS, IGNORE
from bigtfm.data.samples import Examples, Samples
from bigtfm.data.spans import for_encoder, shifted

if TYPE_CHECKING:
    from bigtfm.data.special import SpecialIds

Ints = NDArray[np.int64]


def completion(samples: Samples) -> Examples:
    """A decoder's next token, where that is marked: an answer is learnt, its prompt is not."""
    labels = np.full_like(samples.tokens, IGNORE)
    follows = marks_of(samples)[1:] > 0
    follows[samples.cu_seqlens[1:-1] - 1] = False  # it begins another example
    labels[:-1] = np.where(follows, samples.tokens[1:], IGNORE)
    return Examples(samples.tokens, labels, int(np.count_nonzero(follows)))


def sequence_to_sequence(samples: Samples, *, special: SpecialIds) -> Examples:
    """The encoder reads what has no mark; the decoder writes what has one.

    Where a cut has left either of the two alone, the encoder reads all of it and the decoder its start token,
    without label.
    """
    tokens, begins = samples.tokens, samples.cu_seqlens[:-1]
    written = marks_of(samples) > 0
    counts = np.add.reduceat(written.astype(np.int64), begins)
    whole = (counts > 0) & (counts < samples.seq_lens)
    written &= np.repeat(whole, samples.seq_lens)
    counts = np.where(whole, counts, 1)
    place = written.copy()  # one place of a segment that writes nothing
    place[begins[~whole]] = True
    target = np.where(written, tokens, IGNORE)[place]
    read, seq_lens = for_encoder(tokens[~written], samples.seq_lens - np.where(whole, counts, 0), special)
    return Examples(
        read,
        target,
        int(np.count_nonzero(written)),
        seq_lens,
        decoder_input_ids=shifted(target, counts, special),
        decoder_seq_lens=counts,
    )


def classification(samples: Samples, *, last: bool) -> Examples:
    """The label of each example, at its first token or its last: where the model has seen all of it."""
    places = samples.cu_seqlens[1:] - 1 if last else samples.cu_seqlens[:-1]
    labels = np.full_like(samples.tokens, IGNORE)
    labels[places] = labels_of(marks_of(samples)[places])
    return Examples(samples.tokens, labels, int(np.count_nonzero(labels != IGNORE)))


def tagging(samples: Samples) -> Examples:
    """The label of each marked token: the first of a word."""
    labels = labels_of(marks_of(samples))
    return Examples(samples.tokens, labels, int(np.count_nonzero(labels != IGNORE)))


def question_answering(samples: Samples) -> Examples:
    """The marks themselves; as many labels as examples have an answer."""
    marks = marks_of(samples)
    return Examples(samples.tokens, marks, int(np.count_nonzero(marks & BEGINS)))


def marks_of(samples: Samples) -> Ints:
    assert samples.marks is not None, "job.py refuses data without marks"
    return samples.marks


def labels_of(marks: Ints) -> Ints:
    """Label n of the mark n + 1; no label of 0."""
    return np.where(marks > 0, marks - 1, IGNORE)
