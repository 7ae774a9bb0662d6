"""The layers that every family is made of.

T tokens, C features, F features of the feed-forward layer, H heads, D head size.

Modules hold parameters and nothing else; `torch.empty` parameters, because `init_weights` or a checkpoint
fills them. Each parameter is used inside the forward of the module that owns it: that is what lets an engine
gather it just in time.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Module):
    """y = x W^T + b, W [out, in]."""

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: Tensor | None) -> Tensor:
        """[T, in] -> [T, out]; None: the sum of |W|, an fp32 scalar (see `l1_penalty`)."""
        return magnitude(self.weight) if x is None else F.linear(x, self.weight, self.bias)


class Embedding(nn.Module):
    """A table W [rows, C], read by row number; its transpose is the output layer where the two are tied."""

    def __init__(self, rows: int, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, features))

    def forward(self, x: Tensor | None, project: bool = False) -> Tensor:
        """Row numbers [T] -> [T, C]; project: features [T, C] -> x W^T [T, rows]; None: sum of |W|."""
        if x is None:
            return magnitude(self.weight)
        return F.linear(x, self.weight) if project else F.embedding(x, self.weight)


def magnitude(weight: Tensor) -> Tensor:
    """Sum of |w|, accumulated in fp32."""
    return weight.abs().sum(dtype=torch.float32)


def l1_penalty(model: nn.Module) -> Tensor:
    """Sum of |w| over every matrix (no biases, no norms; a tied matrix once), an fp32 scalar.

    It asks each owner for its share by calling it, so a partitioned weight is gathered by its own module. As
    an ordinary term of the loss it needs no gradient hook and follows whatever scaling the loss gets
    (accumulation, fp16).
    """
    owners = [module for module in model.modules() if isinstance(module, Linear | Embedding)]
    return torch.stack([owner(None) for owner in owners]).sum()


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * weight + bias (Ba et al. 2016); torch accumulates in fp32."""

    def __init__(self, features: int, eps: float, bias: bool) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(features))
        self.bias = nn.Parameter(torch.empty(features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019); torch accumulates in fp32."""

    def __init__(self, features: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(features))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class FeedForward(nn.Module):
    """down(activation(up(x))); swiglu: down(silu(gate) * up), gate and up in one product (Shazeer 2020)."""

    def __init__(
        self, hidden_size: int, ffn_size: int, activation: Literal["gelu", "relu", "swiglu"], bias: bool
    ) -> None:
        super().__init__()
        self.activation = activation
        if activation == "swiglu":
            self.gate_up = Linear(hidden_size, 2 * ffn_size, bias)
        else:
            self.up = Linear(hidden_size, ffn_size, bias)
        self.down = Linear(ffn_size, hidden_size, bias)

    def forward(self, x: Tensor) -> Tensor:  # [T, C] -> [T, C]
        if self.activation == "swiglu":
            gate, up = self.gate_up(x).chunk(2, dim=-1)  # [T, F] each
            x = F.silu(gate) * up
        else:
            x = self.up(x)
            x = F.relu(x) if self.activation == "relu" else F.gelu(x, approximate="tanh")
        out: Tensor = self.down(x)
        return out


def rotary_angles(position_ids: Tensor, head_size: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine, fp32 [T, 1, D/2], of position * base^(-2i/D) (Su et al. 2021, section 3.2.2).

    Computed anew in each forward, in fp32 whatever the model's dtype: a table would be rounded with the
    weights.
    """
    exponent = torch.arange(0, head_size, 2, device=position_ids.device, dtype=torch.float32) / head_size
    angles = position_ids[:, None, None].float() * torch.pow(base, -exponent)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (i, i + D/2) of each head of `x` [T, H, D] by their angles, computed in fp32."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def sinusoids(position_ids: Tensor, features: int) -> Tensor:
    """Position encodings, fp32 [T, C]: sin in even, cos in odd features (Vaswani 2017, section 3.5)."""
    exponent = torch.arange(0, features, 2, device=position_ids.device, dtype=torch.float32) / features
    angles = position_ids[:, None].float() * torch.exp(-math.log(10000.0) * exponent)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)[:, :features]
