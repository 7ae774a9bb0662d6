"""Spans of text hidden from an encoder, for a decoder to write.

The text of a segment is what it holds less a leading BOS and a closing EOS, which stay in the encoder's
document. The flat text below is that of all segments, one behind the other.

N segments, T tokens of all together.
"""

from __future__ import annotations

from math import exp, lgamma, log, sqrt
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bigtfm.config.marks import IGNORE
from bigtfm.config.sections import ObjectiveSection
from bigtfm.data.order import stream_key, uniform
from bigtfm.data.samples import Examples, Samples, choose, places, within

if TYPE_CHECKING:
    from bigtfm.data.special import SpecialIds

Ints = NDArray[np.int64]


def span_sizes(lengths: Ints, options: ObjectiveSection) -> tuple[Ints, Ints]:
    """Hidden tokens, and the spans they form, in texts of the given lengths: [N] -> [N], [N].

    As T5's random_spans_noise_mask counts them; none in a text of less than two tokens.
    """
    hidden = np.rint(lengths * options.mask_fraction).astype(np.int64)
    hidden = np.maximum(np.minimum(np.maximum(hidden, 1), lengths - 1), 0)
    spans = np.rint(hidden / options.span_length).astype(np.int64)
    return hidden, np.minimum(np.maximum(spans, 1), np.minimum(hidden, lengths - hidden))


def span_corruption(
    samples: Samples, *, options: ObjectiveSection, special: SpecialIds, seed: int
) -> Examples:
    """T5's objective (Raffel et al. 2020, section 3.1.4): the decoder writes the spans that were cut out.

    encoder  Thank you <0> me to your party <1> week
    decoder  <0> for inviting <1> last EOS

    EOS ends the target, without a sentinel before it. Spans don't touch; otherwise any place is as likely as
    any other. (T5's code lets every text end with a hidden span: a short one would only ever lose its end.)
    Where there is nothing to hide the decoder reads its start token, without label.
    """
    tokens, begins = samples.tokens, samples.cu_seqlens[:-1]
    starts, lengths = text_of(samples, tokens, special)
    lengths = np.where(lengths < 2, 0, lengths)  # nothing is hidden there
    hidden_counts, span_counts = span_sizes(lengths, options)
    hidden = np.zeros(len(tokens), np.bool_)
    keys = samples.segment_keys + starts - begins
    hidden[places(starts, lengths)] = _noise(lengths, hidden_counts, span_counts, keys, seed)
    opens = hidden.copy()  # where a span begins
    opens[1:] &= ~hidden[:-1]
    opens[starts[lengths > 0]] = hidden[starts[lengths > 0]]
    sentinels = np.array(special.sentinels)[within(span_counts)]  # of all spans

    kept = ~hidden | opens
    encoder = tokens.copy()
    encoder[opens] = sentinels

    # A place of the segment writes a sentinel where a span opens, its token if hidden, EOS if it is the last.
    closes = np.zeros_like(hidden)
    closes[samples.cu_seqlens[1:] - 1] = True
    written = hidden.astype(np.int64) + opens + closes
    ends = np.cumsum(written)
    target = np.empty(ends[-1], np.int64)
    target[(ends - written)[opens]] = sentinels
    target[(ends - closes - 1)[hidden]] = tokens[hidden]
    target[ends[closes] - 1] = np.where(hidden_counts > 0, special.eos, IGNORE)
    decoder_lengths = np.add.reduceat(written, begins)
    read, seq_lens = for_encoder(encoder[kept], np.add.reduceat(kept.astype(np.int64), begins), special)
    return Examples(
        read,
        target,
        int(np.count_nonzero(target != IGNORE)),
        seq_lens,
        decoder_input_ids=shifted(target, decoder_lengths, special),
        decoder_seq_lens=decoder_lengths,
    )


def infilling(samples: Samples, *, options: ObjectiveSection, special: SpecialIds, seed: int) -> Examples:
    """BART's text infilling (Lewis et al. 2020, section 2.2): the decoder writes the whole segment, its BOS
    only where that is not what it starts with.

    Spans of Poisson(`span_length`) tokens, drawn until they hide `mask_fraction` of the text (the last is cut
    to fit), stand anywhere in it, each replaced by one mask; one of no tokens inserts a mask. Of these there
    are at most as many as keep the encoder's document no longer than the segment.
    """
    assert special.mask is not None, "special_ids gives infilling a mask"
    tokens = samples.tokens
    starts, lengths = text_of(samples, tokens, special)
    keys = samples.segment_keys + starts - samples.cu_seqlens[:-1]
    owner, spans = _poisson_spans(lengths, keys, options, seed)  # [K] segment and length of each span
    span_counts = np.bincount(owner, minlength=len(lengths))
    hidden_counts = np.bincount(owner, spans, len(lengths)).astype(np.int64)

    sizes = lengths - hidden_counts + span_counts  # of the text that the encoder reads
    masked = choose(span_counts, sizes, keys, stream_key(seed, "spans: where"))
    takes = np.ones(len(masked), np.int64)  # tokens of the text that each of them stands for
    takes[masked] = spans
    source = np.append(tokens[places(starts, lengths)], special.mask)  # one more: a mask may stand at the end
    text = np.where(masked, special.mask, source[np.cumsum(takes) - takes])

    seq_lens = samples.seq_lens - lengths + sizes
    is_text = np.zeros(len(tokens), np.bool_)
    is_text[places(starts, lengths)] = True
    begins = np.cumsum(seq_lens) - seq_lens + starts - samples.cu_seqlens[:-1]
    encoder_text = np.zeros(seq_lens.sum(), np.bool_)
    encoder_text[places(begins, sizes)] = True
    encoder = np.empty(len(encoder_text), np.int64)
    encoder[encoder_text] = text
    encoder[~encoder_text] = tokens[~is_text]
    target, decoder_lengths = _whole(samples, tokens, special)
    encoder, seq_lens = for_encoder(encoder, seq_lens, special)
    return Examples(
        encoder,
        target,
        int(np.count_nonzero(target != IGNORE)),
        seq_lens,
        decoder_input_ids=shifted(target, decoder_lengths, special),
        decoder_seq_lens=decoder_lengths,
    )


def for_encoder(encoder: Ints, lengths: Ints, special: SpecialIds) -> tuple[Ints, Ints]:
    """What an encoder reads, and its lengths: a BOS that is EOS (T5 has no other) does not lead a text."""
    return _without_bos(encoder, lengths, special) if special.bos == special.eos else (encoder, lengths)


def _whole(samples: Samples, tokens: Ints, special: SpecialIds) -> tuple[Ints, Ints]:
    """What infilling writes, and its lengths: the segments, without BOS unless it is written. A lone BOS
    leaves nothing to write: its place has no label.
    """
    begins, lengths = samples.cu_seqlens[:-1], samples.seq_lens
    if special.writes_bos:
        return tokens, lengths
    target, lone = tokens.copy(), (tokens[begins] == special.bos) & (lengths == 1)
    target[begins[lone]] = IGNORE
    return _without_bos(target, lengths, special)


def _without_bos(ids: Ints, lengths: Ints, special: SpecialIds) -> tuple[Ints, Ints]:
    """Documents of more than one token without the BOS that they begin with, and their lengths."""
    begins = np.cumsum(lengths) - lengths
    dropped = (ids[begins] == special.bos) & (lengths > 1)
    kept = np.ones(len(ids), np.bool_)
    kept[begins[dropped]] = False
    return ids[kept], lengths - dropped


def text_of(samples: Samples, tokens: Ints, special: SpecialIds) -> tuple[Ints, Ints]:
    """Where each segment's text begins in `tokens`, and its length: [N], [N]."""
    begins, lasts = samples.cu_seqlens[:-1], samples.cu_seqlens[1:] - 1
    starts = begins + (tokens[begins] == special.bos)
    return starts, np.maximum(lasts + (tokens[lasts] != special.eos) - starts, 0)


def _noise(lengths: Ints, hidden: Ints, spans: Ints, keys: Ints, seed: int) -> NDArray[np.bool_]:
    """Which tokens of the flat text are hidden: kept and hidden spans in turn, of random lengths."""
    is_hidden = within(2 * spans + 1) % 2 == 1
    edge = within(spans + 1)
    edges = (edge == 0).astype(np.int64) + (edge == np.repeat(spans, spans + 1))  # these may hold no token
    turns = np.empty(len(is_hidden), np.int64)
    turns[is_hidden] = _cut(hidden, spans, keys, stream_key(seed, "spans: hidden"))
    turns[~is_hidden] = _cut(lengths - hidden + 2, spans + 1, keys, stream_key(seed, "spans: kept")) - edges
    return np.repeat(is_hidden, turns)


def _cut(lengths: Ints, counts: Ints, keys: Ints, key: int) -> Ints:
    """Cuts lengths[g] items of each group into counts[g] spans, any way as likely as any other.

    lengths, counts, keys [N] -> lengths of the spans [sum of counts]. A group of no items has no spans.
    """
    opens = within(lengths) == 0
    opens[~opens] = choose(counts - 1, np.maximum(lengths - 1, 0), keys, key)
    return np.diff(np.append(np.flatnonzero(opens), len(opens)))


def _poisson_spans(lengths: Ints, keys: Ints, options: ObjectiveSection, seed: int) -> tuple[Ints, Ints]:
    """Segment and length of each span that `infilling` hides: [K], [K]."""
    groups = np.arange(len(lengths))
    budget, _ = span_sizes(lengths, options)
    draw = uniform(places(keys, lengths), stream_key(seed, "spans: lengths"))  # as many as tokens: enough
    # no span is longer than the longest text: what lies beyond need not be told apart
    spans = np.searchsorted(_poisson(options.span_length, int(lengths.max(initial=0))), draw, side="right")
    sums = np.append(0, np.cumsum(spans))
    left = np.repeat(budget + sums[np.cumsum(lengths) - lengths], lengths) - sums[:-1]  # before each span
    owner, spans = np.repeat(groups, lengths)[left > 0], np.minimum(spans, left)[left > 0]

    room = np.bincount(owner, np.maximum(spans - 1, 0), len(lengths))  # by which spans shorten the text
    inserts = spans == 0
    counts = np.bincount(owner[inserts], minlength=len(lengths))
    stays = np.ones(len(spans), np.bool_)
    stays[inserts] = within(counts) < np.repeat(room, counts)
    return owner[stays], spans[stays]


def _poisson(mean: float, most: int) -> NDArray[np.float64]:
    """P(X <= 0) ... P(X < most) of a Poisson distribution, as far as a number of 53 bits can tell."""
    most = min(most, int(mean + 12 * sqrt(mean)) + 20)
    return np.cumsum([exp(k * log(mean) - mean - lgamma(k + 1)) for k in range(most)])


def shifted(target: Ints, lengths: Ints, special: SpecialIds) -> Ints:
    """What a decoder reads to write `target`: its start token, then the target but for the last token."""
    read = np.empty_like(target)
    read[1:] = target[:-1]
    read[np.cumsum(lengths) - lengths] = special.start
    return read
