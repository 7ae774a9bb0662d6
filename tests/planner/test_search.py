"""What a search finds, and that it leaves the loss alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from gpt2 import ON_H100

from bigtfm.config.deepspeed import load_deepspeed_json
from bigtfm.planner.hardware import device_of
from bigtfm.planner.search import Candidate, deepspeed_values, micro_batches, search_for
from bigtfm.planner.step_time import Rates, table_rates

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def rates() -> Rates:
    h100 = device_of("h100-80g")
    assert h100 is not None
    found = table_rates(h100, "bf16")
    assert found is not None
    return found


def found_within(gib: float, rates: Rates) -> list[Candidate]:
    return search_for(replace(ON_H100, micro_batch=16, accumulation=2), rates, int(gib * 2**30), 8)


def test_the_global_batch_and_the_model_stay(rates: Rates) -> None:
    candidates = found_within(75, rates)
    assert {each.setting.global_batch for each in candidates} == {256}
    assert {each.setting.model for each in candidates} == {ON_H100.model}
    assert len({each.label for each in candidates}) == len(candidates)


def test_the_fastest_that_fits_is_first(rates: Rates) -> None:
    for gib in (3, 10, 75):
        candidates = found_within(gib, rates)
        fitting = [each for each in candidates if each.fits]
        assert fitting
        assert candidates[: len(fitting)] == fitting
        assert all(each.memory.peak <= gib * 2**30 for each in fitting)
        assert all(each.memory.peak > gib * 2**30 for each in candidates[len(fitting) :])
        assert candidates[0].step.seconds == min(each.step.seconds for each in fitting)


def test_less_memory_asks_for_more_of_the_means(rates: Rates) -> None:
    much, little = found_within(75, rates)[0].setting, found_within(2, rates)[0].setting
    assert much.recompute == "none"
    assert much.offload("optimizer") == "none"
    assert little.micro_batch < much.micro_batch
    assert not found_within(0.5, rates)[0].fits


def test_the_smallest_micro_batches_are_tried_and_the_largest() -> None:
    assert micro_batches(64) == [1, 2, 4, 8, 16, 32, 64]
    many = micro_batches(5040)
    assert (many[0], many[-1], len(set(many))) == (1, 5040, 12)
    assert all(5040 % size == 0 for size in many)
    assert micro_batches(10**12)[-1] == 10**12, "at once"


def test_a_ramp_up_s_sizes_can_be_made_by_every_candidate(rates: Rates) -> None:
    setting = replace(ON_H100, micro_batch=2, accumulation=16)
    candidates = search_for(setting, rates, 2**40, 8, ramp=(32, 128), compiled=True)
    assert {each.setting.micro_batch for each in candidates} == {1, 2, 4}
    assert {each.setting.global_batch for each in candidates} == {256}
    assert {each.setting.recompute for each in candidates} == {"none", "full"}


def test_it_writes_a_valid_json_of_the_same_recipe(tmp_path: Path, rates: Rates) -> None:
    stated = load_deepspeed_json(ROOT / "ds_configs/zero1_bf16.json")
    best = found_within(10, rates)[0]
    values = deepspeed_values(stated.values, best)
    for name, value in stated.values.items():
        if name not in ("train_batch_size", "train_micro_batch_size_per_gpu", "zero_optimization"):
            assert values[name] == value
    path = tmp_path / "found.json"
    path.write_text(json.dumps(values))
    written = load_deepspeed_json(path)
    assert written.solve_batch(8) == (best.setting.micro_batch, best.setting.accumulation, 256)
    assert written.zero_stage == best.setting.stage
    assert "gradient_accumulation_steps" not in values, "it runs on other numbers of ranks, too"
    stating = deepspeed_values(stated.values | {"gradient_accumulation_steps": 4}, best)
    assert stating["gradient_accumulation_steps"] == best.setting.accumulation


def test_a_cpu_is_offered_no_offload(rates: Rates) -> None:
    candidates = search_for(replace(ON_H100, device="cpu", precision="fp32"), rates, 2**40, 8)
    assert all(each.setting.offload("optimizer") == "none" for each in candidates)
    stages = {each.setting.stage for each in search_for(replace(ON_H100, optimizer="Lamb"), rates, 2**40, 8)}
    assert stages == {0}
