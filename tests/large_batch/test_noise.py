"""The noise scale against values worked out by hand, closed forms, and an estimator that is wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from bigtfm.large_batch.gradients import SIZE, Sketcher
from bigtfm.large_batch.noise import Floats, noise_scale

GRADIENT = np.array([3.0, 0.0, 4.0, 0.0])  # |G|^2 = 25
DEVIATIONS = np.array([1.0, 5.0, 2.0, 10.0])  # tr(Sigma) = 130
TRUE = 130 / 25


def drawn(count: int, micro_batch: int, seed: int, gradient: Floats = GRADIENT) -> Floats:
    """Mean gradients of micro-batches of a model with this gradient and noise."""
    noise = np.random.default_rng(seed).standard_normal((count, micro_batch, 4)) * DEVIATIONS
    rows = gradient + noise.mean(1)
    return np.asarray(rows @ rows.T)


def test_three_gradients_by_hand() -> None:
    """(1, 2), (3, 0), (2, -2): |g|^2 5, 9, 8; products 3, -2, 6."""
    rows = np.array([[1.0, 2.0], [3.0, 0.0], [2.0, -2.0]])
    found = noise_scale(rows @ rows.T, micro_batch=4)
    assert found.gradient == pytest.approx(7 / 3)
    assert found.noise == pytest.approx(4 * (22 / 3 - 7 / 3))
    assert found.samples == pytest.approx(60 / 7)


def test_it_is_the_papers_pair_of_estimators() -> None:
    """Appendix A.1, from |G|^2 at 6 and at 60 samples."""
    gram, small, big = drawn(10, 6, seed=1), 6, 60
    at_small, at_big = np.diagonal(gram).mean(), gram.mean()
    gradient = (big * at_big - small * at_small) / (big - small)
    noise = (at_small - at_big) / (1 / small - 1 / big)
    found = noise_scale(gram, small)
    assert (found.gradient, found.noise) == pytest.approx((gradient, noise))
    assert found.samples == pytest.approx(noise / gradient)


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_gradients_of_known_covariance(micro_batch: int) -> None:
    """Over many draws the moments are those of the distribution, and the interval holds the true value.

    The control: with each micro-batch's product with itself among the pairs, |G|^2 is off by its noise.
    """
    found = [noise_scale(drawn(24, micro_batch, seed), micro_batch) for seed in range(300)]
    assert np.mean([each.gradient for each in found]) == pytest.approx(25, rel=0.05)
    assert np.mean([each.noise for each in found]) == pytest.approx(130, rel=0.05)
    covered = np.mean([each.low <= TRUE <= each.high for each in found])
    assert covered >= 0.9
    biased = np.mean([drawn(24, micro_batch, seed).mean() for seed in range(300)])
    assert biased == pytest.approx(25 + 130 / (24 * micro_batch), rel=0.05)
    assert abs(biased - 25) > 0.05 * 25 or micro_batch == 4


def test_a_linear_model_has_its_closed_form() -> None:
    """y = x w + e, x of d standard normals, e of deviation s: the gradient of half the squared error at w + a
    is (x a - e) x for one sample, so that G = a and tr(Sigma) = (d + 1) |a|^2 + d s^2.
    """
    torch.manual_seed(0)
    d, s, count, micro_batch = 8, 0.5, 1200, 2
    away = torch.arange(1.0, d + 1) / 10
    model = nn.Linear(d, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(away)  # the true weights are 0
    sketcher, sketches, norms = Sketcher(model), [], []
    for _ in range(count):
        x = torch.randn(micro_batch, d)
        model.zero_grad()
        (0.5 * (model(x)[:, 0] - s * torch.randn(micro_batch)) ** 2).mean().backward()
        assert model.weight.grad is not None
        sketch, norm = sketcher()
        assert norm == pytest.approx(float(model.weight.grad.square().sum()), rel=1e-5)
        sketches.append(sketch)
        norms.append(norm)
    rows = torch.stack(sketches).double()
    found = noise_scale((rows @ rows.T).numpy(), micro_batch)
    length = float(away.square().sum())
    expected = (d + 1) + d * s**2 / length
    assert found.low <= expected <= found.high
    assert found.samples == pytest.approx(expected, rel=0.1)
    assert found.gradient == pytest.approx(length, rel=0.15)


def test_no_gradient_among_the_noise_is_said_so() -> None:
    scales = [noise_scale(drawn(8, 1, seed, gradient=np.zeros(4)), 1) for seed in range(20)]
    assert all(each.high == math.inf for each in scales)
    assert any(each.samples == math.inf and each.gradient <= 0 for each in scales)


def test_no_noise_among_the_gradients_is_zero() -> None:
    rows = np.tile(GRADIENT, (5, 1))
    found = noise_scale(rows @ rows.T, 2)
    assert (found.samples, found.low, found.high) == (0.0, 0.0, 0.0)


def test_what_a_batch_costs() -> None:
    """At the noise scale twice the fewest steps, and twice the fewest samples."""
    found = noise_scale(drawn(24, 4, seed=0), 4)
    assert found.steps(found.samples) == found.examples(found.samples) == 2
    assert found.steps(found.samples / 3) == pytest.approx(4)
    assert found.examples(found.samples / 3) == pytest.approx(4 / 3)
    for batch in (1, 10, 100):  # (S / Smin - 1) (E / Emin - 1) = 1
        assert (found.steps(batch) - 1) * (found.examples(batch) - 1) == pytest.approx(1)


def test_sketches_keep_inner_products() -> None:
    """Of vectors of three times as many elements as a sketch has, within some standard errors."""
    torch.manual_seed(1)
    model = nn.ParameterList([nn.Parameter(torch.zeros(3, SIZE)), nn.Parameter(torch.zeros(5))])
    sketcher = Sketcher(model)
    common = [torch.randn_like(p) for p in model]
    vectors, sketches, norms = [], [], []
    for _ in range(3):
        for p, shared in zip(model, common, strict=True):
            p.grad = torch.randn_like(p) + 0.3 * shared
        vectors.append(torch.cat([p.grad.flatten() for p in model]).double())
        sketch, norm = sketcher()
        sketches.append(sketch.double())
        norms.append(norm)
    exact, found = (torch.stack(rows) @ torch.stack(rows).T for rows in (vectors, sketches))
    assert norms == pytest.approx(exact.diagonal().tolist(), rel=1e-6)
    far = (found - exact).abs() / exact.diagonal().mean()
    assert 0 < float(far.max()) < 5 * math.sqrt(2 / SIZE)
    assert float(exact[0, 1] / exact[0, 0]) > 10 * math.sqrt(2 / SIZE), "what is kept is more than chance"
