"""All units filtered: those that are not yet are judged, compared with each other, and counted together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bigtfm.data.filtering import report as filters_report
from bigtfm.data.filtering.duplicates import compare
from bigtfm.data.filtering.units import Filtering, Judged, judge_unit, read_judged
from bigtfm.data.sources import Unit
from bigtfm.data.workers import run_all


def filter_units(
    filtering: Filtering,
    units: Sequence[Unit],
    numbers: Sequence[int],
    workers: int,
    report: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """Judges units `numbers`, those of an interrupted run kept; returns what the report holds of them."""
    judged: dict[int, Judged | None] = {number: read_judged(filtering, number) for number in numbers}
    weight = {number: sum(span.weight for span in units[number]) for number in numbers}
    total = sum(weight.values())
    done = sum(weight[number] for number in numbers if judged[number] is not None)
    report("filtering", done, total)
    calls = {n: (filtering, n, units[n]) for n in numbers if judged[n] is None}
    for number, record in run_all(judge_unit, calls, workers, filtering.folder.parent.parent):
        judged[number] = record
        done += weight[number]
        report("filtering", done, total)
    if filtering.filters.compares:
        compare(filtering, len(units), report)
    return filters_report.found(filtering, units, [each for each in judged.values() if each is not None])
