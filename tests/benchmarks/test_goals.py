"""docs/benchmarks.md has the goals and figures that were measured, and says which were missed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bench_peers
import bench_planner
import goals
import pytest

from bigtfm.bench.results import rewrite

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results/xeon-2-cores-2026-11"
SPREAD = {"low": 1.0, "median": 1.1, "high": 1.2}


def peer(**changes: Any) -> dict[str, Any]:
    row = {"row": "gpt-14m", "ours": "bigtfm-0", "other": "hf", "goal": 1.15, "ratio": SPREAD}
    return row | {"peak_goal": None, "peak_ratio": 0.9} | changes


def test_the_document_has_the_measured_figures() -> None:
    text = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    assert "\n".join(goals.table(goals.of_folder(RESULTS))) in text


def test_every_goal_has_been_measured() -> None:
    """Each row that the benchmarks would measure is there."""
    rows = [json.loads(line) for line in (RESULTS / goals.PEERS).read_text().splitlines()]
    wanted = {(name, pair.ours, pair.other) for name, pairs in bench_peers.ROWS.items() for pair in pairs}
    assert wanted <= {(row["row"], row["ours"], row["other"]) for row in rows}
    planned = [json.loads(line) for line in (RESULTS / goals.PLANNER).read_text().splitlines()]
    names = {row["name"] for row in planned if row["what"] == "memory"}
    assert names == {name for name, *_ in bench_planner.configurations()}
    assert {row["what"] for row in planned} == {"memory", "time", "search"}


@pytest.mark.parametrize(
    ("row", "reached"),
    [
        (peer(), [False]),
        (peer(goal=1.1), [True]),
        (peer(goal=1.0, peak_goal=0.8), [True, False]),
        (peer(goal=1.0, peak_goal=0.95), [True, True]),
        (peer(other="matmul", goal=1.2, data_wait=SPREAD, data_wait_goal=0.005), [False, False]),
        (peer(other="matmul", goal=None, data_wait=SPREAD, data_wait_goal=1.2), [True]),
    ],
)
def test_a_goal_of_the_peers_is_reached_or_missed(row: dict[str, Any], reached: list[bool]) -> None:
    assert [each.reached for each in goals.of_peers([row])] == reached


def test_goals_of_the_planner() -> None:
    errors = {"states_error": 0.0, "activations_error": -0.02, "peak_error": 0.03, "false_fit": False}
    good = {"what": "memory"} | errors
    rows: list[dict[str, Any]] = [
        good, good, good | {"states_error": -0.02, "peak_error": -0.11, "false_fit": True},
        {"what": "time", "seconds_error": -0.2}, {"what": "search", "name": "8 of 24", "share": 0.96},
    ]  # fmt: skip
    assert [each.reached for each in goals.of_planner(rows)] == [False, True, False, False, False, True]
    assert [each.reached for each in goals.of_planner([good])] == [True] * 4
    assert "MISSED" in str(next(goals.of_planner(rows)))


@pytest.mark.parametrize(
    ("cpu", "gpus", "name"),
    [
        ("Intel(R) Xeon(R) Processor", None, "xeon-2-cores-2026-11"),
        ("AMD EPYC 7763 64-Core Processor", None, "epyc-7763-2-cores-2026-11"),
        ("Intel(R) Core(TM) i7-8565U CPU @ 1.80GHz", None, "core-i7-8565u-2-cores-2026-11"),
        ("AMD EPYC 9654", "NVIDIA H200, NVIDIA H200", "h200-2-cores-2026-11"),
    ],
)
def test_a_folder_is_named_by_hardware_and_month(cpu: str, gpus: str | None, name: str) -> None:
    assert goals.name_of({"cpu": cpu, "cores": 2, "gpus": gpus}, "2026-11") == name


def test_what_is_checked_in_is_the_report_and_the_rows(tmp_path: Path) -> None:
    folder = tmp_path / "bench"
    rewrite(folder / goals.PEERS, [{"hardware": {"cpu": "Xeon", "cores": 4, "gpus": None}}])
    (folder / "report.html").write_text("x")
    (folder / "cells").mkdir()
    kept = goals.keep(folder, tmp_path / "results")
    assert kept.name.startswith("xeon-4-cores-")
    assert sorted(path.name for path in kept.iterdir()) == ["peers.jsonl", "report.html"]
