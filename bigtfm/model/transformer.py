"""The trunk of every family: pre-norm blocks over packed tokens, recomputation, initial weights.

T tokens, C features, H query heads, K key/value heads, D head size, L blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from bigtfm.config.run import ModelSection
from bigtfm.model.attention import attention, cached_attention
from bigtfm.model.layers import FeedForward, LayerNorm, Linear, RMSNorm, rotate
from bigtfm.model.randomness import dropout, normal, stream_key

Recompute = Literal["none", "full", "selective"] | int


@dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens read so far, for decoding: k and v of each block [B, S, K, D].

    The tokens of a forward go to (row, slot). `lengths` is None while prompts are read (their tokens attend
    to each other alone); afterwards it holds the filled slots of each row, [B] int64, the newest token
    included.
    """

    k: list[Tensor]
    v: list[Tensor]
    rows: Tensor  # [T] int64
    slots: Tensor  # [T] int64
    lengths: Tensor | None = None


@dataclass(frozen=True)
class Packed:
    """What a block must know of its tokens besides their features."""

    cu_seqlens: Tensor  # [N + 1] int32
    seq_lens: tuple[int, ...]
    causal: bool
    angles: tuple[Tensor, Tensor] | None = None  # rotary cosine and sine, fp32 [T, 1, D/2]
    dropout_words: Tensor | None = None  # [T] int32; None: no dropout
    cache: Cache | None = None


class Attention(nn.Module):
    """Self-attention with one product for queries, keys and values."""

    def __init__(self, config: ModelSection, index: int) -> None:
        super().__init__()
        self.index = index
        self.heads, self.kv_heads = config.num_attention_heads, config.kv_heads
        self.head_size = config.head_size
        width = self.heads * self.head_size
        self.qkv = Linear(config.hidden_size, width + 2 * self.kv_heads * self.head_size, config.bias)
        self.out = Linear(width, config.hidden_size, config.bias)

    def forward(self, x: Tensor, packed: Packed) -> Tensor:  # [T, C] -> [T, C]
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_size))  # [T, H + 2 K, D]
        if packed.angles is not None:
            qk, v = qkv.split([self.heads + self.kv_heads, self.kv_heads], dim=1)
            q, k = rotate(qk, *packed.angles).split([self.heads, self.kv_heads], dim=1)
        else:
            q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        out: Tensor = self.out(self._attend(q, k, v, packed).flatten(1))
        return out

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, packed: Packed) -> Tensor:
        cache = packed.cache
        if cache is not None:
            cache.k[self.index][cache.rows, cache.slots] = k
            cache.v[self.index][cache.rows, cache.slots] = v
            if cache.lengths is not None:  # one token a row
                keys, values = cache.k[self.index], cache.v[self.index]
                return cached_attention(q[:, None], keys, values, lengths=cache.lengths)[:, 0]
        cu_seqlens, seq_lens = packed.cu_seqlens, packed.seq_lens
        return attention(q, k, v, cu_seqlens=cu_seqlens, seq_lens=seq_lens, causal=packed.causal)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); dropout on both branches."""

    def __init__(self, config: ModelSection, index: int) -> None:
        super().__init__()
        self.index, self.dropout = index, config.dropout
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, index)
        self.mlp_norm = make_norm(config)
        self.mlp = FeedForward(config.hidden_size, config.ffn_size, config.activation, config.bias)

    def forward(self, x: Tensor, packed: Packed) -> Tensor:  # [T, C] -> [T, C]
        x = x + self._drop(self.attention(self.attention_norm(x), packed), packed, 2 * self.index + 1)
        return x + self._drop(self.mlp(self.mlp_norm(x)), packed, 2 * self.index + 2)

    def _drop(self, x: Tensor, packed: Packed, site: int) -> Tensor:
        words = packed.dropout_words
        return x if words is None else dropout(x, self.dropout, words, site)  # site 0 is the embedding's


def make_norm(config: ModelSection) -> LayerNorm | RMSNorm:
    """The normalisation that the config names."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.hidden_size, config.norm_eps)
    return LayerNorm(config.hidden_size, config.norm_eps, config.bias)


def run_blocks(blocks: nn.ModuleList, x: Tensor, packed: Packed, recompute: Recompute) -> Tensor:
    """Passes `x` [T, C] through the blocks. `recompute` says what is kept for the backward pass.

    none: everything; full: the blocks' inputs (Chen et al. 2016); n: inputs alone in every n-th block, the
    first among them, everything in the others; selective: inputs, matrix products and attention outputs. No
    value changes: nothing here draws random numbers.
    """
    for index, block in enumerate(blocks):
        x = _wrapped(block, index, recompute)(x, packed)
    return x


def _wrapped(block: nn.Module, index: int, recompute: Recompute) -> Callable[..., Any]:
    if recompute == "none" or (isinstance(recompute, int) and index % recompute):
        return block
    recomputed = partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False)
    if recompute != "selective":
        return recomputed
    return partial(recomputed, context_fn=partial(create_selective_checkpoint_contexts, _keep_products))


_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear")
_ATTENTION = ("aten::_scaled_dot_product_", "torch_attn::")


def _keep_products(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = op.name().partition(".")[0]
    keep = name in _PRODUCTS or (name.startswith(_ATTENTION) and not name.endswith("backward"))
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def initial_value(name: str, shape: tuple[int, ...], config: ModelSection, seed: int) -> Tensor:
    """The initial weight of parameter `name`, fp32 on the CPU: a function of seed, name and place alone.

    Matrices are normal with init_std; those that end a residual branch with init_std / sqrt(2 L) (Radford et
    al. 2019); biases are 0, norm weights 1. A longer matrix begins with the shorter one's rows: padding the
    vocabulary moves nothing.
    """
    if len(shape) == 1:
        return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    ends_residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
    std = config.init_std / math.sqrt(2 * config.num_layers) if ends_residual else config.init_std
    return normal(stream_key(seed, name), math.prod(shape)).mul_(std).view(shape)


def init_weights(
    model: nn.Module, gather: Callable[[nn.Parameter], AbstractContextManager[Any]] = lambda _: nullcontext()
) -> None:
    """Fills the parameters of a family's module one by one with `initial_value` (model.config, model.seed).

    `gather(parameter)` is a context in which the whole parameter is present and may be written. Rows that pad
    the vocabulary are zero: they get no gradient, so they stay so.
    """
    config, seed, vocab_size = model.config, model.seed, model.vocab_size
    for name, parameter in model.named_parameters():
        with gather(parameter), torch.no_grad():
            value = initial_value(name, tuple(parameter.shape), config, seed)  # type: ignore[arg-type]
            if name.startswith(("embed_tokens.", "lm_head.")):
                value[vocab_size:] = 0
            parameter.copy_(value)
