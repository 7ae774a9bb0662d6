"""The learning-rate schedules that DeepSpeed lacks, with the interface that its engine asks for.

The engine calls `step()` after every update that it applied (not after one that overflowed). Updates are
numbered from 1; the constructor sets the lr of update 1, so that no update is spent on an lr of 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

from torch.optim import Optimizer

from bigtfm.config.problems import ConfigProblem

Decay = Literal["linear", "cosine", "sqrt"]


def warmup(step: int, warmup_num_steps: int) -> float:
    """Linear from 1 / warmup_num_steps at update 1 to 1 at update warmup_num_steps, then 1."""
    return min(1.0, step / max(1, warmup_num_steps))


def inverse_square_root(step: int, warmup_num_steps: int) -> float:
    """min(step / warmup, sqrt(warmup / step)): Vaswani et al. 2017, "Attention is all you need", eq. 3."""
    peak = max(1, warmup_num_steps)
    return min(step / peak, math.sqrt(peak / step))


def wsd(
    step: int,
    total_num_steps: int,
    warmup_num_steps: int,
    decay_num_steps: int,
    min_lr_ratio: float,
    decay_type: Decay,
) -> float:
    """Warm-up, stable, decay: Hu et al. 2024 (MiniCPM); 1 - sqrt is Hägele et al. 2024, "Scaling laws and
    compute-optimal training beyond fixed training durations".

    The decay counts finished updates, as the latter do: its first update still has the full lr, and the
    minimum comes after update total_num_steps, so that the last one still moves the weights.
    """
    finished = step - 1 - (total_num_steps - decay_num_steps)
    progress = min(1.0, max(0, finished) / max(1, decay_num_steps))
    if decay_type == "linear":
        left = 1.0 - progress
    elif decay_type == "cosine":
        left = 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        left = 1.0 - math.sqrt(progress)
    return warmup(step, warmup_num_steps) * (min_lr_ratio + (1.0 - min_lr_ratio) * left)


class Schedule:
    """Sets lr x multiplier(number of the next update) on all parameter groups; its state is that number."""

    def __init__(self, optimizer: Optimizer, lr: float, multiplier: Callable[[int], float]) -> None:
        _require(lr > 0, "lr", f"must be above 0, not {lr}")
        self.optimizer, self.lr, self.multiplier = optimizer, lr, multiplier
        self.next_step = 1  # number of the update that the current lr is for
        self._set_lr()

    def step(self, *_: Any) -> None:
        """Prepare the next update. Arguments are ignored: DeepSpeed's pipeline engine passes a batch size."""
        self.next_step += 1
        self._set_lr()

    def get_lr(self) -> list[float]:
        """The lr of the update to come, one a parameter group."""
        return [self.lr * self.multiplier(self.next_step)] * len(self.optimizer.param_groups)

    get_last_lr = get_lr  # torch's and DeepSpeed's name for what was set last, which is the same

    def state_dict(self) -> dict[str, Any]:
        return {"next_step": self.next_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.next_step = state["next_step"]
        self._set_lr()

    def _set_lr(self) -> None:
        for group, lr in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = lr


def InverseSquareRoot(optimizer: Optimizer, lr: float, warmup_num_steps: int) -> Schedule:
    """Linear warm-up to `lr`, then falling with the inverse square root of the update's number.

    Raises:
        ConfigProblem: a value is out of range.
    """
    _require(warmup_num_steps >= 0, "warmup_num_steps", f"must be 0 or more, not {warmup_num_steps}")
    return Schedule(optimizer, lr, partial(inverse_square_root, warmup_num_steps=warmup_num_steps))


def WSD(
    optimizer: Optimizer,
    lr: float,
    total_num_steps: int,
    warmup_num_steps: int,
    decay_num_steps: int,
    min_lr_ratio: float = 0.0,
    decay_type: Decay = "linear",
) -> Schedule:
    """Linear warm-up to `lr`, a plateau, a decay to min_lr_ratio x lr over the last decay_num_steps updates.

    Raises:
        ConfigProblem: a value is out of range, or warm-up and decay overlap.
    """
    _require(warmup_num_steps >= 0, "warmup_num_steps", f"must be 0 or more, not {warmup_num_steps}")
    _require(decay_num_steps >= 0, "decay_num_steps", f"must be 0 or more, not {decay_num_steps}")
    _require(0 <= min_lr_ratio <= 1, "min_lr_ratio", f"must lie between 0 and 1, not {min_lr_ratio}")
    _require(
        decay_type in get_args(Decay), "decay_type", f"must be one of {get_args(Decay)}, not {decay_type!r}"
    )
    both = warmup_num_steps + decay_num_steps
    what = f"is {total_num_steps}, less than warmup_num_steps and decay_num_steps together ({both})"
    _require(both <= total_num_steps, "total_num_steps", what)

    def multiplier(step: int) -> float:
        return wsd(step, total_num_steps, warmup_num_steps, decay_num_steps, min_lr_ratio, decay_type)

    return Schedule(optimizer, lr, multiplier)


def ExponentialRange(optimizer: Optimizer, lr: float, max_lr: float, total_num_steps: int) -> Schedule:
    """From `lr` at update 1 to `max_lr` at update total_num_steps, each update's lr the same factor above the
    one before: the range test of Smith 2017, "Cyclical learning rates for training neural networks".

    Raises:
        ConfigProblem: a value is out of range.
    """
    _require(max_lr > lr, "max_lr", f"must be above lr {lr}, not {max_lr}")
    _require(total_num_steps > 1, "total_num_steps", f"must be 2 or more, not {total_num_steps}")
    return Schedule(optimizer, lr, lambda step: (max_lr / lr) ** ((step - 1) / (total_num_steps - 1)))


class ReduceOnPlateau(Schedule):
    """Linear warm-up to `lr`, then times `factor` whenever the validation loss stops falling.

    An evaluation improves if its loss is below best x (1 - threshold); after more than `patience` evaluations
    in a row without one, the lr falls, never under `min_lr`. Call `observe` on every rank with the same loss.

    Raises:
        ConfigProblem: a value is out of range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        lr: float,
        factor: float = 0.5,
        patience: int = 3,
        threshold: float = 1e-3,
        min_lr: float = 0.0,
        warmup_num_steps: int = 0,
    ) -> None:
        _require(0 < factor < 1, "factor", f"must lie between 0 and 1, not {factor}")
        _require(patience >= 0, "patience", f"must be 0 or more, not {patience}")
        _require(0 <= threshold < 1, "threshold", f"must be at least 0 and below 1, not {threshold}")
        _require(0 <= min_lr <= lr, "min_lr", f"must lie between 0 and lr, not {min_lr}")
        _require(warmup_num_steps >= 0, "warmup_num_steps", f"must be 0 or more, not {warmup_num_steps}")
        self.factor, self.patience, self.threshold = factor, patience, threshold
        self.scale = 1.0
        self.best: float | None = None  # None rather than infinity: JSON has no infinity
        self.waited = 0
        super().__init__(
            optimizer, lr, lambda step: warmup(step, warmup_num_steps) * max(min_lr / lr, self.scale)
        )

    def observe(self, validation_loss: float) -> None:
        """Take note of an evaluation's loss; the next update has the new lr."""
        improved = self.best is None or validation_loss < self.best * (1.0 - self.threshold)
        if improved and math.isfinite(validation_loss):
            self.best, self.waited = validation_loss, 0
        else:
            self.waited += 1
        if self.waited > self.patience:
            self.scale, self.waited = self.scale * self.factor, 0
        self._set_lr()

    def state_dict(self) -> dict[str, Any]:
        return {"next_step": self.next_step, "scale": self.scale, "best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scale, self.best, self.waited = state["scale"], state["best"], state["waited"]
        super().load_state_dict(state)


def _require(holds: bool, name: str, what: str) -> None:
    if not holds:
        raise ConfigProblem(f"{name} {what}", where="DeepSpeed JSON, scheduler", fix=f"correct {name}")
