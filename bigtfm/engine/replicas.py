"""Copies that must be the same: a bit that has flipped in one rank's weights is found by comparing them.

At stage 0 every rank has all weights and fp32 masters, and updates them by itself: a difference stays, and
grows. At stages 1 and 2 every rank has all weights too, but takes them anew from their owners after each
update: only what goes wrong again and again, or right before a comparison, shows. At stage 3 nothing is kept
twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bigtfm.config.problems import NumericsProblem
from bigtfm.engine import fragments

if TYPE_CHECKING:
    from bigtfm.engine.distributed import Ranks

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by an element's bytes


def replicas(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """Name and values of what every rank has for itself."""
    if engine.zero_optimization_stage() == 3:
        return
    yield from engine.module.named_parameters()
    if not engine.zero_optimization():
        for fragment in fragments.owned_fragments(engine):
            if fragment.flat.data_ptr() != engine.module.get_parameter(fragment.name).data_ptr():
                yield f"fp32 of {fragment.name}", fragment.view(fragment.flat)


def require_equal(engine: Any, step: int, ranks: Ranks) -> None:
    """Compares a checksum of each tensor over the ranks: the sum of its bit patterns, modulo 2^64.

    One flipped bit always changes it.

    Raises:
        NumericsProblem: on every rank; it names the tensor and, where most ranks agree, those that do not.
    """
    named = list(replicas(engine)) if ranks.world_size > 1 else []
    if not named:
        return
    sums = [
        values.detach().view(-1).view(BITS[values.element_size()]).sum(dtype=torch.int64)
        for _, values in named
    ]
    everyone = ranks.gather_tensor(torch.stack(sums).cpu())  # [ranks, tensors]
    for column, (name, _) in enumerate(named):
        found = everyone[:, column].tolist()
        (usual, count), *others = Counter(found).most_common()
        if not others:
            continue
        differ = [rank for rank, value in enumerate(found) if value != usual]
        if 2 * count > len(found):
            who = f"{name} of rank{'s' if len(differ) > 1 else ''} {', '.join(map(str, differ[:8]))} is not"
            who += " what the other ranks have"
        else:
            who = f"the ranks have different values of {name}, and no majority tells which are right"
        raise NumericsProblem(
            f"{who}: memory or a device has changed a bit",
            where=f"step {step}",
            fix="start the same command again: it resumes from the last checkpoint, before which the copies "
            "were the same; if it happens again, take that machine out",
        )
