"""One training to a run directory: a lock that says whose it is and goes with its process."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bigtfm.config.problems import Occupied
from bigtfm.resilience.processes import process

LOCK = ".lock"


@dataclass(frozen=True)
class Owner:
    """A process that trains in a run directory."""

    host: str
    pid: int
    began: int  # of the process, in clock ticks since the machine's start; 0: not known
    since: str  # local time
    job: str | None  # Slurm's number of the job
    restart: str  # and how often that was started again

    @classmethod
    def this(cls, environ: Mapping[str, str]) -> Owner:
        """This process."""
        now, pid = time.strftime("%Y-%m-%d %H:%M:%S"), os.getpid()
        restart = environ.get("SLURM_RESTART_COUNT", "0")
        return cls(socket.gethostname(), pid, _began(pid), now, environ.get("SLURM_JOB_ID"), restart)

    def gone(self, seen_by: Owner) -> bool:
        """Whether it certainly lives no more: its process on this machine, or its job before a restart."""
        if self.host == seen_by.host:
            return _began(self.pid) != self.began
        return self.job is not None and self.job == seen_by.job and self.restart != seen_by.restart

    def __str__(self) -> str:
        job = f", Slurm job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host} since {self.since}{job}"


@contextmanager
def claim(folder: Path, work: str = "training", name: str = "run.name") -> Iterator[None]:
    """Keeps other trainings out of the run directory within the block, and while this process lives.

    work, name: what is done there, and by what it is told to go elsewhere.

    The system ends the lock with the process, however that dies. Where the file system has no locks, who is
    written down in it is asked for instead.

    Raises:
        Occupied: another training is at work there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        owner, me = _read(handle), Owner.this(os.environ)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _occupied(folder, owner, work, name) from None
        except OSError:  # a file system without locks
            if owner is not None and not owner.gone(me):
                otherwise = f"if it runs no more, delete {folder / LOCK}"
                raise _occupied(folder, owner, work, name, otherwise) from None
        _write(handle, asdict(me))
        try:
            yield
        finally:
            _write(handle, {})
    finally:
        os.close(handle)


def alive(folder: Path, environ: Mapping[str, str]) -> bool | None:
    """Whether a training is at work there, as far as can be told from here; None: it can't.

    The lock is not tried: for that moment it would keep a training out.
    """
    try:
        handle = os.open(folder / LOCK, os.O_RDONLY)
    except OSError:
        return None
    try:
        owner, me = _read(handle), Owner.this(environ)
    finally:
        os.close(handle)
    return None if owner is None or owner.host != me.host else not owner.gone(me)


def _occupied(folder: Path, owner: Owner | None, work: str, name: str, otherwise: str = "") -> Occupied:
    return Occupied(
        f"another {work} is at work here{f': {owner}' if owner else ''}",
        where=str(folder),
        fix="; ".join(filter(None, (f"wait until it has ended, or give this one another {name}", otherwise))),
    )


def _read(handle: int) -> Owner | None:
    """Who is written down; None: nobody, or it can't be read."""
    try:
        return Owner(**json.loads(os.pread(handle, 4096, 0)))
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def _write(handle: int, content: dict[str, Any]) -> None:
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(content).encode() + b"\n", 0)
    except OSError:
        pass  # a full disk is told by what needs it; the lock itself holds


def _began(pid: int) -> int:
    """When a process began, in clock ticks since the machine's start; 0: not there, or not known."""
    found = process(pid)
    return found.started if found is not None else 0
