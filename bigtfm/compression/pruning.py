"""Pruning by magnitude: the smallest weights of the blocks' matrices become zero, and stay so in training.

The run's `model.keep_zeros` says that they stay: a training that begins with it (run.init_from) gives them no
gradient, at any ZeRO stage (bigtfm/engine/build.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bigtfm.compression.result import Compressed
from bigtfm.model.heads import LanguageModel
from bigtfm.model.transformer import block_linears


def magnitude(model: LanguageModel, share: float) -> Compressed:
    """The `share` of smallest |w| in each matrix of the blocks becomes zero (Han et al. 2015).

    Within each matrix, not over all: the scale of a matrix says nothing of how much it matters.
    """
    return _pruned(model, lambda weight: _smallest(weight, round(share * weight.numel())), {"share": share})


def two_of_four(model: LanguageModel) -> Compressed:
    """The two smallest of every four neighbouring weights of a row become zero (Mishra et al. 2021).

    A row's last one to three columns, where four do not divide it, stay.
    """
    return _pruned(model, _two_smallest_of_four, {})


def _pruned(
    model: LanguageModel, choose: Callable[[Tensor], Tensor], settings: dict[str, float]
) -> Compressed:
    matrices = {f"{path}.weight" for path, _ in block_linears(model)}
    parameters = {
        name: parameter.detach().masked_fill(choose(parameter.detach()), 0) if name in matrices else parameter
        for name, parameter in model.named_parameters()
    }
    return Compressed(model.config.model_copy(update={"keep_zeros": True}), parameters, settings)


def _smallest(weight: Tensor, count: int) -> Tensor:
    """Where the `count` smallest |w| stand; of equal ones, the first."""
    chosen = torch.zeros(weight.numel(), dtype=torch.bool)
    chosen[weight.abs().flatten().argsort(stable=True)[:count]] = True
    return chosen.view(weight.shape)


def _two_smallest_of_four(weight: Tensor) -> Tensor:
    whole = weight.shape[1] // 4 * 4
    fours = weight[:, :whole].abs().unflatten(1, (-1, 4))
    chosen = torch.zeros_like(weight, dtype=torch.bool)
    chosen[:, :whole] = (
        torch.zeros_like(fours, dtype=torch.bool)
        .scatter(2, fours.argsort(stable=True)[..., :2], True)
        .flatten(1)
    )
    return chosen
