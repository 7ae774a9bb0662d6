"""Text from a GPT or an encoder-decoder: a batch of prompts, greedy or sampled.

B prompts, V vocabulary. What a prompt is answered depends on the weights, the prompt, the seed and the
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
from bigtfm.generation.decoding import Decoding, Prompts, check_length, check_prompts, inference
from bigtfm.model.encoder_decoder import EncoderDecoder
from bigtfm.model.gpt import GPT
from bigtfm.model.randomness import stream_key, uniform


def generate(
    model: GPT | EncoderDecoder,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    start: Sequence[int] = (),
    eos_id: int | None = None,
    on_token: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """The answer to each prompt: new token ids, without the prompt and without the end token.

    A sequence ends at eos_id, after max_new_tokens, or when the decoder has read max_seq_len tokens.

    temperature: divides the logits; 0 takes the likeliest token.
    top_k: keeps the k likeliest tokens; 0 keeps all.
    top_p: keeps the fewest of these that hold this much of their probability (Holtzman et al. 2020); 1: all.
    start: what an encoder-decoder's decoder reads first; empty: config.decoder_start_id. A GPT reads prompts.
    A prompt that stands in the batch more than once gets a different sample each time.
    on_token(prompt number, token id) is called for each new token as soon as it is known.

    Raises:
        ConfigProblem: a prompt is empty, too long or holds an unknown id; or a setting is out of range.
    """
    check_prompts(model, prompts)
    check_length(max_new_tokens)
    _check(temperature, top_k, top_p)
    if not prompts:
        return []
    pick = partial(sample, temperature=temperature, top_k=top_k, top_p=top_p)
    with inference(model):
        decoding = Decoding(model, prompts, start, max_new_tokens)
        return _write(decoding, _keys(prompts, seed), pick, eos_id, on_token)


def _write(
    decoding: Decoding,
    keys: Tensor,  # [B] int64
    pick: Callable[[Tensor, Tensor], Tensor],
    eos_id: int | None,
    on_token: Callable[[int, int], None] | None,
) -> list[list[int]]:
    answers: list[list[int]] = [[] for _ in decoding.owners]
    keys, logits = keys.to(decoding.device), decoding.begin()  # [B], [B, V]
    while True:
        tokens = pick(logits, uniform(keys))  # [R]
        going = []  # the rows that go on
        for row, (prompt, token) in enumerate(zip(decoding.owners, tokens.tolist(), strict=True)):
            if token == eos_id:
                continue
            answers[prompt].append(token)
            if on_token is not None:
                on_token(prompt, token)
            if len(answers[prompt]) < decoding.room[prompt]:
                going.append(row)
        if not going:
            return answers
        keys, logits = keys[going] + 1, decoding.advance(going, tokens[going])


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


def _keys(prompts: Prompts, seed: int) -> Tensor:
    """A key [B] for each prompt: of the seed, the prompt, and how often it has stood in the batch before."""
    seen: Counter[tuple[int, ...]] = Counter()
    keys = []
    for prompt in prompts:
        keys.append(stream_key(seed, f"generate/{list(prompt)}/{seen[tuple(prompt)]}"))
        seen[tuple(prompt)] += 1
    return torch.tensor(keys, dtype=torch.int64)


def _check(temperature: float, top_k: int, top_p: float) -> None:
    where = "generate"
    if not 0 <= temperature < float("inf"):
        fix = "use 0 (greedy) or a positive number"
        raise ConfigProblem(f"temperature is {temperature}", where=where, fix=fix)
    if top_k < 0:
        raise ConfigProblem(f"top_k is {top_k}", where=where, fix="use 0 (all tokens) or a positive number")
    if not 0 < top_p <= 1:
        raise ConfigProblem(f"top_p is {top_p}", where=where, fix="use a probability above 0 and up to 1")
