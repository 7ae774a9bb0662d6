"""OUT/.prepare, where unfinished work lies: one command at a time, and only the same one goes on with it.

Shards of one command are at work together; each is there once, and they set up one after the other.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

from bigtfm.config.problems import ConfigProblem, DataProblem, StorageProblem, first_change
from bigtfm.data.filtering import report as filters_report
from bigtfm.data.indexed import HEADER_NAME, TOKENIZER_FOLDER
from bigtfm.data.sources import READ_BYTES, Source
from bigtfm.data.units import SPLITS, write_synced
from bigtfm.data.workers import STORAGE_FIX
from bigtfm.whole_files import flush_directory

WORK_FOLDER = ".prepare"
LABELS = "labels.json"  # of a task's rows
PLAN_NAME = "prepare.json"  # what command made the data set; the header says what it holds


@contextmanager
def storage_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageProblem(f"can't be written: {error}", where=str(out), fix=STORAGE_FIX) from None


@contextmanager
def locked(out: Path, shard: str | None = None) -> Iterator[Path]:
    """OUT/.prepare, for this process alone; for a shard, together with others of another name."""
    if out.exists() and not out.is_dir():
        raise ConfigProblem("is a file", where=str(out), fix="pass a folder with --out")
    work = out / WORK_FOLDER
    work.mkdir(parents=True, exist_ok=True)
    with ExitStack() as locks:
        try:
            if shard is None:
                locks.enter_context(_lock(work / "lock", fcntl.LOCK_EX | fcntl.LOCK_NB))
            else:
                locks.enter_context(_lock(work / "lock", fcntl.LOCK_SH | fcntl.LOCK_NB))
                name = f"lock-{shard.replace('/', '-of-')}"
                locks.enter_context(_lock(work / name, fcntl.LOCK_EX | fcntl.LOCK_NB))
        except BlockingIOError:
            fix = "wait for it, or pass another --out"
            raise DataProblem("another `bigtfm prepare` is at work here", where=str(out), fix=fix) from None
        try:
            yield work
        finally:
            if shard is None and work.exists() and all(name.startswith("lock") for name in os.listdir(work)):
                shutil.rmtree(work)  # nothing to go on with


def one_at_a_time(work: Path) -> AbstractContextManager[None]:
    """Shards wait here for each other: the first makes what they share, the rest find it."""
    return _lock(work / "lock-setup", fcntl.LOCK_EX)


@contextmanager
def _lock(path: Path, how: int) -> Iterator[None]:
    with path.open("a+") as file:  # some network file systems share a lock of what is open for reading only
        fcntl.flock(file, how)
        yield


def spool_stdin(work: Path, stdin_format: str) -> Source:
    """Standard input as a file, for it is read twice. After a kill it must be sent again."""
    path = work / f"stdin.{stdin_format}"
    digest = hashlib.sha256()
    with path.open("wb") as file:
        while block := sys.stdin.buffer.read(READ_BYTES):
            digest.update(block)
            file.write(block)
        size = file.tell()
    return Source(str(path.resolve()), stdin_format, size, int.from_bytes(digest.digest()[:8], "big"))


def is_finished(out: Path, plan: dict[str, Any], force: bool) -> bool:
    """Whether the data set is there already, made by the same command.

    Raises:
        DataProblem: it is there, made by another command, and not `force`.
    """
    if force or not (out / HEADER_NAME).exists():
        return False
    made = _read_json(out / PLAN_NAME)
    if made != plan:
        what = f"holds a data set of another command ({_difference(made, plan)})"
        raise DataProblem(what, where=str(out), fix="pass another --out, or --force to replace it")
    return True


def continue_or_start(work: Path, plan: dict[str, Any], force: bool, alone: bool) -> None:
    """Keep the finished units of the same command; with `force`, clear those of another one.

    alone: nobody else is at work, so what another command has left without a finished unit is cleared, too.
    """
    path = work / PLAN_NAME
    if path.exists() and (made := _read_json(path)) != plan:
        if not force and not (alone and not any(path.parent.glob("units/*/record.json"))):
            what = f"holds unfinished work of another command ({_difference(made, plan)})"
            raise DataProblem(
                what, where=str(work.parent), fix="finish it with that command, or pass --force to start over"
            )
        for name in ("units", "filtered", TOKENIZER_FOLDER):
            shutil.rmtree(work / name, ignore_errors=True)
        (work / LABELS).unlink(missing_ok=True)
    write_synced(path.with_suffix(".new"), json.dumps(plan).encode())
    path.with_suffix(".new").replace(path)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def _difference(made: Any, plan: dict[str, Any]) -> str:
    if not isinstance(made, dict):
        return "it can't be told which"
    old, new = {**made, **made.get("options", {})}, {**plan, **plan["options"]}
    for key in ("inputs", *{**made.get("options", {}), **plan["options"]}):
        if old.get(key) != new.get(key):
            name, *values = first_change(key, old.get(key), new.get(key))
            was, now = ("none" if value is None else value for value in values)
            return f"{name.rpartition('.')[2]} was {was}, is {now}"
    return "the input files have changed since"


def publish(out: Path, work: Path, header: bytes, plan: dict[str, Any]) -> None:
    """Move .prepare/final into place. A data set is there when its header is: that goes first, comes last."""
    (out / HEADER_NAME).unlink(missing_ok=True)
    for split in SPLITS:  # a data set that is replaced may have had more files
        for old in [*out.glob(f"{split}-*.bin"), *out.glob(f"{split}-*.idx")]:
            old.unlink()
    for name in filters_report.NAMES:
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / TOKENIZER_FOLDER, ignore_errors=True)
    for new in sorted((work / "final").iterdir()):
        new.rename(out / new.name)
    write_synced(out / PLAN_NAME, json.dumps(plan).encode())
    flush_directory(out)
    write_synced(work / HEADER_NAME, header)
    (work / HEADER_NAME).rename(out / HEADER_NAME)
    flush_directory(out)
    shutil.rmtree(work)
