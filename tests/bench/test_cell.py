"""What the ranks of a cell have measured, taken together."""

from __future__ import annotations

from typing import Any

import pytest

from bigtfm.bench.cell import together


def rank(seconds: list[float], forward: float, peak: int, ceiling: float) -> dict[str, Any]:
    return {"seconds": seconds, "split": {"forward": forward}, "memory": {"peak": peak}, "ceiling": ceiling}


def test_a_step_is_the_slowest_ranks_and_memory_the_fullest() -> None:
    found = together([rank([1.0, 2.0, 3.0], 0.5, 10, 4.0), rank([1.5, 1.0, 2.0], 0.7, 30, 8.0)])
    assert found["seconds"] == [1.5, 2.0, 3.0]
    assert found["split"]["forward"] == pytest.approx(0.6)
    assert found["memory"] == {"peak": 30}
    assert found["ceiling"] == 6.0


def test_the_ceiling_is_what_a_matrix_product_takes() -> None:
    """Beside a product that is timed here."""
    import time

    import torch

    from bigtfm.bench.ceiling import matmul_flops

    a = torch.randn(512, 512)
    times = []
    for _ in range(20):
        began = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - began)
    here = 2 * 512**3 / min(times)
    assert matmul_flops(torch.device("cpu"), "fp32", lambda: None) > 0.3 * here
