"""Every torch.distributed collective of this process is noted in the pulse: which, from where, how long."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from bigtfm.resilience.pulse import Pulse
from bigtfm.resilience.stacks import is_library, shown

COLLECTIVES = (
    *("all_reduce", "all_reduce_coalesced", "reduce", "broadcast", "broadcast_object_list", "barrier"),
    *("all_gather", "all_gather_into_tensor", "all_gather_coalesced", "all_gather_object", "gather"),
    *("gather_object", "reduce_scatter", "reduce_scatter_tensor", "scatter", "scatter_object_list"),
    *("all_to_all", "all_to_all_single", "monitored_barrier"),
)
# What passes a collective on for others; a reader looks for the line that wanted it.
_GO_BETWEENS = ("bigtfm/engine/distributed.py", "bigtfm/resilience/collectives.py")
_DEEPSPEED_GO_BETWEENS = ("deepspeed/comm/", "deepspeed/utils/")


def note_in(pulse: Pulse) -> None:
    """Wraps the collectives for the rest of this process. Before DeepSpeed starts: it takes some by name."""
    import torch.distributed
    from torch.distributed.distributed_c10d import Work

    for name in COLLECTIVES:
        if hasattr(torch.distributed, name):
            setattr(torch.distributed, name, _noted(name, getattr(torch.distributed, name), pulse))
    setattr(Work, "wait", _waiting(Work.wait, pulse))  # noqa: B010  where async_op=True is waited for


def _noted(name: str, function: Callable[..., Any], pulse: Pulse) -> Callable[..., Any]:
    waiting = _waiting(function, pulse)

    @functools.wraps(function)
    def noted(*args: Any, **kwargs: Any) -> Any:
        elements = sum(_elements(value) for value in (*args[:2], *kwargs.values()))
        group = getattr(kwargs.get("group"), "group_name", "")
        pulse.begin_collective(name, group, elements, _sites(sys._getframe(1)), lane=_lane())
        return waiting(*args, **kwargs)

    return noted


def _waiting(function: Callable[..., Any], pulse: Pulse) -> Callable[..., Any]:
    @functools.wraps(function)
    def wait(*args: Any, **kwargs: Any) -> Any:
        lane = _lane()
        pulse.wait(lane=lane)
        try:
            return function(*args, **kwargs)
        finally:
            pulse.go_on(lane=lane)

    return wait


def _lane() -> int:
    """1 in a thread that Python code has started; 0 in the main one and autograd's."""
    return int(type(threading.current_thread()) is threading.Thread)


def _elements(value: Any) -> int:
    if hasattr(value, "numel"):
        return int(value.numel())
    if isinstance(value, list | tuple):
        return sum(_elements(item) for item in value)
    return 0


def _sites(frame: FrameType | None) -> tuple[str, str]:
    """file:line of the first frame outside torch and DeepSpeed, and DeepSpeed's first within, "" if none."""
    inner = ""
    while frame is not None:
        filename = frame.f_code.co_filename
        kind = _kind(filename)
        if kind == "ours":
            return f"{shown(filename)}:{frame.f_lineno}", inner
        if kind == "deepspeed" and not inner:
            inner = f"{shown(filename)}:{frame.f_lineno}"
        frame = frame.f_back
    return inner, ""  # autograd's own thread on a GPU: nothing of ours is below


@functools.cache
def _kind(filename: str) -> str:
    name = shown(filename)
    if name.startswith("deepspeed/") and not name.startswith(_DEEPSPEED_GO_BETWEENS):
        return "deepspeed"
    return "between" if is_library(filename) or name in _GO_BETWEENS else "ours"
