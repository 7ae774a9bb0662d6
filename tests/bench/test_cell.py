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


def test_the_ceiling_is_that_of_the_fastest_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 n^3 operations in the time of the best of five; of all sizes the best. The clock is ours."""
    import torch

    from bigtfm.bench import ceiling

    tries: list[int] = []

    def seconds(a: torch.Tensor, *_: object) -> float:
        tries.append(len(a))
        rate = {512: 1e11, 1024: 3e11}.get(len(a), 2e11)
        return 2 * len(a) ** 3 / rate * (1 + len(tries) % 5)  # the fifth of each size is the best

    monkeypatch.setattr(ceiling, "_seconds", seconds)
    monkeypatch.setattr(ceiling, "LARGEST", {"cpu": 2048})
    assert ceiling.matmul_flops(torch.device("cpu"), "fp32", lambda: None) == pytest.approx(3e11)
    assert tries == [512] * 5 + [1024] * 5 + [2048] * 5
