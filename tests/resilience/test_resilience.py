"""Signals and numerics."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from bigtfm.config.problems import NumericsProblem
from bigtfm.resilience.numerics import require_finite
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


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_ends_the_run(value: float) -> None:
    for loss, grad_norm in ((value, 1.0), (1.0, value)):
        with pytest.raises(NumericsProblem, match="step 7"):
            require_finite(7, loss, grad_norm, overflow_allowed=False)


def test_an_overflow_of_the_fp16_loss_scale_is_not_the_end() -> None:
    require_finite(7, 1.0, float("inf"), overflow_allowed=True)
    with pytest.raises(NumericsProblem):
        require_finite(7, float("nan"), 1.0, overflow_allowed=True)
