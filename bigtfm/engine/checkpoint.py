"""Stage-free checkpoints: named fp32 weights and optimizer moments in sharded safetensors, kill-proof.

    step-00000100/
        shard-00000.safetensors   what rank 0 wrote: tensors "<parameter>|fp32", "<parameter>|exp_avg", ...;
                              of a compressed run "<parameter>|int8" and "|scale" (model/quantized.py)
        index.json                parameter -> shape, and which shard holds which of its elements
        state.json                step, samples, schedule, loss scale; what data, tokenizer, model, seed;
                                  a probe and its loss (bigtfm/engine/probe.py)
        manifest.json             size and SHA-256 of every file above, and of itself; written last

A save goes to a temporary directory, is flushed to the disk, and is renamed when whole. A checkpoint counts
when its manifest verifies; no pointer file can go stale, and nothing is unpickled. Any ZeRO stage and any
world size loads it. bigtfm/engine/saver.py writes them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import stat
from contextlib import nullcontext
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from torch import nn

from bigtfm.config.problems import ConfigProblem, NoCheckpoint, StorageProblem, say
from bigtfm.config.sections import TuneSection
from bigtfm.engine import fragments, storage
from bigtfm.model.lora import is_adapter, update
from bigtfm.model.quantized import KINDS, Quantized, put
from bigtfm.sealed import seal, unseal

if TYPE_CHECKING:
    from bigtfm.engine.distributed import Ranks

FORMAT = 1
NOT_THERE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.ELOOP}  # else: a disk that fails
STORED = {torch.float32: "F32", torch.int8: "I8", torch.uint8: "U8"}  # safetensors' names
VOCABULARY = ("embed_tokens.", "lm_head.")  # parameters with a row a token
READ_ELEMENTS = 2**24  # read at once into memory that is not the file's own kind


@dataclass
class Progress:
    """How far a run is: all that the loop carries from one step to the next beside the engine."""

    step: int = 0
    samples: int = 0  # consumed; the data position, since order is a function of it
    tokens: int = 0
    best_loss: float | None = None  # validation, nats a token
    best_step: int | None = None
    stale_evaluations: int = 0  # since the best one
    unevaluated: bool = False  # the step's evaluation was cut short by a signal
    stream: dict[str, Any] | None = None  # where a streamed source stands (bigtfm/data/streaming.py)
    skipped: list[int] = field(default_factory=list)  # steps that were left out: not finite
    recent: list[float] = field(default_factory=list)  # losses that a spike stands out of
    spikes: list[dict[str, Any]] = field(default_factory=list)  # bigtfm/resilience/spikes.py
    identity: dict[str, Any] = field(default_factory=dict)  # what must not change under a run


class _Checked(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _Fragment(_Checked):
    file: str
    start: int = Field(ge=0)
    numel: int = Field(ge=0)
    checksum: int | None = None


class Entry(_Checked):
    """A parameter in index.json."""

    shape: list[int]
    keys: list[str]
    updates: float = Field(ge=0)
    fragments: list[_Fragment]


class _Counters(_Checked):
    global_steps: int = Field(ge=0)
    global_samples: int = Field(ge=0)
    skipped_steps: int = Field(ge=0)


COUNTERS = tuple(_Counters.model_fields)  # of the engine


class _Probe(_Checked):
    inputs: dict[str, _Values | list[int]]
    setting: dict[str, str]
    loss: float


class _Values(_Checked):
    dtype: Literal["int32", "int64"]
    values: list[int]


class State(_Checked):
    """state.json."""

    progress: Progress
    counters: _Counters
    groups: list[dict[str, Any]]
    scheduler: dict[str, Any] | None
    loss_scaler: dict[str, Any] | None
    probe: _Probe | None = None


INDEX = TypeAdapter(dict[str, Entry])


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the newest `keep`, those of every `keep_every` steps, and the best."""

    keep: int
    keep_every: int = 0  # 0: none for that reason


def folder_of(root: Path, step: int) -> Path:
    """Where the checkpoint of a step stands."""
    return root / f"step-{step:08d}"


def state_of(engine: Any, progress: Progress) -> dict[str, Any]:
    """What state.json says beside the probe: all of a training that is no tensor."""
    groups = fragments.base_optimizer(engine).param_groups
    scaler = fragments.loss_scaler(engine)
    return {
        "format": FORMAT,
        "progress": vars(progress),
        "counters": {name: getattr(engine, name) for name in COUNTERS},
        "groups": [{k: v for k, v in group.items() if isinstance(v, int | float | bool)} for group in groups],
        "scheduler": engine.lr_scheduler.state_dict() if engine.lr_scheduler is not None else None,
        "loss_scaler": {k: v for k, v in vars(scaler).items() if isinstance(v, int | float | bool)}
        if scaler
        else None,
    }


def finish(building: Path, final: Path, gathered: list[dict[str, Any]], state: dict[str, Any]) -> None:
    """Index, state and manifest of the shards in `building`, which then becomes `final`.

    gathered: from each writer {"files": manifest rows, "parameters": index entries with one fragment each}.
    """
    files: dict[str, Any] = {}
    index: dict[str, Any] = {}
    for part in gathered:
        files.update(part["files"])
        for name, entry in part["parameters"].items():
            whole = index.setdefault(
                name, {k: entry[k] for k in ("shape", "keys", "updates")} | {"fragments": []}
            )
            whole["fragments"].append(entry["fragment"])
    for name, content in (("index.json", index), ("state.json", state)):
        (building / name).write_text(json.dumps(content, indent=1), encoding="utf-8")
        files[name] = flush_and_hash(building / name)
    (building / "manifest.json").write_bytes(seal({"format": FORMAT, "files": files}))
    flush_and_hash(building / "manifest.json")
    flush_directory(building)
    old = final.with_name(f".replaced-{final.name}")
    if final.exists():  # left by a run that was resumed from an earlier step
        storage.remove(old)
        final.rename(old)
    building.rename(final)
    flush_directory(final.parent)
    storage.remove(old)


def flush_and_hash(path: Path) -> dict[str, Any]:
    """A file's row of the manifest, once it is on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def flush_directory(path: Path) -> None:
    """Brings to the disk which files a folder has."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def defect(checkpoint: Path, share: tuple[int, int] = (0, 1)) -> str | None:
    """What is wrong with a checkpoint directory; None when every file is there with its SHA-256, and every
    element of every parameter in one of them.

    share: (i, n) reads only every n-th file in full, from the i-th on: n ranks verify it together.

    Raises:
        OSError: a file is there and can't be read, which says nothing about what is in it.
    """
    reading = "manifest.json"
    try:
        manifest = json.loads(unseal(_bytes(checkpoint / reading)))
        if manifest["format"] != FORMAT:
            return f"format {manifest['format']} is not {FORMAT}"
        if manifest.keys() != {"format", "files"}:
            return f"{reading} is damaged"
        files = manifest["files"]
        for number, (name, expected) in enumerate(files.items()):
            if problem := _file_defect(checkpoint, name, expected, hashed=number % share[1] == share[0]):
                return problem
        for name in ("index.json", "state.json"):
            if name not in files:
                return f"manifest.json does not list {name}"
        reading = "state.json"
        state = State.model_validate_json(_bytes(checkpoint / reading))
        if checkpoint.name != folder_of(checkpoint, state.progress.step).name:
            return f"state.json is of step {state.progress.step}"
        reading = "index.json"
        index = INDEX.validate_json(_bytes(checkpoint / reading))
        return _index_defect(index, files)
    except OSError as error:
        if error.errno not in NOT_THERE:
            raise
        return f"{Path(error.filename or checkpoint).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{reading} is damaged"


def _bytes(path: Path) -> bytes:
    _size(path)
    return path.read_bytes()


def _read_json(path: Path) -> dict[str, Any]:
    values = json.loads(_bytes(path))
    if not isinstance(values, dict):
        raise ValueError(f"{path.name} holds no object")
    return values


def _size(path: Path) -> int:
    """Bytes of a plain file; a link may lead out of the folder, and reading a pipe would wait for ever."""
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a plain file", str(path))
    return status.st_size


def _file_defect(checkpoint: Path, name: str, expected: dict[str, Any], hashed: bool) -> str | None:
    """A file of the manifest, compared with its size and, where it is `hashed`, its SHA-256."""
    path = checkpoint / name
    if path.parent != checkpoint:
        return f"{name} is not a plain file name"
    if _size(path) != expected["bytes"]:
        return f"{name} has {_size(path)} bytes instead of {expected['bytes']}"
    if not hashed:
        return None
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
            return f"{name} differs from its SHA-256"
    return None


def _index_defect(index: dict[str, Entry], files: dict[str, Any]) -> str | None:
    """Whether the fragments of each parameter hold each of its elements once, in files of the manifest."""
    for name, entry in index.items():
        reached = 0
        for part in sorted(entry.fragments, key=lambda part: part.start):
            if part.file not in files:
                return f"index.json names {part.file}, which the manifest does not list"
            if part.start != reached:
                break
            reached += part.numel
        if reached != math.prod(entry.shape):
            return f"index.json does not cover {name}"
    return None


def steps_in(root: Path) -> dict[int, Path]:
    """The checkpoint folders below `root` by their steps, newest first; nothing else that is there."""
    found = {
        int(path.name.removeprefix("step-")): path
        for path in (root.glob("step-*") if root.is_dir() else ())
        if re.fullmatch(r"step-\d{8,}", path.name)
    }
    return dict(sorted(found.items(), reverse=True))


def newest(root: Path, ranks: Ranks | None = None) -> Path | None:
    """The newest checkpoint that verifies; None when there is none at all. A line tells of those passed over.

    ranks: all of them look together, each at its share of the files, and find the same.

    Raises:
        NoCheckpoint: there are checkpoints and every one is damaged, or the newest is of another version.
        StorageProblem: one can't be read.
    """
    together = ranks.together(f"reading {root}") if ranks is not None else nullcontext()
    found: list[Path] = []
    with together:
        if ranks is None or ranks.rank == 0:
            found = list(steps_in(root).values())
    found = found if ranks is None else ranks.from_first(found)
    defects: list[str] = []
    for checkpoint in found:
        problem = _found_defect(checkpoint, ranks)
        if problem is None:
            if defects and (ranks is None or ranks.rank == 0):
                say(f"note: passed over {'; '.join(defects)}")
            return checkpoint
        if ranks is None and not checkpoint.exists():  # a training has put a newer one in its place
            return newest(root)
        if problem.startswith("format "):
            raise NoCheckpoint(
                f"the newest checkpoint is of another version: {problem}",
                where=str(checkpoint),
                fix="use the version of bigtfm that wrote it, or move that folder away",
            )
        defects.append(f"{checkpoint.name}: {problem}")
    if defects:
        raise NoCheckpoint(
            f"no checkpoint verifies ({'; '.join(defects)})",
            where=str(root),
            fix="restore one of these folders from a backup, or start anew with another run.name",
        )
    return None


def _found_defect(checkpoint: Path, ranks: Ranks | None) -> str | None:
    """`defect`, by all ranks together where there are any."""
    if ranks is None:
        return defect(checkpoint)
    mine: str | None = None
    with ranks.together(f"reading {checkpoint}"):
        mine = defect(checkpoint, (ranks.rank, ranks.world_size))
    return next(filter(None, ranks.gather(mine)), None)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """state.json of a verified checkpoint."""
    return _read_json(checkpoint / "state.json")


def read_index(checkpoint: Path) -> dict[str, Any]:
    """index.json of a verified checkpoint."""
    return _read_json(checkpoint / "index.json")


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


def load(checkpoint: Path, engine: Any, ranks: Ranks, *, moments: bool = True) -> Progress:
    """Fills the engine from a verified checkpoint, each rank reading only the elements that it keeps.

    moments: False leaves the optimizer as it begins: they are those of another kind.

    Raises:
        NoCheckpoint: the checkpoint's parameters are not this model's.
        StorageProblem: it can't be read.
    """
    state = read_state(checkpoint)
    with ranks.together(f"reading {checkpoint}"), Shards(checkpoint, merged=False) as shards:
        shards.require_trainable()
        shards.require_all_used(engine.module)
        for fragment in fragments.owned_fragments(engine):
            entry = shards.entry(fragment.name, fragment.shape)
            keys = entry["keys"] if moments and fragment.group is not None else ["fp32"]
            for key in fragments.moments(engine, fragment).keys() - set(keys):
                fragments.restore_moment(engine, fragment, key).zero_()  # from before its first update
            for key in keys:
                target = fragments.restore_moment(engine, fragment, key)
                shards.fill(target, fragment.name, key, fragment.start)
            if len(keys) > 1:  # before its first update an optimizer has no state, and makes all of it then
                fragments.restore_update_count(engine, fragment, entry["updates"])
    fragments.weights_follow_masters(engine)
    if engine.lr_scheduler is not None and state["scheduler"] is not None:
        for group, saved in zip(fragments.base_optimizer(engine).param_groups, state["groups"], strict=False):
            group["lr"] = saved["lr"]  # the rest of a group is the JSON's to say
        engine.lr_scheduler.load_state_dict(state["scheduler"])
    scaler, saved = fragments.loss_scaler(engine), state["loss_scaler"]
    if scaler is not None and saved and "cur_iter" in saved:  # without it, it was another precision's
        vars(scaler).update(saved)
    for name in COUNTERS:
        setattr(engine, name, state["counters"][name])
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()  # where an update is due
    return Progress(**state["progress"])


def start_from(checkpoint: Path, engine: Any, heads: tuple[str, ...] = ()) -> None:
    """Fills the engine's weights from a verified checkpoint; moments, counters and schedule stay fresh.

    heads: beginnings of names that need not be the same on both sides: what the model alone has stays fresh.
    So do adapters: those of the checkpoint are merged.

    Raises:
        NoCheckpoint: the checkpoint's parameters are not this model's.
    """
    with Shards(checkpoint) as shards:
        shards.require_trainable()
        shards.require_all_used(engine.module, besides=heads)
        for fragment in fragments.owned_fragments(engine):
            if fragment.name.startswith(heads) and not shards.has(fragment.name, fragment.shape):
                continue
            if is_adapter(fragment.name):
                continue
            known = max(0, shards.shared(fragment.name, fragment.shape) - fragment.start)
            shards.fill(fragment.view(fragment.flat)[:known], fragment.name, "fp32", fragment.start)
    fragments.weights_follow_masters(engine)


def load_weights(checkpoint: Path, model: nn.Module, *, quantized: bool = False) -> None:
    """Fills a plain torch module with the checkpoint's fp32 weights, one parameter at a time.

    Adapters are merged: the module has none. quantized: layers whose matrices are quantised there become such
    layers, else they are filled with fp32.
    """
    with Shards(checkpoint) as shards, torch.no_grad():
        shards.require_all_used(model)
        for name, parameter in list(model.named_parameters()):
            shards.entry(name, tuple(parameter.shape))
            if quantized and (matrix := shards.quantized(name)) is not None:
                put(model, name, matrix)
                continue
            whole = torch.empty(parameter.numel())
            shards.fill(whole, name, "fp32", 0)
            parameter.copy_(whole.view(parameter.shape))


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
        if length > _size(path):
            raise ValueError("no header")
        header: dict[str, Any] = json.loads(file.read(length))
        return file, header | {"data": 8 + length}
    except BaseException:
        file.close()
        raise


def prune(root: Path, retention: Retention, step: int, best_step: int | None) -> None:
    """After a save of `step`: deletes what nobody wants to keep, and what a killed save left behind."""
    for path in (*surplus(root, retention, step, best_step), *leftovers(root)):
        storage.remove(path)


def surplus(root: Path, retention: Retention, step: int, best_step: int | None) -> list[Path]:
    """The checkpoints that nobody wants to keep once that of `step` is there.

    A later step than this one is of a past that the run has left: it was resumed from an earlier one.
    """
    found = steps_in(root)
    past = [number for number in found if number <= step]
    for_good = [number for number in past if retention.keep_every and number % retention.keep_every == 0]
    kept = {best_step, *past[: retention.keep], *for_good}
    return [path for number, path in found.items() if number not in kept]


def leftovers(root: Path) -> list[Path]:
    """What killed saves and deletions left behind."""
    return [path for kind in ("building", "replaced", "removing") for path in root.glob(f".{kind}-*")]
