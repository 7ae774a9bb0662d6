"""What the keys of a DeepSpeed JSON must fulfil together. DeepSpeed accepts most of what is refused here.

Each rule is one line of a table: the key, when it is broken, why that matters, the fix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from bigtfm.config.deepspeed import DeepSpeedConfig

OWN_LR = {  # schedulers that ignore optimizer.params.lr: the parameter that they take instead
    "WarmupLR": "warmup_max_lr",
    "WarmupDecayLR": "warmup_max_lr",
    "OneCycle": "cycle_max_lr",
    "LRRangeTest": "lr_range_test_min_lr",
}
MOST_SEQUENCES = 2**31
LAYER_WISE = ("Lamb", "Lars")  # a trust ratio of whole weights
ELEMENT_WISE = ("SGD", "Lion")  # not on DeepSpeed's list of optimizers for ZeRO, and exact on any shard


class Rule(NamedTuple):
    key: str
    broken: Callable[[DeepSpeedConfig], bool]
    reason: str
    fix: str


def _adam_says_nothing(config: DeepSpeedConfig) -> bool:
    stated = config.stated_optimizer_params
    decays = stated.get("weight_decay", 0) > 0
    return config.optimizer_type == "Adam" and decays and "adam_w_mode" not in stated


def _lr_is_lost(config: DeepSpeedConfig) -> bool:
    """Muon with an lr for each half, under a scheduler that gives all groups the same one."""
    own = {"muon_lr", "adam_lr"} & config.stated_optimizer_params.keys()
    return bool(own) and config.scheduler_type not in (None, "WarmupCosineLR")


def _steps_overflow(config: DeepSpeedConfig) -> bool:
    return config.horizon is not None and config.scheduled_steps > config.horizon


def _min_above_max(config: DeepSpeedConfig) -> bool:
    params = config.scheduler_params
    low = max(params.get(name, 0) for name in ("cycle_min_lr", "min_lr"))
    warm = params.get("warmup_min_lr", 0)
    return bool(max(low, 0 if warm == "auto" else warm) > config.lr)


_ZERO, _OPTIMIZER, _SCHEDULER = "zero_optimization", "optimizer.params", "scheduler.params"

RULES = (
    Rule(
        "fp16.enabled",
        lambda c: c.enabled("bf16") and c.enabled("fp16"),
        "bf16 and fp16 are both on",
        "set one of them to false",
    ),
    Rule(
        "train_batch_size",
        lambda c: c.stated_batch.train_batch_size is None and c.stated_batch.micro_batch is None,
        "neither train_batch_size nor train_micro_batch_size_per_gpu is stated",
        "set train_batch_size, the sequences of one optimizer step over all GPUs",
    ),
    Rule(
        "train_batch_size",
        lambda c: any(number is not None and number >= MOST_SEQUENCES for number in c.stated_batch),
        f"it, the micro batch or the accumulation is {MOST_SEQUENCES} or more",
        "count in sequences, not in tokens",
    ),
    Rule(
        f"{_ZERO}.offload_optimizer",
        lambda c: c.offload("optimizer") != "none" and c.zero_stage == 0,
        "DeepSpeed ignores it at stage 0",
        "use stage 1, 2 or 3, or remove it",
    ),
    Rule(
        f"{_ZERO}.offload_param",
        lambda c: c.offload("param") != "none" and c.zero_stage < 3,
        "DeepSpeed ignores it below stage 3",
        "use stage 3, or remove it",
    ),
    Rule(
        f"{_ZERO}.offload_optimizer.device",
        lambda c: c.offload("optimizer") == "nvme" and c.zero_stage < 3,
        "DeepSpeed takes nvme for cpu below stage 3",
        'use stage 3, or "cpu"',
    ),
    Rule(
        f"{_ZERO}.offload_optimizer.nvme_path",
        lambda c: c.offload("optimizer") == "nvme" and not c.zero["offload_optimizer"].get("nvme_path"),
        "device nvme needs a path",
        "set nvme_path to a folder on a local NVMe drive",
    ),
    Rule(
        f"{_ZERO}.offload_param.nvme_path",
        lambda c: c.offload("param") == "nvme" and not c.zero["offload_param"].get("nvme_path"),
        "device nvme needs a path",
        "set nvme_path to a folder on a local NVMe drive",
    ),
    Rule(
        f"{_ZERO}.offload_optimizer.ratio",
        lambda c: (c.zero.get("offload_optimizer") or {}).get("ratio", 1) < 1 and c.zero_stage < 3,
        "DeepSpeed offloads in part at stage 3 only",
        "use stage 3, or remove ratio",
    ),
    Rule(
        f"{_ZERO}.offload_optimizer",
        lambda c: c.offload("optimizer") == "nvme" and c.optimizer_type not in ("Adam", "AdamW"),
        "NVMe offload is for Adam and AdamW",
        'use AdamW, or "device": "cpu"',
    ),
    Rule(
        f"{_ZERO}.zero_hpz_partition_size",
        lambda c: c.zero.get("zero_hpz_partition_size", 1) > 1 and c.zero_stage < 3,
        "DeepSpeed ignores it below stage 3",
        "use stage 3, or remove it",
    ),
    Rule(
        "data_types.grad_accum_dtype",
        lambda c: c.grad_accum_dtype not in (c.precision, "fp32"),
        "gradients would be summed in a type that the precision does not have",
        'remove it, or write "fp32"',
    ),
    Rule(
        "data_types.grad_accum_dtype",
        lambda c: c.grad_accum_dtype != c.precision and c.zero_stage == 0,
        "DeepSpeed raises on it at stage 0",
        "use stage 1, 2 or 3, or remove it",
    ),
    Rule(
        "communication_data_type",
        lambda c: c.values.get("communication_data_type") not in (None, c.precision, "fp32"),
        "gradients would be rounded to another type than the precision's before they are summed over GPUs",
        'remove it, or write "fp32"',
    ),
    Rule(
        "optimizer.type",
        lambda c: c.optimizer_type in LAYER_WISE and c.zero_stage > 0,
        "Lamb's and Lars's trust ratio would be of a GPU's share of the weights, which changes the loss",
        "use zero_optimization.stage 0, or AdamW",
    ),
    Rule(
        "gradient_clipping",
        lambda c: c.optimizer_type == "Muon" and c.clipping > 0 and c.zero_stage > 0,
        "from stage 1 on DeepSpeed clips Muon's update instead of the gradient, which changes the loss "
        "(unset, gradient_clipping is 1.0)",
        'write "gradient_clipping": 0, or use stage 0',
    ),
    Rule(
        f"{_ZERO}.stage",
        lambda c: c.optimizer_type == "Muon" and c.zero_stage in (1, 2),
        "at stages 1 and 2 DeepSpeed keeps Muon's momentum where no checkpoint can save it by parameter",
        "use stage 0, or stage 3 with reduce_scatter false",
    ),
    Rule(
        f"{_ZERO}.reduce_scatter",
        lambda c: c.optimizer_type == "Muon" and c.zero_stage == 3 and c.zero.get("reduce_scatter", True),
        "DeepSpeed raises on Muon at stage 3 with reduce_scatter (the default)",
        'write "reduce_scatter": false',
    ),
    Rule(
        "zero_allow_untested_optimizer",
        lambda c: (
            c.optimizer_type in ELEMENT_WISE
            and c.zero_stage > 0
            and c.values.get("zero_allow_untested_optimizer") is False
        ),
        "false makes DeepSpeed refuse this optimizer under ZeRO",
        "remove it: bigtfm knows that the optimizer is exact on a share of the weights",
    ),
    Rule(
        f"{_OPTIMIZER}.adam_w_mode",
        _adam_says_nothing,
        "DeepSpeed's Adam is AdamW unless adam_w_mode is false, and weight_decay is on",
        'use type AdamW, or write "adam_w_mode": false for weight decay as an L2 term',
    ),
    Rule(
        f"{_OPTIMIZER}.adam_w_mode",
        lambda c: c.optimizer_type == "AdamW" and c.stated_optimizer_params.get("adam_w_mode") is False,
        "DeepSpeed ignores it for AdamW",
        "use type Adam, or remove it",
    ),
    Rule(
        f"{_OPTIMIZER}.weight_decay",
        lambda c: (
            c.optimizer_type in ("AdamW", "Adam")
            and c.stated_optimizer_params.get("torch_adam") is True
            and "weight_decay" not in c.stated_optimizer_params
        ),
        "unset, it is 0 for DeepSpeed's AdamW and 0.01 for torch's",
        "state weight_decay",
    ),
    Rule(
        f"{_OPTIMIZER}.nesterov",
        lambda c: (
            c.stated_optimizer_params.get("nesterov") is True
            and (c.optimizer_params["momentum"] == 0 or c.optimizer_params["dampening"] != 0)
        ),
        "nesterov needs momentum above 0 and no dampening",
        "set momentum, or remove nesterov",
    ),
    Rule(
        f"{_OPTIMIZER}.lr_decay",
        lambda c: (
            c.optimizer_type == "Adagrad"
            and c.offload("optimizer") != "none"
            and any(
                c.stated_optimizer_params.get(name, 0) for name in ("lr_decay", "initial_accumulator_value")
            )
        ),
        "DeepSpeed's Adagrad for offloaded states knows neither lr_decay nor initial_accumulator_value",
        "remove them, or offload_optimizer",
    ),
    *(
        Rule(
            f"{_SCHEDULER}.{name}",
            lambda c, kind=kind, name=name: (
                c.scheduler_type == kind and c.scheduler_params.get(name) not in (c.lr, "auto")
            ),  # type: ignore[misc]
            f"{kind} takes its lr from here, unset from a default, and ignores optimizer.params.lr",
            f"set {name} to the value of optimizer.params.lr",
        )
        for kind, name in OWN_LR.items()
    ),
    Rule(
        f"{_OPTIMIZER}.lr",
        _lr_is_lost,
        "this scheduler gives every parameter the same lr, so that muon_lr and adam_lr are ignored",
        "use WarmupCosineLR, or remove muon_lr and adam_lr",
    ),
    Rule(
        f"{_SCHEDULER}.cycle_momentum",
        lambda c: (
            c.scheduler_type == "OneCycle"
            and c.scheduler_params["cycle_momentum"]
            and "betas" in c.stated_optimizer_params
        ),
        "it is on unless set to false, and replaces optimizer.params.betas",
        'write "cycle_momentum": false, or remove betas',
    ),
    Rule(_SCHEDULER, _min_above_max, "the smallest lr is above optimizer.params.lr", "lower it"),
    Rule(
        f"{_SCHEDULER}.total_num_steps",
        _steps_overflow,
        "warm-up and decay are longer than total_num_steps (unset, warmup_num_steps is 1000)",
        "raise total_num_steps, or shorten warmup_num_steps",
    ),
)
