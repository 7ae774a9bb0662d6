"""Tables of rows: .parquet files, and Hugging Face data sets on disk or by name."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from bigtfm.config.problems import DataProblem, did_you_mean


def open_parquet(path: str, *columns: str) -> Any:
    import pyarrow.parquet

    with parquet_errors(path):
        file = pyarrow.parquet.ParquetFile(path)
    _require(columns, file.schema_arrow.names, path)
    return file


@contextmanager
def parquet_errors(path: str) -> Iterator[None]:
    """Turns what pyarrow raises on a damaged file, when it is opened or later, into one line."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataProblem(
            f"not a readable parquet file: {error}", where=path, fix="fetch the file again"
        ) from None


def open_arrow(path: str, *columns: str) -> Any:
    """The rows of a folder that `datasets` saved (save_to_disk); its train split if it has several."""
    with datasets_errors(path):
        import datasets

        rows = datasets.load_from_disk(path)
        rows = rows[_only_split(list(rows), path)] if isinstance(rows, dict) else rows
    _require(columns, rows.column_names, path)
    return rows.select_columns(list(columns)) if len(columns) == 1 else rows


@lru_cache(maxsize=1)  # a look-up on the hub each
def open_streamed(name: str, *columns: str) -> Any:
    """`hf:NAME[#REVISION][@CONFIG][:SPLIT]`, a name on the hub or a local folder, as a stream of rows."""
    rows = open_split(name)[1]
    with datasets_errors(name):
        found = rows.column_names or list(next(iter(rows), dict.fromkeys(columns)))
    _require(columns, found, name)
    return rows


def _require(columns: Sequence[str], found: Sequence[str], where: str) -> None:
    option = "pass --text-column" if len(columns) == 1 else "name it with --column"
    for column in filter(None, columns):
        if column not in found:
            raise no_column(column, found, where, option=option)


def open_split(name: str) -> tuple[Any, Any, str]:
    """Builder, rows as a stream, and split's name of `hf:NAME[#REVISION][@CONFIG][:SPLIT]`."""
    match = re.fullmatch(
        r"hf:(?P<name>[^:@#]+)(?:#(?P<revision>[^:@#]+))?(?:@(?P<config>[^:@]+))?(?::(?P<split>[^:@]+))?",
        name,
    )
    if match is None:
        raise DataProblem(
            "not the name of a data set",
            where=name,
            fix="write hf:NAME, hf:NAME:SPLIT or hf:NAME#REVISION@CONFIG:SPLIT",
        )
    with datasets_errors(name):
        import datasets

        datasets.disable_progress_bars()
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it reports each of its retries
        builder = datasets.load_dataset_builder(match["name"], match["config"], revision=match["revision"])
        splits = builder.as_streaming_dataset()
        split = match["split"] or _only_split(list(splits), name)
        if split not in splits:
            raise DataProblem(f"no split '{split}'", where=name, fix=did_you_mean(split, splits))
    return builder, splits[split], split


def _only_split(splits: list[str], where: str) -> str:
    if "train" in splits or len(splits) == 1:
        return "train" if "train" in splits else splits[0]
    raise DataProblem(
        f"has no split 'train', but {', '.join(splits)}", where=where, fix=f"write hf:...:{splits[0]}"
    )


class datasets_errors:
    """Turns what `datasets` raises (no network, no such data set, damaged files ...) into one line."""

    def __init__(self, where: str) -> None:
        self.where = where

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, DataProblem):
            what = f"datasets can't load it: {type(error).__name__}: {str(error)[:200]}"
            fix = "check the name and the network; of a local folder, that each file has rows"
            raise DataProblem(what, where=self.where, fix=fix) from None


def no_column(
    column: str, columns: Sequence[str], where: str, option: str = "pass --text-column"
) -> DataProblem:
    hint = did_you_mean(column, columns) if columns else "there are none"
    return DataProblem(f"no column '{column}'", where=where, fix=f"{option}: {hint}")
