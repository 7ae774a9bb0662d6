"""Rates fitted to times."""

from __future__ import annotations

import pytest

from bigtfm.bench.calibrate import PARTS, fit, sweep
from bigtfm.planner.step_time import Work

KINDS = tuple(Work.__dataclass_fields__)


def works() -> list[Work]:
    none = dict.fromkeys(KINDS, 0.0)
    shapes = [(1e9, 1e6, 100), (4e9, 2e6, 300), (2e9, 9e6, 200), (8e9, 1e6, 900)]
    return [Work(**none | {"products": a, "traffic": b, "operations": c}) for a, b, c in shapes]


def test_rates_that_times_were_made_of_are_found() -> None:
    true = {"products": 2e-11, "traffic": 3e-9, "operations": 1e-5}
    times = [sum(true[kind] * getattr(work, kind) for kind in true) for work in works()]
    assert fit(works(), times, tuple(true), times) == pytest.approx(true, rel=1e-4)


def test_no_rate_is_negative() -> None:
    times = [1e-9 * work.products - 1e-3 * work.operations / 100 for work in works()]
    found = fit(works(), times, ("products", "operations"), times)
    assert min(found.values()) >= 0


def test_every_kind_that_a_sweep_shows_is_fitted_once() -> None:
    kinds = [kind for part in PARTS.values() for kind in part]
    assert sorted(kinds) == sorted(set(KINDS) - {"between_nodes", "moved", "swapped"})
    cells = [cell for _, cell in sweep(2, "fp32")]
    assert {cell.zero_stage for cell in cells} == {0, 1, 2, 3}
