"""Weights, and moments that no engine holds: streamed into a checkpoint and out, a tensor at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigtfm.engine import checkpoint, storage
from bigtfm.engine.checkpoint import FORMAT, Progress
from bigtfm.engine.shards import Shards
from bigtfm.model.lora import is_adapter
from bigtfm.model.quantized import Quantized

Shape = tuple[int, ...]
SHARD_BYTES = 10**9  # a shard holds one parameter at least
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}  # safetensors' names


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
    named = ((f"{name}|fp32", tensor) for name, tensor in tensors)
    return save_training(root, shapes, named, progress, shard_bytes=shard_bytes)


def save_training(
    root: Path,
    shapes: Mapping[str, Shape],
    tensors: Iterable[tuple[str, Tensor]],
    progress: Progress,
    moments: Sequence[str] = (),
    updates: float = 0,
    state: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Writes `root`/step-NNNNNNNN with weights and the optimizer's `moments`, and returns it.

    tensors: "<parameter>|fp32" and "<parameter>|<moment>" for each moment, parameters in the order of
    `shapes`; one is held at a time. updates: that the optimizer has counted. state: what state.json says
    beside the progress, where it is not that of a run which has not begun.
    """
    final = checkpoint.folder_of(root, progress.step)
    building = root / f".building-{final.name}"
    storage.remove(building)
    building.mkdir(parents=True)
    keys, stream, gathered = ["fp32", *moments], iter(tensors), []
    for number, names in enumerate(in_shards(shapes, shard_bytes // len(keys))):
        file = f"shard-{number:05d}.safetensors"
        flat = {f"{name}|{key}": (math.prod(shapes[name]),) for name in names for key in keys}
        part = ((name, tensor.flatten()) for name, tensor in islice(stream, len(flat)))
        write_safetensors(building / file, flat, part)
        parameters = {
            name: {
                "shape": shapes[name],
                "fragment": {"file": file, "start": 0, "numel": math.prod(shapes[name])},
                "keys": sorted(keys),
                "updates": updates,
            }
            for name in names
        }
        gathered.append(
            {"files": {file: checkpoint.flush_and_hash(building / file)}, "parameters": parameters}
        )
    checkpoint.finish(building, final, gathered, _state(progress) | dict(state or {}))
    return final


def save_quantized(
    root: Path,
    parameters: Mapping[str, Tensor | Quantized],
    progress: Progress,
    probe: Mapping[str, Any] | None,
) -> Path:
    """Writes `root`/step-NNNNNNNN of a compressed model, in one shard, and returns it.

    parameters: those of the model by name; matrices that are quantised as their integers and scales. probe:
    what state.json keeps of it (bigtfm/engine/probe.py).
    """
    from safetensors.torch import save

    final = checkpoint.folder_of(root, progress.step)
    building, file = root / f".building-{final.name}", "shard-00000.safetensors"
    building.mkdir(parents=True)
    tensors: dict[str, Tensor] = {}
    index: dict[str, dict[str, Any]] = {}
    for name, value in parameters.items():
        shape: Shape
        parts: dict[str, Tensor]
        if isinstance(value, Quantized):
            shape, parts = (
                (len(value.values), value.columns),
                {value.kind: value.values, "scale": value.scales},
            )
        else:
            shape, parts = tuple(value.shape), {"fp32": value.detach()}
        tensors |= {f"{name}|{key}": part.contiguous() for key, part in parts.items()}
        fragment = {"file": file, "start": 0, "numel": math.prod(shape)}
        index[name] = {"shape": shape, "keys": sorted(parts), "updates": 0, "fragment": fragment}
    (building / file).write_bytes(save(tensors, metadata={"format": "pt"}))
    files = {file: checkpoint.flush_and_hash(building / file)}
    state = _state(progress) | {"probe": probe}
    checkpoint.finish(building, final, [{"files": files, "parameters": index}], state)
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


def safetensors_header(
    shapes: Mapping[str, Shape],
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, str] | None = None,
    align: int = 8,
) -> bytes:
    """How a safetensors file of these tensors, one behind the other, begins: a length in 8 bytes, then JSON.

    metadata: beside "format". align: the tensors begin at a multiple of so many bytes.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % align)
    return len(text).to_bytes(8, "little") + text


def write_safetensors(
    path: Path,
    shapes: Mapping[str, Shape],
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """A safetensors file, written tensor by tensor; safetensors' own function wants all at once.

    tensors: name and values in the order of `shapes`. metadata: beside "format".
    """
    with path.open("wb") as file:
        file.write(safetensors_header(shapes, dtype, metadata))
        for (name, shape), (given, tensor) in zip(shapes.items(), tensors, strict=True):
            assert (name, shape) == (given, tuple(tensor.shape)), (
                f"{given} {tensor.shape} is not {name} {shape}"
            )
            values = tensor.detach().to("cpu", dtype).flatten()
            file.write(values.view(torch.uint8).numpy().data)  # numpy knows no bf16


def weight_shapes(folder: Path) -> dict[str, Shape]:
    """Names and shapes of the parameters in a verified checkpoint, without adapters: they are merged."""
    index = checkpoint.read_index(folder)
    return {name: tuple(entry["shape"]) for name, entry in index.items() if not is_adapter(name)}


def read_weights(folder: Path, shapes: Mapping[str, Shape]) -> Iterator[tuple[str, Tensor]]:
    """Name and fp32 values of parameters in a verified checkpoint, one after another.

    Raises:
        NoCheckpoint: it does not hold one of them in this shape.
    """
    with Shards(folder) as shards:
        for name, shape in shapes.items():
            shards.entry(name, shape)
            flat = torch.empty(math.prod(shape))
            shards.fill(flat, name, "fp32", 0)
            yield name, flat.view(shape)
