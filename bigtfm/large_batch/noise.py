"""The gradient noise scale: how large a batch pays. Arithmetic on the products of micro-batches' gradients.

McCandlish et al. 2018, "An Empirical Model of Large-Batch Training": B_simple = tr(Sigma) / |G|^2 (equation
2.9), where G is the gradient of the loss, and Sigma the covariance of one sample's. Training with batches of
B takes about 1 + B_simple / B times the fewest steps and 1 + B / B_simple times the fewest samples
(equation 2.11, with B_crit taken as B_simple).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DRAWS = 2000  # of the bootstrap
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class NoiseScale:
    """B_simple of one set of weights, in samples (sequences), with a bootstrap interval of 95 %."""

    samples: float  # inf: the gradient is not told from the noise
    low: float
    high: float
    gradient: float  # |G|^2, estimated without bias: it may be below 0
    noise: float  # tr(Sigma) of one sample, likewise

    def steps(self, batch: float) -> float:
        """How many times the fewest steps a training with this batch takes."""
        return 1 + self.samples / batch

    def examples(self, batch: float) -> float:
        """How many times the fewest samples it takes."""
        return 1 + batch / self.samples


def noise_scale(gram: Floats, micro_batch: int, seed: int = 0) -> NoiseScale:
    """B_simple from the inner products of the gradients of N micro-batches [N, N].

    With b = `micro_batch` samples in each, the mean of the diagonal is E|g|^2 = |G|^2 + tr(Sigma) / b, and
    the mean off it, over independent pairs, is |G|^2: both without bias. They are the estimators of
    McCandlish et al., appendix A.1, at B_small = b and B_big = N b, for |mean of all|^2 is
    (diagonal + (N - 1) off) / N.

    The interval draws micro-batches with repetition, and counts no pair of a micro-batch with itself, whose
    product is E|g|^2. Where noise dominates, it is wider than it need be (a degenerate U-statistic).
    """
    count = len(gram)
    assert count > 1, "one gradient tells nothing of noise"
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=DRAWS).astype(np.float64)
    norms, pairs = _moments(gram, np.vstack([np.ones(count), drawn]))
    scales = _ratio(micro_batch * (norms - pairs), pairs)
    ordered, cut = np.sort(scales[1:]), round(0.025 * DRAWS)
    noise = micro_batch * float(norms[0] - pairs[0])
    return NoiseScale(float(scales[0]), float(ordered[cut]), float(ordered[-1 - cut]), float(pairs[0]), noise)


def _moments(gram: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """For each row of weights [R, N]: the mean of |g|^2, and of the products of different micro-batches."""
    count, diagonal = len(gram), np.diagonal(gram)
    norms = weights @ diagonal / count
    own = weights**2
    products = ((weights @ gram) * weights).sum(1) - own @ diagonal
    pairs = np.maximum(count**2 - own.sum(1), 1.0)  # none: the same one was drawn each time
    return norms, products / pairs


def _ratio(noise: Floats, gradient: Floats) -> Floats:
    """Noise over gradient; 0: no noise is seen, inf: no gradient."""
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.where(gradient > 0, np.maximum(noise, 0.0) / gradient, math.inf)
    return np.asarray(found, np.float64)
