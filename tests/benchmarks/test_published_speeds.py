"""What the planner makes of trainings that others have published."""

from __future__ import annotations

from statistics import median

import pytest
from published_speeds import Published, published


@pytest.fixture(scope="module")
def rows() -> list[Published]:
    return list(published())


def test_planned_speeds_are_near_published_ones(rows: list[Published]) -> None:
    assert len(rows) == 63
    ratios = [row.ratio for row in rows]
    assert 0.95 < median(ratios) < 1.08
    assert 0.85 < min(ratios)
    assert max(ratios) < 1.3


def test_what_ran_is_planned_to_fit_but_for_the_fullest(rows: list[Published]) -> None:
    assert sum(row.fits for row in rows) == 59
