"""What a tuned recipe becomes at another batch: rules that were published, applied to a DeepSpeed JSON.

k is the new batch over the tuned one. All keep the number of samples (epochs): steps are divided by k.

linear  lr k. SGD with or without momentum, and LARS within it: Goyal et al. 2017, "Accurate, Large Minibatch
        SGD". It holds while the batch is well below the noise scale.
sqrt    lr sqrt(k), nothing else: Krizhevsky 2014, "One weird trick for parallelizing convolutional neural
        networks". LAMB: You et al. 2019, "Large Batch Optimization for Deep Learning", which also keeps the
        number of warm-up steps (a share of the steps that grows with k).
adam    lr sqrt(k), 1 - beta k for both betas, eps / sqrt(k): Malladi et al. 2022, "On the SDEs and Scaling
        Rules for Adaptive Gradient Algorithms", definition 5.2. Decoupled weight decay times sqrt(k), so that
        lr x decay over an epoch stays (Wang & Aitchison 2024, "How to set AdamW's weight decay as you scale
        model and dataset size").
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigtfm.config.deepspeed import DeepSpeedConfig, load_deepspeed_json
from bigtfm.config.deepspeed_rules import OWN_LR
from bigtfm.config.problems import ConfigProblem, did_you_mean

LINEAR, SQRT, ADAM = NAMES = ("linear", "sqrt", "adam")
RULES = {"SGD": LINEAR, "Lars": LINEAR, "Lamb": SQRT, "Adam": ADAM, "AdamW": ADAM}
IN_STEPS = ("total_num_steps", "warmup_num_steps", "decay_num_steps")
UNSCALED = ("OneCycle", "LRRangeTest", "ReduceOnPlateau", "ExponentialRange")  # lengths of other kinds


@dataclass(frozen=True)
class Scaled:
    """A recipe at another batch."""

    rule: str
    factor: float  # k
    values: dict[str, Any]  # the whole DeepSpeed JSON
    changes: dict[str, tuple[Any, Any]]  # key -> what it was, what it is


def scale(tuned: DeepSpeedConfig, batch: int, rule: str | None = None) -> Scaled:
    """The recipe of `tuned` at a global batch of `batch` sequences.

    rule: None: the optimizer's own.

    Raises:
        ConfigProblem: there is no rule for the optimizer or schedule, or it leads beyond what is possible.
    """
    before = tuned.stated_batch.train_batch_size
    if before is None:
        raise _refused(tuned, "train_batch_size is not stated", "state it: the rules go by the global batch")
    kind, k = tuned.optimizer_type, batch / before
    rule = rule or RULES.get(kind)
    if rule is None:
        known = ", ".join(RULES)
        raise _refused(tuned, f"no rule for {kind} has been published that is known here ({known} have one)",
                       "choose one with --rule, and tune around it")  # fmt: skip
    if rule not in NAMES:
        raise ConfigProblem(f"unknown rule '{rule}'", where="--rule", fix=did_you_mean(rule, NAMES))
    if rule == ADAM and kind not in ("Adam", "AdamW"):
        raise _refused(tuned, f"the rule adam is for Adam and AdamW, not for {kind}", "pass --rule sqrt")
    values = copy.deepcopy(tuned.values)
    values["train_batch_size"] = batch
    _keep_micro_batch(values, tuned, k)
    params = values["optimizer"]["params"]
    root = math.sqrt(k)
    params["lr"] = tuned.lr * (k if rule == LINEAR else root)
    if rule == ADAM:
        params |= _adam(tuned, k)
    if isinstance(values.get("scheduler"), dict):
        _scale_schedule(values["scheduler"], tuned, k, params["lr"])
    return Scaled(rule, k, values, _changes(tuned.values, values))


def _adam(tuned: DeepSpeedConfig, k: float) -> dict[str, Any]:
    params, root = tuned.optimizer_params, math.sqrt(k)
    betas = [1 - k * (1 - beta) for beta in params["betas"]]
    if min(betas) < 0:
        most = int(tuned.stated_batch.train_batch_size / (1 - min(params["betas"])))
        raise _refused(
            tuned,
            f"at {k:g} times the batch the rule adam asks for betas of {_short(betas)}",
            f"choose a batch of at most {most}, larger betas to begin with, or --rule sqrt",
        )
    found = {"betas": [round(beta, 12) for beta in betas], "eps": params["eps"] / root}
    if tuned.optimizer_type == "AdamW" and params["weight_decay"]:
        found["weight_decay"] = params["weight_decay"] * root
    return found


def _keep_micro_batch(values: dict[str, Any], tuned: DeepSpeedConfig, k: float) -> None:
    """What fits into a GPU stays; the accumulation makes up for it."""
    _, micro, accumulation = tuned.stated_batch
    if accumulation is None:
        return
    if micro is not None:
        del values["gradient_accumulation_steps"]  # it follows
    elif (accumulation * k).is_integer():
        values["gradient_accumulation_steps"] = int(accumulation * k)
    else:
        raise _refused(
            tuned, f"gradient_accumulation_steps {accumulation} times {k:g} is no whole number",
            "state train_micro_batch_size_per_gpu instead of it",
        )  # fmt: skip


def _scale_schedule(schedule: dict[str, Any], tuned: DeepSpeedConfig, k: float, lr: float) -> None:
    """Steps that take as many samples as before; of LAMB, warm-up steps are kept."""
    kind = schedule["type"]
    if kind in UNSCALED:
        raise _refused(
            tuned, f"the lengths of {kind} are not scaled", "use WarmupCosineLR or WSD, or do it by hand"
        )
    params = schedule["params"]
    for name in IN_STEPS:
        stated = tuned.scheduler_params.get(name)
        if not isinstance(stated, int) or (name == "warmup_num_steps" and tuned.optimizer_type == "Lamb"):
            continue
        params[name] = max(1, math.ceil(stated / k)) if stated else 0
    if (own := OWN_LR.get(kind)) is not None and params.get(own) != "auto":
        params[own] = lr
    total = params.get("total_num_steps")
    taken = sum(params.get(name) or 0 for name in IN_STEPS[1:])
    if isinstance(total, int) and taken > total:
        raise _refused(
            tuned, f"{total} steps are left, and warm-up and decay take {taken}",
            "train on more samples (a larger total_num_steps), or choose a smaller batch",
        )  # fmt: skip


def _changes(before: Any, after: Any, name: str = "") -> dict[str, tuple[Any, Any]]:
    """Every value that differs, under its full name."""
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return {name: (before, after)} if before != after else {}
    found: dict[str, tuple[Any, Any]] = {}
    for key in before | after:
        found |= _changes(before.get(key), after.get(key), f"{name}.{key}".lstrip("."))
    return found


def _refused(tuned: DeepSpeedConfig, what: str, fix: str) -> ConfigProblem:
    return ConfigProblem(what, where=str(tuned.path), fix=fix)


def lr_scale(deepspeed_json: Path, batch: int, rule: str | None, out: Path | None) -> Scaled:
    """The command: `out` is written, if it is given and not there yet.

    Raises:
        ConfigProblem: as `scale`; a file is wrong or in the way.
    """
    found = scale(load_deepspeed_json(deepspeed_json), batch, rule)
    if out is not None:
        if out.exists():
            raise ConfigProblem("is there already", where=str(out), fix="name another file, or remove it")
        out.write_text(json.dumps(found.values, indent=2) + "\n", encoding="utf-8")
        load_deepspeed_json(out)
    return found


def to_json(found: Scaled, out: Path | None) -> dict[str, Any]:
    """One JSON object."""
    changes = {key: {"before": before, "after": after} for key, (before, after) in found.changes.items()}
    wrote = None if out is None else str(out)
    return {"rule": found.rule, "factor": found.factor, "changes": changes, "out": wrote}


def told(found: Scaled, out: Path | None) -> str:
    """What a terminal shows."""
    lines = [f"{found.factor:g} times the batch, by the rule {found.rule}; the number of samples stays"]
    for key, (before, after) in found.changes.items():
        said = ["unset" if value is None else _short(value) for value in (before, after)]
        lines.append(f"  {key}: {said[0]} -> {said[1]}")
    lines.append("A rule is where tuning begins, not where it ends: `bigtfm sweep` goes on from there.")
    return "\n".join([*lines, f"wrote {out}"] if out is not None else lines)


def _short(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_short, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)
