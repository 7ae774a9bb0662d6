"""Python stacks of a process, seen from another one: also while it holds the GIL or hangs in the kernel.

faulthandler writes them on a signal, without the interpreter's help. Only a thread that does nothing else
takes SIGQUIT: it would cut short a sleep or a system call of any other, and free what is to be looked at.
A stopped process has to go on for it; there the main thread takes WHEN_STOPPED, before it does anything else.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import re
import signal
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from bigtfm.resilience.processes import state

PACKAGE = Path(__file__).parents[1]
MEMORY = "bigtfm-stacks"
WHEN_STOPPED = getattr(signal, "SIGRTMAX", 64) - 3
_RECEIVER = "_take_the_signal"
_LIBRARIES = re.compile(r".*/(?:site-packages|dist-packages|lib/python3[.\d]*t?)/")
_FRAME = re.compile(r'  File "(.*)", line (\d+) in (.*)')


@dataclass(frozen=True)
class Frame:
    """A line that a thread stands in."""

    file: str  # from the package on, where it lies in one
    line: int
    function: str
    ours: bool  # neither Python's nor an installed package's

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"


@cache
def shown(filename: str) -> str:
    """A source file as messages name it: bigtfm/train.py, deepspeed/runtime/engine.py, else its path."""
    if filename.startswith(f"{PACKAGE}{os.sep}"):
        return filename[len(str(PACKAGE.parent)) + 1 :]
    return _LIBRARIES.sub("", filename)


@cache
def is_library(filename: str) -> bool:
    """Whether a source file is an installed package's or Python's own."""
    ours = filename.startswith(f"{PACKAGE}{os.sep}")
    return not ours and (filename.startswith("<") or _LIBRARIES.match(filename) is not None)


def register() -> None:
    """Makes the stacks of this process visible to `of`. To be called before it starts threads.

    Does nothing where there is no memfd (macOS).
    """
    if not hasattr(os, "memfd_create"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGQUIT})  # here, and in the threads to come
    memory = os.memfd_create(MEMORY)  # open as long as the process lives: its name is how it is found
    for number in (signal.SIGQUIT, WHEN_STOPPED):
        faulthandler.register(number, file=memory, all_threads=True)
    threading.Thread(target=_take_the_signal, name="stacks", daemon=True).start()


def _take_the_signal() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGQUIT})
    forever, _ = os.pipe()
    os.read(forever, 1)


def of(pid: int, timeout: float = 1.0) -> str:
    """faulthandler's text of all threads; "": the process does not `register`, or can't be made to speak.

    A stopped process goes on for the moment that this takes, after its stacks were written; one in a debugger
    is left alone.

    timeout: seconds.
    """
    memory = _memory_of(pid)
    if memory is None or state(pid) == "t":
        return ""
    try:
        before = os.fstat(memory).st_size
        stopped = state(pid) == "T"
        if stopped:
            _to_thread(pid, WHEN_STOPPED)
            os.kill(pid, signal.SIGCONT)
        else:
            os.kill(pid, signal.SIGQUIT)
        text = _appended(memory, before, timeout)
        if stopped:
            os.kill(pid, signal.SIGSTOP)
        return text
    except OSError:
        return ""
    finally:
        os.close(memory)


def _to_thread(pid: int, number: int) -> None:
    """A signal for a process's main thread (tgkill(2)): it waits there, and comes first when it goes on."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "tgkill"):  # glibc before 2.30: for whichever thread goes on first
        os.kill(pid, number)
    elif libc.tgkill(pid, pid, number):
        raise OSError(ctypes.get_errno(), "tgkill")


def _memory_of(pid: int) -> int | None:
    with suppress(OSError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                if os.readlink(entry).startswith(f"/memfd:{MEMORY}"):
                    return os.open(entry, os.O_RDONLY)
    return None


def _appended(memory: int, before: int, timeout: float) -> str:
    """What is written after `before`, once it has not grown for a moment."""
    deadline, size = time.monotonic() + timeout, before
    while time.monotonic() < deadline:
        time.sleep(0.05)
        grown = os.fstat(memory).st_size
        if grown == size > before:
            break
        size = grown
    return os.pread(memory, size - before, before).decode(errors="replace")


def threads(text: str) -> tuple[tuple[Frame, ...], ...]:
    """The threads in faulthandler's text, the main one first, each from its innermost frame outwards.

    The one that is there to take the signal is left out.
    """
    found: list[tuple[Frame, ...]] = []
    for part in re.split(r"^(?=Thread |Current thread )", text, flags=re.MULTILINE):
        lines = [_FRAME.match(line) for line in part.splitlines()]
        frames = [Frame(shown(hit[1]), int(hit[2]), hit[3], not is_library(hit[1])) for hit in lines if hit]
        if frames and _RECEIVER not in {frame.function for frame in frames}:
            found.append(tuple(frames))
    return tuple(reversed(found))  # faulthandler has the newest first
