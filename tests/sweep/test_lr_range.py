"""The range test of learning rates: what it reads off a curve, and a real run whose loss is lost."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import TINY

from bigtfm.config.problems import ConfigProblem, NumericsProblem
from bigtfm.sweep.lr_range import lost_at, lr_range, read_off


def curve(lost: float) -> list[tuple[float, float]]:
    """A loss that falls until an lr of `lost` / 5 and rises after it."""
    points = []
    for step in range(100):
        lr = 1e-5 * (1e5 ** (step / 99))
        points.append((lr, 8 - 3 / (1 + (3e-3 / lr) ** 1.2) + 4 * max(0.0, math.log10(5 * lr / lost)) ** 2))
    return points


def test_it_reads_the_lr_off_a_curve(tmp_path: Path) -> None:
    found = read_off(curve(0.3), tmp_path)
    assert 0.03 < found.edge < 0.2
    assert found.suggested == pytest.approx(found.edge / 3, rel=0.01)
    assert found.lost is not None
    assert found.edge < found.lost < 1
    assert found.steepest < found.edge
    later = read_off(curve(1.0), tmp_path)
    assert later.edge > found.edge


def test_where_it_first_rose_counts_and_not_a_lower_loss_after_that(tmp_path: Path) -> None:
    """Seen: a bump at 1e-2, after which the loss fell to its lowest at an lr ten times as large."""
    bump = [(lr, loss + (1.0 if 5e-3 < lr < 8e-3 else 0.0)) for lr, loss in curve(0.3)]
    found = read_off(bump, tmp_path)
    assert 2e-3 < found.edge < 5e-3
    small = [(lr, loss + (0.02 if 5e-3 < lr < 8e-3 else 0.0)) for lr, loss in curve(0.3)]
    assert read_off(small, tmp_path).edge > 0.03, "noise is no bump"
    early = [(lr, loss + 0.02 * (place % 12 > 6)) for place, (lr, loss) in enumerate(curve(0.3))]
    assert read_off(early, tmp_path).edge > 0.03, "nor is it at the start"


def test_a_loss_that_never_fell_is_no_range(tmp_path: Path) -> None:
    with pytest.raises(NumericsProblem, match="the loss never fell in 30 steps"):
        read_off([(1e-3 * 1.1**step, 8.0 + step) for step in range(30)], tmp_path)


def test_a_loss_counts_as_lost_only_after_a_fall() -> None:
    assert lost_at([8.0, 7.99, 8.01] * 20) is None, "noise"
    assert lost_at([8.0] * 30 + [13.0]) == 30
    assert lost_at([8 - 0.1 * n for n in range(50)]) is None
    assert lost_at([8 - 0.1 * n for n in range(20)] + [9.0]) == 20


@pytest.mark.launcher
@pytest.mark.slow
def test_two_real_ranks_are_ended_where_their_loss_is_lost(
    tmp_path: Path, tiny_data: Path, deepspeed_json: Callable[..., Path]
) -> None:
    overrides = [*TINY, f"data.path={tiny_data}"]
    out = tmp_path / "range"
    found = lr_range(None, deepspeed_json(stage=1), overrides, out, steps=60, lrs=(1e-4, 1e4), ranks=2)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    ratios = [after["lr"] / before["lr"] for before, after in pairwise(rows)]
    assert all(ratio == pytest.approx(1e8 ** (1 / 59)) for ratio in ratios)
    assert rows[0]["lr"] == pytest.approx(1e-4)
    assert found.steps < 60
    assert found.edge < 10
    assert 1e-4 < found.suggested < 1
    assert (out / "lr-range.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "lr-range.json").read_text()) == found.record
    again = lr_range(None, deepspeed_json(stage=1), overrides, out, steps=60, lrs=(1e-4, 1e4), ranks=2)
    assert again == found
    with pytest.raises(ConfigProblem, match="the folder holds another run"):
        lr_range(None, deepspeed_json(stage=1), overrides, out, steps=61, lrs=(1e-4, 1e4))


def test_a_range_that_is_none(tmp_path: Path, deepspeed_json: Callable[..., Path]) -> None:
    with pytest.raises(ConfigProblem, match=r"--min-lr 1\.0 and --max-lr 0\.1"):
        lr_range(None, deepspeed_json(), [], tmp_path, steps=60, lrs=(1.0, 0.1))
