"""The loss over the vocabulary: which way it goes, and that each way is torch's linear and cross_entropy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bigtfm.config.loss_path import loss_path
from bigtfm.config.marks import IGNORE
from bigtfm.model import cross_entropy
from bigtfm.model.cross_entropy import linear_cross_entropy, path_of

TOKENS, FEATURES, VOCAB = 37, 16, 53


GPU = 80 << 30  # bytes
GPT2_LOGITS, LLAMA_3_LOGITS = 16 * 1024 * 50257, 8192 * 128256


@pytest.mark.parametrize(
    ("wanted", "value_bytes", "fp16", "logits", "memory", "compiles", "expected"),
    [
        ("auto", 4, False, GPT2_LOGITS, None, True, "chunked"),  # a CPU
        ("auto", 2, False, GPT2_LOGITS, None, True, "whole"),
        ("auto", 2, False, GPT2_LOGITS, GPU, True, "compiled"),
        ("auto", 4, False, GPT2_LOGITS, GPU, True, "compiled"),
        ("auto", 2, False, GPT2_LOGITS, GPU, False, "whole"),  # neither Triton nor a compiler
        ("auto", 2, False, LLAMA_3_LOGITS, GPU, True, "compiled"),  # 3.9 GiB of 10
        ("auto", 2, False, 4 * LLAMA_3_LOGITS, GPU, True, "chunked"),  # 15.7 GiB
        ("auto", 4, False, 2 * LLAMA_3_LOGITS, GPU, True, "chunked"),
        ("auto", 2, False, 4 * LLAMA_3_LOGITS, GPU, False, "chunked"),
        ("auto", 2, True, 4 * LLAMA_3_LOGITS, GPU, True, "compiled"),  # fp16 is never chunked
        ("auto", 2, False, GPU // 32, GPU, True, "compiled"),  # an eighth to the byte
        ("auto", 2, False, GPU // 32 + 1, GPU, True, "chunked"),
        ("whole", 4, False, 1, None, True, "whole"),
        ("chunked", 2, False, 1, GPU, True, "chunked"),
        ("compiled", 4, False, 1, None, True, "compiled"),
    ],
)
def test_which_way_it_goes(wanted, value_bytes, fp16, logits, memory, compiles, expected) -> None:
    path = loss_path(
        wanted, value_bytes=value_bytes, fp16=fp16, logits=logits, memory=memory, compiles=compiles
    )
    assert path == expected


def test_which_way_features_on_this_machine_go() -> None:
    x = torch.zeros(3, FEATURES)
    assert path_of("auto", x, VOCAB) == "chunked"
    assert path_of("auto", x.bfloat16(), VOCAB) == "whole"
    assert path_of("compiled", x, VOCAB) == "compiled"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_compiled_it_is_the_whole() -> None:
    """torch.compile at work, on batches of several sizes; columns of the padding count for nothing."""
    draw = torch.Generator().manual_seed(3)
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for tokens in (TOKENS, 12, 50, 1, 23, 0):
        labels = torch.randint(VOCAB - 5, (tokens,), generator=draw)
        labels[::3] = IGNORE
        logits = (4 * torch.randn(tokens, VOCAB, generator=draw)).requires_grad_()
        compiled, whole = (
            outcome(cross_entropy.cross_entropy(logits, VOCAB - 5, labels, 0.1, compiled=by), [logits])
            for by in (True, False)
        )
        torch.testing.assert_close(compiled[0], whole[0], atol=0, rtol=1e-6)
        torch.testing.assert_close(compiled[1], whole[1], atol=1e-6, rtol=1e-6)
        assert not compiled[1][:, VOCAB - 5 :].any()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
    assert 1 <= graphs <= 2, "one for the first size, one for any size"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_every_way_is_as_near_to_fp64(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(4)
    labels = torch.randint(1000, (256,), generator=draw).cuda()
    labels[::3] = IGNORE
    x, weight = (
        torch.randn(rows, 64, generator=draw).to("cuda", dtype).requires_grad_() for rows in (256, 1024)
    )
    exact = [each.detach().double().requires_grad_() for each in (x, weight)]
    true = outcome(cross_entropy.cross_entropy(F.linear(*exact).double(), 1000, labels), exact)
    ways = {
        name: outcome(
            cross_entropy.cross_entropy(F.linear(x, weight), 1000, labels, compiled=by), [x, weight]
        )
        for name, by in (("whole", False), ("compiled", True))
    }
    ways["chunked"] = outcome(linear_cross_entropy(x, weight[:1000], None, labels), [x, weight])
    for name in ("compiled", "chunked"):
        for one, other, best in zip(ways[name], ways["whole"], true, strict=True):
            error, allowed = ((each.double() - best).abs().max() for each in (one, other))
            assert error <= 1.5 * allowed + 1e-3 * best.abs().max(), name


def tensors(bias: bool) -> list[torch.Tensor | None]:
    draw = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(n, FEATURES, generator=draw, requires_grad=True) for n in (TOKENS, VOCAB))
    return [x, weight, torch.randn(VOCAB, generator=draw, requires_grad=True) if bias else None]


def outcome(loss: torch.Tensor, of: list[torch.Tensor | None]) -> list[torch.Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss * 0.3, [each for each in of if each is not None])]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("ignored", ["none", "some", "all"])
@pytest.mark.parametrize("chunk", [1, 10, 100])
def test_loss_and_gradients_are_those_of_torch(
    bias: bool, smoothing: float, ignored: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "LOGITS_BYTES", chunk * 4 * VOCAB)
    labels = torch.arange(TOKENS) % VOCAB
    if ignored != "none":
        labels[:: 3 if ignored == "some" else 1] = IGNORE
    of = tensors(bias)
    fused = outcome(linear_cross_entropy(*of, labels, smoothing), of)
    logits = F.linear(*of)
    expected = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
    for one, other in zip(fused, outcome(expected, of), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert (fused[0] > 0) == (ignored != "all")


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [5, 100])
def test_in_bf16_it_is_torchs_over_fp32_logits(
    smoothing: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As near to fp64 as the whole logits' way is; gradients of the output layer are added up in fp32."""
    monkeypatch.setattr(cross_entropy, "LOGITS_BYTES", chunk * 4 * VOCAB)
    labels = torch.arange(TOKENS) % VOCAB
    labels[::3] = IGNORE
    of = [each.detach().bfloat16().requires_grad_() for each in tensors(bias=True) if each is not None]
    fused = outcome(linear_cross_entropy(*of, labels, smoothing), of)
    whole = F.cross_entropy(F.linear(*of).float(), labels, reduction="sum", label_smoothing=smoothing)
    exact = [each.detach().double().requires_grad_() for each in of]
    true = F.cross_entropy(F.linear(*exact), labels, reduction="sum", label_smoothing=smoothing)
    assert fused[0].dtype == torch.float32
    for one, other, best in zip(fused, outcome(whole, of), outcome(true, exact), strict=True):
        assert one.dtype == other.dtype
        error, allowed = ((each.double() - best).abs().max() for each in (one, other))
        assert error <= 1.5 * allowed + 1e-2 * best.abs().max()


def test_large_logits_stay_exact() -> None:
    x, weight = torch.full((1, 1), 100.0), torch.tensor([[1.0], [-1.0]])
    assert linear_cross_entropy(x, weight, None, torch.tensor([1])) == 200.0


def test_a_second_backward_is_refused() -> None:
    """The gradients are scaled in place: another backward of the same loss would scale them again."""
    of = tensors(bias=False)
    loss = linear_cross_entropy(*of, torch.zeros(TOKENS, dtype=torch.long))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
