"""The fastest matrix product that this process gets out of its device: the ceiling of a training step."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

import torch

LARGEST = {"cpu": 4096, "cuda": 8192}  # rows of the square matrices
_LONG = 0.05  # seconds; a product that takes less may not be the best there is
_TRIES = 5


def matmul_flops(
    device: torch.device, precision: Literal["fp32", "bf16", "fp16"], synchronize: Callable[[], None]
) -> float:
    """FLOP/s of the best of five square products, as large as pays off; 2 n^3 operations each.

    synchronize: waits for the device.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    best, size = 0.0, 512
    while True:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty(size, size, device=device, dtype=dtype)
        seconds = min(_seconds(a, b, out, synchronize) for _ in range(_TRIES))
        best = max(best, 2 * size**3 / seconds)
        if size >= LARGEST[device.type] or (device.type == "cpu" and seconds > _LONG):
            return best
        size *= 2


def _seconds(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, synchronize: Callable[[], None]) -> float:
    synchronize()
    began = time.perf_counter()
    torch.matmul(a, b, out=out)
    synchronize()
    return time.perf_counter() - began
