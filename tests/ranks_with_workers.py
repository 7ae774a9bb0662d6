"""Programs for rank_runner whose ranks may have worker processes, and note them in workers.txt."""

import multiprocessing
import os
from pathlib import Path

import rank_runner

from bigtfm.data import prefetch


def command():
    """`bigtfm ARGS`."""
    _allow_and_note()
    rank_runner._bigtfm()


def jobs():
    """Trainings one after the other."""
    _allow_and_note()
    rank_runner.train_jobs()


def _allow_and_note():
    multiprocessing.current_process().daemon = False  # rank_runner's are, and may have no children
    start = prefetch._start

    def noting(loader, workers):
        started = start(loader, workers)
        with Path("workers.txt").open("a") as notes:
            print(os.getpid(), *[worker.process.pid for worker in started], file=notes)
        return started

    prefetch._start = noting
