"""Stacks of other processes, whatever these are doing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from bigtfm.resilience import processes, stacks

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs Linux")

PROGRAM = """
import ctypes, os, signal, sys, threading, time
from bigtfm.resilience import processes, stacks

def stand_still():
    {what}

def main():
    stand_still()

{register}
print("ready", flush=True)
main()
print("went on", flush=True)
"""
HELD_GIL = "ctypes.PyDLL(None).sleep(600)"


@contextmanager
def process(what: str, register: str = "stacks.register()") -> Iterator[subprocess.Popen[str]]:
    program = PROGRAM.format(what=what, register=register)
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None
        try:
            assert started.stdout.readline() == "ready\n"
            time.sleep(0.2)
            yield started
        finally:
            started.kill()


def functions(text: str) -> list[str]:
    return [frame.function for frame in stacks.threads(text)[0]]


@pytest.mark.parametrize(
    "what", ["time.sleep(600)", HELD_GIL, "while True: pass", "os.read(os.pipe()[0], 1)"]
)
def test_a_process_that_stands_still_is_seen_and_not_disturbed(what: str) -> None:
    with process(what) as started:
        for _ in range(2):  # each time what is new
            text = stacks.of(started.pid)
            assert functions(text) == ["stand_still", "main", "<module>"]
        assert len(stacks.threads(text)) == 1  # not the one that took the signal
        assert started.poll() is None


def test_a_signal_to_the_main_thread_would_end_what_is_looked_at() -> None:
    """Why there is a thread that takes the signal: libc's sleep returns early from one."""
    usual = "import faulthandler; faulthandler.register(signal.SIGQUIT, file=open(os.devnull, 'w'))"
    with process(HELD_GIL, register=usual) as started:
        os.kill(started.pid, signal.SIGQUIT)
        assert started.stdout is not None
        assert started.stdout.readline() == "went on\n"


def test_a_stopped_process_is_seen_and_stays_stopped() -> None:
    with process("time.sleep(600)") as started:
        started.send_signal(signal.SIGSTOP)
        time.sleep(0.1)
        assert processes.state(started.pid) == "T"
        assert functions(stacks.of(started.pid)) == ["stand_still", "main", "<module>"]
        time.sleep(0.1)
        assert processes.state(started.pid) == "T"


@pytest.mark.parametrize("turn", range(5))
def test_a_stopped_process_is_seen_where_it_was_stopped(turn: int) -> None:
    """And not where it comes to while it goes on to show it."""
    with process("os.kill(os.getpid(), signal.SIGSTOP)") as started:
        time.sleep(0.2)
        assert functions(stacks.of(started.pid)) == ["stand_still", "main", "<module>"]
        assert started.stdout is not None
        assert started.stdout.readline() == "went on\n", "it was on its way meanwhile"


def test_threads_come_with_the_main_one_first() -> None:
    with process("threading.Thread(target=time.sleep, args=(600,)).start(); time.sleep(600)") as started:
        main, other = stacks.threads(stacks.of(started.pid))
        assert [frame.function for frame in main] == ["stand_still", "main", "<module>"]
        assert (other[0].file, other[0].function, other[0].ours) == ("threading.py", "run", False)


def test_a_process_that_is_not_prepared_is_left_alone() -> None:
    """SIGQUIT would kill it."""
    with process("time.sleep(600)", register="") as started:
        assert stacks.of(started.pid) == ""
        time.sleep(0.1)
        assert started.poll() is None
        assert processes.state(started.pid) == "S"


def test_a_process_that_is_gone() -> None:
    with process("pass") as started:
        started.wait()
        assert (processes.state(started.pid), stacks.of(started.pid), processes.descendants(started.pid)) == (
            "",
            "",
            [],
        )


def test_descendants_are_found_at_any_depth() -> None:
    child = "import subprocess, sys; subprocess.run(['sleep', '600'])"
    with process(f"import subprocess; subprocess.run([sys.executable, '-c', {child!r}])") as started:
        time.sleep(0.3)
        below = processes.descendants(started.pid)
        try:
            assert len(below) == 2
        finally:
            for child in below:
                os.kill(child.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("filename", "shown", "library"),
    [
        (str(stacks.PACKAGE / "train.py"), "bigtfm/train.py", False),
        ("/v/lib/python3.11/site-packages/deepspeed/runtime/engine.py", "deepspeed/runtime/engine.py", True),
        ("/usr/lib/python3/dist-packages/torch/x.py", "torch/x.py", True),
        ("/usr/lib/python3.13t/threading.py", "threading.py", True),
        ("<frozen importlib._bootstrap>", "<frozen importlib._bootstrap>", True),
        ("/home/me/my_model.py", "/home/me/my_model.py", False),
    ],
)
def test_files_are_named_from_their_package_on(filename: str, shown: str, library: bool) -> None:
    assert (stacks.shown(filename), stacks.is_library(filename)) == (shown, library)
