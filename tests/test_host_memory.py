"""Freed memory stays with a process that asked for it."""

from __future__ import annotations

import subprocess
import sys

import pytest

# As a training step does: some blocks, written, all freed again, and once more. What matters is page faults.
ROUNDS = """
import ctypes, resource, sys
from bigtfm.host_memory import keep_pages
if sys.argv[1] == "keep":
    keep_pages()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
size, faults = 20 << 20, []
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [libc.malloc(size) for _ in range(8)]
    for block in blocks:
        ctypes.memset(block, 1, size)
    for block in blocks:
        libc.free(block)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(faults[-1])
"""


def faults(how: str) -> int:
    command = [sys.executable, "-c", ROUNDS, how]
    return int(subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_pages_are_not_asked_for_again() -> None:
    as_it_is = faults("default")
    if as_it_is < 1000:
        pytest.skip("this malloc keeps them by itself")
    assert faults("keep") < as_it_is / 100
