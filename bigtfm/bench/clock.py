"""The steps of a real training by the phases that its loop tells to its pulse."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from mmap import mmap

from bigtfm.resilience.lifeline import Enough
from bigtfm.resilience.pulse import Pulse

SPLIT = ("data", "forward", "backward", "update", "record", "collectives")


@dataclass
class Step:
    """One optimizer step: from the wish for its data to that for the next one's."""

    seconds: float = 0.0
    phases: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SPLIT, 0.0))  # add up to seconds


class StepClock(Pulse):
    """A pulse that times each step, and ends the training after `steps` of them.

    synchronize: waits for the device. Called at every phase from step `split_from` on, without which a GPU's
    work would show in the phase that happens to wait for it; before, it would slow what is measured.

    Raises, in the loop:
        Enough: the steps are done.
    """

    def __init__(
        self, memory: mmap | None, steps: int, split_from: int, synchronize: Callable[[], None]
    ) -> None:
        super().__init__(memory)
        self.steps: list[Step] = []
        self._last, self._split_from, self._synchronize = steps, split_from, synchronize
        self._current: Step | None = None
        self._name, self._since, self._waited = "", 0.0, 0.0
        self._listener: Callable[[str, int | None], None] = lambda *_: None

    def anew(self, steps: int, listener: Callable[[str, int | None], None]) -> None:
        """For another training in the same process, whose phases and steps are told to `listener`."""
        self.steps, self._current, self._listener = [], None, listener
        self._last, self._split_from = steps, steps + 1

    def _enter(self, phase: str, step: int | None, site: str) -> None:
        if self._current is not None and len(self.steps) + 1 >= self._split_from:
            self._synchronize()
        now, waited = time.perf_counter(), self.waited
        if self._current is not None:
            collectives, elapsed = waited - self._waited, now - self._since
            self._current.seconds += elapsed
            self._current.phases["collectives"] += collectives
            self._current.phases[self._name] += elapsed - collectives
        self._name, self._since, self._waited = phase, now, waited
        if phase == "data":
            if self._current is not None:
                self.steps.append(self._current)
            self._current = Step()
        super()._enter(phase, step, site)
        self._listener(phase, step)
        if len(self.steps) == self._last:
            raise Enough
