"""Documents, as bytes, of a span of input: a .txt cut at paragraph ends, the rows of everything else.

A task's rows have several columns, and are read by `read_rows`.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import IO, Any

from bigtfm.config.problems import DataProblem
from bigtfm.data import tables
from bigtfm.data.sources import READ_BYTES, Reading, Span
from bigtfm.data.tokenizer import character_start

BORDER_WINDOW = 65536  # how far past its nominal place a border between spans of a .txt is looked for
ROWS = 256  # rows read at a time from tables
TEXT_COLUMN_FIX = "name the column that holds the text with --text-column (training: data.text_column)"
DELIMITERS = {"csv": ",", "tsv": "\t"}

Row = Mapping[str, Any]
Where = Callable[[], str]  # file, and line where there are lines
_BLANK_LINES = re.compile(rb"\n(?:[ \t\r]*\n)+")


def read_documents(span: Span, reading: Reading) -> Iterator[bytes]:
    """The span's documents, in order; empty ones too.

    Raises:
        DataProblem: unreadable, damaged, or a row without the text column (the line names file and line).
    """
    with _readable(span):
        if span.kind == "txt":
            yield from _text(span, reading.document_bytes)
        elif span.kind == "txt.gz":
            with gzip.open(span.path) as file:
                yield from _cut(file, sys.maxsize, reading.document_bytes)
        else:
            column = reading.text_column
            for row, where in _rows(span, (column,)):
                yield as_bytes(row[column], column, where)


def read_rows(
    span: Span, columns: Collection[str], optional: Collection[str] = ()
) -> Iterator[tuple[Row, Where]]:
    """The span's rows, in order: the values of `columns`, and what tells the place of the row.

    optional: columns that may be missing.

    Raises:
        DataProblem: text without columns, unreadable, damaged, or a row without one of the columns.
    """
    if span.kind in ("txt", "txt.gz"):
        what, fix = "has no columns", "give the examples as rows of a .jsonl, .csv, .tsv or .parquet file"
        raise DataProblem(what, where=span.path, fix=fix)
    with _readable(span):
        yield from _rows(span, columns, optional)


@contextmanager
def _readable(span: Span) -> Iterator[None]:
    try:
        yield
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


def _rows(
    span: Span, columns: Collection[str], optional: Collection[str] = ()
) -> Iterator[tuple[Row, Where]]:
    if span.kind in ("jsonl", "jsonl.gz"):
        return _jsonl(span, columns, optional)
    if span.kind.removesuffix(".gz") in DELIMITERS:
        return _delimited(span, columns, optional)
    return _table(span, columns, optional)


def _jsonl(span: Span, columns: Collection[str], optional: Collection[str]) -> Iterator[tuple[Row, Where]]:
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
                where = partial(_line, span, position)
                yield _json_row(line, columns, optional, where), where
            position = file.tell()


def _json_row(line: bytes, columns: Collection[str], optional: Collection[str], where: Where) -> Row:
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataProblem(
            f"invalid JSON: {error}", where=where(), fix="correct or remove that line"
        ) from None
    if not isinstance(row, dict):
        example = ", ".join(f'"{column}": "..."' for column in columns)
        raise DataProblem("not a JSON object", where=where(), fix=f"write {{{example}}}")
    for column in columns:
        if column not in row and column not in optional:
            raise tables.no_column(column, list(row), where(), option=_option(columns))
    return row


def _option(columns: Collection[str]) -> str:
    """The flag that names a column."""
    return "pass --text-column" if len(columns) == 1 else "name it with --column"


def _line(span: Span, position: int) -> str:
    """file:line of a byte position; reads the file again up to there."""
    lines = 1
    with gzip.open(span.path) if span.kind.endswith(".gz") else open(span.path, "rb") as file:
        while position > 0 and (block := file.read(min(READ_BYTES, position))):
            lines += block.count(b"\n")
            position -= len(block)
    return f"{span.path}:{lines}"


def _delimited(
    span: Span, columns: Collection[str], optional: Collection[str]
) -> Iterator[tuple[Row, Where]]:
    csv.field_size_limit(sys.maxsize)  # the module's limit of 128 KiB is for a field; ours is memory
    delimiter = DELIMITERS[span.kind.removesuffix(".gz")]
    with gzip.open(span.path) if span.kind.endswith(".gz") else open(span.path, "rb") as raw:
        # surrogateescape: what is no UTF-8 comes through as the bytes it is
        text = io.TextIOWrapper(raw, "utf-8-sig", "surrogateescape", newline="")
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        try:
            header = next(reader, None)
            if header is None:
                return
            for column in columns:
                if column not in header and column not in optional:
                    raise tables.no_column(column, header, f"{span.path}:1", option=_option(columns))
                if header.count(column) > 1:
                    what, fix = f"two columns are named '{column}'", "rename one of them"
                    raise DataProblem(what, where=f"{span.path}:1", fix=fix)
            places = {column: header.index(column) for column in columns if column in header}
            for row in reader:
                where = partial(_at, span.path, reader.line_num)
                if len(row) > max(places.values(), default=-1):
                    values = {column: row[place] for column, place in places.items()}
                    yield (
                        {column: v.encode("utf-8", "surrogateescape") for column, v in values.items()},
                        where,
                    )
                elif row:
                    what = f"only {len(row)} of {len(header)} columns"
                    raise DataProblem(what, where=where(), fix="correct or remove that row")
        except csv.Error as error:
            where = partial(_at, span.path, reader.line_num)
            raise DataProblem(
                f"invalid CSV: {error}", where=where(), fix="correct or remove that row"
            ) from None


def _at(path: str, line: int) -> str:
    return f"{path}:{line}"


def _table(span: Span, columns: Collection[str], optional: Collection[str]) -> Iterator[tuple[Row, Where]]:
    where, needed = partial(str, span.path), [column for column in columns if column not in optional]
    if span.kind == "parquet":
        groups = list(range(span.start, span.stop))
        file = tables.open_parquet(span.path, *needed)
        wanted = [column for column in columns if column in file.schema_arrow.names]
        with tables.parquet_errors(span.path):
            for batch in file.iter_batches(ROWS, row_groups=groups, columns=wanted, use_threads=False):
                for row in batch.to_pylist():
                    yield row, where
    elif span.kind == "arrow":
        rows = tables.open_arrow(span.path, *needed)
        with tables.datasets_errors(span.path):
            for start in range(span.start, span.stop, ROWS):
                block = rows[start : min(start + ROWS, span.stop)]
                for values in zip(*block.values(), strict=True):
                    yield dict(zip(block, values, strict=True)), where
    else:
        dataset = tables.open_streamed(span.path, *needed)
        with tables.datasets_errors(span.path):
            for row in dataset.shard(num_shards=dataset.num_shards, index=span.start):
                yield row, where


def document_hash(document: bytes) -> int:
    """A number below 2**64 that depends on nothing but the document's bytes (BLAKE2b, RFC 7693)."""
    return int.from_bytes(hashlib.blake2b(document, digest_size=8).digest(), "big")


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
