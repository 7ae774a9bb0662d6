"""Ranks with one thing broken: what the tests of the promise must see. Each is a program for rank_runner.

They break the real code in the rank's process, before it is imported where need be.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rank_runner


def mean_of_means() -> None:
    """The loss as DeepSpeed's users weight it: each micro-batch's mean counts the same."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    forward, backward = DeepSpeedEngine.forward, DeepSpeedEngine.backward
    returned: list[Any] = []

    def noted_forward(engine: Any, *args: Any, **kwargs: Any) -> Any:
        returned[:] = forward(engine, *args, **kwargs)
        return tuple(returned)

    def mean_backward(engine: Any, *_: Any, **__: Any) -> Any:
        loss_sum, labels = returned
        return backward(engine, loss_sum / labels.clamp(min=1))

    DeepSpeedEngine.forward, DeepSpeedEngine.backward = noted_forward, mean_backward
    rank_runner.train_jobs()


def dropout_of_the_process() -> None:
    """Dropout from torch's global generator, seeded at the start, as everybody draws it."""
    import torch

    from bigtfm.model import randomness

    assert "bigtfm.model.transformer" not in sys.modules, "it has taken the real one by name"
    randomness.dropout = lambda x, probability, words, site: torch.nn.functional.dropout(x, probability)
    torch.manual_seed(1234)
    rank_runner.train_jobs()


def counting_on_through_a_ramp_up() -> None:
    """DeepSpeed's own count of micro-batches, where the accumulation changes in the middle of a run."""
    from bigtfm.engine import gradients

    gradients.begin = lambda engine, global_batch: engine.set_train_batch_size(global_batch)
    rank_runner.train_jobs()


def _restart_schedule(engine: Any, _: Any, fresh_schedule: dict[str, Any]) -> None:
    engine.lr_scheduler.load_state_dict(fresh_schedule)


def _zero_moments(engine: Any, *_: Any) -> None:
    from bigtfm.engine import fragments

    for fragment in fragments.owned_fragments(engine):
        for key, moment in fragments.moments(engine, fragment).items():
            if key != "fp32":
                moment.zero_()


def _restart_update_count(engine: Any, *_: Any) -> None:
    from bigtfm.engine import fragments

    for fragment in fragments.owned_fragments(engine):
        fragments.restore_update_count(engine, fragment, 0)


def _restart_data(_: Any, progress: Any, *__: Any) -> None:
    progress.samples = 0


def _skip_a_sample(_: Any, progress: Any, *__: Any) -> None:
    progress.samples += 1


BROKEN_LOADS: dict[str, Callable[[Any, Any, dict[str, Any]], None]] = {
    "intact": lambda *_: None,
    "schedule": _restart_schedule,
    "moments": _zero_moments,
    "update-count": _restart_update_count,
    "position": _restart_data,
    "position-by-one": _skip_a_sample,
}


def load_as_named() -> None:
    """Each load leaves out what the run is named after."""
    from bigtfm.engine import loading

    load = loading.load

    def broken_load(found: Path, engine: Any, *args: Any, **kwargs: Any) -> Any:
        fresh_schedule = engine.lr_scheduler.state_dict()
        progress = load(found, engine, *args, **kwargs)
        BROKEN_LOADS[found.parents[1].name](engine, progress, fresh_schedule)
        return progress

    loading.load = broken_load
    rank_runner.train_jobs()


def loads_shown() -> None:
    """Nothing broken: after each load, what the rank holds is written to the run directory.

    Its tensors are called parameter|first element|fp32, exp_avg or exp_avg_sq.
    """
    from safetensors.torch import save_file

    from bigtfm.engine import fragments, loading

    load = loading.load

    def shown_load(found: Path, engine: Any, *args: Any, **kwargs: Any) -> Any:
        progress = load(found, engine, *args, **kwargs)
        held = {
            f"{fragment.name}|{fragment.start}|{key}": view.clone()
            for fragment in fragments.owned_fragments(engine)
            for key, view in fragments.moments(engine, fragment).items()
        }
        save_file(held, found.parents[1] / f"{found.name}-loaded-{os.environ['RANK']}.safetensors")
        return progress

    loading.load = shown_load
    rank_runner.train_jobs()
