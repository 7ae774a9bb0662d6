"""Ranks whose loss jumps at some data: a program for rank_runner. A run's name says what else is done."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import rank_runner

SEQ_LEN, GLOBAL_BATCH = 32, 8
BAD_DATA = {  # the samples of which steps of a run without spikes; by a run's name
    "clean": (),
    **dict.fromkeys(("two", "limit"), (10, 14)),
    "early": (10,),
}
ELSE = (14,)


@contextmanager
def broken(job: Any) -> Iterator[dict[str, Any]]:
    """`given`: progress lists the windows of windows.json from the start. `ignored`: none is left out."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    from bigtfm import train as module
    from bigtfm.resilience import spikes

    name = job.run.run.name
    forward, resume, position = DeepSpeedEngine.forward, module.resume, spikes.position

    def jumping_forward(engine: Any, *args: Any, **kwargs: Any) -> Any:
        loss, count = forward(engine, *args, **kwargs)
        step = int(kwargs["token_keys"].min()) // SEQ_LEN // GLOBAL_BATCH + 1
        if engine.module.training and step in BAD_DATA.get(name, ELSE):
            loss = loss * 1.5
        return loss, count

    def told_resume(*args: Any) -> Any:
        progress, probe = resume(*args)
        progress.spikes = json.loads((job.run.run_dir.parent / "windows.json").read_text())
        return progress, probe

    DeepSpeedEngine.forward = jumping_forward
    if name == "given":
        module.resume = told_resume
    if name == "ignored":
        spikes.position = lambda samples, _: samples
    try:
        yield {}
    finally:
        DeepSpeedEngine.forward, module.resume, spikes.position = forward, resume, position


def train_jobs() -> None:
    """The program."""
    rank_runner.train_broken_jobs(broken)
