"""Liger Kernel's fused kernels (Hsu et al. 2024) in a model's blocks: the only door to the package.

For blocks that are not compiled. Each kernel is the layers' own function in one pass over memory, in fp32
inside as torch's are, with what its backward pass needs computed again.

Left out: its cross-entropy with the output layer, which is `cross_entropy.linear_cross_entropy` but for the
sum of the output layer's gradients, kept there in fp32; LayerNorm, which torch fuses as well; GEGLU, which it
has for gate and up apart alone: both would be copied, and their gradients joined.

T tokens, C features, F features of the feed-forward layer, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bigtfm.model.layers import FeedForward, RMSNorm
from bigtfm.model.transformer import SelfAttention


def use_liger(model: nn.Module) -> None:
    """Lets its kernels compute the RMSNorms, SwiGLUs and rotary positions of a family's module."""
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.kernel = rms_norm
        elif isinstance(module, FeedForward) and module.gated and module.activation is nn.functional.silu:
            module.activate = swiglu
        elif isinstance(module, SelfAttention):
            module.rotated = rotated


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`layers.rms_norm`: x [T, C], weight [C]."""
    from liger_kernel.ops import LigerRMSNormFunction

    # "gemma": all of it in fp32, as torch; False: the gradient that comes in may have other readers
    return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "gemma", False)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of both side by side [T, 2 F] -> [T, F]."""
    from liger_kernel.ops import LigerFusedGateUpSiLUMulFunction

    return LigerFusedGateUpSiLUMulFunction.apply(gate_up)


def rotated(qk: Tensor, heads: int, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`layers.rotated`: qk [T, H + K, D], cosine and sine fp32 [T, 1, D/2] -> [T, H, D], [T, K, D]."""
    from liger_kernel.ops import LigerRopeFunction

    parts = qk.split([heads, qk.shape[1] - heads], dim=1)
    # It writes into what it is given where that is contiguous, and asks for [1, heads, T, D].
    q, k = (part.clone(memory_format=torch.contiguous_format)[None].transpose(1, 2) for part in parts)
    q, k = LigerRopeFunction.apply(q, k, cos[:, 0], sin[:, 0], None, 1, qk.shape[-1])
    return q.transpose(1, 2)[0], k.transpose(1, 2)[0]
