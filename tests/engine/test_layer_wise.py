"""Lamb and Lars as the engine builds them, against the formulas of their papers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bigtfm.engine.build import _own_optimizer

STEPS = 6
SHAPES = ((4, 3), (5, 2))
Update = Callable[[Tensor, Tensor, dict[str, Any], int], None]


def trained(kind: str, params: dict[str, Any]) -> list[Tensor]:
    """Weights after some steps on random gradients."""
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    make = _own_optimizer({"optimizer": {"type": kind, "params": params}}, on_cpu=True)
    assert make is not None
    optimizer = make(weights)
    for _ in range(STEPS):
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        optimizer.step()
    return [weight.detach() for weight in weights]


def by_the_paper(update: Update) -> list[Tensor]:
    torch.manual_seed(0)
    weights = [torch.randn(shape) for shape in SHAPES]
    states: list[dict[str, Any]] = [{} for _ in weights]
    for step in range(1, STEPS + 1):
        for weight, state in zip(weights, states, strict=True):
            update(weight, torch.randn_like(weight), state, step)
    return weights


def lamb(decay: float, beta1: float = 0.9, beta2: float = 0.999) -> Update:
    """You et al. 2019, algorithm 2; the weight's norm is as it is."""

    def update(weight: Tensor, gradient: Tensor, state: dict[str, Any], step: int) -> None:
        m = state["m"] = beta1 * state.get("m", 0.0) + (1 - beta1) * gradient
        v = state["v"] = beta2 * state.get("v", 0.0) + (1 - beta2) * gradient**2
        ratio = m / (1 - beta1**step) / ((v / (1 - beta2**step)).sqrt() + 1e-8) + decay * weight
        weight -= 0.01 * weight.norm() / ratio.norm() * ratio

    return update


def lars(weight: Tensor, gradient: Tensor, state: dict[str, Any], step: int) -> None:
    """You et al. 2017, equation 6 and algorithm 1, the global lr outside of the momentum as in torch."""
    local = 0.002 * weight.norm() / (gradient.norm() + 0.01 * weight.norm())
    state["v"] = 0.9 * state.get("v", 0.0) + local * (gradient + 0.01 * weight)
    weight -= 3.0 * state["v"]


def far(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))


def test_lamb_moves_each_matrix_by_its_own_norm() -> None:
    """Also in its first steps, which as the library has them by default are ten times as long."""
    found = trained("Lamb", {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0})
    assert far(found, by_the_paper(lamb(0.0))) < 1e-5
    assert far(found, by_the_paper(lamb(1.0))) > 1e-3, "the control"


def test_lambs_decay_is_part_of_what_the_ratio_scales() -> None:
    """Without moments: the library corrects no bias of theirs, which shows where decay stands beside them."""
    found = trained("Lamb", {"lr": 0.01, "betas": (0.0, 0.0), "eps": 1e-8, "weight_decay": 1.0})
    assert far(found, by_the_paper(lamb(1.0, 0.0, 0.0))) < 1e-5
    assert far(found, by_the_paper(lamb(0.0, 0.0, 0.0))) > 1e-3, "the control"


def test_lars_is_the_papers() -> None:
    params = {"lr": 3.0, "momentum": 0.9, "weight_decay": 0.01, "trust_coefficient": 0.002}
    found = trained("Lars", params)
    assert far(found, by_the_paper(lars)) < 1e-5


@pytest.mark.parametrize("change", [{"weight_decay": 0.0}, {"trust_coefficient": 0.001}, {"momentum": 0.0}])
def test_every_parameter_of_lars_matters(change: dict[str, float]) -> None:
    params = {"lr": 3.0, "momentum": 0.9, "weight_decay": 0.01, "trust_coefficient": 0.002}
    assert far(trained("Lars", params | change), by_the_paper(lars)) > 1e-4
