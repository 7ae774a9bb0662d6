"""A data set that training streams: looked up with `datasets`, checked, and told apart from any other."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from bigtfm.config.problems import DataProblem
from bigtfm.data import tables
from bigtfm.data.documents import TEXT_COLUMN_FIX, as_bytes

BLOCK = 1024  # windows that are shuffled together; a stream's order depends on it
TEXT_TYPES = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
COMMIT = re.compile(r"hf://datasets/[^@]+@(?P<revision>[0-9a-f]{40})/")


@dataclass(frozen=True)
class StreamSource:
    """A split of a data set, looked up but not read."""

    name: str  # hf:...
    text_column: str
    identity: dict[str, Any]  # equal for equal texts; where a local folder stands is no part of it
    builder: Any  # of `datasets`
    split: str

    @classmethod
    def open(cls, name: str, text_column: str) -> StreamSource:
        """Looks up the files of `name`, hf:NAME[#REVISION][@CONFIG][:SPLIT], and reads its first row.

        Raises:
            DataProblem: there is no such data set, split or column, no row, no text in the column, or what
                the text is made of can't be told.
        """
        builder, rows, split = tables.open_split(name)
        with tables.datasets_errors(name):
            first = next(iter(rows), None)
        if first is None:
            raise DataProblem(f"split '{split}' has no rows", where=name, fix="name a split that has some")
        if text_column not in first:
            raise tables.no_column(text_column, list(first), name, option="set data.text_column")
        kind = getattr((rows.features or {}).get(text_column), "dtype", "string")  # unknown: rows will tell
        if kind not in TEXT_TYPES:
            raise DataProblem(
                f"column '{text_column}' holds {kind}, not text", where=name, fix=TEXT_COLUMN_FIX
            )
        as_bytes(first[text_column], text_column, lambda: name)
        files = _files(builder, split, name)
        identity = {"config": builder.config.name, "split": split, "text_column": text_column, "block": BLOCK}
        return cls(name, text_column, files | identity, builder, split)

    def rows(self, state: dict[str, Any] | None = None) -> Any:
        """The split's rows from the beginning, or from where their `state_dict` was `state`."""
        rows = self.builder.as_streaming_dataset()[self.split].select_columns([self.text_column])
        if state is not None:
            rows.load_state_dict(state)
        return rows


def _files(builder: Any, split: str, name: str) -> dict[str, Any]:
    """What the text is made of: names and sizes of local files, or the hub's commit.

    Raises:
        DataProblem: neither can be told.
    """
    files = list((builder.config.data_files or {}).get(split, ()))
    revisions = {match["revision"] for match in map(COMMIT.match, files) if match}
    if files and all(map(COMMIT.match, files)) and len(revisions) == 1:
        lines, known = files, {"revision": revisions.pop()}
    elif files and all(map(os.path.isfile, files)):
        sizes = [os.path.getsize(file) for file in files]
        root = os.path.commonpath([os.path.dirname(file) for file in files])
        lines = [f"{os.path.relpath(file, root)} {size}" for file, size in zip(files, sizes, strict=True)]
        known = {"bytes": sum(sizes)}
    else:
        raise DataProblem(
            "it can't be told which version of the data this is, so a run on it could not be repeated",
            where=name,
            fix="check the network, or `bigtfm prepare` the text and leave data.stream out",
        )
    return {"files": len(files), "sha256": sha256("\n".join(lines).encode()).hexdigest(), **known}
