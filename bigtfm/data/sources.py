"""What `bigtfm prepare` reads: inputs become sources, sources become spans of work, spans yield documents.

A document is bytes. Reading a span needs nothing but the span itself, so any process can read any span at any time, and
what it yields depends on the input alone. Memory is bounded by the longest document.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import IO, Any

from bigtfm.config.problems import DataProblem, did_you_mean
from bigtfm.data.tokenizer import character_start

EMBEDDED = "embedded"
SUFFIXES = (".txt", ".jsonl", ".csv", ".parquet", ".txt.gz", ".jsonl.gz", ".csv.gz")
BORDER_WINDOW = (
    65536  # how far past its nominal place a border between two spans of a .txt is looked for, in bytes
)
READ_BYTES = 1 << 20
ROWS = 256  # rows read at a time from .parquet and Hugging Face data sets
_BLANK_LINES = re.compile(rb"\n(?:[ \t\r]*\n)+")


@dataclass(frozen=True)
class Source:
    """One file, saved Hugging Face data set ("arrow") or loaded one ("hf"). `size` is in bytes, 0 where unknown."""

    path: str
    kind: str  # txt, jsonl, csv, parquet, arrow, hf; compressed files end in .gz
    size: int
    stamp: int = 0  # time of the last change, in ns


@dataclass(frozen=True)
class Span:
    """A part of a source: bytes of a .txt or .jsonl, row groups, rows or shards of the others, or the whole of it."""

    path: str
    kind: str
    start: int
    stop: int
    size: int  # of the whole source, in bytes
    weight: int  # about how many bytes this span has to read, for the progress bar


Unit = tuple[Span, ...]  # of work


@dataclass(frozen=True)
class Reading:
    """How sources become documents."""

    text_column: str
    document_bytes: int  # a .txt is cut into documents of about this many bytes
    unit_bytes: int  # a unit of work reads about this many bytes


def find_sources(inputs: Sequence[str], stdin: Source | None = None) -> list[Source]:
    """The sources of `inputs`, in their order, folders recursively and sorted. `stdin`: what stands for "-".

    Raises:
        DataProblem: an input is missing, unreadable, of an unsupported kind, or a folder without data.
    """
    sources: list[Source] = []
    for given in inputs:
        if given == EMBEDDED:
            corpus = resources.files("bigtfm.data") / "corpus" / "state_of_the_union.jsonl"
            sources.append(_file_source(Path(str(corpus))))
        elif given == "-" and stdin is not None:
            sources.append(stdin)
        elif given.startswith("hf:"):
            sources.append(Source(given, "hf", 0))
        else:
            sources += _path_sources(Path(given))
    return sources


def _path_sources(path: Path) -> list[Source]:
    if path.is_file():
        return [_file_source(path)]
    if not path.is_dir():
        fix = f"pass files, folders, '-', '{EMBEDDED}' or hf:NAME[:SPLIT]"
        raise DataProblem("no such file or folder", where=str(path), fix=fix)
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        files = sorted(path.rglob("*.arrow"))
        stamp = max((file.stat().st_mtime_ns for file in files), default=0)
        return [Source(str(path.resolve()), "arrow", sum(file.stat().st_size for file in files), stamp)]
    found = []
    for folder, subfolders, names in os.walk(path):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        found += [
            Path(folder, name) for name in names if name.endswith(SUFFIXES) and not name.startswith(".")
        ]
    if not found:
        raise DataProblem(
            "no data in this folder", where=str(path), fix=f"it must hold {', '.join(SUFFIXES)} files"
        )
    return [_file_source(file) for file in sorted(found)]


def _file_source(path: Path) -> Source:
    suffix = next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), None)
    if suffix is None:
        raise DataProblem(
            f"unsupported kind of file '{path.suffix}'", where=str(path), fix=f"use {', '.join(SUFFIXES)}"
        )
    try:
        with path.open("rb") as file:
            start = file.read(2)
        status = path.stat()
    except OSError as error:
        raise DataProblem(
            f"can't be read: {error.strerror}", where=str(path), fix="check its permissions"
        ) from None
    if suffix == ".txt" and start in (b"\xff\xfe", b"\xfe\xff"):
        raise DataProblem(
            "the text is UTF-16", where=str(path), fix="convert it with iconv -f UTF-16 -t UTF-8"
        )
    return Source(str(path.resolve()), suffix[1:], status.st_size, status.st_mtime_ns)


def plan_units(sources: Sequence[Source], reading: Reading) -> list[Unit]:
    """Units of work: consecutive spans of about `reading.unit_bytes` together. A function of the input alone."""
    units: list[Unit] = []
    unit: list[Span] = []
    weight = 0
    for source in sources:
        for span in _spans(source, reading):
            unit.append(span)
            weight += span.weight
            if weight >= reading.unit_bytes:
                units.append(tuple(unit))
                unit, weight = [], 0
    return units + [tuple(unit)] if unit else units


def _spans(source: Source, reading: Reading) -> Iterator[Span]:
    def span(start: int, stop: int, weight: int) -> Span:
        return Span(source.path, source.kind, start, stop, source.size, weight)

    if source.kind in ("txt", "jsonl"):
        count = max(source.size // reading.unit_bytes, 1)
        borders = [source.size * i // count for i in range(count + 1)]
        for start, stop in zip(borders, borders[1:], strict=False):
            if stop > start:
                yield span(start, stop, stop - start)
    elif source.kind == "parquet":
        metadata = _parquet(source.path, reading.text_column).metadata
        for group in range(metadata.num_row_groups):
            yield span(group, group + 1, metadata.row_group(group).total_byte_size)
    elif source.kind == "arrow":
        rows = len(_arrow(source.path, reading.text_column))
        count = max(source.size // reading.unit_bytes, 1)
        for i in range(count):
            yield span(rows * i // count, rows * (i + 1) // count, source.size // count)
    elif source.kind == "hf":
        for shard in range(_streamed(source.path, reading.text_column).num_shards):
            yield span(shard, shard + 1, reading.unit_bytes)  # a unit each: the size is not known
    else:
        yield span(0, source.size, source.size)


def read_documents(span: Span, reading: Reading) -> Iterator[bytes]:
    """The span's documents, in order; empty ones too.

    Raises:
        DataProblem: unreadable, damaged, or a row without the text column (the line names file and line).
    """
    try:
        if span.kind == "txt":
            yield from _text(span, reading.document_bytes)
        elif span.kind == "txt.gz":
            with gzip.open(span.path) as file:
                yield from _cut(file, sys.maxsize, reading.document_bytes)
        elif span.kind in ("jsonl", "jsonl.gz"):
            yield from _jsonl(span, reading.text_column)
        elif span.kind in ("csv", "csv.gz"):
            yield from _csv(span, reading.text_column)
        else:
            yield from _rows(span, reading.text_column)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataProblem(
            f"damaged gzip file: {error}", where=span.path, fix="fetch the file again"
        ) from None
    except OSError as error:
        raise DataProblem(
            f"can't be read: {error}", where=span.path, fix="check the file and its disk"
        ) from None


def _text(span: Span, document_bytes: int) -> Iterator[bytes]:
    with open(span.path, "rb") as file:
        start, stop = (_border(file, position, span.size) for position in (span.start, span.stop))
        file.seek(start)
        yield from _cut(file, stop - start, document_bytes)


def _border(file: IO[bytes], position: int, size: int) -> int:
    """Where the document that holds nominal `position` ends: the same whichever span asks."""
    if position in (0, size):
        return position
    file.seek(position)
    window = file.read(
        BORDER_WINDOW + 1
    )  # one more: whether a character ends at the window's end shows after it
    return position + _paragraph_end(window, 0, BORDER_WINDOW)


def _cut(file: IO[bytes] | gzip.GzipFile, length: int, document_bytes: int) -> Iterator[bytes]:
    """The next `length` bytes as documents of one to two times `document_bytes`, cut at paragraph ends."""
    buffer = bytearray()
    more = True
    while more or buffer:
        while more and len(buffer) <= 3 * document_bytes:
            block = file.read(min(READ_BYTES, length))
            length -= len(block)
            buffer += block
            more = bool(block) and length > 0
        if more or len(buffer) > document_bytes * 3 // 2:
            end = _paragraph_end(buffer, document_bytes, 2 * document_bytes)
        else:
            end = len(buffer)  # the tail, however short
        if end:
            yield bytes(buffer[:end])
            del buffer[:end]


def _paragraph_end(buffer: bytes | bytearray, start: int, stop: int) -> int:
    """End of a paragraph in (start, stop], else of a line, else of a word, else of a character."""
    stop = min(stop, len(buffer))
    if blank := _BLANK_LINES.search(buffer, start, stop):
        return blank.end()
    if (line := buffer.find(b"\n", start, stop)) >= 0:
        return line + 1
    if (word := buffer.find(b" ", start + 1, stop)) >= 0:
        return word
    return character_start(buffer, stop)


def _jsonl(span: Span, column: str) -> Iterator[bytes]:
    """A line belongs to the span that holds its first byte."""
    compressed = span.kind == "jsonl.gz"
    stop = sys.maxsize if compressed else span.stop
    with gzip.open(span.path) if compressed else open(span.path, "rb") as file:
        position = span.start
        if position:
            file.seek(position - 1)
            position -= 1
            while position < stop:  # the rest of a line that began before
                part = file.readline(min(READ_BYTES, stop - position))
                position += len(part)
                if part.endswith(b"\n") or not part:
                    break
        while position < stop and (line := file.readline()):
            if position == 0:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.isspace() and line:
                yield _json_text(line, column, span, position)
            position = file.tell()


def _json_text(line: bytes, column: str, span: Span, position: int) -> bytes:
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataProblem(
            f"invalid JSON: {error}", where=_line(span, position), fix="correct or remove that line"
        ) from None
    if not isinstance(row, dict):
        raise DataProblem(
            "not a JSON object", where=_line(span, position), fix=f'write {{"{column}": "..."}}'
        )
    if column not in row:
        raise _no_column(column, list(row), _line(span, position))
    return _as_bytes(row[column], column, lambda: _line(span, position))


def _line(span: Span, position: int) -> str:
    """file:line of a byte position; reads the file again up to there."""
    lines = 1
    with gzip.open(span.path) if span.kind.endswith(".gz") else open(span.path, "rb") as file:
        while position > 0 and (block := file.read(min(READ_BYTES, position))):
            lines += block.count(b"\n")
            position -= len(block)
    return f"{span.path}:{lines}"


def _csv(span: Span, column: str) -> Iterator[bytes]:
    csv.field_size_limit(sys.maxsize)  # the module's limit of 128 KiB is for a field; ours is memory
    with gzip.open(span.path) if span.kind == "csv.gz" else open(span.path, "rb") as raw:
        # surrogateescape: what is no UTF-8 comes through as the bytes it is
        reader = csv.reader(io.TextIOWrapper(raw, "utf-8-sig", "surrogateescape", newline=""), strict=True)
        try:
            header = next(reader, None)
            if header is None:
                return
            if column not in header:
                raise _no_column(column, header, f"{span.path}:1")
            place = header.index(column)
            for row in reader:
                if len(row) > place:
                    yield row[place].encode("utf-8", "surrogateescape")
                elif row:
                    what = f"only {len(row)} of {len(header)} columns"
                    raise DataProblem(
                        what, where=f"{span.path}:{reader.line_num}", fix="correct or remove that row"
                    )
        except csv.Error as error:
            where = f"{span.path}:{reader.line_num}"
            raise DataProblem(
                f"invalid CSV: {error}", where=where, fix="correct or remove that row"
            ) from None


def _rows(span: Span, column: str) -> Iterator[bytes]:
    def where() -> str:
        return span.path

    if span.kind == "parquet":
        groups = list(range(span.start, span.stop))
        file = _parquet(span.path, column)
        for batch in file.iter_batches(ROWS, row_groups=groups, columns=[column], use_threads=False):
            for value in batch.column(0).to_pylist():
                yield _as_bytes(value, column, where)
    elif span.kind == "arrow":
        rows = _arrow(span.path, column)
        for start in range(span.start, span.stop, ROWS):
            for value in rows[start : min(start + ROWS, span.stop)][column]:
                yield _as_bytes(value, column, where)
    else:
        dataset = _streamed(span.path, column)
        with _datasets_errors(span.path):
            for row in dataset.shard(num_shards=dataset.num_shards, index=span.start):
                yield _as_bytes(row[column], column, where)


def _parquet(path: str, column: str) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataProblem(
            f"not a readable parquet file: {error}", where=path, fix="fetch the file again"
        ) from None
    if column not in file.schema_arrow.names:
        raise _no_column(column, file.schema_arrow.names, path)
    return file


@lru_cache(maxsize=1)
def _arrow(path: str, column: str) -> Any:
    """The rows of a folder that `datasets` saved (save_to_disk); its train split if it has several."""
    with _datasets_errors(path):
        import datasets

        rows = datasets.load_from_disk(path)
        rows = rows[_only_split(list(rows), path)] if isinstance(rows, dict) else rows
    if column not in rows.column_names:
        raise _no_column(column, rows.column_names, path)
    return rows.select_columns([column])


@lru_cache(maxsize=1)  # a look-up on the hub each
def _streamed(name: str, column: str) -> Any:
    """`hf:NAME[@CONFIG][:SPLIT]`, a name on the hub or a local folder, as a stream of rows."""
    match = re.fullmatch(r"hf:(?P<name>[^:@]+)(?:@(?P<config>[^:@]+))?(?::(?P<split>[^:@]+))?", name)
    if match is None:
        raise DataProblem(
            "not the name of a data set",
            where=name,
            fix="write hf:NAME, hf:NAME:SPLIT or hf:NAME@CONFIG:SPLIT",
        )
    with _datasets_errors(name):
        import datasets

        datasets.disable_progress_bars()
        rows = datasets.load_dataset(match["name"], match["config"], streaming=True)
        split = match["split"] or _only_split(list(rows), name)
        if split not in rows:
            raise DataProblem(f"no split '{split}'", where=name, fix=did_you_mean(split, rows))
        rows = rows[split]
        columns = rows.column_names or list(next(iter(rows), {column: ""}))
    if column not in columns:
        raise _no_column(column, columns, name)
    return rows


def _only_split(splits: list[str], where: str) -> str:
    if "train" in splits or len(splits) == 1:
        return "train" if "train" in splits else splits[0]
    raise DataProblem(
        f"has no split 'train', but {', '.join(splits)}", where=where, fix=f"write hf:...:{splits[0]}"
    )


class _datasets_errors:
    """Turns what `datasets` raises (no network, no such data set, damaged files ...) into one line."""

    def __init__(self, where: str) -> None:
        self.where = where

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, DataProblem):
            what = f"datasets can't load it: {type(error).__name__}: {str(error)[:200]}"
            fix = "check the name and the network, or pass local files"
            raise DataProblem(what, where=self.where, fix=fix) from None


def _as_bytes(value: Any, column: str, where: Any) -> bytes:
    if isinstance(value, str):
        return value.encode("utf-8", "surrogatepass")  # JSON can write half a surrogate pair
    if value is None:
        return b""
    if isinstance(value, bytes):
        return value
    what = f"column '{column}' holds {type(value).__name__}, not text"
    raise DataProblem(what, where=where(), fix="name the column that holds the text with --text-column")


def _no_column(column: str, columns: Sequence[str], where: str) -> DataProblem:
    hint = did_you_mean(column, columns) if columns else "there are none"
    return DataProblem(f"no column '{column}'", where=where, fix=f"pass --text-column: {hint}")
