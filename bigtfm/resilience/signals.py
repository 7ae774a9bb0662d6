"""A signal asks for a stop; the loop grants it at a step boundary, on all ranks together."""

from __future__ import annotations

import os
import signal
from types import FrameType

_POLITE = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """Remembers the first stop signal. A second Ctrl-C leaves at once."""

    def __init__(self) -> None:
        self.signal: int = 0  # 0: none yet
        for number in _POLITE:
            signal.signal(number, self._receive)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            os._exit(128 + signal.SIGINT)
        self.signal = number
