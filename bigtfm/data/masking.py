"""Masked language modelling and next-sentence prediction (Devlin et al. 2018, section 3.1 and appendix A)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bigtfm.config.marks import IGNORE
from bigtfm.config.sections import ObjectiveSection
from bigtfm.data.order import random_bits, stream_key, uniform
from bigtfm.data.samples import Examples, Samples

if TYPE_CHECKING:
    from bigtfm.data.special import SpecialIds

PAIR_TOKENS = 16  # a shorter segment makes no pair: it says too little to tell what follows it


def masked_lm(samples: Samples, *, options: ObjectiveSection, special: SpecialIds, seed: int) -> Examples:
    """Hidden tokens are predicted where they stood.

    A token is chosen with probability `mask_fraction`, with `whole_words` all tokens of a word or none. Of
    the chosen, a share `mask_random` becomes any ordinary token, `mask_keep` stays, the rest becomes the mask
    (80/10/10 as in the paper; `mask_fraction` 0.3 and nothing but masks: Wettig et al. 2023). Special tokens
    are neither chosen nor put anywhere. With `next_sentence` the text is one of pairs first.
    """
    assert special.mask is not None, "special_ids gives masked_lm a mask"
    tokens, token_types, next_sentence_labels = samples.tokens.copy(), None, None
    if options.next_sentence:
        tokens, token_types, next_sentence_labels = sentence_pairs(samples, special, seed)
    keys = samples.token_keys
    is_special = special.is_special[tokens]

    draw = uniform(keys, stream_key(seed, "mask"))
    if options.whole_words:
        draw = draw[_word_begins(tokens, is_special, samples.cu_seqlens, special)]
    chosen = np.flatnonzero((draw < options.mask_fraction) & ~is_special)  # [M]
    labels = np.full_like(tokens, IGNORE)
    labels[chosen] = tokens[chosen]

    draw = uniform(keys[chosen], stream_key(seed, "what the masked become"))
    random_begins = 1 - options.mask_random
    replaced = chosen[(draw >= options.mask_keep) & (draw < random_begins)]
    randomised = chosen[draw >= random_begins]
    draw = uniform(keys[randomised], stream_key(seed, "random token"))
    tokens[replaced] = special.mask
    tokens[randomised] = special.ordinary[(draw * len(special.ordinary)).astype(np.int64)]
    return Examples(
        tokens,
        labels,
        len(chosen),
        labelled=chosen,
        token_type_ids=token_types,
        next_sentence_labels=next_sentence_labels,
    )


def _word_begins(
    tokens: NDArray[np.int64],
    is_special: NDArray[np.bool_],
    cu_seqlens: NDArray[np.int64],
    special: SpecialIds,
) -> NDArray[np.int64]:
    """For each token, the place of its word's first token in the segment: [T]."""
    assert special.word_starts is not None, "special_ids gives the table where whole words are asked for"
    begins = special.word_starts[tokens] | is_special
    begins[1:] |= is_special[:-1]  # a special token is a word of its own
    begins[cu_seqlens[:-1]] = True
    return np.maximum.accumulate(np.where(begins, np.arange(len(tokens)), 0))


def sentence_pairs(
    samples: Samples, special: SpecialIds, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Makes each segment of at least PAIR_TOKENS tokens a pair, `BOS A EOS B EOS`, no longer than it was.

    A and B are the segment's text, less what does not fit, cut at a random place; every second B is replaced
    by as many tokens of text from a place in the stream outside the piece.

    Returns:
        tokens [T]; token types [T], 0 up to the first EOS of a pair and 1 behind it; labels [N], 0 where B
        follows A, 1 where it does not, -100 where there is no pair.
    """
    tokens = samples.tokens.copy()
    token_types = np.zeros_like(tokens)
    labels = np.full(len(samples.cu_seqlens) - 1, IGNORE)
    paired = np.flatnonzero(samples.seq_lens >= PAIR_TOKENS)
    begins, ends = samples.cu_seqlens[paired], samples.cu_seqlens[paired + 1]
    keys, stops = samples.segment_keys[paired], samples.segment_stops[paired]
    sizes = ends - begins - 3  # of A and B together
    cuts = 1 + (uniform(keys, stream_key(seed, "pair: cut")) * (sizes - 1)).astype(np.int64)
    labels[paired] = random_bits(keys, stream_key(seed, "pair: B")) >> np.uint64(63)
    draw = uniform(keys, stream_key(seed, "pair: elsewhere"))
    outside = max(samples.stream_size - samples.seq_len, 1)  # places behind and before the piece
    elsewhere = stops + (draw * outside).astype(np.int64)
    for begin, end, size, cut, label, place in zip(
        *(column.tolist() for column in (begins, ends, sizes, cuts, labels[paired], elsewhere)), strict=True
    ):
        text = begin + (tokens[begin] == special.bos)
        a, b = tokens[text : text + cut], tokens[text + cut : text + size]
        if label:
            b = _text(samples, place, len(b), special)
        tokens[begin:end] = np.concatenate([[special.bos], a, [special.eos], b, [special.eos]])
        token_types[begin + cut + 2 : end] = 1
    return tokens, token_types, labels


def _text(samples: Samples, place: int, count: int, special: SpecialIds) -> NDArray[np.int64]:
    """`count` tokens of text, no BOS or EOS, from `place` on; the stream's end leads to its beginning."""
    parts: list[NDArray[np.int64]] = []
    missing, seen = count, 0
    while missing > 0:
        assert seen <= samples.stream_size, "a stream of BOS and EOS alone"
        start = place % samples.stream_size
        read = samples.read(start, min(start + missing, samples.stream_size)).astype(np.int64)
        text = read[(read != special.bos) & (read != special.eos)]
        parts.append(text)
        missing, seen, place = missing - len(text), seen + len(read), start + len(read)
    return np.concatenate(parts)[:count]
