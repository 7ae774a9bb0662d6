"""The DeepSpeed JSON: what it comes to, "auto", the batch triangle, the horizon."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigtfm.config.deepspeed import (
    BatchTriple,
    DeepSpeedConfig,
    acting_stage,
    load_deepspeed_json,
    reduce_bucket,
)
from bigtfm.config.problems import ConfigProblem
from bigtfm.config.run import load_run_config

VALUES: dict[str, Any] = {
    "train_batch_size": 16,
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 2e-3, "weight_decay": 0.1}},
    "scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 300, "warmup_num_steps": 30}},
    "zero_optimization": {"stage": 2},
}
MODEL = load_run_config(None).model
Load = Callable[..., DeepSpeedConfig]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Load VALUES with top-level keys replaced (None: removed)."""

    def load(**changes: Any) -> DeepSpeedConfig:
        values = {key: value for key, value in (VALUES | changes).items() if value is not None}
        path = tmp_path / "ds.json"
        path.write_text(json.dumps(values))
        return load_deepspeed_json(path)

    return load


def test_what_it_states(load: Load) -> None:
    config = load(bf16={"enabled": True}, fp16={"enabled": False})
    assert (config.zero_stage, config.precision, config.optimizer_type) == (2, "bf16", "AdamW")
    assert (config.lr, config.scheduler_type, config.horizon) == (2e-3, "WarmupCosineLR", 300)
    assert config.text == config.path.read_text()
    plain = load(scheduler=None, zero_optimization=None)
    assert (plain.zero_stage, plain.precision, plain.scheduler_type, plain.horizon) == (0, "fp32", None, None)


def test_unset_clipping_is_deepspeeds_default_and_is_stated(load: Load) -> None:
    assert load().clipping == 1.0
    assert load().resolved(MODEL, 300)["gradient_clipping"] == 1.0
    assert load(gradient_clipping=0).clipping == 0.0


def test_optimizer_types_in_any_case(load: Load) -> None:
    config = load(optimizer={"type": "sgd", "params": {"lr": 0.1}})
    assert config.optimizer_type == "SGD"
    resolved = config.resolved(MODEL, 300)
    assert resolved["optimizer"]["type"] == "SGD"  # getattr(torch.optim, "sgd") is a module
    assert resolved["zero_allow_untested_optimizer"] is True


def test_resolved_replaces_every_auto(load: Load) -> None:
    config = load(
        train_batch_size=16,
        train_micro_batch_size_per_gpu="auto",
        gradient_accumulation_steps="auto",
        zero_optimization={
            "stage": 3,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
        },
        scheduler={
            "type": "WarmupDecayLR",
            "params": {
                "total_num_steps": "auto",
                "warmup_min_lr": "auto",
                "warmup_max_lr": "auto",
                "warmup_num_steps": 9,
            },
        },
    )
    before = copy.deepcopy(config.values)
    assert config.horizon is None
    assert config.steps_of(50) == 50
    resolved = config.resolved(MODEL, 50, world_size=2)
    assert config.values == before
    assert '"auto"' not in json.dumps(resolved)
    width = MODEL.hidden_size
    assert resolved["zero_optimization"] == {
        "stage": 3,
        "reduce_bucket_size": width * width,
        "stage3_prefetch_bucket_size": int(0.9 * width * width),
        "stage3_param_persistence_threshold": 10 * width,
    }
    schedule = resolved["scheduler"]["params"]
    assert (schedule["total_num_steps"], schedule["warmup_max_lr"], schedule["warmup_min_lr"]) == (
        50,
        2e-3,
        0.0,
    )
    batch = (resolved["train_micro_batch_size_per_gpu"], resolved["gradient_accumulation_steps"])
    assert (*batch, resolved["train_batch_size"]) == (8, 1, 16)
    assert "train_micro_batch_size_per_gpu" not in config.resolved(MODEL, 50)  # left for DeepSpeed to solve


def test_resolved_states_the_defaults_of_the_optimizer(load: Load) -> None:
    config = load(
        optimizer={"type": "adamw", "params": {"lr": 1e-3, "bias_correction": True, "amsgrad": False}}
    )
    params = config.resolved(MODEL, 300)["optimizer"]["params"]
    assert params == {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
    assert "bias_correction" not in params  # torch's AdamW doesn't know it


def test_resolved_shares_nothing_with_the_file(load: Load) -> None:
    config = load()
    config.resolved(MODEL, 300)["zero_optimization"]["stage"] = 0
    config.resolved(MODEL, 300)["optimizer"]["params"]["betas"].append(1)
    assert config.zero_stage == 2
    assert config.resolved(MODEL, 300)["optimizer"]["params"]["betas"] == [0.9, 0.999]


@pytest.mark.parametrize(
    ("batch", "world_size", "triple"),
    [
        ((16, 4, None), 1, (4, 4, 16)),
        ((16, 4, None), 2, (4, 2, 16)),
        ((16, 4, 2), 2, (4, 2, 16)),
        ((16, None, 2), 2, (4, 2, 16)),
        ((16, None, None), 2, (8, 1, 16)),  # DeepSpeed's choice
        ((None, 4, None), 3, (4, 1, 12)),
        ((None, 4, 2), 3, (4, 2, 24)),
        (("auto", 4, "auto"), 3, (4, 1, 12)),
    ],
)
def test_batch_triangle(load: Load, batch: tuple[Any, ...], world_size: int, triple: tuple[int, ...]) -> None:
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert load(**dict(zip(keys, batch, strict=True))).solve_batch(world_size) == BatchTriple(*triple)


@pytest.mark.parametrize(
    ("batch", "world_size", "fix"),
    [
        ((16, 4, None), 3, "use train_batch_size 12 = 4 x 1 x 3 or 24 = 4 x 2 x 3, or run on 1, 2, 4 ranks"),
        ((16, 4, None), 8, "1 x 2 x 8, 2 x 1 x 8, or run on 1, 2, 4 ranks"),
        ((16, 4, 2), 1, "1 x 16 x 1, 2 x 8 x 1, 4 x 4 x 1, 8 x 2 x 1, 16 x 1 x 1, or run on 2 ranks"),
        ((18, 4, None), 1, "1 x 18 x 1, 2 x 9 x 1, 3 x 6 x 1"),
        ((16, None, 5), 2, "1 x 8 x 2, 2 x 4 x 2, 4 x 2 x 2, 8 x 1 x 2"),
        ((4, None, None), 8, "use train_batch_size 8 = 1 x 1 x 8, or run on 1, 2, 4 ranks"),
    ],
)
def test_impossible_batches_list_possible_ones(
    load: Load, batch: tuple[Any, ...], world_size: int, fix: str
) -> None:
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    with pytest.raises(ConfigProblem) as caught:
        load(**dict(zip(keys, batch, strict=True))).solve_batch(world_size)
    assert fix in caught.value.fix


@given(
    whole=st.integers(1, 64),
    micro=st.none() | st.integers(1, 16),
    accumulation=st.none() | st.integers(1, 8),
    world_size=st.integers(1, 12),
)
def test_a_solution_is_exact_and_a_refusal_is_right(
    whole: int, micro: int | None, accumulation: int | None, world_size: int
) -> None:
    values = VALUES | {
        "train_batch_size": whole,
        "train_micro_batch_size_per_gpu": micro or "auto",
        "gradient_accumulation_steps": accumulation or "auto",
    }
    config = DeepSpeedConfig(Path("ds.json"), "", values)
    exists = any(
        m * a * world_size == whole
        for m in ([micro] if micro else range(1, whole + 1))
        for a in ([accumulation] if accumulation else [1] if micro is None else range(1, whole + 1))
    )
    try:
        triple = config.solve_batch(world_size)
    except ConfigProblem:
        assert not exists
    else:
        assert exists
        assert triple.micro_batch * triple.accumulation * world_size == triple.global_batch == whole
        assert micro in (None, triple.micro_batch)
        assert accumulation in (None, triple.accumulation)


def test_groups_of_hpz_fit_the_ranks(load: Load) -> None:
    config = load(zero_optimization={"stage": 3, "zero_hpz_partition_size": 4})
    assert config.solve_batch(4).accumulation == 1
    with pytest.raises(ConfigProblem, match="does not divide 2 ranks"):
        config.solve_batch(2)


def test_steps(load: Load) -> None:
    config = load()
    assert (config.steps_of(None), config.steps_of(300), config.steps_of(7)) == (300, 300, 7)
    with pytest.raises(ConfigProblem, match=r"run\.steps 301 is larger"):
        config.steps_of(301)
    constant = load(scheduler=None)
    assert constant.steps_of(5) == 5
    with pytest.raises(ConfigProblem, match=r"run\.steps is missing.*has no scheduler"):
        constant.steps_of(None)
    endless = load(scheduler={"type": "InverseSquareRoot", "params": {"warmup_num_steps": 10}})
    with pytest.raises(ConfigProblem, match=r"InverseSquareRoot of .* states no total_num_steps"):
        endless.steps_of(None)


def test_an_auto_horizon_has_to_hold_the_warm_up(load: Load) -> None:
    params = {"total_num_steps": "auto", "warmup_num_steps": 30, "decay_num_steps": 20}
    config = load(scheduler={"type": "WSD", "params": params})
    assert config.steps_of(50) == 50
    with pytest.raises(ConfigProblem, match="50 steps"):
        config.steps_of(49)


@pytest.mark.parametrize(
    "changes",
    [
        {
            "scheduler": {
                "type": "WSD",
                "params": {"total_num_steps": 9, "warmup_num_steps": 2, "decay_num_steps": 7},
            }
        },
        {"scheduler": {"type": "ReduceOnPlateau", "params": {}}},
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 2e-3, "warmup_type": "linear"}}},
        {"scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": 1e-5, "cycle_max_lr": 2e-3}}},
        {"scheduler": {"type": "LRRangeTest", "params": {"lr_range_test_min_lr": 2e-3}}},
        {"optimizer": {"type": "Adam", "params": {"lr": 1e-3, "adam_w_mode": False, "weight_decay": 0.1}}},
        {"optimizer": {"type": "Adagrad", "params": {"lr": 1e-2, "eps": 1e-10}}},
        {"optimizer": {"type": "Lion", "params": {"lr": 1e-4, "betas": [0.9, 0.99]}}},
        {"optimizer": {"type": "SGD", "params": {"lr": 1e-2, "momentum": 0.9, "nesterov": True}}},
        {"optimizer": {"type": "Lamb", "params": {"lr": 1e-2}}, "zero_optimization": {"stage": 0}},
        {
            "optimizer": {"type": "Muon", "params": {"lr": 0.02, "adam_lr": 1e-3}},
            "zero_optimization": {"stage": 0},
        },
        {"optimizer": {"type": "Muon", "params": {"lr": 0.02}}, "zero_optimization": {"stage": 0}},
        {
            "optimizer": {"type": "Muon", "params": {"lr": 0.02}},
            "zero_optimization": {"stage": 3, "reduce_scatter": False},
            "gradient_clipping": 0,
        },
        {"zero_optimization": {"stage": 1, "allgather_bucket_size": 2e8, "reduce_bucket_size": 5e8}},
        {"zero_optimization": {"stage": 2, "offload_optimizer": None, "overlap_comm": True}},
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "none"}, "sub_group_size": 1e9}},
        {
            "bf16": {"enabled": True},
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
        },
        {"fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 1000}},
        {"steps_per_print": 2000, "wall_clock_breakdown": False},
        {"wandb": {"enabled": False}, "tensorboard": {}, "activation_checkpointing": {"profile": False}},
        {"aio": {"block_size": 1048576, "queue_depth": 8, "single_submit": False}},
        {"prescale_gradients": False, "gradient_predivide_factor": 1, "gradient_allreduce_op": "mean"},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_sound_configurations_are_accepted(load: Load, changes: dict[str, Any]) -> None:
    config = load(**changes)
    resolved = config.resolved(MODEL, config.steps_of(9 if config.horizon is None else None), world_size=1)
    assert resolved["train_batch_size"] == 16


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_rank_in_fp32_has_nothing_to_share(stage: int) -> None:
    alone: dict[str, Any] = {"optimizer": "AdamW", "precision": "fp32", "world_size": 1}
    assert acting_stage({"stage": stage}, **alone) == 0
    for change in ({"optimizer": "Muon"}, {"precision": "bf16"}, {"world_size": 2}):
        assert acting_stage({"stage": stage}, **(alone | change)) == stage
    offload = {"stage": stage, "offload_optimizer": {"device": "cpu"}}
    assert acting_stage(offload, **alone) == stage


@pytest.mark.parametrize(
    ("zero", "parameters", "expected"),
    [({}, 1000, 1000), ({}, 10**9, 500_000_000), ({"reduce_bucket_size": 5e7}, 1000, 50_000_000)],
)
def test_a_reduce_bucket_is_no_larger_than_the_model(
    zero: dict[str, Any], parameters: int, expected: int
) -> None:
    assert reduce_bucket(zero, parameters) == expected
