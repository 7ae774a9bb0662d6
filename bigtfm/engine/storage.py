"""The disk below a run: room for a checkpoint, failures that may pass, folders that go as a whole."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bigtfm.config.problems import StorageProblem

FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}


def free_bytes(folder: Path) -> int | None:
    """Bytes that may still be written where `folder` lies, or will; None: the file system does not say.

    A quota is not in it.
    """
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize if status.f_blocks else None


def full(what: str, folder: Path, needed: int) -> StorageProblem:
    """`what`, with the numbers."""
    free = free_bytes(folder)
    return StorageProblem(
        f"{what}: a checkpoint needs {needed:,} bytes and "
        f"{'an unknown number' if free is None else format(free, ',')} are free",
        where=str(folder),
        fix="free space there, lower save.keep or give the run another run.dir; then start the same command "
        "again: it resumes",
    )


@contextmanager
def told_when_full(folder: Path, needed: int) -> Iterator[None]:
    """Raises StorageProblem, with needed and free bytes, where a write finds no room."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise full(FULL[error.errno], folder, needed) from None
        raise


def require_same(folder: Path, inode: int) -> None:
    """Raises StorageProblem unless `folder` is there and is the one that it was."""
    if not folder.is_dir() or folder.stat().st_ino != inode:
        raise StorageProblem(
            "it has been deleted or moved, or its disk is gone, while a training was at work there",
            where=str(folder),
            fix="bring it back, then start the same command again: it resumes from what is in it",
        )


def pauses(seconds: float) -> Iterator[float]:
    """Seconds to wait before each further try: doubling from a half on, `seconds` in all."""
    pause = 0.5
    while seconds > 0:
        yield min(pause, seconds)
        seconds -= pause
        pause *= 2


def remove(path: Path) -> None:
    """Deletes a folder. Under its name it goes at once: none that is half deleted looks like a damaged one.

    A link goes, not what it leads to. What can't be deleted is left.
    """
    try:
        if path.is_symlink() or path.is_file():
            path.unlink()
        elif path.is_dir():
            going = path
            if not path.name.startswith("."):
                going = path.with_name(f".removing-{path.name}")
                shutil.rmtree(going, ignore_errors=True)
                path.rename(going)
            shutil.rmtree(going)
    except OSError:
        pass
