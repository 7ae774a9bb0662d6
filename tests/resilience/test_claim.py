"""A run directory has one owner, whom the message names; a dead one keeps nobody out."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bigtfm.config.problems import Occupied
from bigtfm.resilience import claim as module
from bigtfm.resilience.claim import LOCK, Owner, claim

HOLD = """
import sys; from pathlib import Path; from bigtfm.resilience.claim import claim
with claim(Path(sys.argv[1])): print("mine", flush=True); sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has claimed tmp_path, in Slurm's job 7."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"SLURM_JOB_ID": "7"},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "mine\n"
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without flock."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


def taken(folder: Path) -> str:
    with pytest.raises(Occupied) as caught, claim(folder):
        pass
    return caught.value.line


def test_the_message_names_the_owner(other: subprocess.Popen[str], tmp_path: Path) -> None:
    since = json.loads((tmp_path / LOCK).read_text())["since"]
    assert taken(tmp_path) == (
        f"error: {tmp_path}: another training is at work here: process {other.pid} on {socket.gethostname()} "
        f"since {since}, Slurm job 7. Fix: wait until it has ended, or give this one another run.name"
    )


def test_a_dead_owner_keeps_nobody_out(other: subprocess.Popen[str], tmp_path: Path) -> None:
    other.kill()
    other.wait()
    with claim(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_one_process_may_claim_again_and_again(tmp_path: Path) -> None:
    for _ in range(3):
        with claim(tmp_path):
            assert f"process {os.getpid()} on" in taken(tmp_path)


@pytest.mark.usefixtures("no_locks")
def test_without_locks_the_written_owner_counts(other: subprocess.Popen[str], tmp_path: Path) -> None:
    assert taken(tmp_path).endswith(f"; if it runs no more, delete {tmp_path / LOCK}")
    other.kill()
    other.wait()
    with claim(tmp_path):
        pass


def owner(**changes: object) -> Owner:
    values = {"host": "far", "pid": 1, "began": 5, "since": "then", "job": "7", "restart": "0"}
    return Owner(**(values | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("before", "now", "gone"),
    [
        (owner(), owner(host="here"), False),
        (owner(), owner(host="here", restart="1"), True),  # the same job, requeued after its node was lost
        (owner(), owner(host="here", job="8"), False),
        (owner(job=None), owner(host="here", job=None), False),
        (owner(pid=os.getpid()), owner(), True),  # the number has a new process
        (owner(pid=os.getpid(), began=module._began(os.getpid())), owner(), False),
    ],
)
def test_who_is_gone_for_certain(before: Owner, now: Owner, gone: bool) -> None:
    assert before.gone(now) == gone


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\x80", b'{"pid": 1}', b"[" * 3000])
@pytest.mark.usefixtures("no_locks")
def test_garbage_in_the_lock_is_nobody(tmp_path: Path, text: bytes) -> None:
    (tmp_path / LOCK).write_bytes(text)
    with claim(tmp_path):
        pass
