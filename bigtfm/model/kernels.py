"""Attention kernels that take packed documents as they are: flash-attn 2 to 4, torch's varlen, FlexAttention.

Tq queries, Tk keys, H query heads, K key/value heads, D features a head, N documents, as in `attention`,
which is the only caller. A kernel's package is imported when it is called.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bigtfm.config.sections import Backend

BLOCK = 128  # tokens; FlexAttention skips pairs of blocks


def varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: tuple[Tensor, Tensor], longest: tuple[int, int], *,
    causal: bool, window: int | None, scale: float | None, backend: Backend,
) -> Tensor:  # fmt: skip
    """q [Tq, H, D], k and v [Tk, K, D] -> [Tq, H, D]; of each side cu_seqlens [N + 1] int32, longest length.

    The four kernels agree on the arguments: flash-attn 2.8.3, its `hopper` folder (3), flash-attn-4 4.0.0b36,
    torch 2.13. A window without end is -1, and None to flash-attn 4, which takes (-1, 0) for a window of
    nothing. Their causal masks end at the last query and key, so at a query's own key in self-attention.
    """
    reach = window if window is not None or backend == "flash_attn_4" else -1
    options: dict[str, Any] = {"window_size": (reach, 0 if causal else reach)}
    if backend == "varlen":
        from torch.nn.attention.varlen import varlen_attn

        if "enable_gqa" in inspect.signature(varlen_attn).parameters:  # before 2.12 it went without saying
            options["enable_gqa"] = True
        out = varlen_attn(q, k, v, *cu_seqlens, *longest, scale=scale, **options)
    else:
        out = _flash_attn(backend)(
            q, k, v, cu_seqlens_q=cu_seqlens[0], cu_seqlens_k=cu_seqlens[1], max_seqlen_q=longest[0],
            max_seqlen_k=longest[1], softmax_scale=scale, causal=causal, **options,
        )  # fmt: skip
    return out[0] if isinstance(out, tuple) else out  # 4 and early 3 return the scores' logsumexp, too


def _flash_attn(backend: Backend) -> Callable[..., Any]:
    if backend == "flash_attn_2":
        from flash_attn import flash_attn_varlen_func  # type: ignore
    elif backend == "flash_attn_3":
        from flash_attn_interface import flash_attn_varlen_func  # type: ignore
    else:
        from flash_attn.cute import flash_attn_varlen_func  # type: ignore
    return flash_attn_varlen_func  # type: ignore[no-any-return, unused-ignore]


def flex(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: tuple[Tensor, Tensor], *, causal: bool, window: int | None,
    scale: float | None, bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """FlexAttention (Dong et al. 2024), shapes as above; bias [H, Q, S] gets its gradient.

    Compiled on a GPU. On a CPU it runs unfused and, as torch 2.13 has it, without gradients.
    """
    from torch.nn.attention.flex_attention import flex_attention

    (q_doc, q_place), (k_doc, k_place) = _places(cu_seqlens[0], len(q)), _places(cu_seqlens[1], len(k))

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen, ahead = q_doc[query] == k_doc[key], key - query
        if causal:
            seen = seen & (ahead <= 0)
        return seen if window is None else seen & (ahead >= -window) & (ahead <= window)

    def biased(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert bias is not None
        return score + bias[head, q_place[query], k_place[key]]

    function: Any = _compiled_flex() if q.is_cuda else flex_attention
    out = function(
        *(x.transpose(0, 1)[None] for x in (q, k, v)),  # [1, heads, T, D]
        score_mod=None if bias is None else biased,
        block_mask=_block_mask(visible, q_doc, k_doc, causal, window),
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[0].transpose(0, 1)


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _places(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """The document of each token and its place in it, [T] each."""
    numbers = torch.arange(len(cu_seqlens) - 1, device=cu_seqlens.device)
    documents = torch.repeat_interleave(numbers, cu_seqlens.diff(), output_size=total)
    return documents, torch.arange(total, device=cu_seqlens.device) - cu_seqlens[documents]


def _block_mask(
    visible: Callable[..., Tensor], q_doc: Tensor, k_doc: Tensor, causal: bool, window: int | None
) -> Any:
    """The blocks in which a query may see a key; `visible` decides within them.

    Documents stand in order, so two blocks share one where their ranges of document numbers overlap. torch's
    `create_block_mask` would ask for each of the Tq x Tk pairs, in every layer.
    """
    from torch.nn.attention.flex_attention import BlockMask

    (q_first, q_last), (k_first, k_last) = ((x[::BLOCK], _last(x)) for x in (q_doc, k_doc))
    shared = (q_first[:, None] <= k_last) & (k_first <= q_last[:, None])  # [blocks of queries, of keys]
    if causal:
        shared = shared.tril()
    if window is not None:
        ahead = torch.arange(len(k_first), device=k_doc.device)
        gap = (ahead - ahead[: len(q_first), None]).abs() * BLOCK - (BLOCK - 1)  # between the nearest tokens
        shared = shared & (gap <= window)
    order = shared.int().argsort(dim=-1, descending=True, stable=True)
    return BlockMask.from_kv_blocks(
        shared.sum(-1, dtype=torch.int32)[None, None],
        order.int()[None, None],
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(len(q_doc), len(k_doc)),
    )


def _last(documents: Tensor) -> Tensor:
    """The document of the last token of each block."""
    ends = torch.arange(BLOCK, len(documents) + BLOCK, BLOCK, device=documents.device)
    return documents[ends.clamp(max=len(documents)) - 1]
