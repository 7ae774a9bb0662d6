"""The optimizers and schedulers that a DeepSpeed JSON may name, and their parameters.

Defaults are DeepSpeed's own, stated so that an implementation with others (torch's AdamW decays by 0.01)
gives the same update. Lars and the last four schedulers are bigtfm's.
"""

from __future__ import annotations

from bigtfm.config.deepspeed_schema import Refusal, Table, betas, choice, flag, integer, number, only

# Beyond what fp32 holds (3.4e38), also times 1 / (1 - beta1) or each other, torch raises in the first update.
_LR = number(above=0, high=1e30, required=True)
_DECAY = number(0, 1e6, default=0.0)
_CLIP: Table = {"max_grad_norm": Refusal("DeepSpeed raises on it", "set gradient_clipping")}
_TORCH: Table = {
    name: Refusal("not every implementation of this optimizer has it", "remove it")
    for name in ("foreach", "fused", "maximize", "capturable", "differentiable")
}
_STATES: Table = {"fp32_optimizer_states": only(True, "bigtfm's checkpoints hold fp32 moments")}
_GRADS: Table = {"set_grad_none": only(True, "not every implementation of this optimizer has it")}
_PLAIN: Table = {
    "bias_correction": only(True, "not every implementation of this optimizer can leave it out"),
    "amsgrad": only(False, "not every implementation of this optimizer has it"),
}
_ADAM: Table = {
    "lr": _LR,
    "betas": betas(0.9, 0.999),
    "eps": number(above=0, default=1e-8),
    "weight_decay": _DECAY,
    "adam_w_mode": flag(),
    "torch_adam": flag(),
    **_PLAIN,
    **_STATES,
    **_GRADS,
    **_TORCH,
    **_CLIP,
}

OPTIMIZERS: dict[str, Table] = {
    "AdamW": _ADAM,
    "Adam": _ADAM,
    "Adagrad": {
        "lr": _LR,
        "eps": number(above=0, default=1e-10),
        "weight_decay": _DECAY,
        "lr_decay": number(0),
        "initial_accumulator_value": number(0),
        "amsgrad": only(False, "Adagrad has no such variant"),
        **_STATES,
        **_TORCH,
        **_CLIP,
    },
    "SGD": {
        "lr": _LR,
        "momentum": number(0, below=1, default=0.0),
        "dampening": number(0, 1, default=0.0),
        "weight_decay": _DECAY,
        "nesterov": flag(),
        **_TORCH,
        **_CLIP,
    },
    "Lamb": {
        "lr": _LR,
        "betas": betas(0.9, 0.999),
        "eps": number(above=0, default=1e-8),
        "weight_decay": _DECAY,
        "max_coeff": only(10.0, "the trust ratio is LAMB's own, without limits to set"),
        "min_coeff": only(0.01, "the trust ratio is LAMB's own, without limits to set"),
        "eps_inside_sqrt": only(False, "not every implementation of this optimizer has it"),
        **_PLAIN,
        **_CLIP,
    },
    "Lars": {
        "lr": _LR,
        "momentum": number(0, below=1, default=0.9),
        "dampening": number(0, 1, default=0.0),
        "weight_decay": _DECAY,
        "trust_coefficient": number(above=0, high=1e6, default=1e-3),
        "nesterov": flag(),
        **_TORCH,
        **_CLIP,
    },
    "Lion": {
        "lr": _LR,
        "betas": betas(0.9, 0.999),
        "weight_decay": _DECAY,
        **_STATES,
        **_GRADS,
        **_CLIP,
    },
    "Muon": {
        "lr": _LR,
        "muon_lr": number(above=0),
        "adam_lr": number(above=0),
        "momentum": number(0, below=1, default=0.95),
        "weight_decay": _DECAY,
        "ns_method": choice("gram", "standard"),
        "betas": betas(0.9, 0.95),
        "eps": number(above=0, default=1e-10),
        "adam_w_mode": flag(),
        "torch_adam": flag(),
        **_STATES,
        **_TORCH,
        **_CLIP,
    },
}

REFUSED_OPTIMIZERS = {
    **dict.fromkeys(("onebitadam", "onebitlamb", "zerooneadam"), "DeepSpeed has removed it"),
    **dict.fromkeys(("muadam", "muadamw", "musgd"), "µP optimizers are not supported"),
}

_WARMUP: Table = {
    "warmup_num_steps": integer(1, default=1000),
    "warmup_type": choice("log", "linear", default="log"),
    "last_batch_iteration": only(-1, "bigtfm resumes the schedule by itself"),
}
_WARMUP_LR: Table = {
    "warmup_min_lr": number(0, default=0.0, no_auto=None),
    "warmup_max_lr": number(above=0, no_auto=None),
    **_WARMUP,
}
_TOTAL = integer(1, required=True, no_auto=None)

SCHEDULERS: dict[str, Table] = {
    "WarmupLR": _WARMUP_LR,
    "WarmupDecayLR": {"total_num_steps": _TOTAL, **_WARMUP_LR},
    "WarmupCosineLR": {
        "total_num_steps": _TOTAL,
        "warmup_min_ratio": number(0, 1, default=0.0),
        "cos_min_ratio": number(0, 1, default=0.0001),
        **_WARMUP,
    },
    "OneCycle": {
        "cycle_min_lr": number(0, required=True),
        "cycle_max_lr": number(above=0, required=True),
        "decay_lr_rate": number(0, default=0.0),
        "cycle_first_step_size": integer(1, default=2000),
        "cycle_second_step_size": integer(0, nullable=True),
        "cycle_first_stair_count": integer(0, default=0),
        "cycle_second_stair_count": integer(0, nullable=True),
        "decay_step_size": integer(0, default=0),
        "cycle_momentum": flag(default=True),
        "cycle_min_mom": number(0, below=1, default=0.8),
        "cycle_max_mom": number(0, below=1, default=0.9),
        "decay_mom_rate": number(0, default=0.0),
        "last_batch_iteration": only(-1, "bigtfm resumes the schedule by itself"),
    },
    "LRRangeTest": {
        "lr_range_test_min_lr": number(above=0, default=0.001),
        "lr_range_test_step_size": integer(1, default=2000),
        "lr_range_test_step_rate": number(0, default=1.0),
        "lr_range_test_staircase": flag(default=False),
        "last_batch_iteration": only(-1, "bigtfm resumes the schedule by itself"),
    },
    "ExponentialRange": {"max_lr": number(above=0, required=True), "total_num_steps": _TOTAL},
    "InverseSquareRoot": {"warmup_num_steps": integer(0, required=True)},
    "WSD": {
        "total_num_steps": _TOTAL,
        "warmup_num_steps": integer(0, required=True),
        "decay_num_steps": integer(0, required=True),
        "min_lr_ratio": number(0, 1, default=0.0),
        "decay_type": choice("linear", "cosine", "sqrt", default="linear"),
    },
    "ReduceOnPlateau": {
        "factor": number(above=0, below=1, default=0.5),
        "patience": integer(0, default=3),
        "threshold": number(0, below=1, default=0.001),
        "min_lr": number(0, default=0.0),
        "warmup_num_steps": integer(0, default=0),
    },
}

TORCH_SCHEDULERS = {  # by name they fail from ZeRO stage 1 on; what to take instead
    "ReduceLROnPlateau": "ReduceOnPlateau",
    "CosineAnnealingLR": "WarmupCosineLR",
    "CosineAnnealingWarmRestarts": "WarmupCosineLR",
    "OneCycleLR": "OneCycle",
    "CyclicLR": "OneCycle",
    "LinearLR": "WarmupDecayLR",
    "PolynomialLR": "WarmupDecayLR",
    "ConstantLR": "WarmupLR",
    "LambdaLR": "WSD",
    "MultiplicativeLR": "WSD",
    "StepLR": "WSD",
    "MultiStepLR": "WSD",
    "ExponentialLR": "InverseSquareRoot",
}
