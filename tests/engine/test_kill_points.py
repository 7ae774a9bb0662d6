"""A save killed before each of its writes, flushes and renames in turn: the previous or the new one loads.

Two real ranks train; then each forks, once for every point, a child that saves the engine it has inherited
and dies at that point (writes: also in their middle). The children's ranks meet over a socket of their own,
as gloo's threads do not survive a fork.
"""

from __future__ import annotations

import _pyio
import io
import json
import os
import pickle
import shutil
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import rank_runner
from conftest import TINY

from bigtfm.engine import checkpoint, saver
from bigtfm.engine.checkpoint import Retention
from bigtfm.engine.distributed import Ranks

Json = Callable[..., Path]
pytestmark = [pytest.mark.launcher, pytest.mark.slow]

POINTS = ("open", "write", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir")


@dataclass(frozen=True)
class ForkedRanks(Ranks):
    """Two ranks, or one, that exchange values over `line`; a peer that is gone is an EOFError."""

    line: socket.socket | None = None

    @property
    def aside(self) -> Ranks:
        return self

    def gather(self, value: Any) -> list[Any]:
        if self.line is None:
            return [value]
        text = pickle.dumps(value)
        self.line.sendall(struct.pack("<q", len(text)) + text)
        (size,) = struct.unpack("<q", _receive(self.line, 8))
        other = pickle.loads(_receive(self.line, size))
        return [value, other] if self.rank == 0 else [other, value]

    def sum(self, values: Sequence[float]) -> list[float]:
        return [sum(column) for column in zip(*self.gather(list(values)), strict=True)]

    def from_first(self, value: Any) -> Any:
        return self.gather(value)[0]


def _receive(line: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size:
        part = line.recv(size - len(received))
        if not part:
            raise EOFError("the other rank is gone")
        received += part
    return received


class Points:
    """Counts what the thread of the save asks of the file system, and kills the process before the k-th."""

    def __init__(self, kill_at: int, half: bool) -> None:
        self.count, self._kill_at, self._half = 0, kill_at, half
        self.seen: list[str] = []
        io.open = _pyio.open  # Python's own files, whose writes go through os.write
        for name in POINTS:
            setattr(os, name, self._watched(name, getattr(os, name)))

    def _watched(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            if threading.current_thread().name.startswith("checkpoint"):
                reading = name == "open" and not args[1] & (os.O_WRONLY | os.O_RDWR)
                if not reading:
                    self.count += 1
                    self.seen.append(name)
                    if self.count == self._kill_at:
                        if name == "write" and self._half:
                            call(args[0], bytes(args[1])[: len(args[1]) // 2])
                        os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return watched


def save_in_a_fork(
    engine: Any, progress: Any, ranks: Ranks, root: Path, line: Path, kill_at: int, half: bool
) -> list[str]:
    """What a fork of this rank did to the file system until it was killed, or all that a save does."""
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        connection = None
        if ranks.world_size == 2:
            connection = meet(line, ranks.rank)
        forked = ForkedRanks(*[getattr(ranks, field.name) for field in fields(Ranks)], connection)
        points = Points(kill_at, half)
        try:
            writer = saver.Saver(root, engine, forked, None, Retention(1))
            writer.save(progress)
            writer.wait()
        except EOFError:
            pass
        theirs.sendall(json.dumps(points.seen).encode())
        os._exit(0)
    theirs.close()
    said = b"".join(iter(lambda: ours.recv(2**16), b""))
    ours.close()
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) == (kill_at > 0 and not said)
    return json.loads(said) if said else []


def meet(path: Path, rank: int) -> socket.socket:
    if rank == 0:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen(1)
            connection = listener.accept()[0]
        path.unlink()
        return connection
    connection = socket.socket(socket.AF_UNIX)
    while True:
        try:
            connection.connect(str(path))
            return connection
        except (FileNotFoundError, ConnectionRefusedError):
            time.sleep(0.002)


def kill_every_save() -> None:
    """The program of a rank: trains, then kills its saves; writes what it found to points-N.json."""
    from bigtfm import train as training

    found: dict[str, Any] = {}
    make_saver = training.make_saver

    def making(job: Any, engine: Any, ranks: Ranks, probe: Any, progress: Any, recorder: Any) -> Any:
        real = make_saver(job, engine, ranks, probe, progress, recorder)
        save = real.save

        def saving(progress: Any) -> None:
            if progress.step == 4:
                real.wait()  # step 2's is there
                found.update(kill_all(job, engine, ranks, progress))
            save(progress)

        real.save = saving
        return real

    training.make_saver = making
    rank_runner.train_jobs()
    Path(f"points-{os.environ['RANK']}.json").write_text(json.dumps(found))


def kill_all(job: Any, engine: Any, ranks: Ranks, progress: Any) -> dict[str, Any]:
    root, line = job.checkpoints, Path("line")
    pristine = root.with_name("pristine")
    if ranks.rank == 0:
        shutil.copytree(root, pristine)
    seen = ranks.gather(save_in_a_fork(engine, progress, ranks, root, line, 0, False))
    whole = shards(root / "step-00000004") if ranks.rank == 0 else {}
    outcomes: list[str] = []
    began = time.monotonic()
    for victim, calls in enumerate(seen):
        for number, call in enumerate(calls, 1):
            for half in (False, True) if call == "write" else (False,):
                if ranks.rank == 0:
                    refill(root, pristine)
                ranks.gather(None)
                save_in_a_fork(engine, progress, ranks, root, line, number * (ranks.rank == victim), half)
                ranks.gather(None)
                if ranks.rank == 0:
                    outcomes.append(what_loads(root, pristine, whole))
    if ranks.rank == 0:
        refill(root, pristine)
    ranks.gather(None)
    return {"seen": seen, "outcomes": outcomes, "seconds": time.monotonic() - began}


def refill(root: Path, pristine: Path) -> None:
    for path in root.iterdir():
        shutil.rmtree(path)
    shutil.copytree(pristine, root, dirs_exist_ok=True)


def what_loads(root: Path, pristine: Path, whole: dict[str, str]) -> str:
    """previous or new, if it is that to the last bit; else what is wrong."""
    newest = checkpoint.newest(root)
    if newest is None:
        return "nothing"
    expected = {2: shards(pristine / "step-00000002"), 4: whole}[int(newest.name[-8:])]
    same = shards(newest) == expected
    return ("previous" if newest.name.endswith("2") else "new") if same else f"{newest.name} differs"


def shards(folder: Path) -> dict[str, str]:
    """SHA-256 of each file but the manifest; equal: the run goes on the same from there."""
    files = json.loads((folder / "manifest.json").read_text())["files"]
    return {name: row["sha256"] for name, row in files.items()}


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_save_killed_at_each_point_leaves_the_previous_or_the_new_one(
    world_size: int, tmp_path: Path, tiny_data: Path, deepspeed_json: Json
) -> None:
    fixed = [f"data.path={tiny_data}", *TINY, f"run.dir={tmp_path}", "steps=6", "save.every=2"]
    job = [str(deepspeed_json(stage=2)), *fixed, "run.name=run"]
    args = [json.dumps([job])]
    ranks = rank_runner.start(args, tmp_path, world_size, program=kill_every_save)
    finished = rank_runner.finish(ranks, tmp_path)
    assert finished.codes == [0] * world_size, finished.output[-3000:]
    found = json.loads((tmp_path / "points-0.json").read_text())
    assert set(found["outcomes"]) == {"previous", "new"}, found["outcomes"]
    points = [call for calls in found["seen"] for call in calls]
    assert {"write", "fsync", "rename", "mkdir", "unlink"} <= set(points)
    assert len(found["outcomes"]) == len(points) + points.count("write") >= 30 * world_size / 2
    print(f"{world_size} ranks: {len(found['outcomes'])} kills in {found['seconds']:.1f} s")
