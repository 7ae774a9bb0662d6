"""The output layer and its loss as one function that never holds all logits. For CPUs, in fp32.

T tokens, C features, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bigtfm.config.marks import IGNORE
from bigtfm.config.sections import LOGITS_BYTES


def linear_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """Sum of cross_entropy(x W^T + b, labels), a scalar: x [T, C], weight [V, C], bias [V], labels [T] int64.

    It is `F.linear` and `F.cross_entropy(reduction="sum")` within rounding, gradients included, which are
    computed beside the loss, chunk by chunk of the tokens that have a label, in the memory of the chunk's
    logits (as Liger Kernel does on GPUs: Hsu et al. 2024, section 3.2).
    """
    loss: Tensor = _LinearCrossEntropy.apply(x, weight, bias, labels, label_smoothing)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, label_smoothing: float
    ) -> Tensor:
        known = labels != IGNORE
        ctx.rows = None if bool(known.all()) else known.nonzero()[:, 0]
        ctx.tokens = len(x)
        if ctx.rows is not None:
            x, labels = x[ctx.rows], labels[ctx.rows]
        training, vocab, smoothing = any(ctx.needs_input_grad), len(weight), label_smoothing
        dx, dw, db = torch.empty_like(x), torch.zeros_like(weight), x.new_zeros(vocab)
        losses, size = x.new_empty(len(x)), max(1, min(len(x), LOGITS_BYTES // (4 * vocab)))
        chunk = x.new_empty(size, vocab)
        for first in range(0, len(x), size):
            part, label = x[first : first + size], labels[first : first + size, None]
            logits = chunk[: len(part)]
            torch.mm(part, weight.t(), out=logits)
            if bias is not None:
                logits += bias
            log_p = torch.log_softmax(logits, -1, out=logits)
            loss = log_p.gather(1, label)[:, 0].neg_()
            if smoothing:
                loss = (1 - smoothing) * loss - (smoothing / vocab) * log_p.sum(-1)
            losses[first : first + size] = loss
            if training:
                grad = log_p.exp_()
                if smoothing:
                    grad -= smoothing / vocab
                grad.scatter_add_(1, label, grad.new_full(label.shape, smoothing - 1))
                torch.mm(grad, weight, out=dx[first : first + size])
                dw.addmm_(grad.t(), part)
                if bias is not None:
                    db += grad.sum(0)
        ctx.save_for_backward(dx, dw, None if bias is None else db)
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
        dx, dw, db = ctx.saved_tensors
        dx *= scale
        dw *= scale
        if db is not None:
            db *= scale
        if ctx.rows is not None:
            dx = dx.new_zeros(ctx.tokens, dx.shape[1]).index_copy_(0, ctx.rows, dx)
        return dx, dw, db, None, None
