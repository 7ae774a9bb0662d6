"""What a verified checkpoint holds, read straight into where it belongs: whole, in parts, or merged."""

from __future__ import annotations

import json
import math
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bigtfm.config.problems import ConfigProblem, NoCheckpoint, StorageProblem
from bigtfm.config.sections import TuneSection
from bigtfm.engine.checkpoint import read_index, read_state, size_of
from bigtfm.model.lora import is_adapter, update
from bigtfm.model.quantized import KINDS, Quantized

STORED = {torch.float32: "F32", torch.int8: "I8", torch.uint8: "U8"}  # safetensors' names
VOCABULARY = ("embed_tokens.", "lm_head.")  # parameters with a row a token
READ_ELEMENTS = 2**24  # read at once into memory that is not the file's own kind


class Shards:
    """Reads runs of elements out of a checkpoint's shards, straight into where they belong.

    merged: a matrix is read with its adapter added, and there are no adapters; False: each as it is stored.
    """

    def __init__(self, checkpoint: Path, *, merged: bool = True) -> None:
        self._folder = checkpoint
        self._index = read_index(checkpoint)
        self._adapters = {name: e for name, e in self._index.items() if merged and is_adapter(name)}
        self._scale = _adapter_scale(checkpoint) if self._adapters else 0.0
        self._index = {name: e for name, e in self._index.items() if name not in self._adapters}
        self._open: dict[str, tuple[BufferedReader, dict[str, Any]]] = {}  # file and where its tensors begin

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, *_: object) -> None:
        for file, _starts in self._open.values():
            file.close()

    def require_all_used(self, model: nn.Module, besides: tuple[str, ...] = ()) -> None:
        """Raises NoCheckpoint when the checkpoint has a parameter that the model lacks.

        besides: beginnings of names that it may have.
        """
        surplus = self._index.keys() - {name for name, _ in model.named_parameters()}
        surplus = {name for name in surplus if not name.startswith(besides)}
        if surplus:
            raise NoCheckpoint(
                f"the checkpoint has {min(surplus)}, which the model lacks",
                where=str(self._folder),
                fix=_as_it_was(min(surplus)),
            )

    def require_trainable(self) -> None:
        """Raises ConfigProblem when weights were quantised: no optimizer could go on with them."""
        if kinds := quantized_kinds(self._index):
            raise ConfigProblem(
                f"its weights are {' and '.join(kinds)}: compressed to be used, not to be trained on",
                where=str(self._folder),
                fix="train the run that it was made of, then compress that",
            )

    def has(self, name: str, shape: tuple[int, ...]) -> bool:
        return name in self._index and tuple(self._index[name]["shape"]) == shape

    def entry(self, name: str, shape: tuple[int, ...]) -> dict[str, Any]:
        entry = self._index.get(name)
        if entry is None or tuple(entry["shape"]) != shape:
            has = f"has {name} as {entry['shape']}" if entry else f"has no {name}"
            raise NoCheckpoint(
                f"the checkpoint {has}, the model needs {list(shape)}",
                where=str(self._folder),
                fix=_as_it_was(name),
            )
        return entry

    def shared(self, name: str, shape: tuple[int, ...]) -> int:
        """How many of a parameter's first elements are here: all, or of the vocabulary's rows those of both.

        Another objective knows other tokens behind the tokenizer's, such as <mask>: their rows stay fresh.

        Raises:
            NoCheckpoint: it has another shape, or is not here.
        """
        entry = self._index.get(name)
        if entry is not None and name.startswith(VOCABULARY) and entry["shape"][1:] == list(shape[1:]):
            return min(entry["shape"][0], shape[0]) * math.prod(shape[1:])
        return math.prod(self.entry(name, shape)["shape"])

    def fill(self, target: torch.Tensor, name: str, key: str, start: int) -> None:
        """Copies elements start .. start + target.numel() of a parameter's `key` into `target` [n].

        Raises:
            NoCheckpoint: a shard does not hold what the index says.
        """
        stop = start + target.numel()
        if key == "fp32" and (matrix := self.quantized(name)) is not None:
            target.copy_(matrix.dequantized().view(-1)[start:stop])
        elif key == "fp32" and f"{name.removesuffix('.weight')}.lora_a" in self._adapters:
            values = torch.empty(target.numel())
            self._fill(values, self._index[name], f"{name}|fp32", start)
            target.copy_(values.add_(self._adapter(name, start, stop)))
        else:
            self._fill(target, self._index[name], f"{name}|{key}", start)

    def _adapter(self, name: str, start: int, stop: int) -> torch.Tensor:
        """What its adapter adds to elements start .. stop of a matrix, fp32 [n]."""
        columns, path = self._index[name]["shape"][1], name.removesuffix(".weight")
        first, end = start // columns, -(-stop // columns)
        rank = self._adapters[f"{path}.lora_a"]["shape"][0]
        a, b = self._rows(f"{path}.lora_a", 0, rank), self._rows(f"{path}.lora_b", first, end)
        added = update(a, b, self._scale)
        return added.view(-1)[start - first * columns : stop - first * columns]

    def _rows(self, name: str, first: int, end: int) -> torch.Tensor:
        """Rows first .. end of a part of an adapter, fp32."""
        entry = self._adapters[name]
        width = entry["shape"][1]
        rows = torch.empty(end - first, width)
        self._fill(rows.view(-1), entry, f"{name}|fp32", first * width)
        return rows

    def _fill(self, target: torch.Tensor, entry: dict[str, Any], tensor: str, start: int) -> None:
        """Elements start .. of a tensor that `entry` tells the fragments of into `target` [n]."""
        stop = start + target.numel()
        for part in entry["fragments"]:
            low, high = max(start, part["start"]), min(stop, part["start"] + part["numel"])
            if low < high:
                place = low - part["start"]
                self._read(part["file"], tensor, place, target[low - start : high - start])

    def quantized(self, name: str) -> Quantized | None:
        """A matrix as `weights.save_quantized` has written it; None: a parameter that was not quantised.

        Raises:
            NoCheckpoint: a shard does not hold what the index says.
        """
        entry = self._index[name]
        kind = next((kind for kind in KINDS if kind in entry["keys"]), None)
        if kind is None:
            return None
        file, (rows, columns) = entry["fragments"][0]["file"], entry["shape"]
        width = -(-columns // 2) if kind == "int4" else columns
        values = torch.empty(rows * width, dtype=torch.uint8 if kind == "int4" else torch.int8)
        self._read(file, f"{name}|{kind}", 0, values)
        scales = torch.empty(rows * self._columns(file, f"{name}|scale"))
        self._read(file, f"{name}|scale", 0, scales)
        return Quantized(kind, values.view(rows, width), scales.view(rows, -1), columns)

    def _columns(self, file: str, tensor: str) -> int:
        """The last dimension of a tensor that `_read` has not refused the file of."""
        _, header = self._open[file]
        shape = header.get(tensor, {}).get("shape") or [1]
        return int(shape[-1])

    def _read(self, name: str, tensor: str, first: int, target: torch.Tensor) -> None:
        """Elements `first` .. of a tensor of a shard into `target`, or what is wrong with it."""
        try:
            self._read_elements(name, tensor, first, target)
        except OSError as error:
            raise StorageProblem(
                f"{name} can't be read: {error.strerror}",
                where=str(self._folder),
                fix="mend the disk or its permissions, then start the same command again",
            ) from None
        except (KeyError, ValueError, TypeError, OverflowError, RecursionError) as error:
            raise NoCheckpoint(
                f"{name} does not hold {tensor} as index.json says: {error}",
                where=str(self._folder),
                fix="remove this folder: the next start resumes from an earlier one",
            ) from None

    def _read_elements(self, name: str, tensor: str, first: int, target: torch.Tensor) -> None:
        """Mapped files would count as this process's memory."""
        if name not in self._open:
            self._open[name] = _open_shard(self._folder / name)
        file, header = self._open[name]
        entry = header[tensor]
        begin, end = entry["data_offsets"]
        stored = target.dtype if target.dtype in (torch.int8, torch.uint8) else torch.float32
        size = stored.itemsize
        if entry["dtype"] != STORED[stored] or (end - begin) < size * (first + target.numel()):
            raise ValueError(f"it has {entry['dtype']} in {end - begin} bytes")
        file.seek(header["data"] + begin + size * first)
        for piece in target.split(READ_ELEMENTS):
            in_place = piece.device.type == "cpu" and piece.dtype == stored
            values = piece if in_place else torch.empty(len(piece), dtype=stored)
            if file.readinto(values.numpy().data.cast("B")) != size * len(values):
                raise ValueError("it is too short")
            if not in_place:
                piece.copy_(values)


def _open_shard(path: Path) -> tuple[BufferedReader, dict[str, Any]]:
    """A safetensors file and its header, with "data": where the values begin."""
    file = path.open("rb")
    try:
        length = int.from_bytes(file.read(8), "little")
        if length > size_of(path):
            raise ValueError("no header")
        header: dict[str, Any] = json.loads(file.read(length))
        return file, header | {"data": 8 + length}
    except BaseException:
        file.close()
        raise


def _as_it_was(name: str) -> str:
    """The fix where a parameter is on one side only."""
    if is_adapter(name):
        return "keep [tune] as it was, or begin another run with run.init_from"
    return "use the [model] table that it was made with (run.toml in the run directory)"


def _adapter_scale(checkpoint: Path) -> float:
    """What the products of a checkpoint's adapters are multiplied with.

    Raises:
        NoCheckpoint: it does not say.
    """
    try:
        recipe = read_state(checkpoint)["progress"]["identity"]["recipe"]
        return TuneSection.model_validate(recipe["tune"]).lora_scale
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        raise NoCheckpoint(
            "it has adapters, and state.json does not say of which lora_alpha and lora_rank",
            where=str(checkpoint),
            fix="use a run of this version",
        ) from None


def quantized_kinds(index: dict[str, Any]) -> list[str]:
    """The kinds of quantised matrices in a checkpoint's index."""
    return sorted({kind for entry in index.values() for kind in KINDS if kind in entry["keys"]})
