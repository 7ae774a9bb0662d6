"""Signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from bigtfm.resilience.signals import StopRequest

POLITE = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in POLITE}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", POLITE)
def test_a_signal_is_remembered_and_ends_nothing(number: signal.Signals) -> None:
    stop = StopRequest()
    assert stop.signal == 0
    os.kill(os.getpid(), number)
    assert stop.signal == number


def test_a_second_interrupt_leaves_at_once() -> None:
    code = (
        "import os, signal; from bigtfm.resilience.signals import StopRequest; StopRequest();"
        "os.kill(os.getpid(), signal.SIGINT); print('still here', flush=True);"
        "os.kill(os.getpid(), signal.SIGINT); print('never')"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (130, "still here\n")
