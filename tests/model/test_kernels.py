"""What the packages' functions are handed, on a machine that has none: stand-ins with their signatures.

Parameters as in flash-attn 2.8.3, its folder hopper (3), flash-attn-4 4.0.0b36 and torch 2.11.
"""

from __future__ import annotations

import inspect
import sys
import types

import pytest
import torch

from bigtfm.model.attention import Documents, attention, attention_reference

LENGTHS = (4, 1, 6, 6)
MASKS = [{}, {"causal": True}, {"window": 2}, {"causal": True, "window": 2}, {"causal": True, "window": 0}]


def documents(lengths):
    return Documents(torch.tensor((0, *lengths)).cumsum(0).int(), tuple(lengths))


def computed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, left, right):
    """What all of them document: a query sees the keys from `left` before to `right` after its own place.

    None is no end. Bounds other than those that bigtfm means are mistakes.
    """
    q_lens, k_lens = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert (max_seqlen_q, max_seqlen_k) == (max(q_lens), max(k_lens))
    assert left is None or left >= 0
    assert right in (0, left)
    keys = None if q_lens == k_lens else documents(k_lens)
    mask = {"causal": right == 0 and left != 0, "window": left}
    return attention_reference(q, k, v, documents=documents(q_lens), keys=keys, scale=scale, **mask)


def flash_attn_2(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
    causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
    return_attn_probs=False, block_table=None,
):  # fmt: skip
    left, right = (None if side < 0 else side for side in window_size)
    sides = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return computed(q, k, v, *sides, softmax_scale, left, 0 if causal else right)


def flash_attn_3(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
    softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
    window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
    sm_margin=0,
):  # fmt: skip
    left, right = (None if side < 0 else side for side in window_size)
    sides = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return computed(q, k, v, *sides, softmax_scale, left, 0 if causal else right)


def flash_attn_4(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
    min_seqlen_k=None, seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None,
    softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0,
):  # fmt: skip
    left, right = window_size  # as its _resolve_causal_local_window: -1 is no end only where both are
    if left is not None and right is not None and left < 0 and right < 0:
        left = right = None
    sides = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return computed(q, k, v, *sides, softmax_scale, left, 0 if causal else right), None


def varlen_of_torch_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    left, right = (None if side < 0 else side for side in window_size)
    return computed(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, left, right)


@pytest.fixture
def packages(monkeypatch):
    """The packages as far as bigtfm imports them."""
    flash_attn, cute = types.ModuleType("flash_attn"), types.ModuleType("flash_attn.cute")
    interface = types.ModuleType("flash_attn_interface")
    flash_attn.flash_attn_varlen_func, cute.flash_attn_varlen_func = flash_attn_2, flash_attn_4
    interface.flash_attn_varlen_func = flash_attn_3
    for module in (flash_attn, cute, interface):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    real = inspect.signature(varlen.varlen_attn)

    def varlen_attn(*args, **kwargs):
        bound = real.bind(*args, **kwargs).arguments
        grouped = args[0].shape[1] != args[1].shape[1]
        assert bound.pop("enable_gqa", False) or not grouped or "enable_gqa" not in real.parameters
        return varlen_of_torch_2_11(**bound)

    varlen_attn.__signature__ = real
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("backend", ["flash_attn_2", "flash_attn_3", "flash_attn_4", "varlen"])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("mask", [*MASKS, "cross"])
def test_a_kernel_is_asked_for_the_right_thing(backend, kv_heads, mask):
    k_lens = (3, 2, 9, 1) if mask == "cross" else LENGTHS
    sides = {"documents": documents(LENGTHS)}
    sides |= {"keys": documents(k_lens)} if mask == "cross" else mask
    shapes = [(sum(LENGTHS), 4, 8), *[(sum(k_lens), kv_heads, 8)] * 2]
    q, k, v = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in shapes)
    out = attention(q, k, v, **sides, scale=0.3, backend=backend)
    torch.testing.assert_close(out, attention_reference(q, k, v, **sides, scale=0.3))


@pytest.mark.usefixtures("packages")
def test_varlen_before_grouped_queries_had_a_word(monkeypatch):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_of_torch_2_11)
    q, k = torch.randn(17, 4, 8), torch.randn(17, 2, 8)
    out = attention(q, k, k, documents=documents(LENGTHS), causal=True, backend="varlen")
    torch.testing.assert_close(out, attention_reference(q, k, k, documents=documents(LENGTHS), causal=True))


def test_no_kernel_takes_a_bias():
    q = torch.randn(17, 4, 8)
    with pytest.raises(AssertionError, match="flash_attn_2 takes no bias"):
        attention(q, q, q, documents=documents(LENGTHS), bias=torch.zeros(4, 6, 6), backend="flash_attn_2")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 1, 128, 200])
@pytest.mark.parametrize("lengths", [(1,), (128,), (129, 1, 126), (50, 500, 60, 3), (40,) * 9])
def test_blocks_that_flex_visits(monkeypatch, lengths, window, causal):
    """Unfused FlexAttention ignores blocks, so they are compared with those that torch finds pair by pair."""
    assert_blocks(monkeypatch, lengths, None, causal, window)


@pytest.mark.parametrize("k_lens", [(1, 1, 1, 1), (300, 2, 130, 500), (128, 128, 128, 128)])
def test_blocks_that_flex_visits_in_cross_attention(monkeypatch, k_lens):
    assert_blocks(monkeypatch, (200, 1, 400, 30), k_lens, False, None)


def assert_blocks(monkeypatch, q_lens, k_lens, causal, window):
    module = pytest.importorskip("torch.nn.attention.flex_attention")
    masks = []

    def flex_attention(query, key, value, *, score_mod, block_mask, scale, enable_gqa):
        masks.append(block_mask)
        return query

    monkeypatch.setattr(module, "flex_attention", flex_attention)
    sides = {"documents": documents(q_lens), "keys": documents(k_lens) if k_lens else None}
    q, k = torch.zeros(sum(q_lens), 1, 16), torch.zeros(sum(k_lens or q_lens), 1, 16)
    attention(q, k, k, **sides, causal=causal, window=window, backend="flex")
    needed = module.create_block_mask(masks[0].mask_mod, None, None, len(q), len(k), device="cpu").to_dense()
    visited = masks[0].to_dense()
    assert visited.shape == needed.shape
    assert (visited >= needed).all()
    if window is None:
        assert (visited == needed).all()
    else:  # a document that two blocks share may lie out of reach of its other part
        assert visited.sum() <= needed.sum() + len(q_lens)
