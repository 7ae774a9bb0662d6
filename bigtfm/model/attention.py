"""Attention: the only door. Backends are chosen in this file alone.

N documents, T tokens of all documents together, H query heads, K key/value heads (grouped queries: H is a
multiple of K; Ainslie et al. 2023), D features a head, B rows of a cache, Q queries a row, S slots a row.

Documents are packed: token after token without padding, document n at [cu_seqlens[n], cu_seqlens[n + 1]). No
query sees a key of another document. Scores are scaled by 1 / sqrt(D) (Vaswani et al. 2017, equation 1).
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor, seq_lens: tuple[int, ...], causal: bool
) -> Tensor:
    """Self-attention within each document.

    q [T, H, D], k and v [T, K, D]; cu_seqlens [N + 1] int32; seq_lens: the N lengths on the host (no device
    is asked for them); causal: a query sees the keys up to its own position. Returns [T, H, D].

    torch SDPA: neighbouring documents of equal length are one batch, a view of the packed tensors;
    `by_length` puts equal lengths side by side. Neither padding nor a mask exists.
    """
    runs = [(length, len(list(same))) for length, same in itertools.groupby(seq_lens)]
    if len(runs) == 1:
        return _batch(q, k, v, runs[0], causal)
    sizes = [length * count for length, count in runs]
    # split, not slicing: its backward is one concatenation
    parts = zip(q.split(sizes), k.split(sizes), v.split(sizes), runs, strict=True)
    return torch.cat([_batch(q_run, k_run, v_run, run, causal) for q_run, k_run, v_run, run in parts])


def _batch(q: Tensor, k: Tensor, v: Tensor, run: tuple[int, int], causal: bool) -> Tensor:
    length, count = run
    # [count * length, heads, D] -> [count, heads, length, D]
    q, k, v = (x.unflatten(0, (count, length)).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).flatten(0, 1)


def by_length(cu_seqlens: Tensor, seq_lens: tuple[int, ...]) -> tuple[Tensor, Tensor, tuple[int, ...]] | None:
    """The reordering of whole documents that makes `attention` fast, or None where the order is good already.

    A caller whose result does not depend on the order of documents (a sum of losses) may apply it first.
    Returns (index [T] such that tokens[index] is the new order, cu_seqlens and seq_lens of the new order).
    """
    runs = sum(1 for _ in itertools.groupby(seq_lens))
    if runs == len(set(seq_lens)):
        return None
    starts = cu_seqlens.long()
    order = torch.argsort(starts.diff(), stable=True)
    lengths = starts.diff()[order]
    new_starts = F.pad(lengths.cumsum(0), (1, 0))
    total = sum(seq_lens)
    moved = torch.repeat_interleave(starts[order] - new_starts[:-1], lengths, output_size=total)
    index = torch.arange(total, device=starts.device) + moved
    return index, new_starts.to(cu_seqlens.dtype), tuple(sorted(seq_lens))


def cached_attention(q: Tensor, k: Tensor, v: Tensor, *, lengths: Tensor) -> Tensor:
    """Causal attention of the last Q tokens of each row to all tokens of that row, for decoding.

    q [B, Q, H, D]; k and v [B, S, K, D], of which the first lengths[b] slots of row b are filled, the
    queries' own among them; lengths [B] int64. Returns [B, Q, H, D].
    """
    slots = torch.arange(k.shape[1], device=q.device)
    # [B, Q]: the slot of each query
    last = lengths[:, None] - q.shape[1] + torch.arange(q.shape[1], device=q.device)
    visible = (slots <= last[..., None])[:, None]  # [B, 1, Q, S]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor, seq_lens: tuple[int, ...], causal: bool
) -> Tensor:
    """`attention` as the formula is written, document by document, in any dtype: the yardstick of tests."""
    group = q.shape[1] // k.shape[1]
    out = []
    for q_doc, k_doc, v_doc in zip(q.split(seq_lens), k.split(seq_lens), v.split(seq_lens), strict=True):
        k_doc, v_doc = k_doc.repeat_interleave(group, dim=1), v_doc.repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q_doc, k_doc) / math.sqrt(q.shape[-1])
        if causal:
            hidden = torch.ones_like(scores, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(hidden, -math.inf)
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v_doc))
    return torch.cat(out)
