"""Files that are there whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(out: Path) -> Iterator[Path]:
    """A hidden file beside `out`, which takes its place once it is on the disk; of a failure nothing stays.

    Raises:
        OSError: it can't be written; it names `out`.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle, name = tempfile.mkstemp(prefix=f".building-{out.name}-", dir=out.parent)
    except OSError as error:
        error.filename = str(out)
        raise
    building = Path(name)
    try:
        os.close(handle)
        yield building
        with building.open("rb+") as file:
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        building.chmod(0o666 & ~mask)  # mkstemp's file is its owner's alone
        building.replace(out)
    except OSError as error:
        if error.filename in (None, name):  # a write that finds no room names no file
            error.filename = str(out)
        raise
    finally:
        building.unlink(missing_ok=True)
    flush_directory(out.parent)


def write_whole(out: Path, content: str) -> None:
    """A text as a whole file, in UTF-8."""
    with whole_file(out) as building:
        building.write_text(content, encoding="utf-8")


def flush_directory(path: Path) -> None:
    """Brings to the disk which files a folder has."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
