"""A checkpoint that DeepSpeed's own `save_checkpoint` wrote becomes a run directory to go on in.

Everything that decides the curve is compared first: the model, the optimizer's numbers, each parameter's
weight decay, the schedule, the clipping and the global batch.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigtfm.config.deepspeed_schema import CLIPPING_DEFAULT
from bigtfm.config.problems import ConfigProblem, NoCheckpoint, NumericsProblem, shown
from bigtfm.engine import weights
from bigtfm.engine.build import OWN_SCHEDULES, parameter_groups
from bigtfm.engine.checkpoint import COUNTERS, Progress
from bigtfm.engine.deepspeed_saved import Saved, open_checkpoint
from bigtfm.huggingface.convert import count, lines, made_whole, some, with_progress
from bigtfm.job import Job, check_job
from bigtfm.model.families import make_model
from bigtfm.run_directory import identity, refuse_changes

MOMENTS = {  # what each optimizer keeps
    "Adam": {"exp_avg", "exp_avg_sq"},
    "AdamW": {"exp_avg", "exp_avg_sq"},
    "Lamb": {"exp_avg", "exp_avg_sq"},
    "Lion": {"exp_avg"},
    "Adagrad": {"sum"},
    "SGD": {"momentum_buffer"},
}
_TRANSFORMERS = re.compile(
    r"(^|\.)(transformer\.h|(model|decoder|encoder)\.(layers?|block)|bert|roberta|gpt_neox|lm_head|shared)\."
)
_UNDO = "write into DeepSpeed JSON and run config what that training had (bigtfm never decays vectors)"


def import_deepspeed(
    source: Path,
    out: Path,
    deepspeed_json: Path,
    config: Path | None,
    overrides: Sequence[str] = (),
    *,
    trust: bool = False,
) -> list[str]:
    """Makes a run directory with a checkpoint of ours, one tensor at a time; returns what is to be told.

    source: what was given to save_checkpoint, or one of its global_stepN folders. out: a folder that is not
    there yet, or empty. The other arguments are those of the training to come. trust: whether to unpickle
    files that hold more than DeepSpeed puts there.

    Raises:
        NoCheckpoint: there is none, or it is damaged, incomplete, or of another model.
        ConfigProblem: the training to come would leave the curve of the one that was, or `out` is taken.
        DataProblem: as check_job.
        NumericsProblem: a weight or moment is not finite.
    """
    with made_whole(out) as building:
        saved = open_checkpoint(source, trust=trust)
        place = Path(os.path.abspath(out))
        here = [*overrides, f"run.dir={place.parent}", f"run.name={place.name}"]
        job = check_job(config, deepspeed_json, here, saved.world_size)
        with torch.device("meta"):
            model = make_model(job.run.model, job.special.vocab_size, objective=job.run.objective)
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        theirs = _names(saved, shapes)
        _require_same_recipe(saved, job, model, theirs)
        moments = _moments(saved, job)
        progress = Progress(
            step=saved.state["global_steps"],
            samples=saved.state["global_samples"],
            tokens=saved.state["global_samples"] * job.run.seq_len,
            identity=identity(job),
        )
        keys = ["fp32", *moments]
        tensors = with_progress(
            _tensors(saved, theirs, keys),
            {f"{name}|{key}": shape for name, shape in shapes.items() for key in keys},
            "importing",
        )
        weights.save_training(
            building / "checkpoints", shapes, tensors, progress, moments, saved.updates, _state(saved, job)
        )
        _keep_files(job, building)

    return lines(
        imported=f"{saved.folder}: {count(shapes)} parameters, ZeRO stage {saved.stage}, "
        f"{saved.world_size} ranks, step {progress.step}",
        moments=some(moments) or "none: the optimizer had not begun",
        samples=f"{progress.samples:,} consumed, by DeepSpeed's count; which they were it does not know, so "
        "the data go on at that number of this run's own order",
        next=f"bigtfm train --deepspeed_config {deepspeed_json} "
        + (f"--config {config} " if config else "")
        + " ".join(here),
    )


def _names(saved: Saved, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """The checkpoint's name of each of the model's parameters: the same, or behind a prefix that all have.

    Raises:
        NoCheckpoint: they are not this model's.
    """
    first = next(iter(shapes))
    prefix = next((name.removesuffix(first) for name in saved.shapes if name.endswith(f".{first}")), "")
    names = {name: prefix + name for name in shapes}
    missing = [name for name in shapes if names[name] not in saved.shapes]
    surplus = [name for name in saved.shapes if name not in names.values()]
    if missing or surplus:
        parts = [f"lacks {some(missing)}"] * bool(missing) + [f"has also {some(surplus)}"] * bool(surplus)
        fix = "use the [model] table of the model that was trained"
        if any(_TRANSFORMERS.search(name) for name in surplus):
            fix = (
                "it looks like a transformers model: merge it with the zero_to_fp32.py beside it, then take "
                "the weights alone with `bigtfm import-hf`"
            )
        raise NoCheckpoint(f"of another model: it {' and '.join(parts)}", where=str(saved.folder), fix=fix)
    for name, shape in shapes.items():
        if saved.shapes[names[name]] != shape:
            raise NoCheckpoint(
                f"of another model: {name} is {list(saved.shapes[names[name]])} there and {list(shape)} here",
                where=str(saved.folder),
                fix="use the [model] table and the tokenizer of the model that was trained",
            )
    return names


def _require_same_recipe(saved: Saved, job: Job, model: torch.nn.Module, theirs: Mapping[str, str]) -> None:
    """Raises ConfigProblem when the curve would go on otherwise; resume.allow=recipe accepts it."""
    steps, json = saved.state["global_steps"], saved.state.get("ds_config")
    stated: dict[str, Any] = json if isinstance(json, dict) else {}
    pairs = {
        "global_batch": (
            saved.state["global_samples"] // steps if steps else job.resolved.global_batch,
            job.resolved.batch.samples(steps) // steps if steps else job.resolved.global_batch,
        ),
        "optimizer": _optimizers(saved, _table(stated, "optimizer"), job),
        "weight_decay": _decays(saved, job, model, theirs),
    }
    if scheduler := _table(stated, "scheduler"):
        before = {"type": scheduler.get("type"), **_numbers(scheduler.get("params"))}
        params = job.deepspeed_values.get("scheduler", {}).get("params", {})
        now = {"type": job.deepspeed.scheduler_type, **job.deepspeed.scheduler_params, **params}
        pairs["scheduler"] = before, _chosen(now, before)
    if stated:
        clipping = _numbers(stated).get("gradient_clipping", CLIPPING_DEFAULT)
        pairs["gradient_clipping"] = clipping, job.deepspeed.clipping
    refuse_changes(
        {"recipe": {key: pair[0] for key, pair in pairs.items()}},
        {"recipe": {key: pair[1] for key, pair in pairs.items()}},
        job.run.resume.allow,
        saved.folder,
        undo=_UNDO,
    )


def _optimizers(saved: Saved, stated: Mapping[str, Any], job: Job) -> tuple[dict[str, Any], dict[str, Any]]:
    """The optimizer's settings there and here, but for the weight decay. Its own state counts more than the
    JSON that DeepSpeed keeps beside it; the lr of a state is that of the next update, though, not the peak.
    """
    ours = _numbers(job.deepspeed.optimizer_params) | {"type": job.deepspeed.optimizer_type}
    rates = sorted({group["lr"] for group in saved.groups if "lr" in group})
    if len(rates) > 1:
        raise ConfigProblem(
            f"its parameter groups have {len(rates)} learning rates ({shown(rates)}), a run has one",
            where=str(saved.folder),
            fix="take the weights alone, with the zero_to_fp32.py beside it",
        )
    before = _numbers(stated.get("params"))
    before |= {k: v for group in saved.groups for k, v in _numbers(group).items() if k not in ("lr", "step")}
    if rates and job.deepspeed.scheduler_type is None:
        before["lr"] = rates[0]
    kind = str(stated.get("type", ours["type"]))
    before["type"] = ours["type"] if kind.lower() == ours["type"].lower() else kind
    before = {key: value for key, value in before.items() if key in ours and key != "weight_decay"}
    return before, _chosen(ours, before)


def _decays(
    saved: Saved, job: Job, model: torch.nn.Module, theirs: Mapping[str, str]
) -> tuple[dict[str, float], dict[str, float]]:
    """Each parameter's weight decay there and here; None there: it was frozen."""
    decay = job.deepspeed.optimizer_params.get("weight_decay") or 0.0
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    now = {
        names[id(parameter)]: group.get("weight_decay", decay)
        for group in parameter_groups(model, job.deepspeed.optimizer_type, decay)
        for parameter in group["params"]
    }
    before = dict(now)
    for name in now:
        place = saved.group_of.get(theirs[name])
        if place is None:
            before[name] = "frozen"
        elif saved.groups:
            before[name] = saved.groups[place].get("weight_decay", now[name])
    return before, now


def _table(stated: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = stated.get(key)
    return found if isinstance(found, Mapping) else {}


def _numbers(values: Any) -> dict[str, Any]:
    """The settings that are numbers, names or lists; switches of an implementation are none of these."""
    found = values if isinstance(values, Mapping) else {}
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}
    return {
        key: value
        for key, value in plain.items()
        if isinstance(value, int | float | str | list) and not isinstance(value, bool) and value != "auto"
    }


def _chosen(values: Mapping[str, Any], keys: Mapping[str, Any]) -> dict[str, Any]:
    return {key: values.get(key) for key in keys}


def _moments(saved: Saved, job: Job) -> list[str]:
    """Names of the moments to take over.

    Raises:
        NoCheckpoint: they are not those of the run's optimizer.
    """
    kind = job.deepspeed.optimizer_type
    wanted, found = MOMENTS.get(kind), set(saved.moments)
    may_lack = kind == "SGD" or not saved.updates
    if wanted is None or not (found == wanted or (may_lack and not found)):
        raise NoCheckpoint(
            f"its optimizer kept {some(saved.moments) or 'nothing'}, which is not what {kind} goes on with",
            where=str(saved.folder),
            fix="name the optimizer that it was trained with in the DeepSpeed JSON (Muon can't be imported)",
        )
    return saved.moments


def _tensors(saved: Saved, theirs: Mapping[str, str], keys: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    for name, there in theirs.items():
        for key in keys:
            values = saved.read(there, key)
            if not bool(torch.isfinite(values).all()):
                raise NumericsProblem(
                    f"{key} of {name} is not finite",
                    where=str(saved.folder),
                    fix="pass an earlier global_stepN folder",
                )
            yield f"{name}|{key}", values


def _state(saved: Saved, job: Job) -> dict[str, Any]:
    """What state.json says beside the progress."""
    scaler = {k: v for k, v in saved.loss_scaler.items() if isinstance(v, int | float | bool)}
    dynamic = scaler.get("dynamic") or scaler.get("dynamic_loss_scale")
    lr = next((group["lr"] for group in saved.groups if "lr" in group), job.deepspeed.lr)
    return {
        "counters": {name: saved.state[name] for name in COUNTERS},
        "groups": [{"lr": lr}] * 2,  # with and without weight decay
        "scheduler": _schedule(saved, job),
        "loss_scaler": scaler if dynamic and job.resolved.precision == "fp16" else None,
    }


def _schedule(saved: Saved, job: Job) -> dict[str, Any] | None:
    """The schedule's state: the saved one if the run has such a schedule, else the run's own at this step.

    Raises:
        ConfigProblem: it is another, and resume.allow does not name the recipe.
    """
    kind, found = job.deepspeed.scheduler_type, saved.state.get("lr_scheduler")
    applied = int(saved.updates)
    if kind is None:
        own = None
    elif kind in OWN_SCHEDULES:
        own = {"next_step": applied + 1, "scale": 1.0, "best": None, "waited": 0}
    else:
        own = {"last_batch_iteration": applied - 1}
    keys = set(found) if isinstance(found, dict) else set()
    if (found is None and own is None) or (own is not None and keys and keys <= own.keys()):
        return found
    if "recipe" not in job.run.resume.allow:
        raise ConfigProblem(
            f"its schedule's state ({shown(found)}) is not that of {kind or 'a run without a schedule'}",
            where=str(saved.folder),
            fix=f"{_UNDO}, or accept the change with resume.allow=recipe",
        )
    return own


def _keep_files(job: Job, folder: Path) -> None:
    if job.config_path is not None:
        shutil.copyfile(job.config_path, folder / "run.toml")
    shutil.copyfile(job.deepspeed.path, folder / "deepspeed.json")
    shutil.copytree(job.dataset.tokenizer_path, folder / "tokenizer")
