"""What sampling and beam search stand on: sequences that a decoder writes token by token, over a cache.

B prompts, R rows (sequences being written), T tokens of all prompts together, K key/value heads, D head size,
V vocabulary. A GPT goes on from its prompts; an encoder-decoder reads them with its encoder, and its decoder
writes anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from bigtfm.config.problems import ConfigProblem, NumericsProblem
from bigtfm.model.attention import Documents
from bigtfm.model.encoder_decoder import EncoderDecoder
from bigtfm.model.gpt import GPT
from bigtfm.model.heads import LanguageModel
from bigtfm.model.transformer import Block, Cache, ReadMemory

Prompts = Sequence[Sequence[int]]  # token ids


class Decoding:
    """R sequences being written, at first one for each prompt.

    room: for each prompt, how many tokens it may get: max_new_tokens, or fewer where the decoder would have
    to read more than max_seq_len tokens (for every kind of positions: a model isn't asked about positions
    that it was not built for). The last token written is never read.
    """

    def __init__(
        self, model: GPT | EncoderDecoder, prompts: Prompts, start: Sequence[int], max_new_tokens: int
    ) -> None:
        self.model, self.prompts = model, prompts
        self.start = decoder_start(model, start) if isinstance(model, EncoderDecoder) else ()
        self.device = model.embed_tokens.weight.device
        limit = model.config.max_seq_len
        read = [len(self.start or prompt) for prompt in prompts]  # tokens that the decoder begins with
        self.room = [min(max_new_tokens, limit - count + 1) for count in read]
        slots = max(count + room - 1 for count, room in zip(read, self.room, strict=True))
        self.k, self.v = model.decoder.new_cache(len(prompts), slots)
        self.lengths = torch.zeros(len(prompts), dtype=torch.int64, device=self.device)  # [R] tokens read
        self.owners = list(range(len(prompts)))  # the prompt of each row
        self.memory: ReadMemory | None = None

    def begin(self) -> Tensor:
        """Reads the prompts; returns the logits [B, V] of the first token of each answer."""
        if isinstance(self.model, EncoderDecoder):
            self.memory = _read_sources(self.model, self.prompts)
            for token in self.start:
                logits = self.advance(self.owners, self.lengths.new_full(self.lengths.shape, token))
            return logits
        input_ids, places, rows, documents = pack(self.prompts, self.device)
        cache = Cache(self.k, self.v, rows=rows, slots=places)
        ends = documents.cu_seqlens[1:].long()
        self.lengths = documents.cu_seqlens.diff().long()
        return self.model.project(self.model.hidden(input_ids, places, documents, cache=cache)[ends - 1])

    def advance(self, rows: list[int], tokens: Tensor) -> Tensor:
        """Row r becomes what row rows[r] was, and reads tokens[r]: [R] -> logits [R, V] of the next token.

        A row may be left out, or go on as several.
        """
        if rows != list(range(len(self.owners))):
            self._take(rows)
        at = self.lengths
        cache = Cache(
            self.k, self.v, rows=torch.arange(len(rows), device=self.device), slots=at, lengths=at + 1,
            memory=self.memory,
        )  # fmt: skip
        starts = torch.arange(len(rows) + 1, device=self.device, dtype=torch.int32)
        x = self.model.hidden(tokens, at, Documents(starts, (1,) * len(rows)), cache=cache)
        self.lengths = at + 1
        return self.model.project(x)

    def _take(self, rows: list[int]) -> None:
        index = torch.tensor(rows, device=self.device)
        self.k, self.v = [k[index] for k in self.k], [v[index] for v in self.v]
        self.lengths = self.lengths[index]
        owners = [self.owners[row] for row in rows]
        if self.memory is not None and owners != self.owners:  # all beams of a prompt have read the same
            k, v = ([x[index] for x in side] for side in (self.memory.k, self.memory.v))
            self.memory = ReadMemory(k, v, self.memory.lengths[index])
        self.owners = owners


def _read_sources(model: EncoderDecoder, prompts: Prompts) -> ReadMemory:
    """What the decoder attends to, its keys and values computed once and padded to the longest source."""
    input_ids, places, rows, documents = pack(prompts, model.embed_tokens.weight.device)
    features = model.encode(input_ids, places, documents).features  # [T, C]
    shape = (len(prompts), max(documents.seq_lens))
    k: list[Tensor] = []
    v: list[Tensor] = []
    for block in model.decoder.layers:
        assert isinstance(block, Block)
        assert block.cross_attention is not None
        for side, packed in zip((k, v), block.cross_attention.keys_values(features), strict=True):
            padded = packed.new_zeros(*shape, *packed.shape[1:])  # [B, S, K, D]
            padded[rows, places] = packed
            side.append(padded)
    return ReadMemory(k, v, documents.cu_seqlens.diff().long())


def pack(prompts: Prompts, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Documents]:
    """Prompts one behind the other: token ids, place in and number of each one's prompt, [T] int64 each."""
    seq_lens = tuple(map(len, prompts))
    counts = torch.tensor(seq_lens)
    input_ids = torch.tensor([token for prompt in prompts for token in prompt])
    places = torch.cat([torch.arange(length) for length in seq_lens])
    rows = torch.repeat_interleave(torch.arange(len(prompts)), counts)
    cu_seqlens = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)
    documents = Documents(cu_seqlens.to(device), seq_lens)
    return input_ids.to(device), places.to(device), rows.to(device), documents


@contextmanager
def inference(model: LanguageModel) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards the model is as it was."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise NumericsProblem(
                f"weight {name} is not finite", where="generate", fix="use another checkpoint, or train anew"
            )
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


def decoder_start(model: EncoderDecoder, start: Sequence[int]) -> Sequence[int]:
    """What a decoder reads first: `start`, or where that is empty the model's own start token."""
    if start:
        return start
    if model.config.decoder_start_id is None:
        fix = "pass the tokenizer's BOS as `start`, or set model.decoder_start_id"
        raise ConfigProblem("nothing says what the decoder reads first", where="generate", fix=fix)
    return (model.config.decoder_start_id,)


def check_prompts(model: LanguageModel, prompts: Prompts) -> None:
    """Raises ConfigProblem: a prompt is empty, too long or holds an unknown id."""
    limit = model.config.max_seq_len
    for number, prompt in enumerate(prompts, start=1):
        place = f"prompt {number}"
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


def check_length(max_new_tokens: int) -> None:
    """Raises ConfigProblem: max_new_tokens is below 1."""
    if max_new_tokens < 1:
        raise ConfigProblem(f"max_new_tokens is {max_new_tokens}", where="generate", fix="use at least 1")
