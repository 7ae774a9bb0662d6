"""Disks that are full, slow, read-only, gone or faulty for a while: real file systems under real ranks."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import rank_runner
from conftest import TINY, losses

from bigtfm.config.problems import StorageProblem
from bigtfm.resilience import events
from bigtfm.tracking import MetricsLog, read_metrics

Json = Callable[..., Path]
pytestmark = [pytest.mark.launcher, pytest.mark.slow]
MIB = 2**20
ONE_FITS = ("model.hidden_size=80",)  # a checkpoint of 2.2 MiB
NONE_FITS = ("model.hidden_size=144",)  # 6.5 MiB


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(command).returncode != 0:
        pytest.skip("mounting a file system needs root's rights")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", "--recursive", str(folder)], check=True)


def resize(disk: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


def command(data: Path, json_file: Path, disk: Path, *overrides: str) -> list[str]:
    fixed = [f"data.path={data}", f"run.dir={disk}", "run.name=run", *TINY, "save.every=2", "steps=6"]
    return ["train", "--deepspeed_config", str(json_file), *fixed, *overrides]


def steps_of(run_dir: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run_dir / "checkpoints").glob("step-*"))


def last_line(output: str) -> str:
    return [line for line in output.splitlines() if line.startswith("bigtfm: error")][-1]


def test_a_full_disk(tmp_path: Path, disk: Path, tiny_data: Path, deepspeed_json: Json) -> None:
    """The first checkpoint fits, the second does not; with more room the run goes on as if nothing was."""
    args = command(tiny_data, deepspeed_json(stage=2), disk, *ONE_FITS, "save.retry_seconds=1")
    finished = rank_runner.run(args, tmp_path / "a")
    assert finished.code == 74, finished.output
    run_dir = disk / "run"
    needed, free = 65536 + 12 * 190_640, shutil.disk_usage(disk).free
    said = last_line(finished.output)
    start = f"bigtfm: error: {run_dir}/checkpoints: the disk is full: a checkpoint needs "
    assert said.startswith(start), said
    assert said.endswith(
        "are free. Fix: free space there, lower save.keep or give the run another run.dir; then start the "
        "same command again: it resumes"
    )
    numbers = [int(word.replace(",", "")) for word in said.removeprefix(start).split() if word[0].isdigit()]
    assert numbers[0] > numbers[1] > 0
    assert abs(numbers[0] - needed) < needed / 4
    assert abs(numbers[1] - free) < 2**16
    assert steps_of(run_dir) == [2]
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-00000002"]
    assert json.loads((run_dir / "failure.json").read_text())["exit_code"] == 74

    resize(disk, "6m")  # two fit, and save.keep=2 wants a third for a moment
    again = rank_runner.run(args, tmp_path / "b")
    assert again.code == 0, again.output
    assert "checkpoints before the newest are deleted before it, not after it" in again.output
    assert steps_of(run_dir) == [4, 6]
    whole = rank_runner.run([*args, f"run.dir={tmp_path}"], tmp_path / "c")
    assert whole.code == 0, whole.output
    assert losses(run_dir) == losses(tmp_path / "run")


def test_a_disk_on_which_no_checkpoint_fits(
    tmp_path: Path, disk: Path, tiny_data: Path, deepspeed_json: Json
) -> None:
    """It is said before anything is built."""
    args = command(tiny_data, deepspeed_json(), disk, *NONE_FITS)
    finished = rank_runner.run(args, tmp_path)
    assert finished.code == 74, finished.output
    assert "the disk is full: a checkpoint needs" in last_line(finished.output)
    assert not (disk / "run/metrics.jsonl").exists()


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)


def test_failures_that_pass_are_outlived_and_one_that_stays_ends_the_run(
    tmp_path: Path, disk: Path, tiny_data: Path, deepspeed_json: Json
) -> None:
    """The folder is moved away and back; read-only for a while; full for a while; then deleted."""
    args = command(
        tiny_data, deepspeed_json(), disk, "save.every=20", "steps=1000000", "save.retry_seconds=5"
    )
    ranks = rank_runner.start(args, tmp_path)
    run_dir, away, ballast = disk / "run", disk / "away", disk / "ballast"
    root = run_dir / "checkpoints"

    def count(event: str) -> int:
        return sum(row["event"] == event for row in events.read(run_dir))

    def rows() -> int:
        return (run_dir / "metrics.jsonl").read_bytes().count(b"\n")

    def outlived(breaks: Callable[[], object], mends: Callable[[], object]) -> None:
        failed, done = count("save failed"), count("save done")
        breaks()
        wait_for(lambda: count("save failed") > failed)
        before = rows()
        wait_for(lambda: rows() > before)  # training goes on meanwhile
        mends()
        wait_for(lambda: count("save done") > done)
        newest = max(steps_of(run_dir))
        wait_for(lambda: max(steps_of(run_dir)) > newest)

    def read_only() -> None:
        for options in (["--bind", root], ["-o", "remount,bind,ro"]):
            subprocess.run(["mount", *options, str(root)], check=True)

    try:
        wait_for(lambda: root.is_dir() and bool(steps_of(run_dir)))
        outlived(lambda: root.rename(away), lambda: away.rename(root))
        outlived(read_only, lambda: subprocess.run(["umount", root], check=True))
        outlived(lambda: _fill(ballast), ballast.unlink)
        while run_dir.exists():  # a save in flight may be quicker than the deletion
            shutil.rmtree(run_dir, ignore_errors=True)
        ranks[0].join(30)
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    output = (tmp_path / "rank-0.out").read_text()
    assert ranks[0].exitcode == 74, output[-2000:]
    row = f"{run_dir}/metrics.jsonl: can't be written: No such file or directory. Fix: free space or correct "
    row += "the permissions, then resume"
    save = f"{root}: it has been deleted or moved, or its disk is gone, while a training was at work there. "
    save += "Fix: bring it back, then start the same command again: it resumes from what is in it"
    assert last_line(output) in (f"bigtfm: error: {row}", f"bigtfm: error: {save}")  # what was tried first
    assert not run_dir.exists()  # nor half of it made again


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        with pytest.raises(OSError, match="No space left"):
            list(iter(lambda: file.write(b"\0" * 4096), 0))


def flaky_disk() -> None:
    """`bigtfm` where rank 1's first flushes of a shard fail, as on a network file system that comes back."""
    flush, errors = os.fsync, [errno.EIO, errno.ESTALE, errno.ETIMEDOUT]

    def flaky(handle: int) -> None:
        if os.environ["RANK"] == "1" and threading.current_thread().name.startswith("checkpoint") and errors:
            number = errors.pop()
            raise OSError(number, os.strerror(number))
        flush(handle)

    os.fsync = flaky
    rank_runner._bigtfm()


@pytest.mark.parametrize(("seconds", "code"), [(10, 0), (0, 74)])
def test_faults_of_one_rank_are_tried_again_by_all(
    seconds: int, code: int, tmp_path: Path, tiny_data: Path, deepspeed_json: Json
) -> None:
    args = command(tiny_data, deepspeed_json(stage=2), tmp_path, f"save.retry_seconds={seconds}")
    finished = rank_runner.finish(rank_runner.start(args, tmp_path, 2, program=flaky_disk), tmp_path)
    assert finished.codes == [code, code], finished.output
    if code:
        assert "rank 1: [Errno 110] Connection timed out" in last_line(finished.output)
        assert steps_of(tmp_path / "run") == []
    else:
        assert steps_of(tmp_path / "run") == [4, 6]
        happened = [row["event"] for row in events.read(tmp_path / "run") if row["event"].startswith("save")]
        assert happened == [*["save failed"] * 3, "save done"]


def test_rows_wait_for_a_disk_that_is_full_or_away(disk: Path) -> None:
    path = disk / "run" / "metrics.jsonl"
    log = MetricsLog(path, retry_seconds=60)
    row = {"sample_digest": "x" * 1000}
    log.append({"step": 1} | row)
    _fill(disk / "ballast")
    for step in range(2, 12):  # the last page takes some of them, and a part of one
        log.append({"step": step} | row)
    assert 1 <= len(read_metrics(path)) < 11
    (disk / "ballast").unlink()
    path.parent.rename(disk / "away")
    log.append({"step": 12} | row)
    (disk / "away").rename(path.parent)
    log.append({"step": 13} | row)
    log.close()
    assert [row["step"] for row in read_metrics(path)] == list(range(1, 14))


@pytest.mark.parametrize("seconds", [0.0, 0.5])
def test_rows_that_never_find_their_file_end_the_run(seconds: float, tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    log = MetricsLog(path, retry_seconds=seconds)
    shutil.rmtree(path.parent)
    began = time.monotonic()

    def train() -> None:
        for step in range(200):
            log.append({"step": step})
            time.sleep(0.01)

    with pytest.raises(StorageProblem, match=r"metrics\.jsonl: can't be written: No such file or directory"):
        train()
    assert time.monotonic() - began >= seconds
    log.close()
    assert not path.parent.exists()
