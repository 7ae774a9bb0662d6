"""Beam search: the likeliest answers that a search of limited width finds, from a GPT or an encoder-decoder.

B prompts still searched, W beams (the unfinished hypotheses kept of each), V vocabulary, n tokens written.

A finished hypothesis scores log p / length^length_penalty, its end token included in both. That is Hugging
Face's formula, in whose terms published checkpoints state their settings; Wu et al. 2016 (equation 14) divide
by ((5 + length) / 6)^alpha, which tells short lengths apart less. 0 ranks by probability alone, 1 by the mean
log-probability of a token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from bigtfm.config.problems import ConfigProblem
from bigtfm.generation.decoding import Decoding, Prompts, check_length, check_prompts, inference
from bigtfm.model.encoder_decoder import EncoderDecoder
from bigtfm.model.gpt import GPT

STRONGEST = 10.0  # length penalty; a length to its power fits into a float


@dataclass(frozen=True)
class Hypothesis:
    """An answer and its score (see above), in nats."""

    tokens: list[int]  # without the end token
    score: float


def beam_search(
    model: GPT | EncoderDecoder,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    num_beams: int,
    length_penalty: float = 1.0,
    num_return_sequences: int = 1,
    start: Sequence[int] = (),
    eos_id: int | None = None,
) -> list[list[Hypothesis]]:
    """The best answers to each prompt, best first: num_return_sequences, or fewer if no more were found.

    In each step the num_beams likeliest continuations that don't end are a prompt's next beams; of the
    num_beams likeliest of all, those that end are finished. What max_new_tokens or max_seq_len cuts off is
    finished too.
    The search ends when no beam can win any more, and that changes no answer: log p only falls, so a beam's
    score is bounded by what it would be, with log p as it is, at the length that suits it best.

    length_penalty: -10 to 10; the larger it is, the longer the answers.
    start, eos_id: as in `generate`.

    Raises:
        ConfigProblem: a prompt is empty, too long or holds an unknown id; or a setting is out of range.
    """
    check_prompts(model, prompts)
    check_length(max_new_tokens)
    _check(num_beams, length_penalty, num_return_sequences)
    if not prompts:
        return []
    with inference(model):
        decoding = Decoding(model, prompts, start, max_new_tokens)
        return _search(decoding, num_beams, length_penalty, num_return_sequences, eos_id)


def _search(
    decoding: Decoding, num_beams: int, length_penalty: float, wanted: int, eos_id: int | None
) -> list[list[Hypothesis]]:
    best: list[list[Hypothesis]] = [[] for _ in decoding.owners]  # of each prompt, so far
    searched = decoding.owners  # [B]
    logits = decoding.begin()
    log_p = logits.new_zeros(len(searched), 1, dtype=torch.float64)  # [B, W]: one beam at first
    written = torch.zeros(len(searched), 1, 0, dtype=torch.int64, device=decoding.device)  # [B, W, n]
    for length in count(1):
        # Of 2 W continuations of W beams at most W end, so W go on.
        log_p, rows, written = _continuations(log_p, written, logits, 2 * num_beams)
        ends = written[..., -1] == (-1 if eos_id is None else eos_id)  # [B, 2 W]
        live = log_p.masked_fill(ends, -math.inf).topk(min(num_beams, ends.shape[1]))  # [B, W], best first
        going = []  # of B
        for row, (prompt, leader) in enumerate(zip(searched, live.values[:, 0].tolist(), strict=True)):
            room = decoding.room[prompt]
            finished = (ends[row] | (length == room)) & (log_p[row] > -math.inf)
            finished[num_beams:] = False
            best[prompt] += _hypotheses(written[row, finished], log_p[row, finished], length_penalty, eos_id)
            best[prompt] = sorted(best[prompt], key=lambda hypothesis: -hypothesis.score)[:wanted]
            to_beat = best[prompt][-1].score if len(best[prompt]) == wanted else -math.inf
            # Any beam ends later than now, and no better than the leader at the shortest or longest length.
            hope = max(leader / end**length_penalty for end in (length + 1, room))
            if length < room and hope > to_beat:
                going.append(row)
        if not going:
            break
        searched = [searched[row] for row in going]
        log_p, chosen = live.values[going], live.indices[going]
        written = written[going].take_along_dim(chosen[..., None], 1)
        rows = rows[going].gather(1, chosen)
        logits = decoding.advance(rows.flatten().tolist(), written[..., -1].flatten())
    return best


def _hypotheses(
    written: Tensor, log_p: Tensor, length_penalty: float, eos_id: int | None
) -> list[Hypothesis]:
    """Finished texts, written [F, n] and log p [F], with their scores."""
    scores = log_p / written.shape[1] ** length_penalty
    return [
        Hypothesis(text[:-1] if text[-1] == eos_id else text, score)
        for text, score in zip(written.tolist(), scores.tolist(), strict=True)
    ]


def _continuations(
    log_p: Tensor, written: Tensor, logits: Tensor, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The `width` likeliest continuations of each prompt's beams by one token, best first.

    log_p [B, W], written [B, W, n], logits [B W, V] -> log_p [B, width], the row of logits [B, width] that
    each goes on from, written [B, width, n + 1].
    """
    prompts, beams = log_p.shape
    sums = log_p[..., None] + logits.double().log_softmax(-1).unflatten(0, (prompts, beams))  # [B, W, V]
    top = sums.flatten(1).topk(min(width, sums[0].numel()))
    beam, token = top.indices // sums.shape[2], top.indices % sums.shape[2]
    first_rows = torch.arange(0, prompts * beams, beams, device=beam.device)[:, None]
    written = torch.cat([written.take_along_dim(beam[..., None], 1), token[..., None]], dim=-1)
    return top.values, first_rows + beam, written


def _check(num_beams: int, length_penalty: float, num_return_sequences: int) -> None:
    where = "beam search"
    if num_beams < 1:
        raise ConfigProblem(f"num_beams is {num_beams}", where=where, fix="use at least 1")
    if not -STRONGEST <= length_penalty <= STRONGEST:
        fix = f"use {-STRONGEST} to {STRONGEST}; 0 ranks by probability, 1 by its mean over the tokens"
        raise ConfigProblem(f"length_penalty is {length_penalty}", where=where, fix=fix)
    if not 1 <= num_return_sequences <= num_beams:
        fix = f"use 1 to {num_beams} (num_beams)"
        raise ConfigProblem(f"num_return_sequences is {num_return_sequences}", where=where, fix=fix)
