"""How a trainer gets its host memory: before torch is imported, which reads its part of this once."""

from __future__ import annotations

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_MMAP_THRESHOLD = 32 << 20  # bytes: the most that glibc takes
_TRIM_THRESHOLD = 1 << 30


def keep_pages() -> None:
    """Freed memory stays with the process, and tensors over 2 MiB lie in huge pages where Linux grants them.

    A step on a CPU allocates and frees the same hundreds of megabytes again and again. By default glibc gives
    them back each time, and the kernel clears every page anew: a tenth of the step of a small model.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch's, c10/core/impl/alloc_cpu.cpp
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # glibc
        mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD)
