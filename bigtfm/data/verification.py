"""Large files of data sets, compared with their SHA-256 while training goes on.

Small data sets are compared whole at every start (bigtfm/job.py).
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Sequence
from contextlib import suppress

from bigtfm.config.problems import DataProblem
from bigtfm.data.best_fit import Packed
from bigtfm.data.indexed import Signed, TokenDataset

PIECE = 2**20  # bytes hashed at once; the interpreter is free meanwhile


def large_files(datasets: Sequence[TokenDataset], seq_len: int, packing: str) -> list[Signed]:
    """The files that no start compares with their SHA-256."""
    files = [file for dataset in datasets if not dataset.small for file in dataset.files]
    if packing == "best_fit":
        files += [file for dataset in datasets for file in Packed.open(dataset, seq_len).files if file.large]
    return files


class Verification:
    """A thread of low priority that reads `files` one after another. `failed`: one is not what it was.

    Use it in a `with` block: leaving it ends the reading.
    """

    def __init__(self, files: Sequence[Signed]) -> None:
        self._files = files
        self._problem: DataProblem | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._read, name="verification", daemon=True)
        if files:
            self._thread.start()

    @property
    def failed(self) -> bool:
        return self._problem is not None

    def require_sound(self) -> None:
        """Raises DataProblem when a file is not what it was, as far as they have been read."""
        if self._problem is not None:
            raise self._problem

    def wait(self) -> None:
        """Returns when all files have been read."""
        if self._files:
            self._thread.join()

    def __enter__(self) -> Verification:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.wait()

    def _read(self) -> None:
        with suppress(OSError, AttributeError):  # training goes first; elsewhere than on Linux it shares
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        for file in self._files:
            try:
                sha256 = self._sha256(file)
            except OSError as error:
                self._problem = DataProblem(
                    f"can't be read: {error.strerror}", where=str(file.path), fix="mend the disk, then resume"
                )
                return
            if sha256 not in (None, file.sha256):
                self._problem = file.changed(str(sha256))
                return

    def _sha256(self, file: Signed) -> str | None:
        """None: there is no more need of it."""
        sha256 = hashlib.sha256()
        with file.path.open("rb", buffering=0) as content:
            while piece := content.read(PIECE):
                if self._ended.is_set():
                    return None
                sha256.update(piece)
        return sha256.hexdigest()


def share(places: Sequence[object], rank: int) -> slice:
    """Which of the files a rank reads, where all ranks say which folder they see: those that see the same one
    (on a shared file system) take turns; a machine with a copy of its own reads all of it."""
    same = [other for other, place in enumerate(places) if place == places[rank]]
    return slice(same.index(rank), None, len(same))
