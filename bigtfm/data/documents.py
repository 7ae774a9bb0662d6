"""Documents, as bytes, of a span of input: a .txt cut at paragraph ends, the rows of everything else."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any

from bigtfm.config.problems import DataProblem
from bigtfm.data import tables
from bigtfm.data.sources import READ_BYTES, Reading, Span
from bigtfm.data.tokenizer import character_start

BORDER_WINDOW = 65536  # how far past its nominal place a border between spans of a .txt is looked for
ROWS = 256  # rows read at a time from tables
TEXT_COLUMN_FIX = "name the column that holds the text with --text-column (training: data.text_column)"
_BLANK_LINES = re.compile(rb"\n(?:[ \t\r]*\n)+")


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
    window = file.read(BORDER_WINDOW + 1)  # one more: it shows whether a character ends at the window's end
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
        raise tables.no_column(column, list(row), _line(span, position))
    return as_bytes(row[column], column, lambda: _line(span, position))


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
                raise tables.no_column(column, header, f"{span.path}:1")
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
        file = tables.open_parquet(span.path, column)
        with tables.parquet_errors(span.path):
            for batch in file.iter_batches(ROWS, row_groups=groups, columns=[column], use_threads=False):
                for value in batch.column(0).to_pylist():
                    yield as_bytes(value, column, where)
    elif span.kind == "arrow":
        rows = tables.open_arrow(span.path, column)
        with tables.datasets_errors(span.path):
            for start in range(span.start, span.stop, ROWS):
                for value in rows[start : min(start + ROWS, span.stop)][column]:
                    yield as_bytes(value, column, where)
    else:
        dataset = tables.open_streamed(span.path, column)
        with tables.datasets_errors(span.path):
            for row in dataset.shard(num_shards=dataset.num_shards, index=span.start):
                yield as_bytes(row[column], column, where)


def as_bytes(value: Any, column: str, where: Callable[[], str]) -> bytes:
    """A document from its row's value; nothing for a null.

    Raises:
        DataProblem: the value is neither text nor bytes.
    """
    if isinstance(value, str):
        return value.encode("utf-8", "surrogatepass")  # JSON can write half a surrogate pair
    if value is None:
        return b""
    if isinstance(value, bytes):
        return value
    what = f"column '{column}' holds {type(value).__name__}, not text"
    raise DataProblem(what, where=where(), fix=TEXT_COLUMN_FIX)
