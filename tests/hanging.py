"""Faults that make a job hang, put into one rank's process before it trains; from step 7 on where it applies.

Each is a function that breaks the real code by replacing a function of it.
"""

from __future__ import annotations

import ctypes
import os
import time
from typing import Any

STEP = 7


def _at_step(pulse_step: int) -> bool:
    return pulse_step >= STEP


def _from_step_7(fault: Any) -> Any:
    """Calls the fault once the trainer has come to step 7."""
    from bigtfm.resilience.pulse import Pulse

    enter = Pulse.enter

    def noted(pulse: Any, phase: str, *, step: int | None = None) -> None:
        enter(pulse, phase, step=step)
        if step == STEP:
            fault.due = True

    fault.due = False
    Pulse.enter = noted
    return fault


def sleeping_loader() -> None:
    """A reader that never comes back, in the thread that reads ahead."""
    from bigtfm.data.indexed import Split

    read, calls = Split.read, [0]

    def sleepy_read(split: Any, start: int, stop: int) -> Any:
        calls[0] += 1
        if calls[0] > 100:
            time.sleep(3600)  # the fault
        return read(split, start, stop)

    Split.read = sleepy_read


def held_gil() -> None:
    """A forward that sleeps in C without letting other threads run."""
    from bigtfm.model.gpt import GPT

    forward, calls = GPT.forward, [0]

    def held_forward(model: Any, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] > 15:
            ctypes.PyDLL(None).sleep(3600)  # the fault
        return forward(model, *args, **kwargs)

    GPT.forward = held_forward


def left_out_sum() -> None:
    """One of the loop's own collectives is not called."""
    from bigtfm.engine.distributed import Ranks

    total, calls = Ranks.sum, [0]

    def forgetful_sum(ranks: Any, values: Any) -> Any:
        calls[0] += 1
        return list(values) if calls[0] == 13 else total(ranks, values)

    Ranks.sum = forgetful_sum


def left_out_reduction() -> None:
    """One of DeepSpeed's collectives is not called."""
    from deepspeed.comm.torch import TorchBackend

    calls = [0]
    for name in ("all_reduce", "reduce"):
        function = getattr(TorchBackend, name)

        def forgetful(backend: Any, *args: Any, _function: Any = function, **kwargs: Any) -> Any:
            calls[0] += 1
            return None if calls[0] == 30 else _function(backend, *args, **kwargs)

        setattr(TorchBackend, name, forgetful)


def exited() -> None:
    from bigtfm.model.gpt import GPT

    forward, calls = GPT.forward, [0]

    def leaving_forward(model: Any, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] > 15:
            os._exit(0)
        return forward(model, *args, **kwargs)

    GPT.forward = leaving_forward


def slow_forward() -> None:
    from bigtfm.model.gpt import GPT

    forward = GPT.forward

    def slow(model: Any, *args: Any, **kwargs: Any) -> Any:
        time.sleep(0.2)
        return forward(model, *args, **kwargs)

    GPT.forward = slow
