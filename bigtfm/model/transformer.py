"""The trunk of every family: a stack of blocks over packed tokens, recomputation, initial weights.

N documents, T tokens of all documents together, C features, H query heads, K key/value heads, D head size, L
blocks, B rows and S slots of a cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from bigtfm.config.sections import ComputeSection, ModelSection
from bigtfm.model.attention import AttentionDropout, Documents, attention, cached_attention
from bigtfm.model.layers import (
    Embedding,
    FeedForward,
    LayerNorm,
    Linear,
    RelativeBias,
    RMSNorm,
    make_norm,
    rotary_angles,
    rotated,
    sinusoids,
)
from bigtfm.model.randomness import dropout, normal, stream_key, token_words

Side = Literal["encoder", "decoder"]
SITES = 6  # places in a block at which something is dropped; number 0 of all is the embedding's


@dataclass(frozen=True)
class Memory:
    """What an encoder has made of the documents that a decoder attends to."""

    features: Tensor  # [T, C]
    documents: Documents
    words: Tensor | None = None  # [T] int32: what the dropout of attention to it depends on


@dataclass(frozen=True)
class ReadMemory:
    """A memory's keys and values for decoding: k and v of each block [B, S, K, D], and lengths [B] int64."""

    k: list[Tensor]
    v: list[Tensor]
    lengths: Tensor


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
    memory: ReadMemory | None = None


@dataclass(frozen=True)
class AttentionMaps:
    """Where a forward of one document leaves its attention weights, a tensor [1, H, Q, S] a block."""

    self_attention: list[Tensor] = field(default_factory=list)
    cross_attention: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Packed:
    """What a block must know of its tokens besides their features."""

    documents: Documents
    angles: tuple[Tensor, Tensor] | None = None  # rotary cosine and sine, fp32 [T, 1, D/2]
    local_angles: tuple[Tensor, Tensor] | None = None  # the same for blocks that attend within a window
    bias: Tensor | None = None  # on the scores, [H, Q, K]; with a cache [B, H, 1, S]
    words: Tensor | None = None  # [T] int32, what dropout depends on; None: no dropout
    memory: Memory | None = None
    cache: Cache | None = None
    maps: AttentionMaps | None = None


class SelfAttention(nn.Module):
    """Attention within each document, with one product for queries, keys and values."""

    def __init__(self, config: ModelSection, index: int, causal: bool, backend: Any) -> None:
        super().__init__()
        self.config, self.index, self.causal, self.backend = config, index, causal, backend
        self.rotated = rotated
        self.heads, self.kv_heads, self.head_size = (
            config.num_attention_heads,
            config.kv_heads,
            config.head_size,
        )
        is_global = config.global_every > 0 and index % config.global_every == 0
        self.window = None if is_global else config.window
        width = self.heads * self.head_size
        bias = config.bias if config.qkv_bias is None else config.qkv_bias
        self.qkv = Linear(config.hidden_size, width + 2 * self.kv_heads * self.head_size, bias)
        self.out = Linear(width, config.hidden_size, config.bias)

    def forward(self, x: Tensor, packed: Packed) -> Tensor:  # [T, C] -> [T, C]
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_size))  # [T, H + 2 K, D]
        angles = packed.angles if self.window is None else packed.local_angles
        if angles is not None:
            qk, v = qkv.split([self.heads + self.kv_heads, self.kv_heads], dim=1)
            q, k = self.rotated(qk, self.heads, *angles)
        else:
            q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        out: Tensor = self.out(self.attend(q, k, v, packed).flatten(1))
        return out

    def attend(self, q: Tensor, k: Tensor, v: Tensor, packed: Packed) -> Tensor:
        """[T, H, D] of queries [T, H, D], keys and values [T, K, D]: the part that no compiler looks into."""
        cache, scale, words = packed.cache, self.config.attention_scale, packed.words
        if cache is not None:
            cache.k[self.index][cache.rows, cache.slots] = k
            cache.v[self.index][cache.rows, cache.slots] = v
            if cache.lengths is not None:  # one token a row
                keys, values, lengths = cache.k[self.index], cache.v[self.index], cache.lengths
                return cached_attention(
                    q[:, None],
                    keys,
                    values,
                    lengths=lengths,
                    window=self.window,
                    scale=scale,
                    bias=packed.bias,
                )[:, 0]
        return attention(
            q,
            k,
            v,
            documents=packed.documents,
            causal=self.causal,
            window=self.window,
            scale=scale,
            bias=packed.bias,
            dropout=attention_dropout(self.config, words, words, SITES * self.index + 4),
            weights_to=None if packed.maps is None else packed.maps.self_attention,
            backend=self.backend,
        )


class CrossAttention(nn.Module):
    """Attention of a decoder's documents to the encoder's, document n to document n."""

    def __init__(self, config: ModelSection, index: int, backend: Any) -> None:
        super().__init__()
        self.config, self.index, self.backend = config, index, backend
        heads, kv_heads, self.head_size = config.num_attention_heads, config.kv_heads, config.head_size
        bias = config.bias if config.qkv_bias is None else config.qkv_bias
        self.q = Linear(config.hidden_size, heads * self.head_size, bias)
        self.kv = Linear(config.hidden_size, 2 * kv_heads * self.head_size, bias)
        self.out = Linear(heads * self.head_size, config.hidden_size, config.bias)

    def forward(self, x: Tensor, packed: Packed) -> Tensor:  # [T, C] -> [T, C]
        q = self.q(x).unflatten(-1, (-1, self.head_size))  # [T, H, D]
        if packed.cache is not None and packed.cache.memory is not None:  # one token a row
            read, scale = packed.cache.memory, self.config.attention_scale
            k, v = read.k[self.index], read.v[self.index]
            attended = cached_attention(q[:, None], k, v, lengths=read.lengths, causal=False, scale=scale)[
                :, 0
            ]
        else:
            assert packed.memory is not None, "a decoder with cross-attention needs an encoder's output"
            attended = self.attend(q, *self.keys_values(packed.memory.features), packed)
        out: Tensor = self.out(attended.flatten(1))
        return out

    def keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [T, K, D] of an encoder's features [T, C]."""
        k, v = self.kv(memory).unflatten(-1, (-1, self.head_size)).chunk(2, dim=1)
        return k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, packed: Packed) -> Tensor:
        """[T, H, D] of queries [T, H, D] and the memory's keys and values: what no compiler looks into."""
        assert packed.memory is not None
        return attention(
            q,
            k,
            v,
            documents=packed.documents,
            keys=packed.memory.documents,
            scale=self.config.attention_scale,
            dropout=attention_dropout(self.config, packed.words, packed.memory.words, SITES * self.index + 5),
            weights_to=None if packed.maps is None else packed.maps.cross_attention,
            backend=self.backend,
        )


def attention_dropout(
    config: ModelSection, q_words: Tensor | None, k_words: Tensor | None, site: int
) -> AttentionDropout | None:
    """Which attention weights are dropped; None where none is."""
    if not config.attention_dropout or q_words is None or k_words is None:
        return None
    return AttentionDropout(config.attention_dropout, q_words, k_words, site)


class Block(nn.Module):
    """Self-attention, in a decoder with memory cross-attention, and a feed-forward layer, each on a residual.

    norm_order pre: x + drop(f(norm(x))) (Radford et al. 2019); post: norm(x + drop(f(x))) (Vaswani et al.
    2017).
    """

    def __init__(
        self, config: ModelSection, index: int, *, causal: bool, cross: bool, compute: ComputeSection
    ) -> None:
        super().__init__()
        self.index, self.dropout, self.pre = index, config.dropout, config.norm_order == "pre"
        # An embedding that is normalised already needs no norm before the first block (ModernBERT).
        normalised = index == 0 and self.pre and config.embedding_norm
        self.attention_norm = None if normalised else make_norm(config)
        self.attention = SelfAttention(config, index, causal, compute.attention)
        self.cross_norm = make_norm(config) if cross else None
        self.cross_attention = CrossAttention(config, index, compute.attention) if cross else None
        self.mlp_norm = make_norm(config)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, packed: Packed) -> Tensor:  # [T, C] -> [T, C]
        x = self._add(x, self.attention_norm, partial(self.attention, packed=packed), packed, 1)
        if self.cross_attention is not None:
            x = self._add(x, self.cross_norm, partial(self.cross_attention, packed=packed), packed, 2)
        return self._add(x, self.mlp_norm, self.mlp, packed, 3)

    def _add(
        self,
        x: Tensor,
        norm: LayerNorm | RMSNorm | None,
        sublayer: Callable[[Tensor], Tensor],
        packed: Packed,
        site: int,
    ) -> Tensor:
        branch = sublayer(norm(x) if self.pre and norm is not None else x)
        if packed.words is not None:
            branch = dropout(branch, self.dropout, packed.words, SITES * self.index + site)
        x = x + branch
        return x if self.pre or norm is None else norm(x)


class Stack(nn.Module):
    """An encoder or a decoder: positions, blocks and, with norm_order pre, a final norm.

    cross: its blocks attend to another stack's output. compute: recomputation, and the attention backend by
    its name (not "auto").
    """

    def __init__(
        self, config: ModelSection, side: Side, *, seed: int, compute: ComputeSection, cross: bool = False
    ) -> None:
        super().__init__()
        self.config, self.recompute, self.causal = config, compute.recompute, side == "decoder"
        self.dropout_key = stream_key(seed, f"dropout/{side}")
        hidden = config.hidden_size
        self.embed_positions = (
            Embedding(config.max_seq_len, hidden) if config.positions == "learned" else None
        )
        self.embed_token_types = Embedding(config.token_types, hidden) if config.token_types else None
        self.embed_norm = make_norm(config) if config.embedding_norm else None
        self.relative_bias = RelativeBias(config, self.causal) if config.positions == "relative" else None
        layers = config.decoder_layers if cross else config.num_layers
        self.layers = nn.ModuleList(
            Block(config, index, causal=self.causal, cross=cross, compute=compute) for index in range(layers)
        )
        self.norm = make_norm(config) if config.norm_order == "pre" else None

    def forward(
        self,
        x: Tensor,  # [T, C], the tokens' embeddings
        position_ids: Tensor,  # [T] int64
        documents: Documents,
        *,
        token_keys: Tensor | None = None,  # [T] int64, what dropout depends on; needed where it acts
        token_type_ids: Tensor | None = None,  # [T] int64; None: 0
        memory: Memory | None = None,
        cache: Cache | None = None,
        maps: AttentionMaps | None = None,
    ) -> Tensor:
        """Features [T, C]. A cache takes in keys and values, maps take in attention weights."""
        config, words = self.config, self.words(token_keys)
        x = self._embed(x, position_ids, token_type_ids)
        if words is not None:
            x = dropout(x, config.dropout, words, site=0)
        packed = Packed(
            documents,
            angles=self._angles(position_ids, config.rotary_base),
            local_angles=self._angles(position_ids, config.local_rotary_base or config.rotary_base)
            if config.window
            else None,
            bias=self._bias(documents, cache),
            words=words,
            memory=memory,
            cache=cache,
            maps=maps,
        )
        for index, block in enumerate(self.layers):
            x = _recomputed(block, index, self.recompute)(x, packed)
        return x if self.norm is None else self.norm(x)

    def words(self, token_keys: Tensor | None) -> Tensor | None:
        """The random words [T] that dropout goes by; None where there is no dropout."""
        if not self.training or not (self.config.dropout or self.config.attention_dropout):
            return None
        assert token_keys is not None, "dropout is a function of token_keys"
        return token_words(token_keys, self.dropout_key)

    def _embed(self, x: Tensor, position_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
        config, sinusoidal = self.config, self.config.positions == "sinusoidal"
        if sinusoidal if config.scale_embeddings is None else config.scale_embeddings:
            x = x * math.sqrt(config.hidden_size)  # to the sinusoids' size (Vaswani et al. 2017, section 3.4)
        if self.embed_token_types is not None:
            kinds = torch.zeros_like(position_ids) if token_type_ids is None else token_type_ids
            x = x + self.embed_token_types(kinds)
        if self.embed_positions is not None:
            x = x + self.embed_positions(position_ids)
        elif sinusoidal:
            x = x + sinusoids(position_ids, config.hidden_size).to(x.dtype)
        return x if self.embed_norm is None else self.embed_norm(x)

    def _angles(self, position_ids: Tensor, base: float) -> tuple[Tensor, Tensor] | None:
        if self.config.positions != "rotary":
            return None
        return rotary_angles(position_ids, self.config.head_size, base, self.config.rotary_scaling)

    def _bias(self, documents: Documents, cache: Cache | None) -> Tensor | None:
        if self.relative_bias is None:
            return None
        if cache is not None and cache.lengths is not None:
            slots = torch.arange(cache.k[0].shape[1], device=cache.lengths.device)
            bias: Tensor = self.relative_bias((slots - (cache.lengths[:, None] - 1))[:, None])  # [B, H, 1, S]
        else:
            places = torch.arange(max(documents.seq_lens, default=0), device=documents.cu_seqlens.device)
            bias = self.relative_bias(places - places[:, None])  # [H, Q, K]
        return bias

    def new_cache(self, rows: int, slots: int) -> tuple[list[Tensor], list[Tensor]]:
        """Empty keys and values [B, S, K, D] of each block: B = rows sequences of S = slots tokens."""
        weight = next(self.parameters())
        shape = (rows, slots, self.config.kv_heads, self.config.head_size)
        k = [weight.new_zeros(shape) for _ in self.layers]
        return k, [torch.zeros_like(keys) for keys in k]


def _recomputed(block: nn.Module, index: int, recompute: str | int) -> Callable[..., Any]:
    """The block, or one that keeps less for the backward pass.

    none: everything is kept; full: the blocks' inputs (Chen et al. 2016); n: inputs alone in every n-th
    block, the first among them, everything in the others; selective: inputs, matrix products and attention
    outputs. No value changes: nothing here draws random numbers.
    """
    if recompute == "none" or (isinstance(recompute, int) and index % recompute):
        return block
    recomputed = partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False)
    if recompute != "selective":
        return recomputed
    return partial(recomputed, context_fn=partial(create_selective_checkpoint_contexts, _keep_products))


_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear")
_ATTENTION = ("aten::_scaled_dot_product_", "torch_attn::", "flash_attn")


def _keep_products(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = op.name().partition(".")[0]
    keep = name in _PRODUCTS or (name.startswith(_ATTENTION) and not name.endswith("backward"))
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def block_linears(model: nn.Module) -> list[tuple[str, Linear]]:
    """The blocks' matrices by the names of their modules: all but embeddings, output layer and heads."""
    return [
        (f"{path}.{name}", module)
        for path, block in model.named_modules()
        if isinstance(block, Block)
        for name, module in block.named_modules()
        if isinstance(module, Linear)
    ]


def compile_blocks(model: nn.Module) -> None:
    """Compiles every block of a family's module in place; parameters keep their names.

    Attention stays outside: its kernels are fused already, and the documents' lengths, which differ from
    batch to batch, would be compiled in.
    """
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for block in blocks:
        for part in (block.attention, block.cross_attention):
            if part is not None:
                part.attend = torch.compiler.disable(part.attend)  # type: ignore[method-assign]
        block.compile()
    # Blocks share their code; each may need a graph of its own (its number is in it where dropout acts).
    limit = 8 * (len(blocks) + 1)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, limit)


def initial_value(name: str, shape: tuple[int, ...], config: ModelSection, seed: int) -> Tensor:
    """The initial weight of parameter `name`, fp32 on the CPU: a function of seed, name and place alone.

    Matrices are normal with init_std; with norm_order pre, those that end one of a stack's R residual
    branches with init_std / sqrt(R) (Radford et al. 2019); biases are 0, norm weights 1. A longer matrix
    begins with the shorter one's rows: padding the vocabulary moves nothing. Of an adapter B is 0, A has the
    variance 1 / (3 in) that the code of Hu et al. (2021) gives it.
    """
    if name.endswith("lora_b"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    std = 1 / math.sqrt(3 * shape[1]) if name.endswith("lora_a") else config.init_std
    if config.norm_order == "pre" and name.endswith(("attention.out.weight", "mlp.down.weight")):
        crossed = config.family == "encoder_decoder" and name.startswith("decoder.")
        std /= math.sqrt(3 * config.decoder_layers if crossed else 2 * config.num_layers)
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
