"""The blocks' matrix products in 8-bit floating point, by torchao (Micikevicius et al. 2022): its only door.

Weights, gradients and optimizer stay as they are; both factors of a product are scaled and rounded to 8 bits
right before it. Embeddings, output layer and heads keep their precision.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from bigtfm.config.optional import library, quietly
from bigtfm.model.layers import Linear
from bigtfm.model.transformer import block_linears


def use_float8(model: nn.Module, recipe: str, *, precision: str, capability: tuple[int, int] | None) -> None:
    """Lets every matrix of a family's blocks compute its products, backward ones too, by torchao's recipe.

    precision: of the training. capability: of the GPU, (major, minor); None: a CPU. Parameters stay the
    modules' own, by the same names.

    Raises:
        ConfigProblem: torchao is not installed.
    """
    torchao: Any = _torchao()
    config = replace(
        torchao.Float8LinearConfig.from_recipe_name(recipe),
        emulate=emulated(recipe, precision, capability),
        pad_inner_dim=True,  # the gradient of a weight sums over tokens, of whose number nothing is known
    )
    for _, layer in block_linears(model):
        layer.product = _product(layer, config, torchao)


def emulated(recipe: str, precision: str, capability: tuple[int, int] | None) -> bool:
    """Whether factors are rounded to 8 bits but multiplied in their own precision.

    GPUs multiply them from SM89 on with one scale a tensor, from SM90 on with one a row; the latter in bf16.
    """
    return (
        precision != "bf16"
        or capability is None
        or capability < ((8, 9) if recipe == "tensorwise" else (9, 0))
    )


def _product(layer: Linear, config: Any, torchao: Any) -> Any:
    """torchao's forward over the layer's own weight and bias. No module of the model: no second name."""
    linear: Any = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    linear.weight, linear.bias = layer.weight, layer.bias
    return torchao.convert_to_float8_training(linear, config=config).forward


def _torchao() -> Any:
    with quietly():
        return library(
            "torchao.float8",
            "compute.fp8 needs torchao, which is not installed",
            where="run config",
            extra="fp8",
        )
