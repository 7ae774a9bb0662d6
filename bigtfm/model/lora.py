"""Low-rank adapters beside frozen matrices (Hu et al. 2021, "LoRA"): y = x (W + alpha / r B A)^T + b.

T tokens, r rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigtfm.config.sections import ADAPTERS, TuneSection
from bigtfm.model.layers import Linear, OutputLoss
from bigtfm.model.transformer import block_linears


class LoraLinear(Linear):
    """A `Linear` with an adapter; its own parameters keep their names, and their values at the beginning.

    lora_a [r, in] begins at random, lora_b [out, r] at 0 (transformer.initial_value).
    """

    def __init__(self, layer: Linear, rank: int, scale: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.scale = layer.in_features, layer.out_features, scale
        self.weight, self.bias, self.product = layer.weight, layer.bias, layer.product
        self.lora_a = nn.Parameter(torch.empty(rank, layer.in_features))
        self.lora_b = nn.Parameter(torch.empty(layer.out_features, rank))

    def forward(self, x: Tensor | None, loss: OutputLoss | None = None) -> Tensor:
        """[T, in] -> [T, out]."""
        assert x is not None, "l1 is refused"
        assert loss is None, "it is no output layer"
        return super().forward(x) + F.linear(F.linear(x, self.lora_a), self.lora_b) * self.scale


def add_adapters(model: nn.Module, tune: TuneSection) -> None:
    """Gives the blocks' matrices that `tune` names an adapter each."""
    for path, layer in block_linears(model):
        if tune.adapts(path):
            parent, _, attribute = path.rpartition(".")
            setattr(
                model.get_submodule(parent), attribute, LoraLinear(layer, tune.lora_rank, tune.lora_scale)
            )


def update(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale B A, fp32 [rows, in], of A [r, in] and some rows of B [rows, r]: what merging adds to these rows.

    Computed in fp64, so that it does not matter in how many pieces a matrix is merged.
    """
    return (b.double() @ a.double()).mul_(scale).float()


def is_adapter(name: str) -> bool:
    """Whether a parameter is part of an adapter."""
    return name.endswith(ADAPTERS)
