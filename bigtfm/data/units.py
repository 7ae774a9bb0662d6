"""Units of work: the tokens of each on disk, complete or not there at all; then all of them joined.

A finished unit is a folder  units/00000012/  with train.bin, train.idx, validation.bin, validation.idx (as in
the data set, positions counted from the unit's start) and record.json. It is written under another name and
renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from bigtfm.data.documents import Row, Where, document_hash, read_documents
from bigtfm.data.examples import Example, Reader, TaskSetting, told
from bigtfm.data.filtering.units import Filtering, kept, kept_documents
from bigtfm.data.indexed import INDEX_DTYPE, MARK_SHIFT, Tokens
from bigtfm.data.sources import Reading, Unit
from bigtfm.data.tokenizer import Tokenizer, load_tokenizer

SPLITS = ("train", "validation")
BATCH_BYTES = 1 << 20  # documents are tokenised some at a time, about this many bytes
COPY_BYTES = 1 << 24


@dataclass(frozen=True)
class Job:
    """What every unit of a data set shares."""

    units: Path  # the folder that holds units
    tokenizer: Path
    dtype: str
    reading: Reading
    validation_fraction: float
    task: TaskSetting | None = None
    filtering: Filtering | None = None


@dataclass
class Counts:
    """What a split holds; `bytes` is the documents' text, `max_id` the largest id (-1: none)."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    max_id: int = -1

    def add(self, other: Counts) -> None:
        self.documents += other.documents
        self.tokens += other.tokens
        self.bytes += other.bytes
        self.max_id = max(self.max_id, other.max_id)


@dataclass
class Record:
    """What a unit holds. `smallest_hash` is of its documents (2**64: none)."""

    splits: dict[str, Counts]
    empty_documents: int = 0  # also rows that a task leaves out
    smallest_hash: int = 2**64
    longest: int = 0  # examples of as many tokens as a task allows

    @classmethod
    def parse(cls, text: bytes) -> Record:
        values = json.loads(text)
        return cls(
            **{**values, "splits": {name: Counts(**counts) for name, counts in values["splits"].items()}}
        )


def unit_folder(job: Job, number: int, chosen: int | None) -> Path:
    """Where unit `number` lies; with a `chosen` document it is another one."""
    return job.units / (f"{number:08d}" if chosen is None else f"{number:08d}-chosen")


def read_record(job: Job, number: int, chosen: int | None = None) -> Record | None:
    """The record of a finished unit; None where there is none, or its files aren't whole."""
    folder = unit_folder(job, number, chosen)
    itemsize = np.dtype(job.dtype).itemsize
    try:
        record = Record.parse((folder / "record.json").read_bytes())
        for name, counts in record.splits.items():
            if (folder / f"{name}.bin").stat().st_size != counts.tokens * itemsize:
                return None
            if (folder / f"{name}.idx").stat().st_size != counts.documents * INDEX_DTYPE.itemsize:
                return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return record


def write_unit(job: Job, number: int, spans: Unit, chosen: int | None = None) -> Record:
    """Tokenise the documents of `spans` into the unit's folder.

    A document goes to validation if its hash is `chosen`, or below `job.validation_fraction` of 2**64.
    """
    folder = unit_folder(job, number, chosen)
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    record = _write_tokens(job, number, spans, chosen, unfinished)
    values = {**vars(record), "splits": {name: vars(counts) for name, counts in record.splits.items()}}
    write_synced(unfinished / "record.json", json.dumps(values).encode())
    if folder.exists():
        shutil.rmtree(folder)
    unfinished.rename(folder)
    return record


def _write_tokens(job: Job, number: int, spans: Unit, chosen: int | None, folder: Path) -> Record:
    tokenizer = _tokenizer(job.tokenizer)
    threshold = int(job.validation_fraction * 2**64)
    record = Record({name: Counts() for name in SPLITS})
    with ExitStack() as stack:
        writers = {
            name: stack.enter_context(_SplitWriter(folder / name, record.splits[name], tokenizer, job.dtype))
            for name in SPLITS
        }
        if job.task is not None:
            rows: Iterable[tuple[Row, Where]] = chain.from_iterable(map(job.task.rows, spans))
            if job.filtering:
                rows = (row for row, _ in kept(job.filtering, number, rows))
            for name, example in _examples(job.task, rows, tokenizer, threshold, chosen, record):
                writers[name].add_example(example, tokenizer)
            return record
        read: Iterable[bytes] = chain.from_iterable(read_documents(span, job.reading) for span in spans)
        for batch in _batches(kept_documents(job.filtering, number, read) if job.filtering else read):
            chunks: dict[str, list[bytes]] = {name: [] for name in SPLITS}
            for document in batch:
                if not document:
                    record.empty_documents += 1
                    continue
                place = document_hash(document)
                record.smallest_hash = min(record.smallest_hash, place)
                chunks["validation" if place < threshold or place == chosen else "train"].append(document)
            for name, chunk in chunks.items():
                writers[name].add(chunk)
    return record


def _examples(
    task: TaskSetting,
    rows: Iterable[tuple[Row, Where]],
    tokenizer: Tokenizer,
    threshold: int,
    chosen: int | None,
    record: Record,
) -> Iterator[tuple[str, Example]]:
    """Each row's examples, all of a row in the split that the row's hash chooses."""
    reader = Reader(tokenizer, task.max_tokens, task.labels, task.options)
    for row, where in rows:
        with told(where):
            made = task.format.make(row, reader)
        if not made:
            record.empty_documents += 1
            continue
        number = document_hash(repr(sorted(row.items())).encode("utf-8", "surrogatepass"))
        record.smallest_hash = min(record.smallest_hash, number)
        split = "validation" if number < threshold or number == chosen else "train"
        for example in made:
            assert len(example.ids) <= task.max_tokens, "the format keeps to the reader's max_tokens"
            record.longest += len(example.ids) == task.max_tokens
            yield split, example


@lru_cache(maxsize=1)
def _tokenizer(path: Path) -> Tokenizer:
    """A process loads its tokenizer once."""
    return load_tokenizer(path)


def _batches(documents: Iterable[bytes]) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document) + 64  # so that a million empty documents are a batch too
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def tokenize(
    tokenizer: Tokenizer, documents: Sequence[bytes], dtype: np.dtype[Any]
) -> tuple[Tokens, NDArray[np.int64]]:
    """Documents, at least one, as one stream [T] of `BOS t1 ... tn EOS` each, and where they begin in it."""
    ids = tokenizer.encode_batch(documents)
    lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids)) + 2  # BOS ... EOS
    ends = np.cumsum(lengths)
    starts = ends - lengths
    stream = np.empty(int(ends[-1]), dtype=dtype)
    inner = np.ones(len(stream), dtype=bool)
    inner[starts] = inner[ends - 1] = False
    stream[starts], stream[ends - 1] = tokenizer.bos_id, tokenizer.eos_id
    stream[inner] = np.concatenate(ids)
    return stream, starts


class _Files:
    """A .bin and a .idx that are being written; closing sees them on the disk."""

    def __init__(self, stem: Path) -> None:
        self._tokens = stem.with_suffix(".bin").open("wb")
        self._index = stem.with_suffix(".idx").open("wb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for file in (self._tokens, self._index):
            with file:
                _sync(file)


class _SplitWriter(_Files):
    def __init__(self, stem: Path, counts: Counts, tokenizer: Tokenizer, dtype: str) -> None:
        super().__init__(stem)
        self._counts, self._tokenizer, self._dtype = counts, tokenizer, np.dtype(dtype)

    def add(self, documents: Sequence[bytes]) -> None:
        if not documents:
            return
        stream, starts = tokenize(self._tokenizer, documents, self._dtype)
        self._tokens.write(stream.data)
        self._index.write((starts + self._counts.tokens).astype(INDEX_DTYPE).data)
        added = Counts(len(documents), len(stream), sum(map(len, documents)), int(stream.max()))
        self._counts.add(added)

    def add_example(self, example: Example, tokenizer: Tokenizer) -> None:
        """One document of a task's data set; its text's size is that of what its ids decode to."""
        ids = np.array(example.ids, dtype=np.uint32)
        marked = ids | np.array(example.marks, dtype=np.uint32) << np.uint32(MARK_SHIFT)
        self._tokens.write(marked.astype(self._dtype).data)
        self._index.write(np.array([self._counts.tokens], dtype=INDEX_DTYPE).data)
        size = len(tokenizer.decode_bytes(example.ids))
        self._counts.add(Counts(1, len(ids), max(size, 1), int(ids.max())))


def join_units(
    job: Job, name: str, folders: Iterable[Path], out: Path, file_bytes: int
) -> list[dict[str, Any]]:
    """Join one split of all units, in order, into out/NAME-00000.bin, .idx, ...; returns header entries.

    A file ends with the unit at which it reaches `file_bytes`, so never within a document.
    """
    entries: list[dict[str, Any]] = []
    waiting = [folder for folder in folders if (folder / f"{name}.bin").stat().st_size]
    waiting.reverse()
    while waiting:
        with _JoinedFile(out / f"{name}-{len(entries):05d}", np.dtype(job.dtype)) as file:
            while waiting and file.size < file_bytes:
                folder = waiting.pop()
                file.append(folder / f"{name}.bin", folder / f"{name}.idx")
            entries.append(file.entry())
    return entries


class _JoinedFile(_Files):
    def __init__(self, stem: Path, dtype: np.dtype[Any]) -> None:
        super().__init__(stem)
        self.name, self.itemsize = stem.name, dtype.itemsize
        self.size = self.documents = 0
        self._sha256, self._index_sha256 = hashlib.sha256(), hashlib.sha256()

    def append(self, tokens: Path, index: Path) -> None:
        before = INDEX_DTYPE.type(self.size // self.itemsize)
        with index.open("rb") as file:
            while block := file.read(COPY_BYTES):
                starts = np.frombuffer(block, dtype=INDEX_DTYPE) + before
                self._index.write(starts.data)
                self._index_sha256.update(starts.data)
                self.documents += len(starts)
        with tokens.open("rb") as file:
            while block := file.read(COPY_BYTES):
                self._tokens.write(block)
                self._sha256.update(block)
                self.size += len(block)

    def entry(self) -> dict[str, Any]:
        return {
            "name": f"{self.name}.bin",
            "tokens": self.size // self.itemsize,
            "documents": self.documents,
            "sha256": self._sha256.hexdigest(),
            "index": f"{self.name}.idx",
            "index_sha256": self._index_sha256.hexdigest(),
        }


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and see it on the disk."""
    with path.open("wb") as file:
        file.write(content)
        _sync(file)


def _sync(file: BinaryIO | Any) -> None:
    file.flush()
    os.fsync(file.fileno())
