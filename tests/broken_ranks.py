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


def _restart_schedule(engine: Any, fresh: dict[str, Any]) -> None:
    engine.lr_scheduler.load_state_dict(fresh["scheduler"])


def _zero_moments(engine: Any, _: dict[str, Any]) -> None:
    from bigtfm.engine import fragments

    for fragment in fragments.owned_fragments(engine):
        for key, moment in fragments.moments(engine, fragment).items():
            if key != "fp32":
                moment.zero_()


def _restart_update_count(engine: Any, _: dict[str, Any]) -> None:
    from bigtfm.engine import fragments

    for fragment in fragments.owned_fragments(engine):
        fragments.restore_update_count(engine, fragment, 0)


BROKEN_LOADS: dict[str, Callable[[Any, dict[str, Any]], None]] = {
    "intact": lambda engine, fresh: None,
    "schedule": _restart_schedule,
    "moments": _zero_moments,
    "update-count": _restart_update_count,
    "position": lambda engine, fresh: None,
    "position-by-one": lambda engine, fresh: None,
}
POSITIONS = {"position": lambda samples: 0, "position-by-one": lambda samples: samples + 1}


def load_as_named() -> None:
    """After a load something is as if it had not been restored: what the run is named after."""
    from bigtfm.engine import checkpoint

    load = checkpoint.load

    def broken_load(found: Path, engine: Any, *args: Any, **kwargs: Any) -> Any:
        name = found.parents[1].name
        fresh = {"scheduler": engine.lr_scheduler.state_dict()}
        progress = load(found, engine, *args, **kwargs)
        BROKEN_LOADS[name](engine, fresh)
        progress.samples = POSITIONS.get(name, lambda samples: samples)(progress.samples)
        return progress

    checkpoint.load = broken_load
    rank_runner.train_jobs()


def masters_shown() -> None:
    """Nothing broken: after each load the fp32 masters are written beside the checkpoint's folder."""
    from safetensors.torch import save_file

    from bigtfm.engine import checkpoint, fragments

    load = checkpoint.load

    def shown_load(found: Path, engine: Any, *args: Any, **kwargs: Any) -> Any:
        progress = load(found, engine, *args, **kwargs)
        masters = {
            f"{fragment.name}|{fragment.start}|{key}": view.clone()
            for fragment in fragments.owned_fragments(engine)
            for key, view in fragments.moments(engine, fragment).items()
        }
        save_file(masters, found.parents[1] / f"{found.name}-loaded-{os.environ['RANK']}.safetensors")
        return progress

    checkpoint.load = shown_load
    rank_runner.train_jobs()
