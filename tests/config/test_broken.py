"""Broken configurations: each gives one line that names the key and the fix, and exit code 64."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from bigtfm.config.deepspeed import load_deepspeed_json
from bigtfm.config.problems import ConfigProblem
from bigtfm.config.run import load_run_config

VALUES: dict[str, Any] = {
    "train_batch_size": 16,
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 2e-3}},
    "scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 300, "warmup_num_steps": 30}},
    "zero_optimization": {"stage": 2},
}

# where, what (... removes it), a piece of the line
JSON: list[tuple[str, Any, str]] = [
    # typos at every depth
    ("gradient_clippng", 1.0, "did you mean 'gradient_clipping'?"),
    ("zero_optimisation", {"stage": 3}, "did you mean 'zero_optimization'?"),
    ("zero_optimization.stge", 2, "unknown key 'zero_optimization.stge'. Fix: did you mean 'stage'?"),
    ("zero_optimization.offload_optimizer", {"devise": "cpu"}, "did you mean 'device'?"),
    ("optimizer.parms", {}, "did you mean 'params'?"),
    ("optimizer.params.weight_deacy", 0.1, "did you mean 'weight_decay'?"),
    ("scheduler.params.warmup_steps", 1, "did you mean 'warmup_num_steps'?"),
    ("bf16.enable", True, "did you mean 'enabled'?"),
    ("optimizer.type", "AdmW", "unknown type 'AdmW'. Fix: did you mean 'AdamW'?"),
    ("scheduler.type", "WarmupCosine", "did you mean 'WarmupCosineLR'?"),
    ("made_up", 1, "DeepSpeed has no such key"),
    # in the wrong place
    ("lr", 1e-3, "did you mean 'optimizer.params.lr'?"),
    ("stage", 2, "did you mean 'zero_optimization.stage'?"),
    ("optimizer.params.momentum", 0.9, "unknown key 'optimizer.params.momentum'"),
    ("scheduler.params.warmup_max_lr", 2e-3, "unknown key 'scheduler.params.warmup_max_lr'"),
    # wrong types
    (
        "optimizer.params.lr",
        "1e-5",
        'optimizer.params.lr must be a number > 0 and <= 1e+30, not "1e-5". Fix: write 1e-5 without',
    ),
    ("train_batch_size", "16", "write 16 without quotes"),
    ("bf16.enabled", "true", "write true without quotes"),
    ("zero_optimization.stage", True, "must be one of 0, 1, 2, 3, not true"),
    ("zero_optimization.stage", "two", "must be one of 0, 1, 2, 3"),
    ("gradient_clipping", True, "gradient_clipping must be a number >= 0, not true"),
    ("bf16.enabled", 1, "must be true or false, not 1"),
    ("train_batch_size", 16.0, "must be a whole number >= 1, not 16.0"),
    ("zero_optimization.reduce_bucket_size", 1.5, "whole number"),
    ("zero_optimization", True, "zero_optimization must be an object, not true"),
    ("zero_optimization", None, "must be an object, not null"),
    ("optimizer", "AdamW", "optimizer must be an object"),
    ("optimizer.params.betas", [0.9], "list of two numbers"),
    ("optimizer.params.betas", [0.9, 1.0], "list of two numbers"),
    ("optimizer.params.lr", [1e-3, 1e-4], "must be a number"),
    # out of range
    ("gradient_clipping", -1, "gradient_clipping must be a number >= 0, not -1"),
    ("optimizer.params.lr", 0, "must be a number > 0"),
    ("optimizer.params.lr", -1e-3, "must be a number > 0"),
    ("optimizer.params.lr", float("nan"), "optimizer.params.lr must be a number > 0 and <= 1e+30, not nan"),
    ("optimizer.params.weight_decay", float("inf"), "not inf"),
    ("optimizer.params.lr", 1e31, "optimizer.params.lr must be a number > 0 and <= 1e+30, not 1e+31"),
    ("optimizer.params.weight_decay", 1e7, "weight_decay must be a number >= 0 and <= 1e+06, not 10000000.0"),
    ("train_micro_batch_size_per_gpu", 0, "whole number >= 1, not 0"),
    ("zero_optimization.stage", 4, "must be one of 0, 1, 2, 3, not 4"),
    ("scheduler.params.warmup_num_steps", 0, "whole number >= 1"),
    ("scheduler.params.cos_min_ratio", 1.5, ">= 0 and <= 1"),
    ("scheduler.params.warmup_type", "cosine", "must be one of log, linear"),
    ("communication_data_type", "fp8", "must be one of fp32, bf16, fp16, null"),
    # missing
    ("optimizer", ..., "optimizer is missing"),
    ("optimizer.params", {}, "optimizer.params.lr is missing"),
    ("scheduler.params", ..., "scheduler.params is missing"),
    ("scheduler.params.total_num_steps", ..., "total_num_steps is missing"),
    # "auto"
    ("bf16.enabled", "auto", 'bf16.enabled: "auto" is refused: DeepSpeed drops it'),
    ("optimizer.params.lr", "auto", 'optimizer.params.lr: "auto" is refused'),
    ("gradient_clipping", "auto", '"auto" is refused'),
    ("optimizer.type", "auto", '"auto" is refused'),
    ("zero_optimization.stage", "auto", '"auto" is refused'),
    # ignored, gone, or changing the result
    ("amp", {"enabled": True}, "amp is refused: DeepSpeed has removed it"),
    ("elasticity", {"enabled": True}, "DeepSpeed has removed it"),
    ("sparse_attention", {}, "DeepSpeed has removed it"),
    ("zero_optimization.mics_shard_size", 8, "DeepSpeed has removed it"),
    ("zero_optimization.cpu_offload", True, '"offload_optimizer": {"device": "cpu"}'),
    ("zero_optimization.prefetch_bucket_size", 1, "write stage3_prefetch_bucket_size"),
    ("zero_optimization.zero_quantized_gradients", True, "rounds what GPUs exchange"),
    ("zero_optimization.zenflow", {}, "which changes the loss"),
    ("activation_checkpointing.cpu_checkpointing", True, "compute.recompute"),
    ("activation_checkpointing.number_checkpoints", 4, "compute.recompute"),
    ("data_efficiency", {"enabled": True}, "changes the order of the data"),
    ("bf16.check_grad_overflow", False, "DeepSpeed would train on gradients that are not finite"),
    ("torch_autocast", {"enabled": True}, "use bf16 or fp16"),
    ("bfloat16", {"enabled": True}, "old name of bf16"),
    ("pipeline", {"stages": 2}, "not supported"),
    ("prescale_gradients", True, "prescale_gradients is refused"),
    ("gradient_allreduce_op", "sum", "depend on the number of GPUs"),
    ("fp16.fp16_master_weights_and_grads", True, "which this would round"),
    ("wandb", {"enabled": True}, "MLflow"),
    ("vocabulary_size", 50257, "comes from the data set"),
    ("checkpoint", {"load_universal": True}, "bigtfm writes its own checkpoints"),
    ("optimizer.params.max_grad_norm", 1.0, "set gradient_clipping"),
    ("optimizer.params.amsgrad", True, "optimizer.params.amsgrad is refused"),
    ("optimizer.type", "OneBitAdam", "DeepSpeed has removed it"),
    ("scheduler.type", "CosineAnnealingLR", "use WarmupCosineLR"),
    ("scheduler.type", "ReduceLROnPlateau", "use ReduceOnPlateau"),
]

# a whole section or several keys; a piece of the line
TOGETHER: list[tuple[dict[str, Any], str]] = [
    ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "bf16 and fp16 are both on"),
    ({"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto"}, "neither train_batch_size nor"),
    (
        {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
        "DeepSpeed ignores it at stage 0",
    ),
    (
        {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
        "DeepSpeed ignores it below stage 3",
    ),
    (
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "/n"}}},
        "takes nvme for cpu",
    ),
    (
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
        "device nvme needs a path",
    ),
    ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "device nvme needs a path"),
    (
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
        "at stage 3 only",
    ),
    ({"zero_optimization": {"stage": 2, "zero_hpz_partition_size": 2}}, "DeepSpeed ignores it below stage 3"),
    (
        {
            "optimizer": {"type": "Lion", "params": {"lr": 1e-4}},
            "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/n"}},
        },
        "NVMe offload is for Adam and AdamW",
    ),
    ({"data_types": {"grad_accum_dtype": "bf16"}}, "a type that the precision does not have"),
    (
        {
            "bf16": {"enabled": True},
            "data_types": {"grad_accum_dtype": "fp32"},
            "zero_optimization": {"stage": 0},
        },
        "DeepSpeed raises on it at stage 0",
    ),
    ({"bf16": {"enabled": True}, "communication_data_type": "fp16"}, "communication_data_type: gradients"),
    ({"optimizer": {"type": "Lamb", "params": {"lr": 1e-3}}}, "Lamb's and Lars's trust ratio"),
    ({"optimizer": {"type": "Lars", "params": {"lr": 1.0}}}, "Lamb's and Lars's trust ratio"),
    ({"optimizer": {"type": "Muon", "params": {"lr": 0.02}}}, "unset, gradient_clipping is 1.0"),
    (
        {
            "optimizer": {"type": "Muon", "params": {"lr": 0.02}},
            "zero_optimization": {"stage": 2},
            "gradient_clipping": 0,
        },
        "Muon's momentum",
    ),
    (
        {
            "optimizer": {"type": "Muon", "params": {"lr": 0.02}},
            "zero_optimization": {"stage": 3},
            "gradient_clipping": 0,
        },
        "Muon at stage 3 with reduce_scatter",
    ),
    (
        {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}, "zero_allow_untested_optimizer": False},
        "zero_allow_untested_optimizer",
    ),
    (
        {"optimizer": {"type": "Adam", "params": {"lr": 1e-3, "weight_decay": 0.1}}},
        "DeepSpeed's Adam is AdamW",
    ),
    ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "adam_w_mode": False}}}, "ignores it for AdamW"),
    ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}}, "0.01 for torch's"),
    ({"optimizer": {"type": "SGD", "params": {"lr": 0.1, "nesterov": True}}}, "nesterov needs momentum"),
    (
        {
            "optimizer": {"type": "Adagrad", "params": {"lr": 0.1, "lr_decay": 0.1}},
            "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        },
        "knows neither lr_decay",
    ),
    (
        {"scheduler": {"type": "WarmupLR", "params": {}}},
        "scheduler.params.warmup_max_lr: WarmupLR takes its lr",
    ),
    (
        {"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 9000, "warmup_max_lr": 1e-3}}},
        "ignores optimizer.params.lr",
    ),
    (
        {"scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": 1e-5, "cycle_max_lr": 0.1}}},
        "scheduler.params.cycle_max_lr",
    ),
    (
        {
            "optimizer": {"type": "AdamW", "params": {"lr": 2e-3, "betas": [0.9, 0.95]}},
            "scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": 1e-5, "cycle_max_lr": 2e-3}},
        },
        "replaces optimizer.params.betas",
    ),
    (
        {
            "optimizer": {"type": "Muon", "params": {"lr": 2e-3, "adam_lr": 1e-3}},
            "zero_optimization": {"stage": 0},
            "gradient_clipping": 0,
            "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 2e-3}},
        },
        "muon_lr and adam_lr are ignored",
    ),
    ({"scheduler": {"type": "ReduceOnPlateau", "params": {"min_lr": 0.1}}}, "the smallest lr is above"),
    (
        {
            "scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 300}}
        },  # 1000 steps of warm-up
        "longer than total_num_steps",
    ),
    (
        {
            "scheduler": {
                "type": "WSD",
                "params": {"total_num_steps": 9, "warmup_num_steps": 5, "decay_num_steps": 5},
            }
        },
        "longer than total_num_steps",
    ),
]

TEXTS = {
    "empty": ("", "not valid JSON"),
    "trailing comma": ('{"train_batch_size": 16,}', "line 1 column"),
    "python": ("{'train_batch_size': 16}", "not valid JSON"),
    "a list": ("[1, 2]", "holds no JSON object"),
    "twice": ('{"bf16": {"enabled": true, "enabled": false}}', "key 'enabled' stands there twice"),
    "deep": ("[" * 100_000, "nested too deeply"),
    "overflow": (
        json.dumps(VALUES).replace("0.002", "1e999"),
        "optimizer.params.lr must be a number > 0 and <= 1e+30, not inf",
    ),
    "many digits": ('{"train_batch_size": ' + "9" * 5000 + "}", "can't be read"),
}

TOML = {
    "syntax": ("[run\nsteps = 1", "not valid TOML"),
    "value": ("[run]\nsteps = ten", "not valid TOML"),
    "twice": ("[run]\nsteps = 1\nsteps = 2", "not valid TOML"),
    "unknown table": ("[modle]\nhidden_size = 1", "unknown key 'modle'. Fix: did you mean [model]?"),
    "unknown key": ("[model]\nhiden_size = 1", "did you mean 'model.hidden_size'?"),
    "other table": ("[model]\nseed = 1", "did you mean 'run.seed'?"),
    "above the tables": ("steps = 5", "unknown key 'steps'. Fix: did you mean 'run.steps'?"),
    "DeepSpeed's": ("[run]\ntrain_batch_size = 8", "belongs into the DeepSpeed JSON"),
    "no table": ("model = 3", "model must be a table, not 3"),
    "string": (
        '[run]\nsteps = "100"',
        'run.steps must be a valid integer, not "100". Fix: write 100 without quotes',
    ),
    "float": ("[run]\nsteps = 100.0", "write 100"),
    "bool": ("[run]\nsteps = true", "run.steps must be a valid integer, not true"),
    "negative": ("[run]\nsteps = -5", "greater than or equal to 1, not -5"),
    "nan": ("[model]\ndropout = nan", "model.dropout must be a finite number"),
    "inf": ("[model]\ninit_std = inf", "model.init_std must be a finite number"),
    "range": ("[model]\ndropout = 1.0", "less than 1"),
    "choice": ('[model]\nactivation = "gelo"', "'gelu', 'gelu_tanh', 'relu'"),
    "union": ("[compute]\nrecompute = 0", "compute.recompute must be 'none', 'full' or 'selective'"),
    "heads": ("[model]\nnum_attention_heads = 5", "not a multiple of model.num_attention_heads 5"),
    "kv heads": ("[model]\nnum_kv_heads = 4", "not a multiple of model.num_kv_heads 4"),
    "sequence": ("[data]\nseq_len = 256", "longer than model.max_seq_len 128"),
    "name": ('[run]\nname = "a/b"', "run.name must be letters"),
    "empty path": ('[data]\npath = ""', "data.path must be"),
    "seed": ("[run]\nseed = 9223372036854775808", "less than 9223372036854775808"),
}


def one_line(caught: pytest.ExceptionInfo[ConfigProblem], fragment: str) -> None:
    line = caught.value.line
    assert "\n" not in line
    assert line.startswith("error: ")
    assert ". Fix: " in line
    assert fragment in line
    assert caught.value.exit_code == 64
    assert len(line) < 600


def broken(path: str, value: Any) -> dict[str, Any]:
    values = copy.deepcopy(VALUES)
    section = values
    *parents, key = path.split(".")
    for parent in parents:
        section = section.setdefault(parent, {})
    section[key] = value
    if value is ...:
        del section[key]
    return values


def load(values: dict[str, Any], folder: Path) -> None:
    path = folder / "ds.json"
    path.write_text(json.dumps(values))
    load_deepspeed_json(path)


def test_the_unbroken_one_is_sound(tmp_path: Path) -> None:
    load(VALUES, tmp_path)


@pytest.mark.parametrize(("path", "value", "fragment"), JSON, ids=[f"{case[0]}={case[1]}" for case in JSON])
def test_one_key(path: str, value: Any, fragment: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigProblem) as caught:
        load(broken(path, value), tmp_path)
    one_line(caught, fragment)


@pytest.mark.parametrize(("changes", "fragment"), TOGETHER, ids=[case[1] for case in TOGETHER])
def test_keys_that_do_not_fit_together(changes: dict[str, Any], fragment: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigProblem) as caught:
        load(VALUES | changes, tmp_path)
    one_line(caught, fragment)


@pytest.mark.parametrize(("text", "fragment"), TEXTS.values(), ids=TEXTS)
def test_files_that_are_no_json(text: str, fragment: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(ConfigProblem) as caught:
        load_deepspeed_json(path)
    one_line(caught, fragment)


@pytest.mark.parametrize(("text", "fragment"), TOML.values(), ids=TOML)
def test_run_configs(text: str, fragment: str, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(ConfigProblem) as caught:
        load_run_config(path)
    one_line(caught, fragment)


@pytest.mark.parametrize("load_file", [load_deepspeed_json, load_run_config])
def test_files_that_can_not_be_read(load_file: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigProblem) as caught:
        load_file(tmp_path / "none")
    one_line(caught, "no such file")
    with pytest.raises(ConfigProblem) as caught:
        load_file(tmp_path)
    one_line(caught, "can't be read")
    latin = tmp_path / "latin1"
    latin.write_bytes(b'{"caf\xe9": 1}')
    with pytest.raises(ConfigProblem) as caught:
        load_file(latin)
    one_line(caught, "can't be read")


def test_more_than_one_mistake_is_counted(tmp_path: Path) -> None:
    with pytest.raises(ConfigProblem) as caught:
        load(
            broken("gradient_clippng", 1)
            | {"amp": {}, "optimizer": {"type": "AdamW", "params": {"lr": "x"}}},
            tmp_path,
        )
    one_line(caught, "(and 2 more)")
