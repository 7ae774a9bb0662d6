"""Saving while training goes on: it waits for a copy in host memory, and a thread writes that to the disk."""

from __future__ import annotations

import copy
import errno
import fcntl
import hashlib
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from io import FileIO
from mmap import mmap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bigtfm.config.problems import DIVERGED, NumericsProblem, StorageProblem
from bigtfm.engine import checkpoint, checksums, fragments, storage
from bigtfm.engine.checkpoint import Progress, Retention
from bigtfm.engine.fragments import Fragment
from bigtfm.engine.probe import Probe
from bigtfm.engine.weights import safetensors_header

if TYPE_CHECKING:
    from bigtfm.engine.distributed import Ranks

PAGE = 4096  # bytes; O_DIRECT wants memory, places and lengths in these
PIECE = 2**23  # bytes hashed and written at once, while they are in the cache


@dataclass(frozen=True)
class Place:
    """Where a fragment's weights or one of its moments stand in the shard, in elements."""

    key: str
    first: int
    numel: int


BESIDES = 2**16  # bytes of a checkpoint that are no tensors, at least
Tell = Callable[..., None]  # the name of an event, a line about it, and details


class Saver:
    """Writes checkpoints of an engine below `root`, one at a time.

    `save` copies what this rank keeps into a buffer on the host that is laid out as the shard's file, and
    returns. A thread hashes, writes and flushes the buffer, and meets the other ranks' threads over a process
    group of their own. The buffer, as large as the shard, is kept for the next save. It goes to the disk past
    the page cache, where the file system lets it: that spares the processor a copy, and data sets stay there.

    probe: computed again at every save; None: the checkpoints have none.
    saved: the step that is on the disk already; 0: none.
    asynchronous: False makes `save` return when the checkpoint is on the disk.
    retry_seconds: how long a save that fails is tried again, since many failures of a disk pass.
    tell: hears, on rank 0, of saves that fail and of a disk that is too slow for them.
    flush_log: brings to the disk, on rank 0, what a checkpoint must not be ahead of; raises OSError.
    """

    def __init__(
        self,
        root: Path,
        engine: Any,
        ranks: Ranks,
        probe: Probe | None,
        retention: Retention,
        *,
        saved: int = 0,
        asynchronous: bool = True,
        retry_seconds: float = 0.0,
        tell: Tell = lambda *_, **__: None,
        flush_log: Callable[[], None] = lambda: None,
    ) -> None:
        self._root, self._engine, self._ranks, self._aside = root, engine, ranks, ranks.aside
        self._probe, self._retention, self._asynchronous = probe, retention, asynchronous
        self._retry_seconds, self._tell = retry_seconds, tell if ranks.rank == 0 else lambda *_, **__: None
        self._flush_log = flush_log
        self._folder = root.stat().st_ino
        self._saved = saved or None
        self._file_image = mmap(-1, PAGE)  # header and buffer
        self._buffer = torch.empty(0)
        self._layout: dict[str, list[Place]] = {}  # by parameter name; what this rank writes
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writer.submit(int)  # starts its thread while there is memory for one
        self._writing: Future[None] | None = None
        self._closing = threading.Event()

    @property
    def failed(self) -> bool:
        """Whether a save has failed that nobody has waited for yet; `wait` raises why, on every rank."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    @property
    def saved(self) -> int | None:
        """The step of the last checkpoint; None: there is none."""
        return self._saved

    def went_back(self, step: int) -> None:
        """The run stands at an earlier checkpoint again."""
        self._saved = step

    def wait(self) -> None:
        """Returns when no save is in flight.

        Raises:
            StorageProblem: on every rank, when any rank could not write; earlier checkpoints are untouched.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            self._ranks.pulse.enter("save")
            writing.result()

    def save(self, progress: Progress) -> None:
        """A checkpoint of this step, unless there is one, by all ranks together; waits for the one before it.

        Raises:
            StorageProblem: as `wait`.
            NumericsProblem: the model's loss is not finite; nothing is written.
        """
        self._wait_for_the_one_before(progress.step)
        if progress.step == self._saved:
            return
        self._ranks.pulse.enter("save")
        state = checkpoint.state_of(self._engine, progress)
        if self._probe is not None:
            state["probe"] = self._probe.with_loss(self._engine, self._ranks.device)
            self._require_finite(progress.step, self._ranks.from_first(state["probe"]["loss"]))
        entries = self._copy()
        self._saved = progress.step
        self._writing = self._writer.submit(self._write, copy.deepcopy(state), entries)
        if not self._asynchronous:
            self.wait()

    def _wait_for_the_one_before(self, step: int) -> None:
        behind, began = self._writing is not None and not self._writing.done(), time.monotonic()
        self.wait()
        seconds = time.monotonic() - began
        if behind and seconds > 1:
            self._tell(
                "slow save",
                f"at step {step} training waited {seconds:.1f} s until the one before was on the disk: "
                "raise save.every, or save to a faster disk",
                step=step,
                seconds=round(seconds, 3),
            )

    def _require_finite(self, step: int, loss: float) -> None:
        if not math.isfinite(loss):
            raise NumericsProblem(
                f"after the update the loss of the probe is {loss}",
                where=f"step {step}",
                fix=f"{DIVERGED}; what was saved before is sound",
            )

    def close(self) -> None:
        """Lets a save in flight end, whatever became of it; one that has failed is not tried again."""
        self._closing.set()
        self._writer.shutdown(wait=True)

    def _copy(self) -> dict[str, Any]:
        """Copies this rank's shard into the buffer; returns its entries of the index."""
        entries: dict[str, Any] = {}
        for fragment in self._mine():
            views = fragments.moments(self._engine, fragment)
            places = self._layout.get(fragment.name, [])
            if [(place.key, place.numel) for place in places] != [(k, v.numel()) for k, v in views.items()]:
                self._lay_out()  # the first save, or the first one with moments
                return self._copy()
            for place, view in zip(places, views.values(), strict=True):
                self._buffer[place.first : place.first + place.numel].copy_(view, non_blocking=True)
            entries[fragment.name] = {
                "shape": fragment.shape,
                "fragment": {"file": self._file, "start": fragment.start, "numel": fragment.numel},
                "keys": sorted(views),
                "updates": fragments.update_count(self._engine, fragment),
            }
        if self._ranks.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        return entries

    def _lay_out(self) -> None:
        """Gives every tensor its place, and makes a buffer for all of them."""
        self._layout, end = {}, 0
        for fragment in self._mine():
            places = self._layout.setdefault(fragment.name, [])
            for key, view in fragments.moments(self._engine, fragment).items():
                places.append(Place(key, end, view.numel()))
                end += view.numel()
        self._unpin()
        shapes = {f"{n}|{place.key}": (place.numel,) for n, group in self._layout.items() for place in group}
        header = safetensors_header(shapes, align=PAGE)
        self._bytes = len(header) + 4 * end
        self._file_image = mmap(-1, self._bytes + -self._bytes % PAGE)
        self._file_image[: len(header)] = header
        self._buffer = torch.frombuffer(self._file_image, dtype=torch.float32, count=end, offset=len(header))
        if self._ranks.device.type == "cuda" and end:
            # Pinned as it is: torch would round up to a power of two.
            torch.cuda.cudart().cudaHostRegister(self._buffer.data_ptr(), 4 * end, 0)

    def _unpin(self) -> None:
        if self._ranks.device.type == "cuda" and self._buffer.numel():
            torch.cuda.cudart().cudaHostUnregister(self._buffer.data_ptr())

    def _mine(self) -> Iterator[Fragment]:
        return fragments.written_fragments(self._engine, self._ranks.rank, self._ranks.world_size)

    @property
    def _file(self) -> str:
        return f"shard-{self._ranks.rank:05d}.safetensors"

    def _write(self, state: dict[str, Any], entries: dict[str, Any]) -> None:
        """What the thread does. Its ranks' collectives are its own, and all ranks try equally often."""
        step, pauses = state["progress"]["step"], storage.pauses(self._retry_seconds)
        began, failed = time.monotonic(), False
        while True:
            try:
                self._try(state, entries)
                break
            except StorageProblem as problem:
                pause, failed = next(pauses, None), True
                if pause is None:
                    raise
                again = f"the checkpoint of step {step} is tried again in {pause:.1f} s: {problem.what}"
                self._tell("save failed", again, step=step, what=problem.what)
                self._pause(pause)
                if any(self._aside.sum([self._closing.is_set()])):
                    raise
        self._ranks.pulse.took("save", time.monotonic() - began)
        if failed:
            self._tell("save done", f"the checkpoint of step {step} is on the disk now", step=step)

    def _pause(self, seconds: float) -> None:
        """Before another try; it is no hang."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not self._closing.wait(min(left, 1.0)):
            self._ranks.pulse.moves()

    def _try(self, state: dict[str, Any], entries: dict[str, Any]) -> None:
        ranks, final = self._aside, checkpoint.folder_of(self._root, state["progress"]["step"])
        building = self._root / f".building-{final.name}"
        needed = BESIDES + int(ranks.sum([self._buffer.nbytes])[0])
        try:
            with ranks.together(f"writing {final}"), storage.told_when_full(self._root, needed):
                storage.require_same(self._root, self._folder)
                if ranks.rank == 0:
                    storage.remove(building)
                    self._make_room(needed, state["progress"])
            self._write_into(building, final, needed, state, entries)
        except BaseException:
            if ranks.rank == 0:  # the room may be needed
                storage.remove(building)
            raise

    def _make_room(self, needed: int, progress: dict[str, Any]) -> None:
        """Where it is short, what would go after this save goes before it; the newest stays.

        Raises:
            StorageProblem: it is not enough.
        """
        free = storage.free_bytes(self._root)
        if free is not None and free < needed:
            fewer = replace(self._retention, keep=max(1, self._retention.keep - 1))
            checkpoint.prune(self._root, fewer, progress["step"], progress["best_step"])
            free = storage.free_bytes(self._root)
        if free is not None and free < needed:
            raise storage.full(storage.FULL[errno.ENOSPC], self._root, needed)

    def _write_into(
        self, building: Path, final: Path, needed: int, state: dict[str, Any], entries: dict[str, Any]
    ) -> None:
        progress, ranks = state["progress"], self._aside
        files: dict[str, Any] = {}
        with ranks.together(f"writing {final}"), storage.told_when_full(self._root, needed):
            building.mkdir(exist_ok=True)  # not its parents: a run directory that is gone stays away
            if entries:
                self._require_finite_copies(progress["step"])
                files[self._file] = self._write_shard(building / self._file)
                for name, entry in entries.items():
                    weights = next(place for place in self._layout[name] if place.key == "fp32")
                    values = self._buffer[weights.first : weights.first + weights.numel]
                    entry["fragment"]["checksum"] = checksums.checksum(values, entry["fragment"]["start"])
                    self._ranks.pulse.moves()
        gathered = ranks.gather({"files": files, "parameters": entries})
        with ranks.together(f"writing {final}"), storage.told_when_full(self._root, needed):
            if ranks.rank == 0:
                self._flush_log()
                checkpoint.finish(building, final, gathered, state)
                checkpoint.prune(self._root, self._retention, progress["step"], progress["best_step"])

    def _require_finite_copies(self, step: int) -> None:
        """A weight or a moment may be NaN although the loss of the probe is not."""
        for name, places in self._layout.items():
            self._ranks.pulse.moves()
            for place in places:
                extremes = torch.aminmax(self._buffer[place.first : place.first + place.numel])
                if not all(map(math.isfinite, map(float, extremes))):
                    raise NumericsProblem(
                        f"{place.key} of {name} is not finite on rank {self._ranks.rank}",
                        where=f"step {step}",
                        fix="start the same command again: it resumes from the last checkpoint, which is "
                        "finite",
                    )

    def _write_shard(self, path: Path) -> dict[str, Any]:
        """The buffer as a safetensors file; returns its row of the manifest.

        The hash is of what was meant to be written, so that a disk that keeps something else is found out.
        Each piece goes to the disk before the next: one that is slow but moves is no hang.
        """
        sha256, image = hashlib.sha256(), memoryview(self._file_image)
        with path.open("wb", buffering=0) as file:
            direct = _past_cache(file, True)
            while (at := file.tell()) < len(image):
                try:
                    file.write(image[at : at + PIECE])
                except OSError as error:
                    if error.errno != errno.EINVAL or not _past_cache(file, False):
                        raise
                    direct = False
                if not direct:
                    os.fsync(file.fileno())
                self._ranks.pulse.moves()
                sha256.update(image[at : min(file.tell(), self._bytes)])
            file.truncate(self._bytes)
            os.fsync(file.fileno())
        return {"bytes": self._bytes, "sha256": sha256.hexdigest()}


def _past_cache(file: FileIO, wanted: bool) -> bool:
    """Whether O_DIRECT could be switched on or off: not every file system has it, nor keeps to it."""
    direct = getattr(os, "O_DIRECT", 0)
    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    with suppress(OSError):
        fcntl.fcntl(file, fcntl.F_SETFL, flags | direct if wanted else flags & ~direct)
    return fcntl.fcntl(file, fcntl.F_GETFL) != flags
