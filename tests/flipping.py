"""Ranks in whose copies of the weights a bit flips: a program for rank_runner. A run's name is WHAT-STAGE."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import rank_runner

STEP, PARAMETER = 3, "decoder.layers.1.mlp.down.weight"
BIT = 26  # rank 1 flips the one below: a weight around 0.1 becomes 16 times as large or small


@contextmanager
def broken(job: Any) -> Iterator[dict[str, Any]]:
    """Right before the comparison of step STEP a bit flips, once: in rank 1's weight or its fp32 `master`.

    `each` flips another one on every rank, `none` none; `unseen` leaves out the comparisons.
    """
    import torch

    from bigtfm import train as module
    from bigtfm.engine import fragments, replicas

    what, rank, require_equal = (
        job.run.run.name.split("-")[0],
        int(os.environ["RANK"]),
        replicas.require_equal,
    )
    found: dict[str, Any] = {"compared": []}

    def flip(engine: Any) -> None:
        values = next(p for name, p in engine.module.named_parameters() if name == PARAMETER)
        values = getattr(values, "ds_tensor", values)
        if what == "master":
            fragment = next(f for f in fragments.owned_fragments(engine) if f.name == PARAMETER)
            values = fragment.view(fragment.flat)
        values.detach().view(-1)[:1].view(torch.int32).bitwise_xor_(1 << (BIT - rank))

    def after_a_flip(engine: Any, step: int, ranks: Any) -> None:
        found["compared"] = [name for name, _ in replicas.replicas(engine)]
        if step == STEP and what != "none" and (rank == 1 or what == "each"):
            flip(engine)
        if what != "unseen":
            require_equal(engine, step, ranks)

    replicas.require_equal = after_a_flip
    assert module.replicas is replicas
    try:
        yield found
    finally:
        replicas.require_equal = require_equal


def train_jobs() -> None:
    """The program."""
    rank_runner.train_broken_jobs(broken)
