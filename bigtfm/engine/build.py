"""From a model's constructor and the user's DeepSpeed JSON to a DeepSpeed engine.

Everything that DeepSpeed has to be told beyond the user's file is decided here, on a copy of it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from bigtfm.config.deepspeed import acting_stage, reduce_bucket
from bigtfm.config.deepspeed_rules import LAYER_WISE
from bigtfm.config.problems import ConfigProblem
from bigtfm.config.sections import ComputeSection, TuneSection
from bigtfm.engine import fragments, schedules
from bigtfm.model.cross_entropy import can_compile
from bigtfm.model.float8 import use_float8
from bigtfm.model.heads import LanguageModel
from bigtfm.model.liger import use_liger
from bigtfm.model.transformer import block_linears, compile_blocks, init_weights

ONE_LR_A_GROUP = ("AdamW", "Adam", "SGD", "Lion")
OWN_SCHEDULES = {"ExponentialRange", "InverseSquareRoot", "WSD", "ReduceOnPlateau"}


def build_engine(
    make_model: Callable[[], LanguageModel],
    config: dict[str, Any],
    compute: ComputeSection,
    tune: TuneSection | None = None,
) -> deepspeed.DeepSpeedEngine:
    """Model, optimizer and schedule under ZeRO, as `config` (a resolved DeepSpeed JSON, left as it is) says.

    The initial weights are the same at every stage and world size: each is a function of seed and name. What
    `tune` leaves as it is needs no gradient: DeepSpeed keeps neither fp32 masters nor moments of it.

    Raises:
        ConfigProblem: the accelerator lacks the precision that the JSON asks for.
    """
    config, tune = copy.deepcopy(config), tune or TuneSection()  # initialize() pops from what it is given
    on_cpu = get_accelerator().device_name() == "cpu"
    _require_precision(config)
    _require_compiler(compute)
    zero = config.setdefault("zero_optimization", {})
    stage = zero["stage"] = _acting_stage(config)
    if stage == 3 and compute.recompute == "selective":
        # Stage 3's own F.linear adds the bias in place into the product that selective recomputation saved.
        zero.setdefault("memory_efficient_linear", False)
    schedule = _own_schedule(config)
    params = config["optimizer"].setdefault("params", {})
    kind, weight_decay = config["optimizer"]["type"], params.get("weight_decay", 0.0)
    optimizer = _own_optimizer(config, on_cpu)

    with deepspeed.zero.Init(config_dict_or_path=copy.deepcopy(config)) if stage == 3 else nullcontext():
        model = make_model()
    init_weights(model, gather=_gather if stage == 3 else nullcontext)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(tune.learns(name))
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    elements = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in learning)
    zero["reduce_bucket_size"] = reduce_bucket(zero, elements)
    if model.config.keep_zeros:
        for _, layer in block_linears(model):
            if layer.weight.requires_grad:
                layer.weight.register_hook(partial(_no_gradient_where_zero, layer.weight))
    if compute.kernels == "liger":
        use_liger(model)
    if compute.fp8 != "none":
        capability = None if on_cpu else torch.cuda.get_device_capability()
        use_float8(model, compute.fp8, precision=_precision(config), capability=capability)
    if compute.compile_blocks:
        torch._dynamo.trace_rules.add("deepspeed")  # its hooks gather parameters: nothing to be compiled
        compile_blocks(model)
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=parameter_groups(model, kind, weight_decay, tune),
        optimizer=optimizer,
        config=config,
    )
    _undo_dry_run(engine)
    if torch.distributed.get_world_size() == 1 and not engine.zero_optimization():
        engine.enable_backward_allreduce = False  # it would copy all gradients into buckets and back
    if schedule is not None:  # bound late: at stages 1 and 2 DeepSpeed replaces a torch Adagrad by a new one
        engine.lr_scheduler = schedule(engine.optimizer)
    return engine


def _no_gradient_where_zero(weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Without a gradient every optimizer but Muon leaves a zero weight alone, and its moments at zero.

    The weights themselves are the mask: nothing else has to be kept, partitioned or loaded. At stage 3 the
    whole weight is there while its gradient is computed.
    """
    return gradient.masked_fill(weight == 0, 0)


def _precision(config: dict[str, Any]) -> str:
    return next((name for name in ("fp16", "bf16") if config.get(name, {}).get("enabled")), "fp32")


def _acting_stage(config: dict[str, Any]) -> int:
    return acting_stage(
        config["zero_optimization"],
        optimizer=config["optimizer"]["type"],
        precision=_precision(config),
        world_size=torch.distributed.get_world_size(),
    )


def _undo_dry_run(engine: deepspeed.DeepSpeedEngine) -> None:
    """At stage 0 in fp16 and bf16 DeepSpeed takes a step on zero gradients to allocate the moments.

    It decays the masters and counts as an update in Adam's bias correction: the curve would leave the other
    stages'.
    """
    wrapper = engine.optimizer
    if engine.zero_optimization() or not hasattr(wrapper, "initialize_optimizer_states"):
        return
    optimizer = fragments.base_optimizer(engine)
    optimizer.state.clear()
    for group in optimizer.param_groups:
        group.pop("step", None)
    with torch.no_grad():
        if hasattr(wrapper, "fp32_groups_flat"):
            pairs = list(zip(wrapper.fp32_groups_flat, wrapper.fp16_groups_flat, strict=True))
        else:
            groups = zip(wrapper.fp32_groups, wrapper.fp16_groups, strict=True)
            pairs = [pair for group in groups for pair in zip(*group, strict=True)]
        for master, weight in pairs:
            master.copy_(weight)


def _gather(parameter: nn.Parameter) -> Any:
    """All of a ZeRO-3 parameter while it is filled; rank 0's values reach the others."""
    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)


def _require_precision(config: dict[str, Any]) -> None:
    accelerator = get_accelerator()
    for key, supported in (("fp16", accelerator.is_fp16_supported), ("bf16", accelerator.is_bf16_supported)):
        if config.get(key, {}).get("enabled") and not supported():
            raise ConfigProblem(
                f"{key} is not supported on this device ({accelerator.device_name()})",
                where=f"DeepSpeed JSON: {key}.enabled",
                fix="use a bf16 or fp32 JSON, for example ds_configs/zero2_fp32.json",
            )


def _require_compiler(compute: ComputeSection) -> None:
    """What "auto" compiles it compiles where it can; what is asked for must work."""
    asked = {"compute.compile_blocks": compute.compile_blocks, "compute.loss": compute.loss == "compiled"}
    device = get_accelerator().device_name()
    for key in (key for key, wanted in asked.items() if wanted and not can_compile(device)):
        raise ConfigProblem(
            f"{key} needs torch.compile, and this machine lacks a C++ compiler"
            + ("" if device == "cpu" else ", or Triton"),
            where="run config",
            fix="install g++" + ("" if device == "cpu" else " and triton") + f", or leave {key} out",
        )


def parameter_groups(
    model: nn.Module, kind: str, weight_decay: float, tune: TuneSection | None = None
) -> list[dict[str, Any]]:
    """Weight decay for the matrices; none for the vectors (norms, biases) and what the model exempts.

    Where `tune` gives parts of the model an lr of their own, each has its groups, and `lr_scale` says how
    many times the schedule's it is (gradients.step). What needs no gradient is in none.

    Raises:
        ConfigProblem: the optimizer has one lr for all.
    """
    tune = tune or TuneSection()
    if tune.layer_decay != 1 and kind not in ONE_LR_A_GROUP:
        raise ConfigProblem(
            f"{kind} has one lr for all, and tune.layer_decay asks for several",
            where="run config",
            fix=f"use {', '.join(ONE_LR_A_GROUP)} in the DeepSpeed JSON, or leave tune.layer_decay out",
        )
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    if kind == "Adagrad":  # stages 1 and 2 rebuild it with one group, whatever it was given
        return [{"params": [parameter for _, parameter in trained]}]
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in trained:
        decays = _dimensions(parameter) >= 2 and not getattr(parameter, "no_weight_decay", False)
        scale = _lr_scale(name, model, tune)
        group = {"params": [], "weight_decay": weight_decay if decays else 0.0}
        group |= {} if scale == 1 else {"lr_scale": scale}
        groups.setdefault((-scale, not decays), group)["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def _lr_scale(name: str, model: nn.Module, tune: TuneSection) -> float:
    """How many times the schedule's lr a parameter has (Howard & Ruder 2018, section 3.2)."""
    if tune.layer_decay == 1 or not isinstance(model, LanguageModel):
        return 1.0
    config = model.config
    blocks = config.decoder_layers if name.startswith("decoder.") else config.num_layers
    if config.family == "gpt":
        blocks = config.num_layers
    if found := re.match(r"(?:encoder|decoder)\.layers\.(\d+)\.", name):
        return tune.layer_decay ** (blocks - int(found[1]))
    if re.match(r"embed_tokens\.|(?:encoder|decoder)\.(?:embed|relative)", name):
        return tune.layer_decay ** (blocks + 1)
    return 1.0


def _dimensions(parameter: nn.Parameter) -> int:
    return len(getattr(parameter, "ds_shape", parameter.shape))  # a ZeRO-3 parameter is flat


def _own_optimizer(config: dict[str, Any], on_cpu: bool) -> partial[torch.optim.Optimizer] | None:
    """What DeepSpeed would not build here, from torch code; else None.

    On a CPU it compiles its Adam for minutes and has no Lion. Its Lamb needs fp16 and is none on a CPU. LARS
    (You et al. 2017, "Large Batch Training of Convolutional Networks") it has nowhere.
    """
    kind, params = config["optimizer"]["type"], config["optimizer"]["params"]
    if kind in ("Adam", "AdamW", "Muon") and on_cpu:
        params.setdefault("torch_adam", True)
        if kind != "Muon" and params["torch_adam"]:
            params.setdefault("fused", True)  # one pass over the weights; torch's default makes about ten
    if kind not in LAYER_WISE and not (kind == "Lion" and on_cpu):
        return None
    import pytorch_optimizer

    del config["optimizer"]
    if kind == "Lars":
        return partial(pytorch_optimizer.LARS, **params)
    known = {name: params[name] for name in ("lr", "betas", "eps", "weight_decay") if name in params}
    if kind == "Lion":
        return partial(pytorch_optimizer.Lion, **known)
    # As in You et al. 2019, algorithm 2: decay within the trust ratio, and no step that early ones inflate.
    # No norm of its own: clipping is the JSON's gradient_clipping.
    return partial(
        pytorch_optimizer.Lamb, max_grad_norm=0.0, weight_decouple=False, adam_debias=True, **known
    )


def _own_schedule(config: dict[str, Any]) -> Callable[[torch.optim.Optimizer], Any] | None:
    """The schedules that DeepSpeed lacks, taken out of its copy of the JSON; it builds its own by itself."""
    scheduler = config.get("scheduler") or {}
    if scheduler.get("type") not in OWN_SCHEDULES:
        return None
    del config["scheduler"]
    build = getattr(schedules, scheduler["type"])
    return partial(build, lr=config["optimizer"]["params"]["lr"], **scheduler.get("params", {}))
