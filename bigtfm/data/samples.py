"""Between loader and objectives: samples as they are read, and examples made out of them.

A sample is one or more pieces: runs of consecutive tokens of the stream. A segment is the part of one
document that lies in one piece. Nothing crosses it. P pieces of T tokens of all together in N segments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bigtfm.data.order import random_bits


class Samples(NamedTuple):
    """Consecutive samples, read."""

    tokens: NDArray[np.int64]  # [T]
    token_keys: NDArray[np.int64]  # [T]: sample number * seq_len + offset in the sample
    cu_seqlens: NDArray[np.int64]  # [N + 1]: where segments begin, and T
    boundaries: NDArray[np.int64]  # positions, 1 .. T, before which a document ends
    ends: NDArray[np.int64]  # [P]: positions at which pieces end
    behind: NDArray[np.int64]  # [P]: the token behind each piece; any, where a document ends
    stops: NDArray[np.int64]  # [P]: where the pieces end in the stream
    seq_len: int  # most tokens in a sample
    stream_size: int  # tokens in the whole stream
    read: Callable[[int, int], NDArray[Any]]  # the stream's tokens from, to
    marks: NDArray[np.int64] | None = None  # [T], of a task's data set

    @property
    def seq_lens(self) -> NDArray[np.int64]:
        """Lengths of the segments [N]."""
        return self.cu_seqlens[1:] - self.cu_seqlens[:-1]

    @property
    def segment_keys(self) -> NDArray[np.int64]:
        """The key of each segment's first token [N].

        A segment of l tokens owns the keys k .. k + l - 1: what is drawn for it is a function of them.
        """
        return self.token_keys[self.cu_seqlens[:-1]]

    @property
    def segment_stops(self) -> NDArray[np.int64]:
        """Where the piece that holds each segment ends in the stream [N]."""
        return self.stops[np.searchsorted(self.ends, self.cu_seqlens[:-1], side="right")]


class Examples(NamedTuple):
    """What a model reads and has to predict: N documents of T tokens; U tokens of N decoder documents."""

    input_ids: NDArray[np.int64]  # [T]
    labels: NDArray[np.int64]  # [T], or [U] where there is a decoder
    num_labels: int
    seq_lens: NDArray[np.int64] | None = None  # [N], at most the segments' lengths; None: they are
    token_type_ids: NDArray[np.int64] | None = None  # [T]
    next_sentence_labels: NDArray[np.int64] | None = None  # [N]
    decoder_input_ids: NDArray[np.int64] | None = None  # [U]
    labelled: NDArray[np.int64] | None = (
        None  # [M], places of the labels, for a model that asks about them alone
    )
    decoder_seq_lens: NDArray[np.int64] | None = None  # [N], at most twice the segments' lengths


def within(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Of groups one behind the other, each item's place in its group: [N] -> [sum of sizes]."""
    return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def places(starts: NDArray[np.int64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """starts[0], starts[0] + 1, ... of each group, one behind the other: [N], [N] -> [sum of sizes]."""
    return np.repeat(starts, sizes) + within(sizes)


def choose(
    counts: NDArray[np.int64], sizes: NDArray[np.int64], first_keys: NDArray[np.int64], key: int
) -> NDArray[np.bool_]:
    """Marks counts[g] of the sizes[g] items of each group, any choice as likely as any other: [sum of sizes].

    Those with the smallest of the random numbers first_keys[g], first_keys[g] + 1, ... of the stream `key`.
    """
    bits = random_bits(places(first_keys, sizes), key)
    order = np.lexsort((bits, np.repeat(np.arange(len(sizes)), sizes)))  # group by group
    chosen = np.zeros(len(bits), np.bool_)
    chosen[order] = within(sizes) < np.repeat(counts, sizes)
    return chosen
