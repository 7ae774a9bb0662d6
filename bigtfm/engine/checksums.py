"""Checksums of weights that are the same however the weights are cut into fragments."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bigtfm.engine import fragments
from bigtfm.engine.checkpoint import read_index
from bigtfm.engine.shards import Shards

if TYPE_CHECKING:
    from bigtfm.engine.distributed import Ranks


def checksum(values: torch.Tensor, start: int) -> int:
    """Sum of each element's bits times an odd number of its own, modulo 2^64.

    values: fp32 [n] on the host, elements start .. start + n of a parameter. The checksum of a parameter is
    the sum of its fragments', wherever it is cut: it needs no more than each rank's own elements.
    """
    total, size = 0, 2**16  # in pieces: 64-bit copies stay in the cache
    odd = torch.arange(min(size, values.numel())) * 2 + 1
    for first in range(0, values.numel(), size):
        bits = values[first : first + size].view(torch.int32).to(torch.int64)
        total += int((bits * (odd[: len(bits)] + 2 * (start + first))).sum())
    return total % 2**64


def engine_checksums(engine: Any, ranks: Ranks) -> dict[str, int]:
    """Checksum of each parameter's fp32 weights in the engine, put together from all ranks."""
    mine: dict[str, int] = {}
    for fragment in fragments.written_fragments(engine, ranks.rank, ranks.world_size):
        values = fragment.view(fragment.flat).to("cpu", torch.float32)
        mine[fragment.name] = mine.get(fragment.name, 0) + checksum(values, fragment.start)
    parts = ranks.gather(mine)
    return {name: sum(part.get(name, 0) for part in parts) for name in set().union(*parts)}


def stored_checksums(checkpoint: Path) -> dict[str, int]:
    """The same of what the shards hold."""
    sums = {}
    with Shards(checkpoint, merged=False) as shards:
        for name, entry in read_index(checkpoint).items():
            values = torch.empty(math.prod(entry["shape"]))
            shards.fill(values, name, "fp32", 0)
            sums[name] = checksum(values, 0)
    return sums


def changed_tensors(checkpoint: Path, checksums: dict[str, int]) -> list[str]:
    """Parameters of a checkpoint whose weights do not have these checksums."""
    changed = []
    for name, entry in read_index(checkpoint).items():
        saved = [fragment.get("checksum") for fragment in entry["fragments"]]
        if None not in saved and (sum(saved) - checksums[name]) % 2**64:
            changed.append(name)
    return changed
