"""Reading ahead: the batches of the next steps are made while this one is computed, by a thread or processes.

What is read, and its order, stays a function of sample numbers: however many workers there are, whichever is
quicker, a step gets what `loader.batch` would have returned.
"""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import recv_handle, send_handle
from queue import SimpleQueue
from tempfile import TemporaryFile
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import torch

from bigtfm.config.problems import DataProblem
from bigtfm.data.loader import Batch
from bigtfm.resilience import stacks
from bigtfm.resilience.lifeline import end_with_parent

# What asks a trainer to stop may reach its workers too, for instance as Slurm's signal to all of a job's
# processes: whether the work goes on is the trainer's to say.
POLITE = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP}


class MakesBatches(Protocol):
    """What is asked of a bigtfm.data.loader.Loader. With workers it is pickled: by paths, not by content."""

    def batch(self, first_sample: int, count: int) -> Batch: ...


class Prefetcher:
    """Micro-batches of a training's steps, made `ahead` steps before they are asked for.

    Use it in a `with` block: leaving it ends the workers. A trainer that is killed takes them along, too.

    workers: processes; 0: one thread of this process, which also reads ahead but shares its interpreter.
    ahead: steps; memory for their batches is needed on the host.
    pin_memory: batches lie in pinned memory where CUDA is there, so that copies to the GPU don't wait.
    """

    def __init__(
        self, loader: MakesBatches, workers: int = 0, ahead: int = 2, pin_memory: bool = False
    ) -> None:
        self._loader, self._ahead = loader, ahead
        self._pinned = pin_memory and torch.cuda.is_available()
        self._due: dict[tuple[int, int], Future[Batch]] = {}
        self._workers = _start(loader, workers)
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        # One thread for each process: it waits for the answer, unpacks and pins it.
        self._threads = ThreadPoolExecutor(max(1, workers), "read-ahead")
        self._device = torch.cuda.current_device() if self._pinned else None

    def step(self, starts: Sequence[int], count: int, stride: int) -> list[Batch]:
        """The batches of one step, in order: `count` samples from each of `starts` on.

        stride: samples of a step on all ranks together; the next step is expected that much further on. What
            was not expected, as after a resume, is made now.

        Raises:
            DataProblem: what `loader.batch` raises for these samples (for later ones: when they are asked
                for); or a worker was killed.
        """
        now = [(start, count) for start in starts]
        later = [(start + turn * stride, count) for turn in range(1, self._ahead + 1) for start in starts]
        for key in self._due.keys() - {*now, *later}:
            self._due.pop(key).cancel()
        # What is there is taken before more is begun: a thread that begins holds the interpreter.
        there = all(key in self._due and self._due[key].done() for key in now)
        self._begin(now if there else now + later)
        batches = [self._due.pop(key).result() for key in now]
        self._begin(later)
        return batches

    def _begin(self, keys: list[tuple[int, int]]) -> None:
        for key in keys:
            if key not in self._due:
                self._due[key] = self._threads.submit(self._make, *key)

    def forget(self) -> None:
        """Drops what was made ahead, and returns when nothing is being made: the next step is elsewhere."""
        for future in self._due.values():
            future.cancel()
        wait(self._due.values())
        self._due.clear()

    def _make(self, first: int, count: int) -> Batch:
        batch = self._ask(first, count) if self._workers else self._loader.batch(first, count)
        if self._pinned:
            torch.cuda.set_device(self._device)  # a thread begins on the first GPU, and would allocate there
            batch = batch.pin_memory()
        return batch

    def _ask(self, first: int, count: int) -> Batch:
        """One batch from a worker that has nothing else to do."""
        worker = self._idle.get()
        try:
            worker.connection.send((first, count))
            answer, sizes = worker.connection.recv()
            buffers = [bytearray(size) for size in sizes]
            os.preadv(worker.memory, buffers, 0)
        except (EOFError, OSError):
            raise DataProblem(
                "a process that reads the data was killed (out of memory?)",
                where="data.workers",
                fix="start the same command again: it resumes; fewer data.workers need less memory",
            ) from None
        finally:
            self._idle.put(worker)
        made = pickle.loads(answer, buffers=buffers)
        if isinstance(made, Exception):
            raise made
        fields: dict[str, Any] = {
            name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
            for name, value in made.items()
        }
        return Batch(**fields)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.process.kill()  # it holds nothing that could be lost, and its thread sees the end
            worker.process.join()
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.connection.close()
            os.close(worker.memory)


class _Worker(NamedTuple):
    process: BaseProcess
    connection: Connection  # numbers of samples there, an answer back
    memory: int  # file descriptor of memory that both share: the answer's arrays


def _start(loader: MakesBatches, workers: int) -> list[_Worker]:
    """Worker processes, idle."""
    if not workers:
        return []
    context = get_context("forkserver")  # forks of a process that has imported torch once and has no threads
    os.environ["BIGTFM_PARENT"] = str(os.getpid())  # for the first of these two
    context.set_forkserver_preload(["bigtfm.resilience.dies_with_parent", __name__])
    pickled = pickle.dumps(loader)
    started: list[_Worker] = []
    before = signal.pthread_sigmask(signal.SIG_BLOCK, POLITE)  # inherited, so that no moment is left open
    try:
        for number in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, pickled), name=f"data-worker-{number}")
            process.start()
            theirs.close()
            memory = _nameless_memory()
            send_handle(ours, memory, process.pid)
            started.append(_Worker(process, ours, memory))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return started


def _nameless_memory() -> int:
    """A file descriptor of memory that goes with its last user, however that ends."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("batch")
    with TemporaryFile() as file:  # macOS
        return os.dup(file.fileno())


def _serve(connection: Connection, pickled: bytes) -> None:
    """A worker's life: answers requests until the trainer's end of the connection is gone."""
    signal.pthread_sigmask(signal.SIG_BLOCK, POLITE)  # where the fork server was there before
    stacks.register()
    end_with_parent()  # also in the middle of a batch
    torch.set_num_threads(1)
    loader: MakesBatches | None = None
    with suppress(EOFError, OSError):
        memory = recv_handle(connection)
        while True:
            first, count = connection.recv()
            buffers: list[pickle.PickleBuffer] = []
            try:
                loader = loader or pickle.loads(pickled)
                made: Any = _arrays(loader.batch(first, count))
            except Exception as error:  # it is the trainer's, at the step that it belongs to
                made = error
            answer = pickle.dumps(made, protocol=5, buffer_callback=buffers.append)
            os.pwritev(memory, buffers, 0)
            connection.send((answer, [buffer.raw().nbytes for buffer in buffers]))


def _arrays(batch: Batch) -> dict[str, Any]:
    """A batch's fields, its tensors as arrays, which share their memory."""
    return {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in vars(batch).items()}
