"""Text from a GPT: a batch of prompts, a cache of keys and values, greedy or sampled.

B prompts, V vocabulary. What a prompt continues with depends on the weights, the prompt, the seed and the
sampling settings, not on the other prompts of the batch: its random numbers are a function of the seed and of
the prompt itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from bigtfm.config.problems import ConfigProblem
from bigtfm.model.gpt import GPT
from bigtfm.model.randomness import stream_key, uniform
from bigtfm.model.transformer import Cache


def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_id: int | None = None,
    on_token: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """The continuation of each prompt (token ids, without the prompt and without the end token).

    A sequence ends at eos_id, after max_new_tokens, or when the model has read max_seq_len tokens (for every
    kind of positions: a model isn't asked about positions that it was not built for).

    temperature: divides the logits; 0 takes the likeliest token.
    top_k: keeps the k likeliest tokens; 0 keeps all.
    top_p: keeps the fewest of these that hold this much of their probability (Holtzman et al. 2020); 1: all.
    A prompt that stands in the batch more than once gets a different sample each time.
    on_token(prompt number, token id) is called for each new token as soon as it is known.

    Raises:
        ConfigProblem: a prompt is empty, too long or holds an unknown id; or a setting is out of range.
    """
    _check(model, prompts, max_new_tokens, temperature, top_k, top_p)
    if not prompts:
        return []
    pick = partial(sample, temperature=temperature, top_k=top_k, top_p=top_p)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            return _decode(model, prompts, max_new_tokens, _keys(prompts, seed), pick, eos_id, on_token)
    finally:
        model.train(was_training)


def _decode(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    keys: Tensor,  # [B] int64
    pick: Callable[[Tensor, Tensor], Tensor],
    eos_id: int | None,
    on_token: Callable[[int, int], None] | None,
) -> list[list[int]]:
    device = model.embed_tokens.weight.device
    limit = model.config.max_seq_len
    slots = min(limit, max(map(len, prompts)) + max_new_tokens)
    k, v = model.new_cache(len(prompts), slots)
    keys = keys.to(device)
    rows = torch.arange(len(prompts), device=device)
    starts = torch.arange(len(prompts) + 1, device=device, dtype=torch.int32)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)  # [B] tokens in the cache

    logits = _read_prompts(model, prompts, k, v)  # [B, V]
    generated: list[list[int]] = [[] for _ in prompts]
    active = [True] * len(prompts)
    for step in range(max_new_tokens):
        tokens = pick(logits, uniform(keys + step))  # [B]
        for row, token in enumerate(tokens.tolist()):
            if not active[row]:
                continue
            if token == eos_id:
                active[row] = False
                continue
            generated[row].append(token)
            if on_token is not None:
                on_token(row, token)
            active[row] = len(prompts[row]) + step < limit
        if not any(active) or step + 1 == max_new_tokens:
            break
        at = lengths.clamp(max=slots - 1)  # finished rows run along; nobody reads what they compute
        cache = Cache(k, v, rows=rows, slots=at, lengths=at + 1)
        logits = model.project(model.hidden(tokens, at, starts, (1,) * len(prompts), cache=cache))
        lengths = lengths + 1
    return generated


def _read_prompts(model: GPT, prompts: Sequence[Sequence[int]], k: list[Tensor], v: list[Tensor]) -> Tensor:
    """Fills the cache with the prompts, packed; returns the logits [B, V] after each prompt's last token."""
    device = model.embed_tokens.weight.device
    seq_lens = tuple(len(prompt) for prompt in prompts)
    input_ids = torch.tensor([token for prompt in prompts for token in prompt], device=device)  # [T]
    position_ids = torch.cat([torch.arange(length) for length in seq_lens]).to(device)
    rows = torch.repeat_interleave(torch.arange(len(prompts)), torch.tensor(seq_lens)).to(device)
    ends = torch.tensor(seq_lens, device=device).cumsum(0)
    cu_seqlens = torch.cat([ends.new_zeros(1), ends]).to(torch.int32)
    cache = Cache(k, v, rows=rows, slots=position_ids)
    return model.project(model.hidden(input_ids, position_ids, cu_seqlens, seq_lens, cache=cache)[ends - 1])


def sample(logits: Tensor, u: Tensor, *, temperature: float, top_k: int, top_p: float) -> Tensor:
    """A token [B] for each row of `logits` [B, V]: the cumulative distribution inverted at `u` [B]."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.double()
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature
    probabilities, ids = scaled.softmax(-1).sort(dim=-1, descending=True, stable=True)
    if top_k:
        probabilities[:, top_k:] = 0
    if top_p < 1:
        before = probabilities.cumsum(-1) - probabilities  # what the likelier tokens hold already
        probabilities = probabilities.masked_fill(before >= top_p * probabilities.sum(-1, keepdim=True), 0)
    cumulative = probabilities.cumsum(-1)
    # the last kept token begins below the total and u < 1, so a dropped token is never reached
    choice = torch.searchsorted(cumulative, u[:, None] * cumulative[:, -1:], right=True)
    return ids.gather(-1, choice.clamp(max=ids.shape[-1] - 1))[:, 0]


def _keys(prompts: Sequence[Sequence[int]], seed: int) -> Tensor:
    """A key [B] for each prompt: of the seed, the prompt, and how often it has stood in the batch before."""
    seen: Counter[tuple[int, ...]] = Counter()
    keys = []
    for prompt in prompts:
        keys.append(stream_key(seed, f"generate/{list(prompt)}/{seen[tuple(prompt)]}"))
        seen[tuple(prompt)] += 1
    return torch.tensor(keys, dtype=torch.int64)


def _check(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
) -> None:
    where = "generate"
    if max_new_tokens < 1:
        raise ConfigProblem(f"max_new_tokens is {max_new_tokens}", where=where, fix="use at least 1")
    if not 0 <= temperature < float("inf"):
        fix = "use 0 (greedy) or a positive number"
        raise ConfigProblem(f"temperature is {temperature}", where=where, fix=fix)
    if top_k < 0:
        raise ConfigProblem(f"top_k is {top_k}", where=where, fix="use 0 (all tokens) or a positive number")
    if not 0 < top_p <= 1:
        raise ConfigProblem(f"top_p is {top_p}", where=where, fix="use a probability above 0 and up to 1")
    limit = model.config.max_seq_len
    for number, prompt in enumerate(prompts, start=1):
        place = f"{where}: prompt {number}"
        if not prompt:
            fix = "give at least one token, such as the start token"
            raise ConfigProblem("it has no tokens", where=place, fix=fix)
        if len(prompt) > limit:
            fix = f"shorten it; the model reads at most {limit} (max_seq_len)"
            raise ConfigProblem(f"it has {len(prompt)} tokens", where=place, fix=fix)
        wrong = next((token for token in prompt if not 0 <= token < model.vocab_size), None)
        if wrong is not None:
            fix = f"use the run's own tokenizer; the model knows ids 0 to {model.vocab_size - 1}"
            raise ConfigProblem(f"token id {wrong} is unknown", where=place, fix=fix)
