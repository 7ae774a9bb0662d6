"""The layers that every family is made of.

T tokens, C features, F features of the feed-forward layer, H heads, D head size, Q queries, K keys.

Modules hold parameters and nothing else; `torch.empty` parameters, because `init_weights` or a checkpoint
fills them. Each parameter is used inside the forward of the module that owns it: that is what lets an engine
gather it just in time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigtfm.config.sections import ModelSection

OutputLoss = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # of features, an output layer's W and b


class Linear(nn.Module):
    """y = x W^T + b, W [out, in]. `product` computes it, if it is set (bigtfm.model.float8)."""

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.product: Callable[[Tensor], Tensor] | None = None

    def forward(self, x: Tensor | None, loss: OutputLoss | None = None) -> Tensor:
        """[T, in] -> [T, out]; None: the sum of |W|, an fp32 scalar (see `l1_penalty`).

        loss: what to return instead, as a function of x, W and b.
        """
        if x is None:
            return magnitude(self.weight)
        if self.product is not None and loss is None:
            return self.product(x)
        return F.linear(x, self.weight, self.bias) if loss is None else loss(x, self.weight, self.bias)


class Embedding(nn.Module):
    """A table W [rows, C], read by row number; its transpose is the output layer where the two are tied."""

    def __init__(self, rows: int, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, features))

    def forward(self, x: Tensor | None, project: bool = False, loss: OutputLoss | None = None) -> Tensor:
        """Row numbers [T] -> [T, C]; project: features [T, C] -> x W^T [T, rows]; None: sum of |W|.

        loss: what to return of features instead, as a function of x, W and None.
        """
        if x is None:
            return magnitude(self.weight)
        if loss is not None:
            return loss(x, self.weight, None)
        return F.linear(x, self.weight) if project else F.embedding(x, self.weight)


class Bias(nn.Module):
    """x + b, b [features]."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(features))

    def forward(self, x: Tensor | None) -> Tensor:
        """x + b; None: b."""
        return self.bias.clone() if x is None else x + self.bias


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


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; torch accumulates in fp32."""
    return F.rms_norm(x, weight.shape, weight, eps)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019)."""

    def __init__(self, features: int, eps: float) -> None:
        super().__init__()
        self.eps, self.kernel = eps, rms_norm
        self.weight = nn.Parameter(torch.empty(features))

    def forward(self, x: Tensor) -> Tensor:
        return self.kernel(x, self.weight, self.eps)


def make_norm(config: ModelSection) -> LayerNorm | RMSNorm:
    """The normalisation that the config names."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.hidden_size, config.norm_eps)
    return LayerNorm(config.hidden_size, config.norm_eps, config.bias)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation (Hendrycks and Gimpel 2016)."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "relu": F.relu,
    "silu": F.silu,
    "swiglu": F.silu,
    "geglu": F.gelu,
    "geglu_tanh": gelu_tanh,
}


def gate(gate_up: Tensor, activation: Callable[..., Tensor]) -> Tensor:
    """activation(gate) * up of both side by side [T, 2 F] -> [T, F]."""
    first, up = gate_up.chunk(2, dim=-1)
    return activation(first) * up


class FeedForward(nn.Module):
    """down(activation(up(x))); gated: down(activation(gate) * up), both in one product (Shazeer 2020)."""

    def __init__(self, config: ModelSection) -> None:
        super().__init__()
        hidden, width = config.hidden_size, config.ffn_size
        self.activation, self.gated = ACTIVATIONS[config.activation], config.gated
        self.activate: Callable[[Tensor], Tensor] = partial(gate, activation=self.activation)
        if self.gated:
            self.gate_up = Linear(hidden, 2 * width, config.bias)
        else:
            self.up = Linear(hidden, width, config.bias)
        self.down = Linear(width, hidden, config.bias)

    def forward(self, x: Tensor) -> Tensor:  # [T, C] -> [T, C]
        x = self.activate(self.gate_up(x)) if self.gated else self.activation(self.up(x))
        out: Tensor = self.down(x)
        return out


def rotary_angles(
    position_ids: Tensor,
    head_size: int,
    base: float,
    scaling: tuple[float, float, float, float] | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosine and sine, fp32 [T, 1, D/2], of position * base^(-2i/D) (Su et al. 2021, section 3.2.2).

    scaling: (factor, low, high, length) slows the frequencies down as Llama 3.1 does: by `factor` those whose
    wavelength is over length / low, not at all those under length / high, and gradually in between.

    Computed anew in each forward, in fp32 whatever the model's dtype: a table would be rounded with the
    weights.
    """
    exponent = torch.arange(0, head_size, 2, device=position_ids.device, dtype=torch.float32) / head_size
    frequencies = torch.pow(base, -exponent)
    if scaling is not None:
        factor, low, high, length = scaling
        turns = frequencies * (length / (2 * math.pi))  # in the original length
        share = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies * (share + (1 - share) / factor)
    angles = position_ids[:, None, None].float() * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (i, i + D/2) of each head of `x` [T, H, D] by their angles, computed in fp32."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def rotated(qk: Tensor, heads: int, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Queries [T, H, D] and keys [T, K, D], turned, of both side by side [T, H + K, D]."""
    q, k = rotate(qk, cos, sin).split([heads, qk.shape[1] - heads], dim=1)
    return q, k


def sinusoids(position_ids: Tensor, features: int) -> Tensor:
    """Position encodings, fp32 [T, C]: the sines, then the cosines (Vaswani et al. 2017, section 3.5).

    The paper interleaves them, its code (tensor2tensor), fairseq and Marian do not: features have no order.
    Angles are fp64: at position 2,048 the rounding of fp32 ones is seen in a model's logits.
    """
    exponent = torch.arange(0, features, 2, device=position_ids.device, dtype=torch.float64) / features
    angles = position_ids[:, None] * torch.exp(-math.log(10000.0) * exponent)
    return torch.cat((angles.sin(), angles.cos()), dim=-1)[:, :features].float()


class RelativeBias(nn.Module):
    """What a head adds to a score, by the distance of query and key (Raffel et al. 2020, section 2.1).

    W [buckets, H]: half of the buckets for one distance each, the others for ranges that grow up to
    `relative_max_distance`. An encoder's tell keys before a query from keys behind it.
    """

    def __init__(self, config: ModelSection, causal: bool) -> None:
        super().__init__()
        self.causal, self.max_distance = causal, config.relative_max_distance
        self.weight = nn.Parameter(torch.empty(config.relative_buckets, config.num_attention_heads))

    def forward(self, distance: Tensor) -> Tensor:
        """Key position - query position, int64 [..., Q, K] -> bias [..., H, Q, K]."""
        return F.embedding(self._bucket(distance), self.weight).movedim(-1, -3)

    def _bucket(self, distance: Tensor) -> Tensor:
        buckets = self.weight.shape[0]  # a partitioned weight is whole inside this forward
        if self.causal:
            first, far = torch.zeros_like(distance), (-distance).clamp(min=0)
        else:
            buckets //= 2
            first, far = (distance > 0) * buckets, distance.abs()
        exact = buckets // 2
        growth = torch.log(far.clamp(min=1).float() / exact) / math.log(self.max_distance / exact)
        ranges = (exact + (growth * (buckets - exact)).long()).clamp(max=buckets - 1)
        return first + torch.where(far < exact, far, ranges)
