from __future__ import annotations

from dataclasses import dataclass, replace
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from bigtfm.config.sections import Backend
from bigtfm.model.attention import (
    AttentionDropout,
    Documents,
    attention,
    attention_reference,
    by_length,
    cached_attention,
    groups_by_length,
)
from bigtfm.model.backends import Device, Needs, installed_kernels, obstacle, this_device

CPU = Device("CPU", None)
GPU = this_device()  # the CPU where there is none: then the tests below that need one don't run
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Threads cost more than they save on shapes as small as these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def on_every_device():
    """(backend, device): what a CPU has, and every backend on a GPU; one that is not there says so."""
    for backend in get_args(Backend):
        if not obstacle(backend, CPU, Needs("fp32", 64), ()):
            yield pytest.param(backend, CPU, id=f"{backend}-cpu")
    for backend in get_args(Backend):
        marks = [pytest.mark.gpu]
        why = obstacle(backend, GPU, Needs("bf16", 64), installed_kernels())
        if why or GPU.capability is None:
            marks.append(pytest.mark.skip(reason=f"{backend}: {why or 'there is no GPU'}"))
        yield pytest.param(backend, GPU, id=f"{backend}-gpu", marks=marks)


every_backend = pytest.mark.parametrize(("backend", "device"), list(on_every_device()))


@dataclass(frozen=True)
class Case:
    q_lens: tuple[int, ...]
    k_lens: tuple[int, ...] | None = None  # cross-attention
    kv_heads: int = 2
    group: int = 1
    size: int = 8
    causal: bool = False
    window: int | None = None
    scale: float | None = None
    bias: bool = False
    seed: int = 0

    @property
    def arguments(self):
        return {"causal": self.causal, "window": self.window, "scale": self.scale}

    def documents(self, device="cpu"):
        sides = {"documents": documents(self.q_lens, device)}
        return sides if self.k_lens is None else {**sides, "keys": documents(self.k_lens, device)}

    def tensors(self, dtype=torch.float64):
        """q, k, v and, with a bias, the bias, which is larger than the longest documents need."""
        generator = torch.Generator().manual_seed(self.seed)
        heads, k_lens = self.kv_heads * self.group, self.k_lens or self.q_lens
        shapes = [(sum(self.q_lens), heads, self.size), *[(sum(k_lens), self.kv_heads, self.size)] * 2]
        if self.bias:
            shapes.append((heads, max(self.q_lens, default=0) + 2, max(k_lens, default=0) + 1))
        return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def documents(lengths, device="cpu"):
    return Documents(torch.tensor((0, *lengths), device=device).cumsum(0).int(), tuple(lengths))


@st.composite
def cases(draw, sizes=(2, 8, 30, 64, 96, 128, 256), bias=True, window=True):
    q_lens = draw(st.lists(st.integers(1, 24), min_size=0, max_size=6))
    if draw(st.booleans()):
        q_lens.sort()
    cross = draw(st.integers(0, 2)) == 0
    lengths = st.lists(st.integers(1, 24), min_size=len(q_lens), max_size=len(q_lens))
    return Case(
        q_lens=tuple(q_lens),
        k_lens=tuple(draw(lengths)) if cross else None,
        kv_heads=draw(st.integers(1, 2)),
        group=draw(st.integers(1, 3)),
        size=draw(st.sampled_from(sizes)),
        causal=draw(st.booleans()) and not cross,
        window=draw(st.sampled_from([None, 0, 1, 3, 10, 23, 50])) if window and not cross else None,
        scale=draw(st.sampled_from([None, 0.05, 0.2])),
        bias=bias and draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )


def cases_for(backend, device, dtype):
    """What the backend can do, by the rules that `choose` goes by."""

    def can(**needs):
        return not obstacle(backend, device, Needs(**({"dtype": dtype, "head_dim": 64} | needs)), installed)

    installed = installed_kernels()
    sizes = [size for size in (2, 8, 30, 64, 96, 128, 256) if can(head_dim=size)]
    return cases(tuple(sizes), bias=can(bias=True), window=can(window=True))


def results(function, case, tensors, **options):
    """Output and gradients of one call."""
    q, k, v, *bias = tensors = [x.clone().requires_grad_() for x in tensors]
    bias = {"bias": bias[0]} if bias else {}
    out = function(q, k, v, **case.arguments, **case.documents(q.device), **bias, **options)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), tensors)]


def assert_agrees(case, backend, device, dtype, tolerance):
    """Backend against fp64 reference, relative to the largest number where that is over 1."""
    rounded = case.tensors(DTYPES[dtype])
    exact = results(attention_reference, case, [x.double() for x in rounded])
    where = "cpu" if device.capability is None else "cuda"
    seen = results(attention, case, [x.to(where) for x in rounded], backend=backend)
    for name, one, other in zip(["output", "q", "k", "v", "bias"], seen, exact, strict=False):
        assert one.shape == other.shape
        if other.numel():
            error = (one.double().cpu() - other).abs().max().item()
            assert error <= tolerance * max(1.0, other.abs().max().item()), f"{name}: {error} ({case})"


@settings(max_examples=100, deadline=None)
@given(case=cases(sizes=(2, 8, 30)))
def test_reference_is_the_formula_with_one_mask(case):
    """The yardstick against softmax(q k^T scale + bias) v over all tokens at once, other documents hidden."""

    def formula(q, k, v, documents, keys=None, causal=False, window=None, scale=None, bias=None):
        (q_doc, q_place), (k_doc, k_place) = (
            (
                torch.tensor([n for n, length in enumerate(side.seq_lens) for _ in range(length)]).long(),
                torch.tensor([i for length in side.seq_lens for i in range(length)]).long(),
            )
            for side in (documents, keys or documents)
        )
        ahead = k_place - q_place[:, None]
        visible = (q_doc[:, None] == k_doc) & (ahead <= (0 if causal else 99))
        if window is not None:
            visible &= ahead.abs() <= window
        k, v = k.repeat_interleave(case.group, 1), v.repeat_interleave(case.group, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * (scale or case.size**-0.5)
        if bias is not None:
            scores = scores + bias[:, q_place[:, None], k_place]
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(~visible, -torch.inf).softmax(-1), v)

    seen, expected = (results(f, case, case.tensors()) for f in (attention_reference, formula))
    for one, other in zip(seen, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


@every_backend
def test_agrees_with_fp64_reference(backend, device):
    dtype = "bf16" if obstacle(backend, device, Needs("fp32", 64), installed_kernels()) else "fp32"

    @settings(max_examples=200, deadline=None)
    @given(case=cases_for(backend, device, dtype))
    def check(case):
        assert_agrees(case, backend, device, dtype, 2e-5 if dtype == "fp32" else 2e-2)

    check()


@every_backend
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision(backend, device, dtype):
    @settings(max_examples=15, deadline=None)
    @given(case=cases_for(backend, device, dtype))
    def check(case):
        assert_agrees(case, backend, device, dtype, 2e-2)

    check()


@every_backend
@pytest.mark.parametrize("lengths", [(), (1,), (1, 1, 1), (5, 1, 5, 5, 1)])
def test_no_token_and_single_tokens(backend, device, lengths):
    dtype = "fp32" if device is CPU else "bf16"
    for case in (Case(lengths, size=64, causal=True), Case(lengths, tuple(3 for _ in lengths), size=64)):
        assert_agrees(case, backend, device, dtype, 2e-5 if dtype == "fp32" else 2e-2)


LEAKS = [
    Case((4, 6, 4, 1), size=64, causal=True),
    Case((6, 6, 6, 6), size=64),
    Case((9, 6, 4, 1), size=64, group=2, causal=True, window=2),
    Case((4, 6, 4, 1), (3, 2, 5, 7), size=64),
]


def leaks(case, backend, device, dtype, sides):
    """Whether document 1 of q, k, v reaches the outputs of the others, or their gradients."""
    where = "cpu" if device.capability is None else "cuda"
    tensors = [x.to(where).requires_grad_() for x in case.tensors(dtype)]
    owners = [
        torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(where) == 1
        for lengths in (case.q_lens, *[case.k_lens or case.q_lens] * 2)
    ]
    out = attention(*tensors, **case.arguments, **sides, backend=backend)
    changed = [torch.where(owner[:, None, None], x + 1, x) for x, owner in zip(tensors, owners, strict=True)]
    moved = attention(*changed, **case.arguments, **sides, backend=backend)
    gradients = torch.autograd.grad(out[~owners[0]].sum(), tensors)
    reached = any(x[owner].any() for x, owner in zip(gradients, owners, strict=True))
    assert (moved != out)[owners[0]].any()
    return bool((moved != out)[~owners[0]].any()) or reached


@every_backend
@pytest.mark.parametrize("case", LEAKS)
def test_nothing_leaks_from_one_document_to_another(backend, device, case):
    needs = Needs("bf16", 64, window=case.window is not None)
    if obstacle(backend, device, needs, installed_kernels()):
        pytest.skip("the rules refuse this to it")
    where = "cpu" if device.capability is None else "cuda"
    dtype = torch.float32 if device is CPU else torch.bfloat16
    assert not leaks(case, backend, device, dtype, case.documents(where))
    joined = {name: documents((sum(side.seq_lens),), where) for name, side in case.documents().items()}
    assert leaks(case, backend, device, dtype, joined)  # the test can fail


def test_causal_sees_no_later_token():
    q, k, v = (x.float() for x in Case((4, 6, 4, 1)).tensors())
    before = attention(q, k, v, documents=documents((4, 6, 4, 1)), causal=True)
    v[7] += 1.0  # the fourth token of the second document
    moved = (attention(q, k, v, documents=documents((4, 6, 4, 1)), causal=True) != before).any(-1).any(-1)
    assert moved.nonzero().flatten().tolist() == [7, 8, 9]


def test_reference_by_hand():
    q = torch.tensor([[[1.0, 0.0]], [[2.0, 0.0]]], dtype=torch.float64)
    v = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]], dtype=torch.float64)
    out = attention_reference(q, q, v, documents=documents((2,)), causal=True)
    weight = 1 / (1 + torch.exp(torch.tensor((2 - 4) / 2**0.5, dtype=torch.float64)))  # of key 1 for query 1
    torch.testing.assert_close(
        out[:, 0], torch.tensor([[1.0, 0.0], [1 - weight, weight]], dtype=torch.float64)
    )


# --- FlexAttention on a CPU ---


@pytest.fixture
def flex_gradients(monkeypatch):
    """torch bars FlexAttention's gradients on a CPU, but its unfused form has them, so our part is tested."""
    module = pytest.importorskip("torch.nn.attention.flex_attention")
    monkeypatch.setattr(module, "_validate_device", lambda *_: None)
    yield
    torch.compiler.reset()


def flex_on_cpu(test):
    """Marks of a test of FlexAttention's unfused form: slow to compile, and torch warns of it."""
    test = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")(test)
    test = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")(test)
    return pytest.mark.slow(pytest.mark.usefixtures("flex_gradients")(test))


@flex_on_cpu
@settings(max_examples=25, deadline=None)
@given(case=cases(sizes=(8, 30)), long=st.booleans())
def test_flex_on_cpu(case, long):
    """Masks, bias and gradients; with `long`, documents that share and that fill blocks of 128 tokens."""
    if long:
        k_lens = None if case.k_lens is None else (*case.k_lens, 170, 20)
        case = replace(case, q_lens=(*case.q_lens, 100, 300), k_lens=k_lens)
    torch.compiler.reset()  # each shape is compiled anew; their number is limited
    assert_agrees(case, "flex", CPU, "fp32", 2e-5)


@flex_on_cpu
@pytest.mark.parametrize("case", LEAKS)
def test_flex_on_cpu_leaks_nothing(case):
    assert not leaks(case, "flex", CPU, torch.float32, case.documents())
    joined = {name: documents((sum(side.seq_lens),)) for name, side in case.documents().items()}
    assert leaks(case, "flex", CPU, torch.float32, joined)


# --- attention dropout ---


def words(count, seed=0):
    return torch.randint(-(2**31), 2**31, (count,), generator=torch.Generator().manual_seed(seed)).int()


def dropped(q, k, v, lengths, probability=0.25, site=0, q_words=None, **options):
    q_words = words(len(q)) if q_words is None else q_words
    drop = AttentionDropout(probability, q_words, q_words, site)
    return attention(q, k, v, documents=documents(lengths), dropout=drop, backend="reference", **options)


def test_dropout_keeps_the_mean():
    """Equal weights and values of 1: each output is the share that stays, scaled."""
    length, heads, probability = 64, 8, 0.25
    q, v = torch.zeros(length, heads, 1), torch.ones(length, heads, 1)
    outs = torch.stack([dropped(q, q, v, (length,), probability, site) for site in range(10)])
    sigma = (probability / (1 - probability) / length) ** 0.5  # of one output
    assert abs(outs.mean().item() - 1) < 5 * sigma / outs.numel() ** 0.5
    assert outs.std().item() == pytest.approx(sigma, rel=0.1)
    flat = outs.transpose(1, 2).reshape(80, length)  # sites and heads drop independently
    correlations = torch.corrcoef(flat).triu(1)
    assert correlations.abs().max() < 6 / length**0.5


def test_dropout_drops_pairs_and_heads_independently():
    """Values that name their key show which weights stay: [query, head, key]."""
    length, heads = 48, 6
    q, v = torch.zeros(length, heads, 1), torch.eye(length)[:, None].expand(-1, heads, -1)
    kept = (dropped(q, q, v, (length,), 0.5) != 0).double() - 0.5
    spread = 5 * 0.25 / length**0.5  # five sigma of a mean of products over 48 pairs, each 1/4 or -1/4
    for other in (kept.transpose(0, 2), kept.roll(1, 0), kept.roll(1, 1), kept.roll(1, 2)):
        means = (kept * other)[:, :, 1:-1].mean(-1)
        assert abs(means.mean().item()) < 5 * 0.25 / kept.numel() ** 0.5 * 2
        assert (means.abs() < 1.5 * spread).all()


def test_dropout_does_not_depend_on_packing():
    case = Case((3, 9, 3, 5, 9), size=8, causal=True)
    q, k, v = (x.float() for x in case.tensors())
    index, _ = by_length(documents(case.q_lens))
    out, token_words = dropped(q, k, v, case.q_lens, causal=True), words(len(q))
    (index,) = index

    def moved(its_words):
        qkv = (q[index], k[index], v[index])
        return dropped(*qkv, sorted(case.q_lens), q_words=its_words, causal=True)

    torch.testing.assert_close(moved(token_words[index]), out[index])
    assert not torch.allclose(moved(token_words), out[index])  # words that go by the place in the batch


def test_dropout_is_the_same_when_recomputed():
    tensors = [x.float().requires_grad_() for x in Case((7, 4), size=8).tensors()]
    plain = dropped(*tensors, (7, 4))
    again = checkpoint(dropped, *tensors, (7, 4), use_reentrant=False, preserve_rng_state=False)
    torch.testing.assert_close(plain, again, atol=0, rtol=0)
    for one, other in zip(
        torch.autograd.grad(plain.sum(), tensors), torch.autograd.grad(again.sum(), tensors), strict=True
    ):
        torch.testing.assert_close(one, other, atol=0, rtol=0)


def test_dropout_of_nothing_is_no_dropout_and_no_kernel_drops():
    q, k, v = (x.float() for x in Case((7, 4)).tensors())
    plain = attention(q, k, v, documents=documents((7, 4)), backend="reference")
    torch.testing.assert_close(dropped(q, k, v, (7, 4), 0.0), plain, atol=0, rtol=0)
    with pytest.raises(AssertionError, match="only the reference"):
        attention(
            q, k, v, documents=documents((7, 4)), dropout=AttentionDropout(0.1, words(11), words(11), 0)
        )


# --- the order of documents ---


def test_by_length_moves_whole_documents():
    case = Case((3, 1, 3, 2, 1), size=8, causal=True)
    (index,), (new,) = by_length(documents(case.q_lens))
    assert new.seq_lens == (1, 1, 2, 3, 3)
    assert new.cu_seqlens.tolist() == [0, 1, 2, 4, 7, 10]
    assert index.tolist() == [3, 9, 7, 8, 0, 1, 2, 4, 5, 6]
    assert by_length(documents((3, 3, 1))) is None  # equal lengths are neighbours already
    q, k, v = case.tensors()
    moved = attention(q[index], k[index], v[index], documents=new, causal=True)
    torch.testing.assert_close(moved, attention(q, k, v, **case.documents(), causal=True)[index])


def test_by_length_moves_both_sides_together():
    case = Case((2, 5, 2, 2), (4, 1, 3, 4), size=8)
    (q_index, k_index), (q_docs, k_docs) = by_length(documents(case.q_lens), documents(case.k_lens))
    assert (q_docs.seq_lens, k_docs.seq_lens) == ((2, 2, 2, 5), (3, 4, 4, 1))
    assert q_docs.cu_seqlens.tolist() == [0, 2, 4, 6, 11]
    assert q_docs.cu_seqlens.dtype == torch.int32
    assert by_length(documents((2, 2, 5, 2)), documents((1, 1, 4, 3))) is None
    q, k, v = case.tensors()
    moved = attention(q[q_index], k[k_index], v[k_index], documents=q_docs, keys=k_docs)
    torch.testing.assert_close(moved, attention(q, k, v, **case.documents())[q_index])


def test_only_packed_kernels_take_any_order():
    grouping = {backend for backend in get_args(Backend) if groups_by_length(backend)}
    packed = {"flash_attn_2", "flash_attn_3", "flash_attn_4", "varlen", "flex"}
    assert grouping == set(get_args(Backend)) - packed


# --- decoding ---


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(3, 20), min_size=1, max_size=4),
    queries=st.integers(1, 3),
    case=cases(sizes=(8,)),
)
def test_cached_attention_is_the_end_of_full_attention(lengths, queries, case):
    cross = case.k_lens is not None
    case = replace(case, q_lens=tuple(lengths), k_lens=None, causal=not cross)
    q, k, v, *bias = case.tensors()
    bias = bias[0] if bias else None
    full = attention_reference(q, k, v, **case.arguments, **case.documents(), bias=bias).split(lengths)
    rows = [
        torch.nn.utils.rnn.pad_sequence(x.split(lengths), batch_first=True, padding_value=1e4) for x in (k, v)
    ]
    last = torch.stack([x[-queries:] for x in q.split(lengths)])
    if bias is not None:  # the rows of the last queries
        bias = torch.stack([bias[:, length - queries : length, : max(lengths)] for length in lengths])
    out = cached_attention(
        last, *rows, lengths=torch.tensor(lengths), causal=not cross, window=case.window, scale=case.scale,
        bias=bias,
    )  # fmt: skip
    torch.testing.assert_close(out, torch.stack([x[-queries:] for x in full]), atol=1e-9, rtol=1e-9)
