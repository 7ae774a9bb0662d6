"""The loss over the vocabulary, three ways: of all logits, the same compiled, and without ever holding all.

T tokens, C features, V vocabulary, Vp vocabulary padded to a multiple.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from bigtfm.config.loss_path import GPU_LOGITS_BYTES, LOGITS_BYTES, LossPath, loss_path
from bigtfm.config.marks import IGNORE


def path_of(wanted: Any, x: Tensor, vocab_size: int) -> LossPath:
    """How the loss of features x [T, C] is computed where `wanted` is compute.loss: see `loss_path`."""
    memory = torch.cuda.get_device_properties(x.device).total_memory if x.is_cuda else None
    return loss_path(
        wanted,
        value_bytes=x.element_size(),
        fp16=x.dtype == torch.float16,
        logits=len(x) * vocab_size,
        memory=memory,
        compiles=can_compile(x.device.type),
    )


@functools.cache
def can_compile(device_type: str) -> bool:
    """Whether torch.compile can make kernels for the device: a C compiler, on a GPU Triton besides."""
    if device_type == "cpu":
        return bool(shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++"))
    from torch.utils._triton import has_triton

    return has_triton() and bool(shutil.which(os.environ.get("CC", "gcc")) or shutil.which("clang"))


def cross_entropy(
    logits: Tensor, vocab_size: int, labels: Tensor, label_smoothing: float = 0.0, *, compiled: bool = False
) -> Tensor:
    """Sum of the token losses, an fp32 scalar: logits [T, Vp], of which the first V count, labels [T] int64.

    compiled: by torch.compile, which rounds to fp32, cuts the padding off and takes softmax and gradients in
    passes over the logits as they are.
    """
    if compiled and len(logits) > 1:  # torch.compile would make graphs of their own for no and one token
        return _compiled()(logits, vocab_size, labels, label_smoothing)
    return _cross_entropy(logits, vocab_size, labels, label_smoothing)


def _cross_entropy(logits: Tensor, vocab_size: int, labels: Tensor, label_smoothing: float) -> Tensor:
    logits = logits[:, :vocab_size].float()
    return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=label_smoothing)


@functools.cache
def _compiled() -> Callable[[Tensor, int, Tensor, float], Tensor]:
    return torch.compile(_cross_entropy)


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
        apart = x.device.type != "cpu"
        if apart:  # which tokens these are would have to be waited for: the others weigh nothing
            labels = labels.clamp_min(0)
        elif not bool(known.all()):
            ctx.rows = known.nonzero()[:, 0]
            x, labels = x[ctx.rows], labels[ctx.rows]
        training, vocab, smoothing = any(ctx.needs_input_grad), len(weight), label_smoothing
        half = x.dtype != torch.float32
        dx, db = torch.empty_like(x), x.new_zeros(vocab, dtype=torch.float32)
        dw = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        held = GPU_LOGITS_BYTES if apart else LOGITS_BYTES
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
                if apart:
                    grad *= known[first : first + size, None]
                if bias is not None:
                    db += grad.sum(0)
                grad = logits.copy_(grad) if half else grad
                torch.mm(grad, weight, out=dx[first : first + size])
                if dw is None:
                    continue
                if half:
                    dw += torch.mm(grad.t(), part)  # chunks are added up in fp32
                else:
                    dw.addmm_(grad.t(), part)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(dx, dw, None if bias is None else db)
        return (losses * known).sum() if apart else losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None, None]:
        dx, dw, db = ctx.saved_tensors
        for gradient in (dx, dw, db):
            if gradient is not None:
                gradient *= scale
        if ctx.rows is not None:
            dx = dx.new_zeros(ctx.tokens, dx.shape[1]).index_copy_(0, ctx.rows, dx)
        weight_dtype, bias_dtype = ctx.dtypes
        dw, db = None if dw is None else dw.to(weight_dtype), None if db is None else db.to(bias_dtype)
        return dx, dw, db, None, None
