"""Gradients of single micro-batches by a plain model, kept as sketches from which their products follow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bigtfm.config.problems import NumericsProblem
from bigtfm.data.loader import Loader

SIZE = 262_139  # numbers of a sketch: a prime, so that no shape of a matrix lines up with it


@dataclass(frozen=True)
class Gradients:
    """Some micro-batches' gradients of sum(token losses), one a row."""

    sketches: NDArray[np.float32]  # [N, size of a sketch]
    norms: NDArray[np.float64]  # [N]: |g|^2, exact
    losses: NDArray[np.float64]  # [N]: sums, in nats
    labels: NDArray[np.float64]  # [N]: how many tokens were predicted

    @classmethod
    def of(cls, parts: Sequence[Gradients]) -> Gradients:
        """All of them."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in cls.__annotations__))

    @property
    def gram(self) -> NDArray[np.float64]:
        """Inner products [N, N] of the gradients of the mean loss of a token.

        All are divided by the same number of labels, as in a global batch. Where micro-batches differ in
        theirs, that counts as noise: (standard deviation / mean)^2 samples, under 1 as a rule.
        """
        products = (self.sketches @ self.sketches.T).astype(np.float64)
        np.fill_diagonal(products, self.norms)
        return np.asarray(products / self.labels.mean() ** 2)


class Sketcher:
    """A gradient in at most SIZE numbers whose inner products are those of the gradients, but for chance.

    Each element gets a sign by a fixed draw, and all whose places are equal modulo SIZE are added up
    (Charikar, Chen & Farach-Colton 2002; Weinberger et al. 2009, "Feature Hashing for Large Scale Multitask
    Learning"): without bias, off by about |a| |b| sqrt(2 / SIZE). Up to SIZE elements nothing is added up,
    and products are exact. It makes room for hundreds of gradients of any model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        count, device = sum(each.numel() for each in self.parameters), self.parameters[0].device
        self.size = min(count, SIZE)
        draw = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, (count,), generator=draw, dtype=torch.int8) * 2 - 1
        self.signs = signs.to(device)

    def __call__(self) -> tuple[Tensor, float]:
        """The sketch [size] of the gradients that stand in the model, and their squared norm."""
        flat = torch.cat(
            [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in self.parameters]
        )
        norm = float(torch.linalg.vector_norm(flat, dtype=torch.float64)) ** 2
        padded = nn.functional.pad(flat * self.signs, (0, -len(flat) % self.size))
        return padded.view(-1, self.size).sum(0), norm


def gradients_of(
    model: nn.Module,
    loader: Loader,
    starts: Sequence[int],
    micro_batch: int,
    done: Callable[[int, int], Any] = lambda done, total: None,
) -> Gradients:
    """The gradients of `micro_batch` samples from each of `starts` on, with dropout as in training.

    done: hears of each, and of how many.

    Raises:
        NumericsProblem: a gradient is not finite.
    """
    device = next(model.parameters()).device
    sketcher, rows = Sketcher(model), []
    model.train()
    for number, start in enumerate(starts):
        batch = loader.batch(start, micro_batch)
        model.zero_grad()
        loss, _ = model(**batch.to(device).model_inputs())
        loss.backward()
        sketch, norm = sketcher()
        if not np.isfinite(norm):
            raise NumericsProblem(
                f"the gradient of samples {start} to {start + micro_batch - 1} is not finite",
                where="bigtfm noise-scale",
                fix="pass an earlier --step, from before the run diverged",
            )
        rows.append((sketch.cpu().numpy(), norm, float(loss.detach()), float(batch.num_labels)))
        done(number + 1, len(starts))
    model.zero_grad()
    sketches, *numbers = zip(*rows, strict=True) if rows else ([], [], [], [])
    return Gradients(np.array(sketches, np.float32).reshape(-1, sketcher.size), *map(np.array, numbers))
