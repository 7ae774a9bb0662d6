"""Worker processes that read ahead change nothing: the same samples and losses to the bit, and clear ends."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rank_runner
import ranks_with_workers
from conftest import TINY

Json = Callable[..., Path]
pytestmark = [pytest.mark.launcher, pytest.mark.slow]
SAME = ("step", "loss", "grad_norm", "lr", "tokens", "sample_digest")


def rows(run_dir: Path) -> list[tuple[Any, ...]]:
    """What must be equal to the bit."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [tuple(json.loads(line)[name] for name in SAME) for line in lines]


def noted(folder: Path) -> list[list[int]]:
    """The rank's pid, and its workers', of each training."""
    path = folder / "workers.txt"
    return (
        [[int(pid) for pid in line.split()] for line in path.read_text().splitlines()]
        if path.exists()
        else []
    )


def ended(pids: list[int], seconds: float = 5) -> bool:
    """Whether all of these processes are gone in time; a zombie is."""
    deadline = time.monotonic() + seconds
    while True:
        running = []
        for pid in pids:
            try:
                state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if state != "Z":
                running.append(pid)
        if not running or time.monotonic() > deadline:
            return not running
        time.sleep(0.02)


def train_all(jobs: list[list[str]], folder: Path, world_size: int) -> None:
    finished = rank_runner.train_all(jobs, folder, world_size, ranks_with_workers.jobs)
    assert finished.codes == [0] * world_size, finished.output[-3000:]


def test_workers_and_a_resume_among_them_change_nothing(
    tmp_path: Path, tiny_data: Path, deepspeed_json: Json
) -> None:
    plain, sharded = str(deepspeed_json()), str(deepspeed_json("two.json", stage=2))

    def job(family: str, name: str, workers: int, steps: int, json_file: str = plain) -> list[str]:
        mine = [f"model.family={family}", f"run.name={family}-{name}", f"data.workers={workers}"]
        return [json_file, f"data.path={tiny_data}", *TINY, f"run.dir={tmp_path}", *mine, f"steps={steps}"]

    gpt = [job("gpt", "none", 0, 10), job("gpt", "one", 1, 10), job("gpt", "cut", 3, 4)]
    bert = [job("bert", "none", 0, 10), job("bert", "cut", 3, 4)]
    train_all([*gpt, *bert, [*job("gpt", "other", 0, 10), "seed=7"]], tmp_path / "first", 1)
    assert [len(pids) - 1 for pids in noted(tmp_path / "first")] == [0, 1, 3, 0, 3, 0]
    train_all([job("gpt", "cut", 1, 10), job("bert", "cut", 2, 10)], tmp_path / "resumed", 1)
    train_all([job("gpt", "two", 2, 10, sharded)], tmp_path / "two", 2)

    gpt_rows = rows(tmp_path / "gpt-none")
    assert len(gpt_rows) == 10
    assert rows(tmp_path / "gpt-one") == rows(tmp_path / "gpt-cut") == gpt_rows
    assert rows(tmp_path / "bert-cut") == rows(tmp_path / "bert-none") != gpt_rows
    assert rows(tmp_path / "gpt-other") != gpt_rows, "the control"
    two = rows(tmp_path / "gpt-two")
    assert [len(pids) - 1 for pids in noted(tmp_path / "two")] == [2, 2], "each rank has its own workers"
    assert [row[-1] for row in two] == [row[-1] for row in gpt_rows]
    assert [row[1] for row in two] == pytest.approx([row[1] for row in gpt_rows], rel=1e-5)
    assert all(ended(pids[1:], 0) for pids in noted(tmp_path / "first")), "a training takes its workers along"


@pytest.fixture
def training(tmp_path: Path, tiny_data: Path, deepspeed_json: Json) -> list[Any]:
    """A rank with two workers that has trained some steps and would go on for long."""
    args = ["train", "--deepspeed_config", str(deepspeed_json()), f"data.path={tiny_data}", *TINY]
    args += ["run.name=run", "steps=100000", "data.workers=2"]
    ranks = rank_runner.start(args, tmp_path, program=ranks_with_workers.command)
    metrics = tmp_path / "runs/run/metrics.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        time.sleep(0.02)
    return ranks


def test_a_killed_worker_ends_the_training_with_one_line(training: list[Any], tmp_path: Path) -> None:
    [[_, *workers]] = noted(tmp_path)
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    finished = rank_runner.finish(training, tmp_path, timeout=30)
    assert finished.code == 65, finished.output[-3000:]
    assert finished.output.count("error: data.workers: a process that reads the data was killed") == 1
    assert "Traceback" not in finished.output
    assert json.loads((tmp_path / "runs/run/failure.json").read_text())["where"] == "data.workers"
    assert ended(workers)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_workers_go_with_their_trainer(number: signal.Signals, training: list[Any], tmp_path: Path) -> None:
    """A polite signal to all of them is the trainer's to answer: it saves, and takes them along."""
    [[rank, *workers]] = noted(tmp_path)
    if number == signal.SIGTERM:
        for pid in workers:
            os.kill(pid, number)
    os.kill(rank, number)
    finished = rank_runner.finish(training, tmp_path, timeout=30)
    assert finished.code == (75 if number == signal.SIGTERM else 79), finished.output[-3000:]
    assert ended(workers)
