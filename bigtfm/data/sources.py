"""What `bigtfm prepare` reads: inputs become sources, sources become spans, spans make units of work.

What a span yields (documents.py) depends on the input alone, so any process can read any span at any time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import pairwise
from pathlib import Path

from bigtfm.config.problems import DataProblem
from bigtfm.data import tables

EMBEDDED = "embedded"
SUFFIXES = (".txt", ".jsonl", ".csv", ".tsv", ".parquet", ".txt.gz", ".jsonl.gz", ".csv.gz", ".tsv.gz")
READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Source:
    """A file, a folder of a saved Hugging Face data set ("arrow"), or the name of one ("hf")."""

    path: str
    kind: str  # txt, jsonl, csv, parquet, arrow, hf; compressed files end in .gz
    size: int  # in bytes, 0 where unknown
    stamp: int = 0  # time of the last change, in ns


@dataclass(frozen=True)
class Span:
    """A part of a source: bytes of a .txt or .jsonl; row groups, rows, shards of a table; else the whole."""

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
    """The sources of `inputs`, in their order; folders recursively, sorted. `stdin`: what stands for "-".

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
    if start in (b"\xff\xfe", b"\xfe\xff") and suffix != ".parquet" and not suffix.endswith(".gz"):
        raise DataProblem(
            "the text is UTF-16", where=str(path), fix="convert it with iconv -f UTF-16 -t UTF-8"
        )
    return Source(str(path.resolve()), suffix[1:], status.st_size, status.st_mtime_ns)


def plan_units(sources: Sequence[Source], reading: Reading) -> list[Unit]:
    """Units of work: consecutive spans of about `reading.unit_bytes`. A function of the input alone."""
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
    return [*units, tuple(unit)] if unit else units


def _spans(source: Source, reading: Reading) -> Iterator[Span]:
    def span(start: int, stop: int, weight: int) -> Span:
        return Span(source.path, source.kind, start, stop, source.size, weight)

    if source.kind in ("txt", "jsonl"):
        count = max(source.size // reading.unit_bytes, 1)
        borders = [source.size * i // count for i in range(count + 1)]
        for start, stop in pairwise(borders):
            if stop > start:
                yield span(start, stop, stop - start)
    elif source.kind == "parquet":
        metadata = tables.open_parquet(source.path, reading.text_column).metadata
        for group in range(metadata.num_row_groups):
            yield span(group, group + 1, metadata.row_group(group).total_byte_size)
    elif source.kind == "arrow":
        rows = len(tables.open_arrow(source.path, reading.text_column))
        count = max(source.size // reading.unit_bytes, 1)
        for i in range(count):
            yield span(rows * i // count, rows * (i + 1) // count, source.size // count)
    elif source.kind == "hf":
        for shard in range(tables.open_streamed(source.path, reading.text_column).num_shards):
            yield span(shard, shard + 1, reading.unit_bytes)  # a unit each: the size is not known
    else:
        yield span(0, source.size, source.size)
