"""A side's end of the line to the benchmark, which lets one side train at a time, some steps in a row."""

from __future__ import annotations

import json
import resource
import time
from typing import Any, TextIO


class Enough(Exception):
    """The benchmark has seen what it wanted to see."""


class Turns:
    """Waits for a number of steps, times them, answers with a line of JSON, and waits again.

    asked: a line for each turn, the number of steps in it; its end is the end. answers: where the lines go.
    """

    def __init__(self, asked: TextIO, answers: TextIO) -> None:
        self._asked, self._answers = asked, answers
        self._left, self._began, self._seconds = 0, 0.0, [0.0]
        self.notes: dict[str, Any] = {}  # what else the side wants to say about a turn

    def step(self) -> None:
        """The end of each step, and once before the first.

        Raises:
            Enough: there is no further turn.
        """
        now = time.perf_counter()
        if self._left:
            self._seconds.append(now - self._began)
            self._left -= 1
        if not self._left:
            self._next()
        self._began = time.perf_counter()

    def _next(self) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(
            json.dumps({"seconds": self._seconds, "peak_bytes": peak, **self.notes}),
            file=self._answers,
            flush=True,
        )
        line = self._asked.readline()
        if not line:
            raise Enough
        self._left, self._seconds = int(line), []
