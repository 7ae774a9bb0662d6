"""Reading ahead: the batches of the next steps are made while this one is computed, by a thread or processes.

What is read, and its order, stays a function of sample numbers: however many workers there are, whichever is
quicker, a step gets what `loader.batch` would have returned.
"""

from __future__ import annotations

import pickle
import signal
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from queue import SimpleQueue
from typing import Any, Protocol, Self

import torch

from bigtfm.config.problems import DataProblem
from bigtfm.data.loader import Batch

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
        self._idle: SimpleQueue[Connection] = SimpleQueue()
        for _, connection in self._workers:
            self._idle.put(connection)
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
        wanted = dict.fromkeys(now + later)
        for key in self._due.keys() - wanted:
            self._due.pop(key).cancel()
        for key in wanted:
            if key not in self._due:
                self._due[key] = self._threads.submit(self._make, *key)
        return [self._due.pop(key).result() for key in now]

    def _make(self, first: int, count: int) -> Batch:
        batch = self._ask(first, count) if self._workers else self._loader.batch(first, count)
        if self._pinned:
            torch.cuda.set_device(self._device)  # a thread begins on the first GPU, and would allocate there
            batch = batch.pin_memory()
        return batch

    def _ask(self, first: int, count: int) -> Batch:
        """One batch from a worker that has nothing else to do."""
        connection = self._idle.get()
        try:
            connection.send((first, count))
            answer = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            raise DataProblem(
                "a process that reads the data was killed (out of memory?)",
                where="data.workers",
                fix="start the same command again: it resumes; fewer data.workers need less memory",
            ) from None
        finally:
            self._idle.put(connection)
        if isinstance(answer, Exception):
            raise answer
        fields, arrays = answer  # as _packed makes them
        tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return Batch(**fields, **tensors)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process, _connection in self._workers:
            process.kill()  # it holds nothing that could be lost, and its thread sees the end
            process.join()
        self._threads.shutdown(cancel_futures=True)
        for _process, connection in self._workers:
            connection.close()


def _start(loader: MakesBatches, workers: int) -> list[tuple[BaseProcess, Connection]]:
    """Worker processes, each with our end of the connection to it."""
    if not workers:
        return []
    context = get_context("forkserver")  # forks of a process that has imported torch once and has no threads
    context.set_forkserver_preload([__name__])
    pickled = pickle.dumps(loader)
    started: list[tuple[BaseProcess, Connection]] = []
    before = signal.pthread_sigmask(signal.SIG_BLOCK, POLITE)  # inherited, so that no moment is left open
    try:
        for number in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, pickled), name=f"data-worker-{number}")
            process.start()
            theirs.close()
            started.append((process, ours))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return started


def _serve(connection: Connection, pickled: bytes) -> None:
    """A worker's life: answers requests until the trainer's end of the connection is gone."""
    signal.pthread_sigmask(signal.SIG_BLOCK, POLITE)  # where the fork server was there before
    torch.set_num_threads(1)
    loader: MakesBatches | None = None
    while True:
        try:
            first, count = connection.recv()
        except (EOFError, OSError):
            return
        try:
            loader = loader or pickle.loads(pickled)
            answer = _packed(loader.batch(first, count))
        except Exception as error:  # it is the trainer's, at the step that it belongs to
            answer = pickle.dumps(error)
        try:
            connection.send_bytes(answer)
        except OSError:
            return


def _packed(batch: Batch) -> bytes:
    """A batch as bytes: its tensors as arrays, which pickle copies whole."""
    fields = vars(batch)
    arrays = {name: value.numpy() for name, value in fields.items() if isinstance(value, torch.Tensor)}
    rest = {name: value for name, value in fields.items() if name not in arrays}
    return pickle.dumps((rest, arrays), protocol=5)
