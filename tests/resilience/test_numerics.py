"""What is said of numbers that are not finite, what a spike is, and what a run does differently after one."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bigtfm.config.batch import GlobalBatch
from bigtfm.config.problems import NumericsProblem, known_cause, loss_scale_floor
from bigtfm.config.sections import GuardSection
from bigtfm.data.loader import Batch
from bigtfm.resilience import numerics, spikes
from bigtfm.resilience.numerics import Finding, Watch

GUARD = GuardSection(spike=6.0, spike_window=20, spike_skip=3, spike_lr=0.5)
ADVICE = "lower the lr or warm up longer (DeepSpeed JSON), and look for extreme values in the run config"


def batch(tokens_per_sample: int, samples: tuple[int, ...], first: int = 100) -> Batch:
    """Samples of consecutive numbers from `first` on, of as many tokens each."""
    keys = torch.arange(first * tokens_per_sample, (first + len(samples)) * tokens_per_sample)
    none = torch.zeros(0)
    return Batch(keys, keys, keys, none, (), keys, len(keys), samples)


class Two(nn.Module):
    """A linear layer and a root, whose gradient at 0 is infinite."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(3, 3)
        self.root = Root()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.root(self.up(x)).sum()
        return out


class Root(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - x.detach()).abs().sqrt() if self.training else x


def test_the_first_that_is_not_finite_is_named_with_its_samples() -> None:
    model, watch = Two().eval(), Watch()
    watch.micro_batch(batch(2, (7, 9, 4)))  # six positions
    x = torch.ones(6, 3)
    x[3] = math.inf  # of the second sample
    with watch.hooks(model):
        model(x)
    assert watch.found is not None
    assert (watch.found.what, watch.found.samples) == ("output of up", (9,))


def test_a_gradient_is_named_where_it_stops_being_finite_and_never_handed_on() -> None:
    model, watch = Two().train(), Watch()
    watch.micro_batch(batch(2, (7, 9, 4)))
    with watch.hooks(model):
        model(torch.ones(6, 3)).backward()
    assert watch.found is not None
    assert watch.found.what == "gradient at the output of up"
    assert all(bool(parameter.grad.isnan().all()) for parameter in model.parameters())
    model.zero_grad()
    model.eval()(torch.ones(6, 3)).backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters()), "the hooks are gone"


def test_a_forward_comes_before_a_backward_of_any_rank() -> None:
    backward, forward = Finding("gradient of a", "nan", (1,)), Finding("output of b", "inf", (2, 3))
    said = numerics.culprit([(backward, 1.0), (None, 1.0), (forward, math.nan)])
    assert said.said == "on rank 2 the output of b is inf in samples 2, 3"
    assert said.details == {"rank": 2, "what": "output of b", "value": "inf", "samples": (2, 3)}
    gone = numerics.culprit([(None, 1.0), (None, math.nan)])
    assert gone.said == (
        "run again it is finite, so neither data nor weights: memory or a device failed on rank 1"
    )
    assert json.loads(json.dumps(gone.details)) == {"rank": 1, "what": "finite when run again"}


@given(st.sets(st.integers(1, 60)), st.integers(1, 60))
def test_in_a_row_counts_back_from_the_step(skipped: set[int], step: int) -> None:
    known = sorted(number for number in skipped if number <= step)
    count = 0
    while step - count in skipped:
        count += 1
    assert numerics.in_a_row(step, known) == count


def test_lines_word_for_word() -> None:
    with pytest.raises(NumericsProblem) as caught:
        numerics.require_all_applied(list(range(3, 30, 2)), where="runs/a")
    assert caught.value.line == (
        "error: runs/a: finished and saved, but steps 3, 5, 7, 9, 11, 13, 15, 17 and 6 more were left out: "
        "loss or gradient not finite. Fix: events.jsonl there tells rank, layer and samples; the checkpoint "
        "is good to use"
    )
    numerics.require_all_applied([], where="runs/a")
    with pytest.raises(NumericsProblem) as caught:
        numerics.require_finite_weights(7, [([], ["b"]), (["a"], ["a", "b"])])
    assert caught.value.line == (
        "error: step 7: weight a of rank 1 is not finite. Fix: start the same command again: it resumes from "
        "the last checkpoint, which is finite"
    )
    assert numerics.too_many(9, 3, "the loss is nan: because").line == (
        f"error: step 9: the loss is nan: because (as 3 before it). Fix: {ADVICE}; what was saved is finite"
    )
    assert spikes.too_many(9, 12.5, [{"step": 4}, {"step": 7}]).line == (
        f"error: step 9: the loss jumps to 12.5, after spikes at steps 4, 7. Fix: {ADVICE}; guard.spikes "
        "allows more; what was saved is from before the spike"
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_validation_loss_that_is_not_finite_ends_the_run(value: float) -> None:
    with pytest.raises(NumericsProblem, match=f"step 7: validation loss is {value}"):
        numerics.require_finite(7, "validation loss", value)
    numerics.require_finite(7, "validation loss", 1.0)


def test_the_floor_of_fp16s_loss_scale_is_explained() -> None:
    """With DeepSpeed's own scaler: what it raises is known by its words."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    scaler = DynamicLossScaler(2.0, 1000, 1.0, 1, False)
    scaler.cur_scale = scaler.min_scale
    with pytest.raises(Exception, match="minimum") as caught:
        scaler.update_scale(True)
    known = known_cause(caught.value)
    assert isinstance(known, NumericsProblem)
    assert known.line == loss_scale_floor().line
    assert known.line == (
        "error: DeepSpeed JSON: fp16: gradients overflow fp16 at the smallest loss scale too: no update is "
        f"possible. Fix: use bf16 if the GPU has it; else {ADVICE}; what was saved is finite"
    )


def falling(step: int) -> float:
    """A loss curve with noise, steep in the beginning: from 10.8 to 3."""
    return 3.0 + 7.8 * math.exp(-step / 30) + random.Random(step).gauss(0, 0.03)


def test_a_spike_stands_out_and_a_healthy_curve_has_none() -> None:
    recent: list[float] = []
    for step in range(2000):
        loss = falling(step)
        assert not spikes.is_spike(recent, loss, GUARD), step
        recent = spikes.with_last(recent, loss, GUARD)
        assert len(recent) == min(step + 1, GUARD.spike_window)
    assert spikes.is_spike(recent, falling(2000) + 0.5, GUARD)
    assert not spikes.is_spike(recent, 0.0, GUARD), "only upwards"
    assert not spikes.is_spike(recent, math.nan, GUARD), "that is left out already"
    assert not spikes.is_spike(recent[1:], 100.0, GUARD), "too early to tell"
    assert not spikes.is_spike(recent, 100.0, GuardSection()), "off unless asked for"
    assert spikes.with_last(recent, math.inf, GUARD) == recent
    assert not spikes.is_spike([2.0] * 20, 2.001, GUARD), "rounding of a loss that does not move"
    assert spikes.is_spike([2.0] * 20, 2.1, GUARD)


def test_a_window_is_left_out_and_the_lr_lowered_from_the_checkpoint_on() -> None:
    eight = GlobalBatch(8)
    found = [spikes.spike(14, 112, (12, 96), eight, GUARD), spikes.spike(20, 176, (16, 144), eight, GUARD)]
    assert found[0] == {"step": 14, "back_to": 12, "first_sample": 96, "end_sample": 112, "lr": 0.5}
    assert found[1]["first_sample"] == 152, "three steps"
    assert [spikes.position(n, found) for n in (88, 96, 104, 112, 144, 152, 168, 176)] == [
        *(88, 112, 112, 112, 144, 176, 176, 176)
    ]
    assert [spikes.lr_factor(step, found) for step in (12, 13, 16, 17)] == [1.0, 0.5, 0.5, 0.25]
    assert spikes.lr_factor(5, []) == 1.0


def test_in_a_ramp_up_a_window_is_of_the_steps_own_sizes() -> None:
    """4 sequences in each of three steps, then 8: the last three steps before step 6 took 4 + 8 + 8."""
    growing = GlobalBatch(8, (4,), (3,))
    found = spikes.spike(5, 28, (0, 0), growing, GUARD)
    assert (found["first_sample"], found["end_sample"]) == (8, 28)
    assert spikes.end(0, range(1, 8), growing, []) == growing.samples(7) == 44
    assert spikes.end(4, range(2, 6), growing, [found]) == 28 + 4 + 8 * 2, "4 in step 2, then past it"


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 20)), max_size=5), st.integers(0, 80))
def test_a_position_is_outside_of_all_windows_and_skips_nothing_else(
    windows: list[tuple[int, int]], samples: int
) -> None:
    found: list[dict[str, Any]] = [{"first_sample": a, "end_sample": a + n} for a, n in windows]
    left_out = {number for a, n in windows for number in range(a, a + n)}
    expected = samples
    while expected in left_out:
        expected += 1
    assert spikes.position(samples, found) == expected
