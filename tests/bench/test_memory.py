"""The counter of live bytes, against torch's own allocator."""

from __future__ import annotations

import itertools
import os

import pytest
import small_models
import torch

from bigtfm.bench.memory import LiveBytes


def allocator_peak(step) -> int:
    """The most bytes that torch has allocated, by its profiler."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            with torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
            ) as found:
                step()
        finally:
            os.dup2(kept, 2)
            os.close(kept)
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda e: e.start_ns())))


@pytest.mark.parametrize("kind", ["gpt", "bert", "transformer"])
def test_it_counts_what_the_allocator_gives(kind: str) -> None:
    model = small_models.make(kind, hidden_size=64, num_layers=3, max_seq_len=128).train()
    inputs = small_models.batch(model, [128] * 8, written=[128] * 8)

    def step() -> None:
        model.zero_grad()
        model(**inputs)[0].backward()

    step()
    model.zero_grad()
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    counter = LiveBytes((small_models.VOCAB,))
    seen = []
    look = counter._see

    def noting(tensor, operation):
        look(tensor, operation)
        seen.append(sum(born.nbytes for key, born in counter.live.items() if key not in weights))

    counter._see = noting
    with counter:
        step()
    model.zero_grad()
    assert max(seen) == pytest.approx(allocator_peak(step), rel=0.03)


def test_what_is_freed_is_gone() -> None:
    counter = LiveBytes(())
    with counter:
        a = torch.zeros(1000)
        b = a.view(10, 100)
        assert sum(born.nbytes for born in counter.live.values()) == 4000
        del a
        assert len(counter.live) == 1
        del b
        assert not counter.live
