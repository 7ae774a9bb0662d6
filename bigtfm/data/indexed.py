"""The token data set on disk, and its memory-mapped reader. NumPy only.

A data set is a folder:

    dataset.json             the header: everything below is checked against it
    train-00000.bin ...      token ids, little-endian uint16 or uint32; documents stand as  BOS t1 ... tn EOS
    train-00000.idx ...      where documents begin in the .bin of that name: uint64 positions, in tokens
    validation-00000.bin ... the same for the validation split
    tokenizer/               the tokenizer's own files

The files of a split follow each other in one stream of tokens; a document never runs over a file's end.

In a task's data set (`bigtfm prepare --task`) a document is an example, and each token has a mark, a number
below 4096 that says what is to be learnt there (data/examples.py): ids are uint32, with the mark in their
upper 12 bits.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bigtfm.config.problems import DataProblem, did_you_mean
from bigtfm.sealed import unseal

FORMAT = "bigtfm-tokens"
VERSION = 1
HEADER_NAME = "dataset.json"
TOKENIZER_FOLDER = "tokenizer"
INDEX_DTYPE = np.dtype("<u8")
FILE_NAME = r"^[A-Za-z0-9_][A-Za-z0-9._-]*$"
SHA256 = r"^[0-9a-f]{64}$"
MARK_SHIFT = 20  # bits of an id below its mark
MAX_MARK = 2 ** (32 - MARK_SHIFT) - 1
VERIFIED_BYTES = 256 * 2**20  # up to here SHA-256 is checked at every start, in under a second

SplitName = Literal["train", "validation"]
Tokens = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class TokenFile(_Strict):
    """A .bin and its .idx."""

    name: str = Field(pattern=FILE_NAME)
    tokens: int = Field(ge=1)
    documents: int = Field(ge=1)
    sha256: str = Field(pattern=SHA256)
    index: str = Field(pattern=FILE_NAME)
    index_sha256: str = Field(pattern=SHA256)


class SplitHeader(_Strict):
    """Counts of a split. `bytes` is of the documents' text; `max_id` is the largest token id (-1: none)."""

    documents: int = Field(ge=0)
    tokens: int = Field(ge=0)
    bytes: int = Field(ge=0)
    max_id: int = Field(ge=-1)
    files: tuple[TokenFile, ...] = Field(strict=False)

    @model_validator(mode="after")
    def _counts_add_up(self) -> SplitHeader:
        for name in ("tokens", "documents"):
            total = sum(getattr(file, name) for file in self.files)
            if getattr(self, name) != total:
                raise ValueError(f"{name} is {getattr(self, name)}, but the files hold {total}")
        if self.tokens and (self.max_id < 0 or not self.bytes):
            raise ValueError(f"{self.tokens} tokens of {self.bytes} bytes with max_id {self.max_id}")
        return self


class TokenizerFile(_Strict):
    name: str = Field(pattern=FILE_NAME)
    sha256: str = Field(pattern=SHA256)


class TokenizerHeader(_Strict):
    """`identity` is the SHA-256 of the first file, the model."""

    kind: Literal["sentencepiece", "huggingface"]
    identity: str = Field(pattern=SHA256)
    bos_id: int = Field(ge=0)
    eos_id: int = Field(ge=0)
    files: tuple[TokenizerFile, ...] = Field(strict=False, min_length=1)


class TaskHeader(_Strict):
    """What the examples of a task's data set are for."""

    name: str  # as `bigtfm prepare --task` calls it
    kinds: tuple[str, ...] = Field(strict=False)  # of objectives that can learn them
    labels: tuple[str, ...] = Field(default=(), strict=False, max_length=MAX_MARK)  # mark n + 1 is label n
    max_tokens: int = Field(ge=1)  # no example is longer
    options: dict[str, Any] = {}  # how rows became examples: columns, templates


class Header(_Strict):
    """dataset.json."""

    format: Literal["bigtfm-tokens"] = "bigtfm-tokens"
    version: Literal[1] = 1
    dtype: Literal["uint16", "uint32"]
    vocab_size: int = Field(ge=1, le=2**31)
    tokenizer: TokenizerHeader
    splits: dict[SplitName, SplitHeader] = Field(min_length=2)
    task: TaskHeader | None = None
    source: dict[str, Any]
    options: dict[str, Any]

    @model_validator(mode="after")
    def _ids_fit(self) -> Header:
        if self.dtype == "uint16" and self.vocab_size > 65536:
            raise ValueError(f"a vocabulary of {self.vocab_size} doesn't fit uint16")
        if self.task is not None and (self.dtype != "uint32" or self.vocab_size > 2**MARK_SHIFT):
            raise ValueError(f"marks don't fit {self.dtype} beside a vocabulary of {self.vocab_size}")
        for name, split in self.splits.items():
            if split.max_id >= self.vocab_size:
                raise ValueError(
                    f"{name} holds id {split.max_id}, beyond the vocabulary of {self.vocab_size}"
                )
        if max(self.tokenizer.bos_id, self.tokenizer.eos_id) >= self.vocab_size:
            raise ValueError(f"the tokenizer's BOS or EOS id is beyond the vocabulary of {self.vocab_size}")
        return self


class Signed(NamedTuple):
    """A file, the SHA-256 that it has to have, and what to do where it has another."""

    path: Path
    sha256: str
    fix: str

    @property
    def large(self) -> bool:
        """Whether `verify` takes longer than a start should."""
        return self.path.stat().st_size > VERIFIED_BYTES

    def verify(self) -> None:
        """Raises DataProblem when the file is missing or differs."""
        try:
            with self.path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            raise DataProblem("missing file", where=str(self.path), fix=self.fix) from None
        except OSError as error:
            raise DataProblem(
                f"can't be read: {error}", where=str(self.path), fix="check its permissions"
            ) from None
        if found != self.sha256:
            raise self.changed(found)

    def changed(self, found: str) -> DataProblem:
        """What is said of a file with another SHA-256."""
        what = f"its SHA-256 is {found[:12]}, but the header says {self.sha256[:12]}: the file was changed"
        return DataProblem(what, where=str(self.path), fix=self.fix)


class Split:
    """One split of a data set: a stream of tokens, read where it is needed.

    folders: where each of the header's files lies. marked: whether the tokens have marks.
    """

    def __init__(
        self,
        name: SplitName,
        header: SplitHeader,
        folders: Sequence[Path],
        dtype: np.dtype[Any],
        marked: bool = False,
    ) -> None:
        self.name = name
        self.header = header
        self.marked = marked
        self._folders = folders
        places = list(zip(folders, header.files, strict=True))
        self._tokens = [_map(folder / file.name, dtype, file.tokens) for folder, file in places]
        self._starts = [_map(folder / file.index, INDEX_DTYPE, file.documents) for folder, file in places]
        self._offsets = list(accumulate((file.tokens for file in header.files), initial=0))
        self._first_tokens = np.array(self._offsets[:-1], dtype=np.int64)
        documents = [file.documents for file in header.files]
        self._first_documents = np.cumsum([0, *documents[:-1]], dtype=np.int64)
        self._dtype = dtype

    def __reduce__(
        self,
    ) -> tuple[object, ...]:  # another process maps the files; a map's content would travel
        folders = [f.absolute() for f in self._folders]
        return type(self), (self.name, self.header, folders, self._dtype, self.marked)

    @classmethod
    def join(cls, splits: Sequence[Split]) -> Split:
        """The streams of splits of the same dtype, all with marks or none, one behind the other, as one."""
        if len(splits) == 1:
            return splits[0]
        headers = [split.header for split in splits]
        header = SplitHeader(
            documents=sum(header.documents for header in headers),
            tokens=sum(header.tokens for header in headers),
            bytes=sum(header.bytes for header in headers),
            max_id=max(header.max_id for header in headers),
            files=tuple(file for header in headers for file in header.files),
        )
        folders = [folder for split in splits for folder in split._folders]
        return cls(splits[0].name, header, folders, splits[0]._dtype, splits[0].marked)

    @property
    def num_tokens(self) -> int:
        """Tokens, BOS and EOS included."""
        return self.header.tokens

    @property
    def num_documents(self) -> int:
        return self.header.documents

    @property
    def num_bytes(self) -> int:
        """Bytes (UTF-8) of the documents' text: what bits per byte are counted on."""
        return self.header.bytes

    def read(self, start: int, stop: int) -> Tokens:
        """Tokens [start, stop) of the stream, uint16 or uint32; a read-only view where they lie in one file.

        Raises:
            IndexError: the range isn't within the split.
        """
        found = self._read(start, stop)
        return found & (2**MARK_SHIFT - 1) if self.marked else found

    def read_marks(self, start: int, stop: int) -> npt.NDArray[Any]:
        """The marks of the tokens [start, stop), where they have some: uint32.

        Raises:
            IndexError: as `read`.
        """
        return self._read(start, stop) >> MARK_SHIFT

    def _read(self, start: int, stop: int) -> Tokens:
        parts = [self._tokens[file][a:b] for file, a, b in self._parts(start, stop)]
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=self._dtype)

    def document_starts(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Positions p in the stream, start <= p < stop, at which a document begins; int64 [documents]."""
        parts = []
        for file, a, b in self._parts(start, stop):
            # uint64 keys: with any other type NumPy would convert the whole index first
            first, last = np.searchsorted(self._starts[file], np.array([a, b], dtype=INDEX_DTYPE))
            parts.append(self._starts[file][first:last].astype(np.int64) + self._offsets[file])
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def documents_before(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """How many documents begin before each position of the stream: int64 [n] -> int64 [n]."""

        def look_up(file: int, places: npt.NDArray[np.int64]) -> Any:
            first = self._first_documents[file]
            return np.searchsorted(self._starts[file], places.astype(INDEX_DTYPE)) + first

        return _by_file(self._first_tokens, positions, look_up)

    def document_positions(self, documents: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Where documents begin in the stream, by their numbers: int64 [n] -> int64 [n]."""

        def look_up(file: int, places: npt.NDArray[np.int64]) -> Any:
            return self._starts[file][places].astype(np.int64) + self._first_tokens[file]

        return _by_file(self._first_documents, documents, look_up)

    def defect(self) -> str | None:
        """What the SHA-256 can't tell: ids above the header's largest, an index out of order. Reads all."""
        for file, tokens, starts in zip(self.header.files, self._tokens, self._starts, strict=True):
            largest = int((tokens & (2**MARK_SHIFT - 1) if self.marked else tokens).max())
            if largest > self.header.max_id:
                return f"{file.name} holds id {largest}, above the header's {self.header.max_id}"
            if starts[0] != 0 or starts[-1] >= file.tokens or not (starts[:-1] < starts[1:]).all():
                return f"{file.index} does not lead from document to document"
        return None

    def _parts(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """(file, first, last) for each file that [start, stop) touches; positions are the file's own."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"[{start}, {stop}) isn't within the {self.num_tokens} tokens of {self.name}")
        parts = []
        file = bisect_right(self._offsets, start) - 1
        while start < stop:
            end = min(stop, self._offsets[file + 1])
            parts.append((file, start - self._offsets[file], end - self._offsets[file]))
            start, file = end, file + 1
        return parts


def _by_file(
    firsts: npt.NDArray[np.int64],
    values: npt.NDArray[np.int64],
    look_up: Callable[[int, npt.NDArray[np.int64]], Any],
) -> npt.NDArray[np.int64]:
    """`look_up(file, value - firsts[file])` of each value; `firsts`: the files' first values."""
    if len(firsts) == 1:
        return look_up(0, values)
    files = np.searchsorted(firsts, values, side="right") - 1
    out = np.empty(len(values), dtype=np.int64)
    for file in set(files.tolist()):
        here = np.flatnonzero(files == file)
        out[here] = look_up(file, values[here] - firsts[file])
    return out


class TokenDataset:
    """A prepared data set. Opening it costs O(number of files), whatever the number of tokens."""

    def __init__(self, path: Path, header: Header, identity: str) -> None:
        self.path = path
        self.header = header
        self.identity = identity  # SHA-256 of dataset.json, in hex: it names every byte of the data set
        dtype = np.dtype(header.dtype).newbyteorder("<")
        self._splits = {
            name: Split(name, split, [path] * len(split.files), dtype, header.task is not None)
            for name, split in header.splits.items()
        }

    @classmethod
    def open(cls, path: str | Path) -> TokenDataset:
        """Open the data set in folder `path`.

        Raises:
            DataProblem: missing, unfinished, damaged, of another version, or with another tokenizer.
        """
        path = Path(path)
        try:
            text = (path / HEADER_NAME).read_bytes()
        except FileNotFoundError:
            what = (
                "no such data set"
                if not path.is_dir()
                else f"holds no finished data set ({HEADER_NAME} is missing)"
            )
            raise DataProblem(what, where=str(path), fix=_prepare_again(path)) from None
        except OSError as error:
            raise DataProblem(
                f"can't be read: {error}", where=str(path), fix="check its permissions"
            ) from None
        header = _parse_header(text, path)
        dataset = cls(path, header, hashlib.sha256(text).hexdigest())
        dataset._check_tokenizer()
        return dataset

    @property
    def vocab_size(self) -> int:
        return self.header.vocab_size

    @cached_property
    def tokenizer_path(self) -> Path:
        """The folder for `load_tokenizer`."""
        return self.path / TOKENIZER_FOLDER

    def split(self, name: str) -> Split:
        """The split `name`: train or validation.

        Raises:
            DataProblem: there is no such split.
        """
        for known, split in self._splits.items():
            if known == name:
                return split
        raise DataProblem(f"no split '{name}'", where=str(self.path), fix=did_you_mean(name, self._splits))

    @property
    def files(self) -> list[Signed]:
        """Tokens and indices of both splits."""
        return [
            Signed(self.path / name, sha256, _prepare_again(self.path))
            for split in self.header.splits.values()
            for file in split.files
            for name, sha256 in ((file.name, file.sha256), (file.index, file.index_sha256))
        ]

    @property
    def small(self) -> bool:
        """Whether `verify` takes less than a second."""
        tokens = sum(split.tokens for split in self.header.splits.values())
        return tokens * np.dtype(self.header.dtype).itemsize <= VERIFIED_BYTES

    def verify(self) -> None:
        """Read every file and compare it with the header: its SHA-256, the token ids, the index.

        Raises:
            DataProblem: a file differs (the line names it).
        """
        for file in self.files:
            file.verify()
        for data in self._splits.values():
            if what := data.defect():
                raise DataProblem(what, where=str(self.path), fix=_prepare_again(self.path))
        self._check_tokenizer()

    def _check_tokenizer(self) -> None:
        tokenizer = self.header.tokenizer
        for file in tokenizer.files:
            Signed(self.tokenizer_path / file.name, file.sha256, _prepare_again(self.path)).verify()
        if tokenizer.files[0].sha256 != tokenizer.identity:
            what = f"the tokenizer's identity isn't the SHA-256 of {tokenizer.files[0].name}"
            raise DataProblem(what, where=str(self.path / HEADER_NAME), fix=_prepare_again(self.path))


def _parse_header(text: bytes, folder: Path) -> Header:
    where = str(folder / HEADER_NAME)
    try:
        values = json.loads(unseal(text))
    except (ValueError, RecursionError) as error:
        raise DataProblem(
            f"the header can't be read: {error}", where=where, fix=_prepare_again(folder)
        ) from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise DataProblem(
            "not the header of a bigtfm data set",
            where=where,
            fix="pass a folder that `bigtfm prepare` wrote",
        )
    if values.get("version") != VERSION:
        what = f"format version {values.get('version')}, but this bigtfm reads {VERSION}"
        raise DataProblem(what, where=where, fix=_prepare_again(folder))
    try:
        return Header.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        what = f"damaged header: {key + ': ' if key else ''}{first['msg'].removeprefix('Value error, ')}"
        raise DataProblem(what, where=where, fix=_prepare_again(folder)) from None


def _map(path: Path, dtype: np.dtype[Any], count: int) -> npt.NDArray[Any]:
    try:
        size = path.stat().st_size
        if size == count * dtype.itemsize:
            mapped = np.memmap(path, dtype=dtype, mode="r", shape=(count,))
            if dtype == INDEX_DTYPE:  # a binary search leaps: reading ahead at each place is for nothing
                mapped._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]
            return np.asarray(mapped)  # slicing np.memmap itself costs microseconds
    except FileNotFoundError:
        raise DataProblem("missing file", where=str(path), fix=_prepare_again(path.parent)) from None
    except OSError as error:
        raise DataProblem(f"can't be read: {error}", where=str(path), fix="check its permissions") from None
    what = f"{size} bytes, but the header says {count * dtype.itemsize}"
    raise DataProblem(what, where=str(path), fix=_prepare_again(path.parent))


def _prepare_again(folder: Path) -> str:
    if (folder / HEADER_NAME).exists():
        return f"write it again with `bigtfm prepare --out {folder} --force` and the same inputs"
    source = "" if folder.name == "quickstart" else "--input YOUR_TEXT "  # the quickstart's is the default
    return f"run `bigtfm prepare {source}--out {folder}`"
