"""Weights without a training's state: streamed into a checkpoint and out of one, a tensor at a time."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigtfm.engine import checkpoint
from bigtfm.engine.checkpoint import FORMAT, Progress

Shape = tuple[int, ...]
SHARD_BYTES = 10**9  # a shard holds one tensor at least


def save_weights(
    root: Path,
    shapes: Mapping[str, Shape],
    tensors: Iterable[tuple[str, Tensor]],
    progress: Progress,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Writes `root`/step-NNNNNNNN with weights alone, to begin a run with, and returns it.

    tensors: name and values, in the order of `shapes`; one is held at a time.
    """
    final = root / f"step-{progress.step:08d}"
    building = root / f".building-{final.name}"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    stream, gathered = iter(tensors), []
    for number, names in enumerate(in_shards(shapes, shard_bytes)):
        file, part = f"shard-{number:05d}.safetensors", {name: shapes[name] for name in names}
        write_safetensors(
            building / file,
            {f"{name}|fp32": (math.prod(shape),) for name, shape in part.items()},  # fragments are flat
            ((f"{name}|fp32", tensor.flatten()) for name, tensor in islice(stream, len(part))),
        )
        parameters = {
            name: {
                "shape": shape,
                "fragment": {"file": file, "start": 0, "numel": math.prod(shape)},
                "keys": ["fp32"],
                "updates": 0,
            }
            for name, shape in part.items()
        }
        gathered.append(
            {"files": {file: checkpoint.flush_and_hash(building / file)}, "parameters": parameters}
        )
    checkpoint.finish(building, final, gathered, _state(progress))
    return final


def _state(progress: Progress) -> dict[str, Any]:
    """state.json of a run that has not begun."""
    counters = dict.fromkeys(checkpoint.COUNTERS, 0)
    empty: dict[str, Any] = {"groups": [], "scheduler": None, "loss_scaler": None}
    return {"format": FORMAT, "progress": vars(progress), "counters": counters, **empty}


def in_shards(shapes: Mapping[str, Shape], limit: int) -> list[list[str]]:
    """Names, in order, in groups of at most `limit` bytes of fp32 each, or of one."""
    groups: list[list[str]] = []
    room = 0
    for name, shape in shapes.items():
        size = 4 * math.prod(shape)
        if size > room or not groups:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    return groups


def write_safetensors(path: Path, shapes: Mapping[str, Shape], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """An fp32 safetensors file, written tensor by tensor; safetensors' own function wants all at once.

    tensors: name and values in the order of `shapes`. The format: the header's length in 8 bytes, the header
    as JSON, the values.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, shape), (given, tensor) in zip(shapes.items(), tensors, strict=True):
            assert (name, shape) == (given, tuple(tensor.shape)), (
                f"{given} {tensor.shape} is not {name} {shape}"
            )
            file.write(tensor.detach().to("cpu", torch.float32).contiguous().numpy().data.cast("B"))


def weight_shapes(folder: Path) -> dict[str, Shape]:
    """Names and shapes of the parameters in a verified checkpoint."""
    return {name: tuple(entry["shape"]) for name, entry in checkpoint.read_index(folder).items()}


def read_weights(folder: Path, shapes: Mapping[str, Shape]) -> Iterator[tuple[str, Tensor]]:
    """Name and fp32 values of parameters in a verified checkpoint, one after another.

    Raises:
        NoCheckpoint: it does not hold one of them in this shape.
    """
    with checkpoint.Shards(folder) as shards:
        for name, shape in shapes.items():
            shards.entry(name, shape)
            flat = torch.empty(math.prod(shape))
            shards.fill(flat, name, "fp32", 0)
            yield name, flat.view(shape)
