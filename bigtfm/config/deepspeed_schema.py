"""Every key of a DeepSpeed JSON: what it may hold, or why it is refused. Written against DeepSpeed 0.19.8.

A table is a dict from a key to one of
  Key      a value: what it must be, its default, whether "auto" may stand there,
  Refusal  what would be ignored, fail, or change the result behind the user's back: the reason and the fix,
  Section  an object with a table of its own.
A test compares these tables with what the installed DeepSpeed reads.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

CLIPPING_DEFAULT = 1.0
NO_AUTO = "no other place states it"


@dataclass(frozen=True)
class Key:
    """One value. `says` completes the sentence "must be ..."; `no_auto` says why "auto" is refused."""

    says: str
    test: Callable[[Any], bool]
    default: Any = None
    required: bool = False
    no_auto: str | None = NO_AUTO


@dataclass(frozen=True)
class Refusal:
    """A key that is refused unless its value does nothing."""

    reason: str
    fix: str
    inert: Callable[[Any], bool] = lambda value: False


@dataclass(frozen=True)
class Section:
    """An object. `keys` is None where the table depends on a type that is unknown."""

    keys: Mapping[str, Key | Refusal | Section] | None
    required: bool = False
    nullable: bool = False


Table = Mapping[str, Key | Refusal | Section]


def _is_number(value: Any) -> bool:
    """Finite too; an int may be too large for a float."""
    return (
        isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    )


def number(
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: float = -math.inf,
    below: float = math.inf,
    **more: Any,
) -> Key:
    """A finite number, low <= x <= high and above < x < below."""
    bounds = [
        text
        for bound, text in (
            (low, f">= {low:g}"),
            (above, f"> {above:g}"),
            (high, f"<= {high:g}"),
            (below, f"< {below:g}"),
        )
        if math.isfinite(bound)
    ]

    def test(value: Any) -> bool:
        return _is_number(value) and low <= value <= high and above < value < below

    return Key(f"a number {' and '.join(bounds)}".strip(), test, **more)


def integer(low: int, *, nullable: bool = False, **more: Any) -> Key:
    """A whole number >= low, written as one (16, not 16.0)."""

    def test(value: Any) -> bool:
        return (nullable and value is None) or (_is_number(value) and isinstance(value, int) and value >= low)

    return Key(f"a whole number >= {low}", test, **more)


def size(low: int = 1, **more: Any) -> Key:
    """A whole number of elements or bytes, which DeepSpeed's documentation likes to write as 5e8."""

    def test(value: Any) -> bool:
        return _is_number(value) and value == int(value) and value >= low

    return Key(f"a whole number >= {low}", test, **more)


def flag(*, nullable: bool = False, **more: Any) -> Key:
    """true or false."""
    return Key("true or false", lambda value: isinstance(value, bool) or (nullable and value is None), **more)


def choice(*options: Any, **more: Any) -> Key:
    """One of `options`."""
    says = "one of " + ", ".join("null" if option is None else str(option) for option in options)

    def test(value: Any) -> bool:
        return any(value == option and type(value) is type(option) for option in options)  # True is not 1

    return Key(says, test, **more)


def text(*, nullable: bool = False, **more: Any) -> Key:
    """Text that is not empty."""

    def test(value: Any) -> bool:
        return (isinstance(value, str) and value != "") or (nullable and value is None)

    return Key("text", test, **more)


def texts() -> Key:
    """A list of texts."""

    def test(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)

    return Key("a list of texts", test)


def betas(first: float, second: float) -> Key:
    """Two decay rates, with these defaults."""

    def test(value: Any) -> bool:
        return (
            isinstance(value, list) and len(value) == 2 and all(_is_number(b) and 0 <= b < 1 for b in value)
        )

    return Key("a list of two numbers >= 0 and < 1", test, default=[first, second])


def only(value: Any, reason: str, fix: str | None = None) -> Refusal:
    """Refused unless it holds `value` (or null), which changes nothing."""

    def inert(given: Any) -> bool:
        return given is None or (given == value and isinstance(given, bool) == isinstance(value, bool))

    return Refusal(reason, fix or f"remove it, or set it to {json.dumps(value)}", inert)


def _off(reason: str, fix: str = "remove it") -> Refusal:
    """A block that is refused unless it is switched off."""

    def inert(given: Any) -> bool:
        return given in (None, {}) or (isinstance(given, dict) and given.get("enabled") is False)

    return Refusal(reason, fix, inert)


def _gone(fix: str = "remove it") -> Refusal:
    return Refusal("DeepSpeed has removed it", fix)


_RECOMPUTE = "set compute.recompute in the run config, and remove it here"
_OWN_CHECKPOINTS = "bigtfm writes its own checkpoints, which any ZeRO stage and number of GPUs can read"
_MASTERS = "bigtfm's checkpoints hold fp32 weights and moments, which this would round"
_QUANTIZED = "it rounds what GPUs exchange, so that the loss would depend on their number"
_ALIAS = "DeepSpeed takes two names for it"
_MONITOR = _off(
    "DeepSpeed would log the loss as scaled for its backward pass; bigtfm logs to metrics.jsonl and MLflow",
    "remove it; see [track] in the run config",
)

BF16: Table = {
    "enabled": flag(default=False, no_auto="DeepSpeed drops it without a word and trains in fp32"),
    "immediate_grad_update": only(
        False, "it acts only inside DeepSpeed's BF16_Optimizer and is not supported"
    ),
    "check_grad_overflow": only(True, "DeepSpeed would train on gradients that are not finite"),
    "bf16_master_weights_and_grads": only(False, _MASTERS),
    "bf16_optimizer_states": only(False, _MASTERS),
}

FP16: Table = {
    "enabled": flag(default=False, no_auto="DeepSpeed drops it without a word and trains in fp32"),
    "auto_cast": only(False, "the model's inputs are token ids; there is nothing to cast"),
    "loss_scale": number(0, default=0),
    "initial_scale_power": integer(0),
    "loss_scale_window": integer(1),
    "hysteresis": integer(1),
    "consecutive_hysteresis": flag(),
    "min_loss_scale": integer(1),
    "fp16_master_weights_and_grads": only(False, _MASTERS),
}

OFFLOAD_PARAM: Table = {
    "device": choice("none", "cpu", "nvme", default="none"),
    "nvme_path": text(nullable=True),
    "buffer_count": integer(1),
    "buffer_size": size(),
    "max_in_cpu": size(0),
    "pin_memory": flag(),
}

OFFLOAD_OPTIMIZER: Table = {
    "device": choice("none", "cpu", "nvme", default="none"),
    "nvme_path": text(nullable=True),
    "buffer_count": integer(1),
    "pin_memory": flag(),
    "pipeline_read": flag(),
    "pipeline_write": flag(),
    "fast_init": flag(),
    "ratio": number(0, 1, default=1.0),
    "super_offload": only(False, "SuperOffload is not supported"),
    "cpuadam_cores_perc": only(0.8, "it acts only with super_offload, which is not supported"),
}

AIO: Table = {
    "block_size": size(),
    "queue_depth": integer(1),
    "intra_op_parallelism": integer(1),
    "single_submit": flag(),
    "overlap_events": flag(),
    "use_gds": flag(),
}

ZERO: Table = {
    "stage": choice(0, 1, 2, 3, default=0),
    "contiguous_gradients": flag(),
    "reduce_scatter": flag(default=True),
    "reduce_bucket_size": size(no_auto=None),
    "use_multi_rank_bucket_allreduce": flag(),
    "allgather_partitions": flag(),
    "allgather_bucket_size": size(),
    "overlap_comm": flag(nullable=True),
    "compute_grad_norm": only(True, "bigtfm logs the gradient norm of every step"),
    "load_from_fp32_weights": only(True, _OWN_CHECKPOINTS),
    "elastic_checkpoint": only(False, _OWN_CHECKPOINTS),
    "offload_param": Section(OFFLOAD_PARAM, nullable=True),
    "offload_optimizer": Section(OFFLOAD_OPTIMIZER, nullable=True),
    "zenflow": only(None, "ZenFlow updates weights late, which changes the loss", "remove it"),
    "sub_group_size": size(),
    "cpu_offload": only(False, "it is deprecated", 'write "offload_optimizer": {"device": "cpu"}'),
    "cpu_offload_param": only(False, "it is deprecated", 'write "offload_param": {"device": "cpu"}'),
    "cpu_offload_use_pin_memory": only(False, "it is deprecated", "set pin_memory in the offload sections"),
    "stage3_prefetch_bucket_size": size(0, no_auto=None),
    "stage3_param_persistence_threshold": size(0, no_auto=None),
    "stage3_model_persistence_threshold": size(0),
    "stage3_max_live_parameters": size(0),
    "stage3_max_reuse_distance": size(0),
    "stage3_gather_16bit_weights_on_model_save": flag(),
    "stage3_module_granularity_threshold": size(0),
    "stage3_use_all_reduce_for_fetch_params": flag(),
    "stage3_allgather_sequential": flag(),
    "prefetch_bucket_size": Refusal(_ALIAS, "write stage3_prefetch_bucket_size"),
    "param_persistence_threshold": Refusal(_ALIAS, "write stage3_param_persistence_threshold"),
    "model_persistence_threshold": Refusal(_ALIAS, "write stage3_model_persistence_threshold"),
    "max_live_parameters": Refusal(_ALIAS, "write stage3_max_live_parameters"),
    "max_reuse_distance": Refusal(_ALIAS, "write stage3_max_reuse_distance"),
    "gather_16bit_weights_on_model_save": Refusal(_ALIAS, "write stage3_gather_16bit_weights_on_model_save"),
    "module_granularity_threshold": Refusal(_ALIAS, "write stage3_module_granularity_threshold"),
    "use_all_reduce_for_fetch_params": Refusal(_ALIAS, "write stage3_use_all_reduce_for_fetch_params"),
    "allgather_sequential": Refusal(_ALIAS, "write stage3_allgather_sequential"),
    "stage3_gather_fp16_weights_on_model_save": Refusal(
        "it is deprecated", "write stage3_gather_16bit_weights_on_model_save"
    ),
    "ignore_unused_parameters": flag(),
    "legacy_stage1": only(False, "DeepSpeed raises on it"),
    "round_robin_gradients": flag(),
    "parameter_alignment": flag(),
    "zero_hpz_partition_size": integer(1, default=1),
    "zero_quantized_weights": only(False, _QUANTIZED),
    "zero_quantized_nontrainable_weights": only(False, _QUANTIZED),
    "zero_quantized_gradients": only(False, _QUANTIZED),
    "memory_efficient_linear": flag(),
    "pipeline_loading_checkpoint": only(False, _OWN_CHECKPOINTS),
    "override_module_apply": flag(),
    "log_trace_cache_warnings": flag(),
    "enable_sanity_checks": flag(),
    "save_muon_momentum_buffer_in_memory": flag(),
    "leaf_module": Refusal("it names classes inside the model, which bigtfm sets itself", "remove it"),
    "mics_shard_size": _gone(),
    "mics_hierarchical_params_gather": _gone(),
    "zeropp_loco_param": _gone(),
}

ACTIVATION_CHECKPOINTING: Table = {
    name: only(value, "it would be ignored: bigtfm recomputes activations by itself", _RECOMPUTE)
    for name, value in {
        "partition_activations": False,
        "number_checkpoints": None,
        "contiguous_memory_optimization": False,
        "cpu_checkpointing": False,
        "profile": False,
        "synchronize_checkpoint_boundary": False,
    }.items()
}

FLOPS_PROFILER: Table = {
    "enabled": flag(),
    "recompute_fwd_factor": number(0),
    "profile_step": integer(1),
    "module_depth": integer(-1),
    "top_modules": integer(1),
    "detailed": flag(),
    "output_file": text(nullable=True),
}

COMMS_LOGGER: Table = {
    "enabled": flag(),
    "prof_all": flag(),
    "prof_ops": texts(),
    "verbose": flag(),
    "debug": flag(),
}

DATA_TYPES: Table = {
    "grad_accum_dtype": choice("fp32", "bf16", "fp16", None),
    "param_dtype": only(None, "the precision is stated by bf16 or fp16", "remove it"),
    "buffer_dtype": only(None, "it would round the tables of the rotary positions", "remove it"),
    "keep_in_fp32_modules": only("auto", "it acts on buffers of transformers models", "remove it"),
}

TOP: Table = {
    "train_batch_size": integer(1, no_auto=None),
    "train_micro_batch_size_per_gpu": integer(1, no_auto=None),
    "gradient_accumulation_steps": integer(1, no_auto=None),
    "gradient_clipping": number(0, default=CLIPPING_DEFAULT),
    "zero_optimization": Section(ZERO),
    "bf16": Section(BF16),
    "fp16": Section(FP16),
    "data_types": Section(DATA_TYPES),
    "communication_data_type": choice("fp32", "bf16", "fp16", None),
    "aio": Section(AIO, nullable=True),
    "activation_checkpointing": Section(ACTIVATION_CHECKPOINTING),
    "flops_profiler": Section(FLOPS_PROFILER),
    "comms_logger": Section(COMMS_LOGGER),
    "timers": Section({"throughput": Section({"enabled": flag(), "synchronized": flag()})}),
    "steps_per_print": integer(1, nullable=True),
    "wall_clock_breakdown": flag(),
    "memory_breakdown": flag(),
    "dump_state": flag(),
    "log_level": choice("debug", "info", "warning", "error", "critical", None),
    "disable_python_gc": flag(),
    "zero_allow_untested_optimizer": flag(),
    "zero_force_ds_cpu_optimizer": flag(),
    # what would change the result, or be ignored
    "bfloat16": Refusal(
        "it is an old name of bf16, which wins without a word if both stand there", 'write "bf16"'
    ),
    "torch_autocast": _off("bigtfm's models name no dtype", "use bf16 or fp16"),
    "managed_gradient_accumulation": only(
        True, "bigtfm takes the exact mean over the global batch by itself"
    ),
    "prescale_gradients": only(False, "ZeRO refuses it, and elsewhere it only rounds differently"),
    "gradient_predivide_factor": only(1.0, "ZeRO refuses it, and elsewhere it only rounds differently"),
    "gradient_allreduce_op": only("mean", "a sum would make the update depend on the number of GPUs"),
    "fp32_allreduce": Refusal("DeepSpeed ignores it", 'write "communication_data_type": "fp32"'),
    "disable_allgather": only(False, "DeepSpeed ignores it"),
    "allgather_size": Refusal("DeepSpeed ignores it", "write zero_optimization.allgather_bucket_size"),
    "vocabulary_size": Refusal("the vocabulary's size comes from the data set", "remove it"),
    "dataloader_drop_last": only(False, "it would be ignored: bigtfm has its own loader, which never ends"),
    "checkpoint": Refusal(_OWN_CHECKPOINTS, "remove it; see [save] in the run config"),
    "datastates_ckpt": Refusal(_OWN_CHECKPOINTS, "remove it; see [save] in the run config"),
    "data_efficiency": _off("it changes the order of the data and the sequence length"),
    "tensorboard": _MONITOR,
    "wandb": _MONITOR,
    "csv_monitor": _MONITOR,
    "comet": _MONITOR,
    "autotuning": _off("it starts runs of its own with other batch sizes"),
    "hybrid_engine": _off("it is for generation inside RLHF"),
    "weight_quantization": Refusal("it is for inference", "remove it"),
    "compile": Refusal("it acts only on engine.compile(), which bigtfm does not call", "remove it"),
    "pipeline": Refusal("pipeline parallelism is not supported", "remove it"),
    "tensor_parallel": Refusal("tensor parallelism is not supported", "remove it"),
    "expert_parallel": Refusal("expert parallelism is not supported", "remove it"),
    "use_data_before_expert_parallelism": only(False, "expert parallelism is not supported"),
    "sequence_parallel_size": only(1, "sequence parallelism is not supported"),
    "seq_parallel_communication_data_type": Refusal("sequence parallelism is not supported", "remove it"),
    # what DeepSpeed has removed
    "amp": _gone("use bf16 or fp16"),
    "elasticity": _gone("state train_batch_size: bigtfm keeps it on any number of GPUs"),
    "curriculum_learning": _gone(),
    "progressive_layer_drop": _gone(),
    "compression_training": _gone(),
    "quantize_training": _gone(),
    "sparse_attention": _gone(),
    "sparse_gradients": _gone(),
    "eigenvalue": _gone(),
    "graph_harvesting": _gone(),
    "nebula": _gone("remove it; see [save] in the run config"),
}
