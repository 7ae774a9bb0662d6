"""Candidates of a search as cells of a benchmark, and what becomes of their results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bigtfm.bench import confirm
from bigtfm.config.deepspeed import load_deepspeed_json
from bigtfm.config.problems import ConfigProblem
from bigtfm.plan.job import plan
from bigtfm.planner.search import Candidate, deepspeed_values

ROOT = Path(__file__).parents[2]
CONFIG, DEEPSPEED = ROOT / "configs/gpt_124m.toml", ROOT / "ds_configs/zero1_bf16.json"
OVERRIDES = ["data.path=none", "model.vocab_size=50257"]


@pytest.fixture(scope="module")
def candidates() -> list[Candidate]:
    found, _ = plan(CONFIG, DEEPSPEED, OVERRIDES, gpus=8, gpu="h100-80g")
    return found.candidates()


def test_a_cell_trains_what_write_would_write(candidates: list[Candidate]) -> None:
    stated = load_deepspeed_json(DEEPSPEED).values
    for candidate in (candidates[0], candidates[len(candidates) // 2], candidates[-1]):
        [(_, cell)] = confirm._cells([candidate], stated, CONFIG, DEEPSPEED, OVERRIDES)
        written = json.loads(json.dumps(deepspeed_values(stated, candidate)))
        assert cell.deepspeed_values == written | {
            "gradient_accumulation_steps": candidate.setting.accumulation
        }
        assert f"compute.recompute={candidate.setting.recompute}" in cell.run_overrides


def test_the_fastest_trial_is_first_and_what_fails_is_left_out(
    candidates: list[Candidate], monkeypatch: pytest.MonkeyPatch
) -> None:
    results: list[dict[str, Any]] = [
        {"status": "ok", "why": "", "tokens_per_second": {"median": 10.0}},
        {"status": "oom", "why": "out of memory"},
        {"status": "ok", "why": "", "tokens_per_second": {"median": 30.0}},
    ]

    def run(matrix: Any, out: Path) -> Iterator[dict[str, Any]]:
        yield from results[: len(matrix.cells)]

    monkeypatch.setattr(confirm, "run_matrix", run)
    found = confirm.confirmed(candidates, 3, CONFIG, DEEPSPEED, OVERRIDES, "none")
    assert [each.measured for each in found[:3]] == [30.0, 10.0, None]
    assert [each.label for each in found[:2]] == [candidates[2].label, candidates[0].label]
    assert len(found) == len(candidates) - 1
    results[0] = results[1]
    with pytest.raises(ConfigProblem, match="none of them runs here: out of memory"):
        confirm.confirmed(candidates, 2, CONFIG, DEEPSPEED, OVERRIDES, "none")
    with pytest.raises(ConfigProblem, match="needs a run config"):
        confirm.confirmed(candidates, 2, None, DEEPSPEED, OVERRIDES, "none")
