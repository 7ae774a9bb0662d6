"""The output layer and its loss as one function that never holds all logits.

T tokens, C features, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bigtfm.config.marks import IGNORE
from bigtfm.config.sections import GPU_LOGITS_BYTES, LOGITS_BYTES


def linear_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """Sum of cross_entropy(x W^T + b, labels), a scalar: x [T, C], weight [V, C], bias [V], labels [T] int64.

    It is `F.linear` and `F.cross_entropy(reduction="sum")` within rounding, gradients included, which are
    computed beside the loss, chunk by chunk of the tokens that have a label, in the memory of the chunk's
    logits (as Liger Kernel does on GPUs: Hsu et al. 2024, section 3.2). In 16 bits products are taken in
    them, softmax, loss and sums in fp32. The loss is an fp32 scalar.
    """
    loss: Tensor = _LinearCrossEntropy.apply(x, weight, bias, labels, label_smoothing)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, label_smoothing: float
    ) -> Tensor:
        known, tokens = labels != IGNORE, len(x)
        ctx.tokens, ctx.rows = tokens, None
        if x.is_cuda:  # which tokens these are would have to be waited for: the others weigh nothing
            labels = labels.clamp_min(0)
        elif not bool(known.all()):
            ctx.rows = known.nonzero()[:, 0]
            x, labels = x[ctx.rows], labels[ctx.rows]
        training, vocab, smoothing = any(ctx.needs_input_grad), len(weight), label_smoothing
        half = x.dtype != torch.float32
        dx, db = torch.empty_like(x), x.new_zeros(vocab, dtype=torch.float32)
        dw = torch.zeros_like(weight, dtype=torch.float32)
        held = GPU_LOGITS_BYTES if x.is_cuda else LOGITS_BYTES
        size = max(1, min(len(x), held // (4 * vocab)))
        losses = x.new_empty(len(x), dtype=torch.float32)
        chunk = x.new_empty(size, vocab)
        for first in range(0, len(x), size):
            part, label = x[first : first + size], labels[first : first + size, None]
            logits = chunk[: len(part)]
            torch.mm(part, weight.t(), out=logits)
            if bias is not None:
                logits += bias
            log_p = logits.float() if half else logits
            log_p = torch.log_softmax(log_p, -1, out=log_p)
            loss = log_p.gather(1, label)[:, 0].neg_()
            if smoothing:
                loss = (1 - smoothing) * loss - (smoothing / vocab) * log_p.sum(-1)
            losses[first : first + size] = loss
            if training:
                grad = log_p.exp_()
                if smoothing:
                    grad -= smoothing / vocab
                grad.scatter_add_(1, label, grad.new_full(label.shape, smoothing - 1))
                if x.is_cuda:
                    grad *= known[first : first + size, None]
                if bias is not None:
                    db += grad.sum(0)
                grad = logits.copy_(grad) if half else grad
                torch.mm(grad, weight, out=dx[first : first + size])
                if half:
                    dw += torch.mm(grad.t(), part)  # chunks are added up in fp32
                else:
                    dw.addmm_(grad.t(), part)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(dx, dw, None if bias is None else db)
        return (losses * known).sum() if x.is_cuda else losses.sum()

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
        weight_dtype, bias_dtype = ctx.dtypes
        return dx, dw.to(weight_dtype), None if db is None else db.to(bias_dtype), None, None
