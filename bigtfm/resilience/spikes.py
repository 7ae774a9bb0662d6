"""Spikes of the loss: what counts as one, and what a run does differently after it. Functions of numbers.

A run goes back to its newest checkpoint and leaves out the data around the spike: Chowdhery et al. 2022,
"PaLM: Scaling Language Modeling with Pathways", section 5.1. What it does from there on follows from the
spikes that its progress lists, so that another process given the same list has the same curve.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from bigtfm.config.batch import GlobalBatch
from bigtfm.config.problems import DIVERGED, NumericsProblem
from bigtfm.config.sections import GuardSection

LEAST_DEVIATION = 1e-3  # of the mean: a loss that hardly moves has no spikes of its rounding


def is_spike(recent: Sequence[float], loss: float, guard: GuardSection) -> bool:
    """Whether `loss` is guard.spike standard deviations above the mean of the steps before.

    recent: their losses, guard.spike_window of them or it is too early to tell. In the steep beginning the
    deviation holds the descent, and is large.
    """
    if not guard.spike or len(recent) < guard.spike_window:
        return False
    mean = statistics.fmean(recent)
    deviation = max(statistics.pstdev(recent, mean), LEAST_DEVIATION * abs(mean))
    return loss > mean + guard.spike * deviation


def with_last(recent: Sequence[float], loss: float, guard: GuardSection) -> list[float]:
    """The losses to compare the next one with."""
    if not guard.spike or not math.isfinite(loss):
        return list(recent)
    return [*recent, loss][-guard.spike_window :]


def spike(
    step: int, samples: int, back_to: tuple[int, int], batch: GlobalBatch, guard: GuardSection
) -> dict[str, Any]:
    """A spike as a run's progress lists it.

    step, samples: it was seen after this step, and this many samples. back_to: both, of the checkpoint.
    """
    went_back, earliest = back_to
    skipped = batch.samples(step) - batch.samples(max(0, step - guard.spike_skip))
    first = max(earliest, samples - skipped)
    lr = guard.spike_lr
    return {"step": step, "back_to": went_back, "first_sample": first, "end_sample": samples, "lr": lr}


def position(samples: int, spikes: Sequence[dict[str, Any]]) -> int:
    """The first sample from number `samples` on that is not left out."""
    for found in sorted(spikes, key=lambda found: found["first_sample"]):
        if found["first_sample"] <= samples < found["end_sample"]:
            samples = found["end_sample"]
    return samples


def end(samples: int, steps: range, batch: GlobalBatch, spikes: Sequence[dict[str, Any]]) -> int:
    """How many samples a run is through, with those left out, after those steps."""
    for step in steps:
        samples = position(samples, spikes) + batch.at(step)
    return samples


def lr_factor(step: int, spikes: Sequence[dict[str, Any]]) -> float:
    """What the schedule's lr is multiplied by in this step."""
    return math.prod(found["lr"] for found in spikes if step > found["back_to"])


def too_many(step: int, loss: float, spikes: Sequence[dict[str, Any]]) -> NumericsProblem:
    """One spike more than guard.spikes."""
    steps = ", ".join(str(found["step"]) for found in spikes)
    return NumericsProblem(
        f"the loss jumps to {loss:.4g}, after spikes at steps {steps}",
        where=f"step {step}",
        fix=f"{DIVERGED}; guard.spikes allows more; what was saved is from before the spike",
    )
