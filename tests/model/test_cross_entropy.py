"""The fused output layer and loss is torch's linear and cross_entropy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bigtfm.config.marks import IGNORE
from bigtfm.model import cross_entropy
from bigtfm.model.cross_entropy import linear_cross_entropy

TOKENS, FEATURES, VOCAB = 37, 16, 53


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
