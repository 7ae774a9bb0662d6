"""Numbers that are not finite: who brought them in, how many are too many, and what the user is told.

A step whose loss or gradient is not finite has been left out by then, on all ranks
(bigtfm/engine/gradients.py). It is run again under a `Watch`, which finds what was the first to be not
finite: data, weights and randomness are the same, so a step that is finite now was disturbed from outside.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from bigtfm.config.problems import DIVERGED, NumericsProblem

if TYPE_CHECKING:
    from bigtfm.data.loader import Batch

MAX_SHOWN = 8  # steps or samples in a line


class Finding(NamedTuple):
    """What was the first to be not finite on a rank."""

    what: str  # "output of blocks.0.mlp", "gradient of blocks.0.mlp.up.weight", ...
    value: str  # nan or inf
    samples: tuple[int, ...]  # ids: those that it was in, else all of the micro-batch


@dataclass
class Watch:
    """Looks at what each module returns, at the gradient there, and at each parameter's gradient.

    It turns the parameters' gradients into NaN once it has seen them.
    """

    found: Finding | None = None
    batch: Batch | None = None

    def micro_batch(self, batch: Batch) -> None:
        """What the forward and backward that follow are of."""
        self.batch = batch

    @contextmanager
    def hooks(self, model: nn.Module) -> Iterator[None]:
        handles: list[Any] = []
        for name, module in model.named_modules():
            where = name or "the model"
            handles.append(module.register_forward_hook(partial(self._returned, where)))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                handles.append(parameter.register_hook(partial(self._parameter, f"gradient of {name}")))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _returned(self, where: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        for tensor in output if isinstance(output, tuple) else (output,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                self.look(f"output of {where}", tensor.detach())
                if tensor.requires_grad:
                    tensor.register_hook(partial(self.look, f"gradient at the output of {where}"))

    def _parameter(self, what: str, gradient: Tensor) -> Tensor:
        self.look(what, gradient)
        return torch.full_like(gradient, math.nan)

    def look(self, what: str, values: Tensor) -> None:
        """Remembers the first that is not finite."""
        if self.found is None and not bool(torch.isfinite(values).all()):
            assert self.batch is not None
            value = "nan" if bool(torch.isnan(values).any()) else "inf"
            self.found = Finding(what, value, _samples(self.batch, values))


def _samples(batch: Batch, values: Tensor) -> tuple[int, ...]:
    """Ids of the samples whose positions are not finite in values [T, ...]; all, if it has another shape."""
    positions = batch.token_keys
    if values.dim() < 2 or len(values) != len(positions) or not len(batch.samples):
        return batch.samples
    bad = ~torch.isfinite(values.flatten(1)).all(dim=1).cpu()
    # Keys count through the samples of a micro-batch, each of which has as many as the others.
    stride = int(positions.max() - positions.min()) // len(batch.samples) + 1
    places = ((positions[bad] - positions.min()) // stride).unique().tolist()
    return tuple(batch.samples[min(place, len(batch.samples) - 1)] for place in places)


class Culprit(NamedTuple):
    """Why a step was left out."""

    said: str  # a clause
    details: dict[str, Any]  # for its event


def culprit(ranks: Sequence[tuple[Finding | None, float]]) -> Culprit:
    """The first of what the ranks have found; a forward comes before any backward.

    ranks: the finding of the step run again, and the loss as it was in the step itself, by rank.
    """
    found = [(f.what.startswith("gradient"), rank, f) for rank, (f, _) in enumerate(ranks) if f is not None]
    if found:
        _, rank, first = min(found)
        word = "sample" if len(first.samples) == 1 else "samples"
        said = f"on rank {rank} the {first.what} is {first.value} in {word} {listed(first.samples)}"
        return Culprit(said, {"rank": rank} | first._asdict())
    bad = [rank for rank, (_, loss) in enumerate(ranks) if not math.isfinite(loss)]
    who = f" on rank {listed(bad)}" if bad else ""
    said = f"run again it is finite, so neither data nor weights: memory or a device failed{who}"
    return Culprit(said, {"rank": bad[0] if bad else None, "what": "finite when run again"})


def listed(numbers: Sequence[int]) -> str:
    """7, 9 and 12 more."""
    shown = ", ".join(map(str, numbers[:MAX_SHOWN]))
    return f"{shown} and {len(numbers) - MAX_SHOWN} more" if len(numbers) > MAX_SHOWN else shown


def in_a_row(step: int, skipped: Sequence[int]) -> int:
    """How many steps up to `step` were left out one after the other. skipped: ascending."""
    count = 0
    while count < len(skipped) and skipped[-1 - count] == step - count:
        count += 1
    return count


def require_agreement(step: int, applied: Sequence[bool]) -> None:
    """Raises NumericsProblem when some ranks have left a step out and others have not.

    applied: by rank. At stage 0 in fp32 each rank judges by itself the gradients that all have.
    """
    if any(applied):
        out = [rank for rank, applies in enumerate(applied) if not applies]
        raise NumericsProblem(
            f"the gradients, which are all ranks' sum, are not finite on rank {listed(out)} alone: memory "
            "or a device failed",
            where=f"step {step}",
            fix="start the same command again: it resumes from the last checkpoint; if it happens again, "
            "take that machine out",
        )


def require_finite_weights(step: int, broken: Sequence[tuple[Sequence[str], Sequence[str]]]) -> None:
    """Raises NumericsProblem when a rank has a weight that is not finite.

    broken: by rank, names of parameters, in what the rank updates itself, and in its copies of the others'.
    """
    places = [(kind, rank, names) for rank, kinds in enumerate(broken) for kind, names in enumerate(kinds)]
    for _, rank, names in sorted(places, key=lambda place: place[:2]):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise NumericsProblem(
                f"weight {names[0]} of rank {rank} is not finite{more}",
                where=f"step {step}",
                fix="start the same command again: it resumes from the last checkpoint, which is finite",
            )


def too_many(step: int, allowed: int, said: str) -> NumericsProblem:
    """One step more was not finite than may be left out in a row. said: of this one."""
    before = f" (as {allowed} before it)" if allowed else ""
    return NumericsProblem(
        f"{said}{before}", where=f"step {step}", fix=f"{DIVERGED}; what was saved is finite"
    )


def require_all_applied(skipped: Sequence[int], where: str) -> None:
    """Raises NumericsProblem, at the end of a run, when steps were left out of it."""
    if skipped:
        word, be = ("steps", "were") if len(skipped) > 1 else ("step", "was")
        raise NumericsProblem(
            f"finished and saved, but {word} {listed(skipped)} {be} left out: loss or gradient not finite",
            where=where,
            fix="events.jsonl there tells rank, layer and samples; the checkpoint is good to use",
        )


def require_finite(step: int, name: str, value: float) -> None:
    """Raises NumericsProblem on a NaN or infinite value."""
    if not math.isfinite(value):
        raise NumericsProblem(
            f"{name} is {value}", where=f"step {step}", fix=f"{DIVERGED}; what was saved is finite"
        )
