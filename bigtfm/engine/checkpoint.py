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
world size loads it. saver.py writes them, shards.py and loading.py read them.
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
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from bigtfm.config.problems import NoCheckpoint, say
from bigtfm.engine import fragments, storage
from bigtfm.sealed import seal, unseal
from bigtfm.whole_files import flush_directory

if TYPE_CHECKING:
    from bigtfm.engine.distributed import Ranks

FORMAT = 1
NOT_THERE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.ELOOP}  # else: a disk that fails


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
    size_of(path)
    return path.read_bytes()


def _read_json(path: Path) -> dict[str, Any]:
    values = json.loads(_bytes(path))
    if not isinstance(values, dict):
        raise ValueError(f"{path.name} holds no object")
    return values


def size_of(path: Path) -> int:
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
    if size_of(path) != expected["bytes"]:
        return f"{name} has {size_of(path)} bytes instead of {expected['bytes']}"
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
