"""Best-fit packing: whole documents put together into sequences, so that few are cut.

After Ding et al. 2024, "Fewer truncations improve language modeling". A document longer than a sequence is
cut into full ones first. What is left of it, and every other document, goes by decreasing length into the
fullest sequence that has room for it. That is worked out on groups of equal lengths (cf. Krell et al. 2021,
"Efficient sequence packing without cross-contamination"), and the documents follow in a few passes over
arrays. Nothing is drawn: the plan is a function of the data set and the length of a sequence. It lies beside
the data:

    packed-N/plan.json       the header
    packed-N/first.i64       which piece each sequence begins with, and their number: int64 [sequences + 1]
    packed-N/starts.i64      where pieces begin in the training stream: int64 [pieces]
    packed-N/stops.i64       and where they end
"""

from __future__ import annotations

import hashlib
import os
import shutil
from bisect import bisect_left, insort
from collections import defaultdict, deque
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bigtfm.config.problems import DataProblem, StorageProblem, counted
from bigtfm.data.indexed import SHA256, Signed, TokenDataset
from bigtfm.data.order import Pieces
from bigtfm.data.samples import places, within
from bigtfm.sealed import seal, unseal

HEADER_NAME = "plan.json"
ARRAYS = ("first", "starts", "stops")
DTYPE = np.dtype("<i8")

Ints = NDArray[np.int64]


class Plan(BaseModel):
    """plan.json."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: Literal["bigtfm-plan"] = "bigtfm-plan"
    version: Literal[1] = 1
    dataset: str = Field(pattern=SHA256)  # identity of the data set
    seq_len: int = Field(ge=1)  # tokens in a sequence at most
    sequences: int = Field(ge=1)
    pieces: int = Field(ge=1)
    tokens: int = Field(ge=1)  # all of the training split's
    documents: int = Field(ge=1)
    cut: int = Field(ge=0)  # documents in more than one piece
    cut_by_windows: int = Field(ge=0)  # documents that windows of the same length cut
    sha256: dict[str, str]  # of each array's file

    @property
    def full(self) -> float:
        """Share of the places in all sequences that hold a token."""
        return self.tokens / (self.sequences * self.seq_len)

    def record(self, folder: Path) -> dict[str, Any]:
        """What `bigtfm pack --json` says."""
        return {"folder": str(folder), **self.model_dump(exclude={"format", "version"}), "full": self.full}

    def line(self, folder: Path) -> str:
        """What `bigtfm pack` says."""
        return (
            f"{folder}: {counted(self.sequences, 'sequence')} of up to {self.seq_len:,} tokens, "
            f"{self.full:.2%} full; {self.cut:,} of {counted(self.documents, 'document')} "
            f"{'is' if self.cut == 1 else 'are'} cut (in windows: {self.cut_by_windows:,})"
        )


def best_fit_decreasing(lengths: Ints, capacity: int) -> Ints:
    """The bin of each item: int64 [n] -> int64 [n]; lengths 1 .. capacity.

    Items go by decreasing length, equal ones in their order, into the bin with the least room that is enough,
    of bins with equal room into the one that has had it longest, and else into a new bin.

    While items of one length l are packed, the bin in use stays the fullest that has room, until it has none:
    a bin with room r takes r // l of them. So whole groups of bins move from one room to another.
    """
    room_left = capacity - lengths
    small = room_left.astype(np.uint16) if capacity < 2**16 else room_left  # sorted by radix
    order = np.argsort(small, kind="stable")
    counts = np.bincount(lengths)
    present = np.flatnonzero(counts)[::-1]
    by_room: dict[int, deque[Ints]] = defaultdict(deque)  # bins with that much room, in arrays, oldest first
    rooms: list[int] = []  # the rooms that some bin has, ascending
    opened = 0
    chosen: list[Ints] = []  # the bin of each item, by decreasing length

    def put(bins: Ints, room: int, oldest: bool = False) -> None:
        if len(bins) and room:
            if not by_room[room]:
                insort(rooms, room)
            by_room[room].insert(0 if oldest else len(by_room[room]), bins)

    for length, left in zip(present.tolist(), counts[present].tolist(), strict=True):
        while left:
            at = bisect_left(rooms, length)
            if at < len(rooms):
                room = rooms[at]
                bins = by_room[room].popleft()
                if not by_room[room]:
                    del rooms[at]
            else:
                room = capacity
                bins = np.arange(opened, opened - (-left // (room // length)))
                opened += len(bins)
            each = room // length
            filled, rest = divmod(min(left, each * len(bins)), each)
            chosen.append(np.repeat(bins[:filled], each))
            put(bins[:filled], room - each * length)
            partly = bins[filled : filled + bool(rest)]
            chosen.append(np.repeat(partly, rest))
            put(partly, room - rest * length)
            put(bins[filled + bool(rest) :], room, oldest=True)
            left -= filled * each + rest
    bins_of = np.empty(len(lengths), np.int64)
    bins_of[order] = np.concatenate([np.empty(0, np.int64), *chosen])
    return bins_of


def make_plan(starts: Ints, num_tokens: int, seq_len: int) -> dict[str, Ints]:
    """The plan's arrays for documents that begin at `starts` in a stream of `num_tokens`."""
    ends = np.append(starts[1:], num_tokens)
    full, rests = np.divmod(ends - starts, seq_len)  # full sequences of each document, and tokens left
    full_starts = np.repeat(starts, full) + within(full) * seq_len
    has_rest = np.flatnonzero(rests)
    bins = best_fit_decreasing(rests[has_rest], seq_len)
    by_bin = has_rest[np.argsort(bins, kind="stable")]
    first = np.append(
        np.arange(len(full_starts)), len(full_starts) + np.cumsum(np.append(0, np.bincount(bins)))
    )
    return {
        "first": first,
        "starts": np.concatenate([full_starts, ends[by_bin] - rests[by_bin]]),
        "stops": np.concatenate([full_starts + seq_len, ends[by_bin]]),
    }


def pack(path: str | Path, seq_len: int) -> tuple[Path, Plan]:
    """Writes the plan of a data set's training split, unless it is there; returns its folder and header.

    Raises:
        DataProblem: the data set is missing, damaged or has no training text.
        StorageProblem: the plan can't be written.
    """
    dataset = TokenDataset.open(path)
    folder = folder_of(dataset, seq_len)
    try:
        return folder, Packed.open(dataset, seq_len).plan
    except DataProblem:
        pass  # there is none, or one of other data, or a damaged one
    split = dataset.split("train")
    if not split.num_tokens:
        raise DataProblem("the training split is empty", where=str(path), fix="prepare more text")
    starts = split.document_starts(0, split.num_tokens)
    ends = np.append(starts[1:], split.num_tokens)
    arrays = make_plan(starts, split.num_tokens, seq_len)
    plan = Plan(
        dataset=dataset.identity,
        seq_len=seq_len,
        sequences=len(arrays["first"]) - 1,
        pieces=len(arrays["starts"]),
        tokens=split.num_tokens,
        documents=len(starts),
        cut=int(np.count_nonzero(ends - starts > seq_len)),
        cut_by_windows=int(np.count_nonzero(starts // seq_len != (ends - 1) // seq_len)),
        sha256={name: hashlib.sha256(array.astype(DTYPE).data).hexdigest() for name, array in arrays.items()},
    )
    try:
        _write(folder, plan, arrays)
    except OSError as error:
        raise StorageProblem(
            f"can't be written: {error}", where=str(folder), fix="check space and permissions"
        ) from None
    return folder, plan


def _write(folder: Path, plan: Plan, arrays: dict[str, Ints]) -> None:
    """All of it under another name first: the folder is there when it is complete."""
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
    unfinished.mkdir()
    try:
        contents = {f"{name}.i64": array.astype(DTYPE).tobytes() for name, array in arrays.items()}
        for name, content in {**contents, HEADER_NAME: seal(plan.model_dump())}.items():
            with (unfinished / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def folder_of(dataset: TokenDataset, seq_len: int) -> Path:
    """Where the plan of a data set lies."""
    return dataset.path / f"packed-{seq_len}"


class Packed:
    """A data set's training split in packed sequences; the plan is mapped and read where it is needed.

    start: the split's first position in the stream.
    """

    def __init__(self, folder: Path, plan: Plan, start: int = 0) -> None:
        self.folder, self.plan, self.start = folder, plan, start
        sizes = {"first": plan.sequences + 1, "starts": plan.pieces, "stops": plan.pieces}
        self._first, self._starts, self._stops = (
            np.asarray(np.memmap(folder / f"{name}.i64", DTYPE, "r", shape=(size,)))
            for name, size in sizes.items()
        )

    def __reduce__(self) -> tuple[object, ...]:  # another process maps the files
        return type(self), (self.folder.absolute(), self.plan, self.start)

    @classmethod
    def open(cls, dataset: TokenDataset, seq_len: int, start: int = 0) -> Packed:
        """The plan that `bigtfm pack` has written.

        Raises:
            DataProblem: there is none, or it is damaged, or of another data set.
        """
        folder = folder_of(dataset, seq_len)

        def problem(what: str) -> DataProblem:
            fix = f"run `bigtfm pack {dataset.path} --seq-len {seq_len}`"
            return DataProblem(what, where=str(folder), fix=fix)

        try:
            plan = Plan.model_validate_json(unseal((folder / HEADER_NAME).read_bytes()))
            if (plan.dataset, plan.seq_len) != (dataset.identity, seq_len):
                raise problem("it was made for other data than stand there now")
            for name, size in zip(ARRAYS, (plan.sequences + 1, plan.pieces, plan.pieces), strict=True):
                file = folder / f"{name}.i64"
                if file.stat().st_size != size * DTYPE.itemsize:
                    raise problem(f"{file.name} is damaged: it has not the size that {HEADER_NAME} says")
            packed = cls(folder, plan, start)
            for array in packed.files:
                if not array.large:
                    array.verify()
            return packed
        except FileNotFoundError:
            raise problem("data.packing best_fit needs a plan, and there is none") from None
        except ValidationError as error:
            raise problem(f"{HEADER_NAME} is damaged: {error.errors()[0]['msg']}") from None
        except ValueError as error:
            raise problem(f"{HEADER_NAME} is damaged: {error}") from None
        except OSError as error:
            raise problem(f"can't be read: {error}") from None

    @property
    def files(self) -> list[Signed]:
        """The plan's arrays."""
        fix = f"run `bigtfm pack {self.folder.parent} --seq-len {self.plan.seq_len}`"
        return [Signed(self.folder / f"{name}.i64", self.plan.sha256.get(name, ""), fix) for name in ARRAYS]

    @property
    def size(self) -> int:
        return self.plan.sequences

    @property
    def tokens_per_sample(self) -> float:
        return self.plan.tokens / self.plan.sequences

    def pieces(self, indices: Ints) -> Pieces:
        begins = self._first[indices]
        counts = self._first[indices + 1] - begins
        which = places(begins, counts)
        samples = np.repeat(np.arange(len(indices)), counts)
        return Pieces(indices, samples, self.start + self._starts[which], self.start + self._stops[which])
