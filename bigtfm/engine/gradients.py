"""The last look at a step's gradients before the update: a step that is not finite is left out, everywhere.

DeepSpeed leaves out a step whose gradient norm is not finite, on all ranks together, at every stage and in
every precision but one: stage 0 in fp32 trains on it. It never looks at the loss. Here a loss that is not
finite makes its gradients so, and stage 0 in fp32 is given what the other stages have, so that there is one
rule: no weight, moment, update count or schedule moves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bigtfm.config.problems import loss_scale_floor
from bigtfm.engine import fragments
from bigtfm.engine.checkpoint import COUNTERS

if TYPE_CHECKING:
    from bigtfm.data.loader import Batch
    from bigtfm.engine.distributed import Ranks
    from bigtfm.resilience.numerics import Watch


def marked(loss: Tensor) -> Tensor:
    """The same loss, to the bit; one that is not finite makes all gradients NaN, which it need not by itself.

    A rank's NaN reaches all ranks with the sum of the gradients: nothing more has to be agreed on, or waited
    for.
    """
    return loss * (loss.detach() * 0 + 1)


def begin(engine: Any, global_batch: int) -> None:
    """Before each step: how many sequences its micro-batches add up to.

    DeepSpeed finds the last one by counting all micro-batches of the run modulo the accumulation, which a
    change of the accumulation would put off.
    """
    engine.set_train_batch_size(global_batch)
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()


def step(engine: Any, ranks: Ranks, lr_factor: float = 1.0) -> tuple[float, float]:
    """`engine.step()`, behind each micro-batch's backward; the last one of a step updates, or leaves it out.

    Returns the L2 norm of the reduced gradients and the lr of that update: the schedule's times `lr_factor`.

    Raises:
        NumericsProblem: fp16's loss scale can't be lowered any more.
    """
    if not engine.is_gradient_accumulation_boundary():
        engine.step()
        return math.nan, math.nan
    norm = _last_look(engine, ranks)
    scaler = fragments.loss_scaler(engine)
    at_floor = scaler is not None and scaler.cur_scale <= (getattr(scaler, "min_loss_scale", None) or 0)
    with _lr_times(engine, lr_factor):
        lr = engine.get_lr()[0]  # of a group whose lr is the schedule's: they come first
        engine.step()
    if at_floor and not engine.was_step_applied():  # stages 1 to 3 raise by themselves
        raise loss_scale_floor()
    return float(engine.get_global_grad_norm()) if norm is None else norm, lr


def _last_look(engine: Any, ranks: Ranks) -> float | None:
    """Where DeepSpeed does not look at the reduced gradients, or too late; their norm, if it keeps none."""
    optimizer = engine.optimizer
    if any(getattr(optimizer, "sub_groups_using_muon", ())):
        # Stage 3 puts the gradients into Muon's momentum before it looks at their norm.
        bad = not all(bool(torch.isfinite(gradient).all()) for gradient in _stage_3_gradients(optimizer))
        optimizer.use_muon = not ranks.sum([bad])[0]
    if engine.zero_optimization() or engine.fp16_enabled() or engine.bfloat16_enabled():
        return None
    grads = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
    norm = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))) if grads else 0.0
    optimizer.overflow = not math.isfinite(norm)  # what the engine asks every other optimizer for
    engine.clip_fp32_gradients = lambda: None  # it would take the norm once more, tensor by tensor
    if 0 < engine.gradient_clipping() < norm + 1e-6 and not optimizer.overflow:
        torch._foreach_mul_(grads, engine.gradient_clipping() / (norm + 1e-6))
    if optimizer.overflow:
        optimizer.step = lambda: vars(optimizer).pop("step")  # once; without gradients Muon would still decay
    return norm


def _stage_3_gradients(optimizer: Any) -> Iterator[Tensor]:
    if optimizer.offload_optimizer:
        yield from (flat.grad for flat in optimizer.fp32_partitioned_groups_flat if flat.grad is not None)
    else:
        for group in optimizer.averaged_gradients.values():
            yield from group


@contextmanager
def _lr_times(engine: Any, factor: float) -> Iterator[None]:
    """An update at a lower lr than the schedule's, which goes on as if nothing had happened.

    Also where parts of the model have a share of it (build.parameter_groups).
    """
    every = fragments.base_optimizer(engine).param_groups
    groups = every if factor != 1 or any("lr_scale" in group for group in every) else []
    before = [group["lr"] for group in groups]
    for group in groups:
        group["lr"] *= factor * group.get("lr_scale", 1.0)
    yield
    if engine.lr_scheduler is None or not engine.was_step_applied():  # else it has set the next one
        for group, lr in zip(groups, before, strict=True):
            group["lr"] = lr


def replay(engine: Any, batches: Sequence[Batch], labels: float, ranks: Ranks, watch: Watch) -> None:
    """The step that was left out, once more, by all ranks together; it is left out again.

    watch: its hooks are on the model, so that no gradient reaches DeepSpeed that could update anything.
    """
    scaler = fragments.loss_scaler(engine)
    kept = {name: getattr(engine, name) for name in (*COUNTERS, "micro_steps")}
    scale = dict(vars(scaler)) if scaler is not None else {}
    if scaler is not None:
        scaler.raise_error_at_min_scale, scaler.min_loss_scale = False, 0.0
    engine.micro_steps = engine.global_steps * len(batches)
    with torch.compiler.set_stance("force_eager"):  # hooks inside compiled code would not run
        for batch in batches:
            watch.micro_batch(batch)
            loss, _ = engine(
                **batch.to(ranks.device).model_inputs(), l1_scale=labels / (ranks.world_size * len(batches))
            )
            watch.look("loss", loss.detach())
            engine.backward(marked(loss) * (ranks.world_size / max(labels, 1)), scale_wrt_gas=False)
            step(engine, ranks)
    assert not engine.was_step_applied(), "a replay must not train"
    for name, value in kept.items():
        setattr(engine, name, value)
    if scaler is not None:
        vars(scaler).clear()
        vars(scaler).update(scale)


def is_of_loss_scale(engine: Any, loss: float) -> bool:
    """Whether a step was left out by fp16's own design, to lower its loss scale: the loss is finite."""
    scaler = fragments.loss_scaler(engine)
    dynamic = getattr(scaler, "dynamic", False) or getattr(scaler, "dynamic_loss_scale", False)
    return bool(dynamic) and math.isfinite(loss)


def broken_weights(engine: Any) -> tuple[list[str], list[str]]:
    """Names of weights that are not finite: in what this rank updates, and in its copies of the others."""
    copies = [
        name
        for name, parameter in engine.module.named_parameters()
        if not bool(torch.isfinite(getattr(parameter, "ds_tensor", parameter)).all())
    ]
    owned = [
        fragment.name
        for fragment in fragments.owned_fragments(engine)
        if not bool(torch.isfinite(fragment.view(fragment.flat)).all())
    ]
    return owned, copies
