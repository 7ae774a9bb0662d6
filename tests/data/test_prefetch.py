import os
import pickle
import signal
import subprocess
import sys
import time
from functools import partial
from multiprocessing import forkserver
from pathlib import Path

import awkward_objectives
import numpy as np
import pytest
import rank_runner  # noqa: F401  # says what the session's fork server imports
import torch
from loaders import windows_loader

from bigtfm.config.problems import DataProblem
from bigtfm.data.indexed import TokenDataset
from bigtfm.data.objectives import causal_lm
from bigtfm.data.prefetch import Prefetcher

SEQ_LEN, STRIDE = 32, 8
TESTS = Path(__file__).parent.parent


@pytest.fixture(scope="module", autouse=True)
def _the_server_of_all_tests():
    forkserver.ensure_running()


@pytest.fixture
def loader(tiny_data):
    return make_loader(tiny_data)


def make_loader(data, objective=causal_lm):
    dataset = TokenDataset.open(data)
    return windows_loader(dataset.split("train"), SEQ_LEN, 7, dataset.vocab_size, objective)


def starts(step, count=2):
    """The micro-batches of rank 1 of 2 at a step: 2 samples each."""
    return [step * STRIDE + 2 + 4 * turn for turn in range(count)]


def assert_same(batches, expected):
    for batch, other in zip(batches, expected, strict=True):
        assert batch.samples == other.samples
        for name, value in vars(other).items():
            mine = getattr(batch, name)
            if isinstance(value, torch.Tensor):
                assert mine.dtype == value.dtype
                assert torch.equal(mine, value), name
            else:
                assert mine == value, name


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_step_gets_what_the_loader_makes_in_order(workers, tiny_data):
    plain = make_loader(tiny_data)
    with Prefetcher(make_loader(tiny_data, awkward_objectives.uneven), workers) as batches:
        for step in [0, 1, 2, 3, 4, 40, 41, 3, 5]:  # 40: a resume elsewhere; 3 and 5: not foreseen either
            got = batches.step(starts(step), 2, STRIDE)
            assert_same(got, [plain.batch(first, 2) for first in starts(step)])
        assert_same(batches.step(starts(6, 1), 3, STRIDE), [plain.batch(50, 3)])  # another micro batch
    with pytest.raises(AssertionError):  # the control
        assert_same(got, [plain.batch(first, 2) for first in reversed(starts(5))])


def test_the_next_steps_are_made_before_they_are_asked_for(tiny_data):
    made = []

    def watching(samples):
        made.append(int(samples.token_keys[0]) // SEQ_LEN)
        return causal_lm(samples)

    with Prefetcher(make_loader(tiny_data, watching), ahead=2) as batches:
        batches.step(starts(0), 2, STRIDE)
        deadline = time.monotonic() + 10
        while len(made) < 6 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert made == [*starts(0), *starts(1), *starts(2)]
        batches.step(starts(1), 2, STRIDE)
    assert made[6:] in ([], [starts(3)[0]], starts(3)), "nothing is made twice"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_problem_arrives_as_itself_at_its_step(workers, tiny_data):
    objective = partial(awkward_objectives.failing, bad_sample=starts(2)[1])
    with Prefetcher(make_loader(tiny_data, objective), workers) as batches:
        for step in (0, 1):
            assert len(batches.step(starts(step), 2, STRIDE)) == 2
        with pytest.raises(DataProblem) as raised:
            batches.step(starts(2), 2, STRIDE)
    assert raised.value.line == "error: here: sample 22 is bad. Fix: mend it"


def test_a_data_set_that_went_away_is_said_by_a_worker(tiny_data, tmp_path):
    copy = tmp_path / "tokens"
    subprocess.run(["cp", "-r", tiny_data, copy], check=True)
    loader = make_loader(copy)
    (copy / "train-00000.bin").unlink()
    with Prefetcher(loader, 1) as batches, pytest.raises(DataProblem, match="missing file"):
        batches.step(starts(0), 2, STRIDE)


def test_a_killed_worker_is_one_line(loader):
    with Prefetcher(loader, 2) as batches:
        batches.step(starts(0), 2, STRIDE)
        for worker in batches._workers:
            os.kill(worker.process.pid, signal.SIGKILL)
        with pytest.raises(DataProblem, match=r"was killed \(out of memory\?\)") as raised:
            batches.step(starts(100), 2, STRIDE)
    assert "fewer data.workers" in raised.value.line


def test_leaving_ends_the_workers(loader):
    with Prefetcher(loader, 2) as batches:
        batches.step(starts(0), 2, STRIDE)
        processes = [worker.process for worker in batches._workers]
        assert all(process.is_alive() for process in processes)
    assert [process.exitcode for process in processes] == [-signal.SIGKILL] * 2


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 1])
def test_batches_lie_in_pinned_memory(workers, tiny_data):
    plain = make_loader(tiny_data)
    with Prefetcher(make_loader(tiny_data), workers, pin_memory=True) as batches:
        [batch] = batches.step(starts(0, 1), 2, STRIDE)
    assert all(value.is_pinned() for value in vars(batch).values() if isinstance(value, torch.Tensor))
    assert_same([batch], [plain.batch(starts(0)[0], 2)])


def test_a_split_is_pickled_by_path(tiny_data, monkeypatch, tmp_path):
    monkeypatch.chdir(tiny_data)
    split = TokenDataset.open(".").split("train")
    size = sum(path.stat().st_size for path in tiny_data.glob("train-*"))
    pickled = pickle.dumps(windows_loader(split, SEQ_LEN, 7, 512))
    content = pickle.dumps(split.read(0, split.num_tokens))  # the control: what a map's content would be
    assert len(pickle.dumps(split)) < 2000 < size // 50 < len(content)
    monkeypatch.chdir(tmp_path)  # the folder was named from where the data set was opened
    again = pickle.loads(pickled).stream
    assert np.array_equal(again.read(0, split.num_tokens), split.read(0, split.num_tokens))


PROGRAM = """
import signal, sys
import awkward_objectives
from loaders import windows_loader
from bigtfm.data import prefetch
from bigtfm.data.indexed import TokenDataset

if {unprotected}:
    prefetch.POLITE.clear()
    prefetch._serve = awkward_objectives.serve_unprotected
dataset = TokenDataset.open({data!r})
loader = windows_loader(dataset.split("train"), 32, 7, dataset.vocab_size)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
    signal.signal(number, lambda *_: None)
with prefetch.Prefetcher(loader, 2) as batches:
    batches.step([0, 4], 2, 8)
    print(*[worker.process.pid for worker in batches._workers], flush=True)
    sys.stdin.readline()
    try:
        for step in range(1, 6):
            made = batches.step([8 * step, 8 * step + 4], 2, 8)
        print("made", *[batch.samples for batch in made])
    except Exception as error:
        print(error)
    sys.stdout.flush()
    sys.stdin.readline()
"""


@pytest.fixture
def trainer(tiny_data):
    """Starts a program that reads ahead with two workers, in a process group of its own."""
    started = []

    def start(unprotected=False):
        program = PROGRAM.format(data=str(tiny_data), unprotected=unprotected)
        process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"},
        )
        started.append(process)
        return process, [int(pid) for pid in process.stdout.readline().split()]

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def alive(pids):
    """Which of these processes run; a zombie does not."""
    states = {}
    for pid in pids:
        try:
            states[pid] = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
    return [pid for pid, state in states.items() if state != "Z"]


@pytest.mark.slow
def test_workers_end_with_a_trainer_that_is_killed(trainer):
    process, workers = trainer()
    assert alive(workers) == workers
    process.kill()
    deadline = time.monotonic() + 5
    while alive(workers) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert alive(workers) == []


@pytest.mark.slow
@pytest.mark.parametrize("unprotected", [False, True])
def test_a_signal_to_the_whole_group_is_the_trainers_affair(unprotected, trainer):
    process, workers = trainer(unprotected)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        os.killpg(process.pid, number)
    time.sleep(0.3)
    process.stdin.write("\n")
    process.stdin.flush()
    said = process.stdout.readline()
    if unprotected:
        assert "was killed" in said, "the control"
    else:
        assert said.startswith("made"), said
        assert alive(workers) == workers
    process.stdin.write("\n")
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 0
    assert errors == "" or unprotected
