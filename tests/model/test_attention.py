from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtfm.model.attention import attention, attention_reference, by_length, cached_attention


def packed(seq_lens, heads, kv_heads, size, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(sum(seq_lens), h, size) for h in (heads, kv_heads, kv_heads)]
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    cu_seqlens = torch.tensor((0, *seq_lens)).cumsum(0).to(torch.int32)
    return q, k, v, {"cu_seqlens": cu_seqlens, "seq_lens": tuple(seq_lens)}


def gradients(function, tensors, **kwargs):
    tensors = [x.detach().clone().requires_grad_() for x in tensors]
    out = function(*tensors, **kwargs)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    (out * weights).sum().backward()
    return [out.detach(), *(x.grad for x in tensors)]


@settings(max_examples=60, deadline=None)
@given(
    seq_lens=st.lists(st.integers(1, 40), min_size=1, max_size=7),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    size=st.sampled_from([2, 8, 16, 30]),
    causal=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_agrees_with_fp64_reference(seq_lens, kv_heads, group, size, causal, seed):
    q, k, v, where = packed(seq_lens, kv_heads * group, kv_heads, size, seed)
    exact = gradients(attention_reference, [q.double(), k.double(), v.double()], causal=causal, **where)
    seen = gradients(attention, [q, k, v], causal=causal, **where)
    for one, other in zip(seen, exact, strict=True):
        torch.testing.assert_close(one.double(), other, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("seq_lens", [(1,), (1, 1, 1), (5, 5, 5), (3, 1, 3, 8, 1)])
def test_bf16(seq_lens):
    q, k, v, where = packed(seq_lens, 4, 2, 16, dtype=torch.bfloat16)
    exact = gradients(attention_reference, [q.double(), k.double(), v.double()], causal=True, **where)
    for one, other in zip(gradients(attention, [q, k, v], causal=True, **where), exact, strict=True):
        torch.testing.assert_close(one.double(), other, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("function", [attention, attention_reference])
def test_no_attention_across_documents_or_into_the_future(function):
    q, k, v, where = packed((4, 6, 4, 1), 2, 2, 8)
    before = function(q, k, v, causal=True, **where)
    v = v.clone()
    v[7] += 1.0  # the fourth token of the second document
    moved = (function(q, k, v, causal=True, **where) != before).any(-1).any(-1)
    assert moved.nonzero().flatten().tolist() == [7, 8, 9]


def test_reference_is_softmax_of_scaled_scores():
    q = torch.tensor([[[1.0, 0.0]], [[2.0, 0.0]]], dtype=torch.float64)
    v = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]], dtype=torch.float64)
    out = attention_reference(q, q, v, cu_seqlens=torch.tensor([0, 2]), seq_lens=(2,), causal=True)
    weight = 1 / (1 + torch.exp(torch.tensor((2 - 4) / 2**0.5, dtype=torch.float64)))  # of key 1 for query 1
    torch.testing.assert_close(
        out[:, 0], torch.tensor([[1.0, 0.0], [1 - weight, weight]], dtype=torch.float64)
    )


def test_by_length_moves_whole_documents():
    seq_lens = (3, 1, 3, 2, 1)
    cu_seqlens = torch.tensor([0, 3, 4, 7, 9, 10], dtype=torch.int32)
    index, new_cu_seqlens, new_lens = by_length(cu_seqlens, seq_lens)
    assert new_lens == (1, 1, 2, 3, 3)
    assert new_cu_seqlens.tolist() == [0, 1, 2, 4, 7, 10]
    assert index.tolist() == [3, 9, 7, 8, 0, 1, 2, 4, 5, 6]
    assert by_length(torch.tensor([0, 3, 6, 7]), (3, 3, 1)) is None  # equal lengths are neighbours already
    q, k, v, where = packed(seq_lens, 2, 1, 8)
    moved = attention(q[index], k[index], v[index], cu_seqlens=new_cu_seqlens, seq_lens=new_lens, causal=True)
    torch.testing.assert_close(moved, attention(q, k, v, causal=True, **where)[index])


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(3, 20), min_size=1, max_size=4),
    queries=st.integers(1, 3),
    group=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_cached_attention_is_the_end_of_full_attention(lengths, queries, group, seed):
    q, k, v, where = packed(lengths, 2 * group, 2, 8, seed)
    full = attention_reference(q, k, v, causal=True, **where).split(lengths)
    rows = [
        torch.nn.utils.rnn.pad_sequence(x.split(lengths), batch_first=True, padding_value=1e4) for x in (k, v)
    ]
    last = torch.stack([x[-queries:] for x in q.split(lengths)])
    out = cached_attention(last, *rows, lengths=torch.tensor(lengths))
    torch.testing.assert_close(out, torch.stack([x[-queries:] for x in full]), atol=1e-5, rtol=1e-5)
