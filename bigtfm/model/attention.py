"""Attention: the only door. `bigtfm.model.backends` says which kernel serves it; here each is called.

N documents, T tokens of all documents together (Tq queries, Tk keys), H query heads, K key/value heads
(grouped queries: H is a multiple of K; Ainslie et al. 2023), D features a head; B rows of a batch or a cache,
each with Q queries and S keys.

Documents are packed: token after token without padding. No query sees a key of another document. Scores are
scaled by 1 / sqrt(D) unless `scale` says otherwise (Vaswani et al. 2017, equation 1).
"""

from __future__ import annotations

import itertools
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bigtfm.config.sections import Backend
from bigtfm.model import kernels
from bigtfm.model.randomness import mix32


@dataclass(frozen=True)
class Documents:
    """Packed documents: document n stands at [cu_seqlens[n], cu_seqlens[n + 1])."""

    cu_seqlens: Tensor  # [N + 1] int32, on the device
    seq_lens: tuple[int, ...]  # the N lengths on the host: no device is asked for them


@dataclass(frozen=True)
class AttentionDropout:
    """Which attention weights are dropped: a hash of query token, key token, head and site; no generator."""

    probability: float
    q_words: Tensor  # [Tq] int32, `bigtfm.model.randomness.token_words`
    k_words: Tensor  # [Tk] int32
    site: int  # number of the place in the model


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    documents: Documents,
    keys: Documents | None = None,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
    dropout: AttentionDropout | None = None,
    weights_to: list[Tensor] | None = None,
    backend: Backend = "sdpa",
) -> Tensor:
    """Attention within each document: q [Tq, H, D], k and v [Tk, K, D] -> [Tq, H, D].

    documents: the queries', and the keys' too unless `keys` is given. With `keys` it is cross-attention:
        query document n sees all of key document n, neither causal nor windowed.
    causal: a query sees the keys up to its own position.
    window: a query sees keys at most `window` tokens back (and, unless causal, ahead), itself besides.
    scale: factor on the scores; None: 1 / sqrt(D).
    bias: [H, Q, S], added to the scaled score of query i and key j of a document; Q and S are at least the
        longest lengths. It gets a gradient if it requires one.
    dropout: the reference backend's alone, since kernels draw numbers that depend on the batch.
    weights_to: gets the attention weights, as in `attention_reference`, which computes then: no kernel shows
        them.
    """
    assert keys is None or (not causal and window is None), "cross-attention sees all of the key document"
    assert dropout is None or backend == "reference", "only the reference drops attention weights"
    if backend == "reference" or weights_to is not None or not len(q):  # most kernels refuse zero tokens
        return attention_reference(
            q, k, v, documents=documents, keys=keys, causal=causal, window=window, scale=scale, bias=bias,
            dropout=dropout, weights_to=weights_to,
        )  # fmt: skip
    keys = keys or documents
    if not groups_by_length(backend):
        cu_seqlens = (documents.cu_seqlens, keys.cu_seqlens)
        if backend == "flex":
            return kernels.flex(q, k, v, cu_seqlens, causal=causal, window=window, scale=scale, bias=bias)
        assert bias is None, f"{backend} takes no bias"
        longest = (max(documents.seq_lens), max(keys.seq_lens))
        return kernels.varlen(
            q, k, v, cu_seqlens, longest, causal=causal, window=window, scale=scale, backend=backend
        )
    q_runs, k_runs = _runs(documents, keys)
    rows = zip(_rows(q, q_runs), _rows(k, k_runs), _rows(v, k_runs), strict=True)
    return _packed([_sdpa(*qkv, causal, window, scale, bias, backend) for qkv in rows])


Runs = list[tuple[int, int]]  # (count, length) of neighbouring documents of equal length: each run is a batch


def _runs(queries: Documents, keys: Documents) -> tuple[Runs, Runs]:
    """The runs of both sides: documents whose query and key lengths are their neighbours'."""
    pairs = itertools.groupby(zip(queries.seq_lens, keys.seq_lens, strict=True))
    runs = [(len(list(run)), *pair) for pair, run in pairs] or [(1, 0, 0)]
    return [(count, length) for count, length, _ in runs], [(count, length) for count, _, length in runs]


def _rows(x: Tensor, runs: Runs) -> list[Tensor]:
    """Packed tokens [T, ...] as one batch [count, length, ...] a run: views, without padding."""
    # split, not slicing: its backward is one concatenation
    parts = x.split([count * length for count, length in runs]) if len(runs) > 1 else [x]
    return [part.unflatten(0, run) for part, run in zip(parts, runs, strict=True)]


def _packed(rows: list[Tensor]) -> Tensor:
    """The inverse of `_rows`."""
    return rows[0].flatten(0, 1) if len(rows) == 1 else torch.cat([row.flatten(0, 1) for row in rows])


def _hidden(q: Tensor, k: Tensor, causal: bool, window: int | None) -> Tensor | None:
    """The keys that a query must not see [Q, S], for q [B, Q, ...] and k [B, S, ...]; None: it sees all."""
    longest = max(q.shape[1], k.shape[1])
    reach = longest if window is None else window
    if not causal and reach >= longest - 1:
        return None
    ahead = torch.arange(k.shape[1], device=k.device) - torch.arange(q.shape[1], device=q.device)[:, None]
    return (ahead < -reach) | (ahead > (0 if causal else reach))


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, scale: float | None,
    bias: Tensor | None, backend: Backend,
) -> Tensor:  # fmt: skip
    """torch's kernels on a batch: q [B, Q, H, D], k and v [B, S, K, D] -> [B, Q, H, D]."""
    mask = None  # a matrix where `causal` alone doesn't say it: a bias, or a document longer than the window
    if bias is not None or (window is not None and window < q.shape[1] - 1):
        hidden = _hidden(q, k, causal, window)
        if bias is None:
            mask = None if hidden is None else ~hidden
        else:
            mask = bias[:, : q.shape[1], : k.shape[1]].to(q.dtype)
            mask = (mask if hidden is None else mask.masked_fill(hidden, -math.inf))[None]
    group = q.shape[2] // k.shape[2]
    ungrouped = mask is not None or q.dtype == torch.float32 or backend == "sdpa_efficient"
    if q.is_cuda and group > 1 and ungrouped:
        # Flash and cuDNN alone have known of groups in every version; flash takes neither mask nor fp32.
        k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with _kernel(backend, k.shape[2]):
        out = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=causal and mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    return out.transpose(1, 2)


def _kernel(backend: Backend, keys: int) -> AbstractContextManager[None]:
    """Forces one of SDPA's kernels; with plain `sdpa` torch chooses."""
    if backend == "sdpa_cudnn" and keys == 1:
        return nullcontext()  # cuDNN takes no single key
    forced = {
        "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
        "sdpa_flash": SDPBackend.FLASH_ATTENTION,
        "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
        "sdpa_math": SDPBackend.MATH,
    }
    return sdpa_kernel(forced[backend]) if backend in forced else nullcontext()


def groups_by_length(backend: str) -> bool:
    """Whether the backend is faster where documents of equal length are neighbours (see `by_length`)."""
    return backend == "reference" or backend.startswith("sdpa")


def by_length(*sides: Documents) -> tuple[list[Tensor], list[Documents]] | None:
    """The reordering of whole documents that makes grouping backends fast; None: the order is good already.

    `sides` are reordered together (an encoder's and a decoder's documents), by the tuple of their lengths. A
    caller whose result does not depend on the order of documents (a sum of losses) may apply it first.
    Returns for each side the index [T] such that tokens[index] is the new order, and the new documents.
    """
    lengths = list(zip(*(side.seq_lens for side in sides), strict=True))
    if sum(1 for _ in itertools.groupby(lengths)) == len(set(lengths)):
        return None
    order = torch.arange(len(lengths), device=sides[0].cu_seqlens.device)
    for side in reversed(sides):  # stable sorts, the least significant length first
        order = order[side.cu_seqlens.diff()[order].argsort(stable=True)]
    indices, moved = [], []
    for side, seq_lens in zip(sides, zip(*sorted(lengths), strict=True), strict=True):
        index, cu_seqlens = _reordered(side, order)
        indices.append(index)
        moved.append(Documents(cu_seqlens, seq_lens))
    return indices, moved


def _reordered(documents: Documents, order: Tensor) -> tuple[Tensor, Tensor]:
    """Token index [T] and cu_seqlens [N + 1] of the documents in `order` [N]."""
    starts = documents.cu_seqlens.long()
    lengths = starts.diff()[order]
    new_starts = F.pad(lengths.cumsum(0), (1, 0))
    total = sum(documents.seq_lens)
    shift = torch.repeat_interleave(starts[order] - new_starts[:-1], lengths, output_size=total)
    return torch.arange(total, device=starts.device) + shift, new_starts.to(documents.cu_seqlens.dtype)


def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lengths: Tensor,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention of the last Q tokens of each row to the keys of that row, for decoding.

    q [B, Q, H, D]; k and v [B, S, K, D], of which the first lengths[b] slots of row b are filled; lengths [B]
    int64. causal: the queries' own keys are the last of them, and a query sees those up to its own, at most
    `window` tokens back; else (cross-attention) every query sees all filled slots. bias [B, H, Q, S] is added
    to the scaled scores, scale as in `attention`. Returns [B, Q, H, D].
    """
    assert causal or window is None, "cross-attention sees all of the key document"
    slots = torch.arange(k.shape[1], device=k.device)
    last = (lengths - 1)[:, None].expand(-1, q.shape[1])  # [B, Q]: the last slot that each query sees
    if causal:
        last = last - torch.arange(q.shape[1] - 1, -1, -1, device=q.device)
    visible = slots <= last[..., None]  # [B, Q, S]
    if window is not None:
        visible &= slots >= last[..., None] - window
    mask = visible[:, None]  # [B, 1, Q, S]
    if bias is not None:
        mask = bias.to(q.dtype).masked_fill(~mask, -math.inf)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    documents: Documents,
    keys: Documents | None = None,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
    dropout: AttentionDropout | None = None,
    weights_to: list[Tensor] | None = None,
) -> Tensor:
    """`attention` as the formula is written, in fp32, or in fp64 for such tensors: the yardstick of tests.

    It holds all scores of a run of documents at once. It alone drops attention weights, after the softmax, as
    Vaswani et al. 2017 and the models that follow them do.

    weights_to: for each run of neighbouring documents of equal length the weights [B, H, Q, S], before any is
        dropped, are appended to it.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    group, dtype = q.shape[1] // k.shape[1], q.dtype
    accurate = torch.promote_types(dtype, torch.float32)
    q, k, v = q.to(accurate), k.to(accurate), v.to(accurate)
    q_runs, k_runs = _runs(documents, keys or documents)
    drops: list[AttentionDropout | None] = [None] * len(q_runs)
    if dropout is not None:
        words = zip(_rows(dropout.q_words, q_runs), _rows(dropout.k_words, k_runs), strict=True)
        drops = [replace(dropout, q_words=q_row, k_words=k_row) for q_row, k_row in words]
    out = []
    rows = zip(_rows(q, q_runs), _rows(k, k_runs), _rows(v, k_runs), drops, strict=True)
    for q_row, k_row, v_row, drop in rows:
        k_row, v_row = k_row.repeat_interleave(group, dim=2), v_row.repeat_interleave(group, dim=2)
        scores = torch.einsum("bqhd,bshd->bhqs", q_row, k_row) * scale
        if bias is not None:
            scores = scores + bias[:, : q_row.shape[1], : k_row.shape[1]]
        hidden = _hidden(q_row, k_row, causal, window)
        if hidden is not None:
            scores = scores.masked_fill(hidden, -math.inf)
        weights = scores.softmax(-1)
        if weights_to is not None:
            weights_to.append(weights)
        if drop is not None:
            weights = _drop(weights, drop)
        out.append(torch.einsum("bhqs,bshd->bqhd", weights, v_row))
    return _packed(out).to(dtype)


def _drop(weights: Tensor, dropout: AttentionDropout) -> Tensor:
    """Zeroes attention weights [B, H, Q, S] and scales the rest; the words are [B, Q] and [B, S].

    As in `randomness.dropout` the probability is rounded to a multiple of 2^-16, and the scale is that one's.
    """
    cut = min(round(dropout.probability * 65536), 65535)
    if cut == 0:
        return weights
    heads = weights.shape[1]
    start, device = dropout.site * heads, dropout.q_words.device
    place = torch.arange(start, start + heads, dtype=torch.int32, device=device)[:, None]  # [H, 1]
    of_query = mix32(dropout.q_words[:, None] ^ mix32(place))  # [B, H, Q]
    hashes = mix32(of_query[..., None] ^ dropout.k_words[:, None, None])  # [B, H, Q, S]
    return torch.where((hashes >> 16) >= cut - 32768, weights * (65536 / (65536 - cut)), 0.0)
