"""From a verified checkpoint into an engine, or into a plain torch module."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bigtfm.engine import fragments
from bigtfm.engine.checkpoint import COUNTERS, Progress, read_state
from bigtfm.engine.shards import Shards
from bigtfm.model.lora import is_adapter
from bigtfm.model.quantized import put

if TYPE_CHECKING:
    from bigtfm.engine.distributed import Ranks


def load(checkpoint: Path, engine: Any, ranks: Ranks, *, moments: bool = True) -> Progress:
    """Fills the engine from a verified checkpoint, each rank reading only the elements that it keeps.

    moments: False leaves the optimizer as it begins: they are those of another kind.

    Raises:
        NoCheckpoint: the checkpoint's parameters are not this model's.
        StorageProblem: it can't be read.
    """
    state = read_state(checkpoint)
    with ranks.together(f"reading {checkpoint}"), Shards(checkpoint, merged=False) as shards:
        shards.require_trainable()
        shards.require_all_used(engine.module)
        for fragment in fragments.owned_fragments(engine):
            entry = shards.entry(fragment.name, fragment.shape)
            keys = entry["keys"] if moments and fragment.group is not None else ["fp32"]
            for key in fragments.moments(engine, fragment).keys() - set(keys):
                fragments.restore_moment(engine, fragment, key).zero_()  # from before its first update
            for key in keys:
                target = fragments.restore_moment(engine, fragment, key)
                shards.fill(target, fragment.name, key, fragment.start)
            if len(keys) > 1:  # before its first update an optimizer has no state, and makes all of it then
                fragments.restore_update_count(engine, fragment, entry["updates"])
    fragments.weights_follow_masters(engine)
    if engine.lr_scheduler is not None and state["scheduler"] is not None:
        for group, saved in zip(fragments.base_optimizer(engine).param_groups, state["groups"], strict=False):
            group["lr"] = saved["lr"]  # the rest of a group is the JSON's to say
        engine.lr_scheduler.load_state_dict(state["scheduler"])
    scaler, saved = fragments.loss_scaler(engine), state["loss_scaler"]
    if scaler is not None and saved and "cur_iter" in saved:  # without it, it was another precision's
        vars(scaler).update(saved)
    for name in COUNTERS:
        setattr(engine, name, state["counters"][name])
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()  # where an update is due
    return Progress(**state["progress"])


def start_from(checkpoint: Path, engine: Any, heads: tuple[str, ...] = ()) -> None:
    """Fills the engine's weights from a verified checkpoint; moments, counters and schedule stay fresh.

    heads: beginnings of names that need not be the same on both sides: what the model alone has stays fresh.
    So do adapters: those of the checkpoint are merged.

    Raises:
        NoCheckpoint: the checkpoint's parameters are not this model's.
    """
    with Shards(checkpoint) as shards:
        shards.require_trainable()
        shards.require_all_used(engine.module, besides=heads)
        for fragment in fragments.owned_fragments(engine):
            if fragment.name.startswith(heads) and not shards.has(fragment.name, fragment.shape):
                continue
            if is_adapter(fragment.name):
                continue
            known = max(0, shards.shared(fragment.name, fragment.shape) - fragment.start)
            shards.fill(fragment.view(fragment.flat)[:known], fragment.name, "fp32", fragment.start)
    fragments.weights_follow_masters(engine)


def load_weights(checkpoint: Path, model: nn.Module, *, quantized: bool = False) -> None:
    """Fills a plain torch module with the checkpoint's fp32 weights, one parameter at a time.

    Adapters are merged: the module has none. quantized: layers whose matrices are quantised there become such
    layers, else they are filled with fp32.
    """
    with Shards(checkpoint) as shards, torch.no_grad():
        shards.require_all_used(model)
        for name, parameter in list(model.named_parameters()):
            shards.entry(name, tuple(parameter.shape))
            if quantized and (matrix := shards.quantized(name)) is not None:
                put(model, name, matrix)
                continue
            whole = torch.empty(parameter.numel())
            shards.fill(whole, name, "fp32", 0)
            parameter.copy_(whole.view(parameter.shape))
