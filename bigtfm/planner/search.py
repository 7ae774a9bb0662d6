"""The fastest configuration that fits, found without running one: every choice that leaves the loss alone.

The global batch stays, and so does everything of the recipe: what varies is the ZeRO stage, the micro batch
(with the accumulation that makes up for it), recomputation and offload.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bigtfm.config.deepspeed_rules import LAYER_WISE
from bigtfm.planner.memory import MemoryPlan, plan_memory
from bigtfm.planner.setting import Setting
from bigtfm.planner.step_time import Rates, StepPlan, plan_step

RECOMPUTE: tuple[str, ...] = ("none", "selective", "full")
OFFLOADS: tuple[dict[str, str], ...] = (
    {},
    {"offload_optimizer": "cpu"},
    {"offload_optimizer": "cpu", "offload_param": "cpu"},
)
MICRO_BATCHES = 12  # sizes that are tried


@dataclass(frozen=True)
class Candidate:
    """A configuration with what is expected of it."""

    setting: Setting
    memory: MemoryPlan
    step: StepPlan
    fits: bool
    measured: float | None = None  # tokens a second, in a trial

    @property
    def label(self) -> str:
        s = self.setting
        offload = [
            f"{what} on {s.offload(what)}" for what in ("optimizer", "param") if s.offload(what) != "none"
        ]
        recompute = [] if s.recompute == "none" else [f"recompute {s.recompute}"]
        batch = f"micro batch {s.micro_batch} x {s.accumulation}"
        return ", ".join([f"ZeRO {s.stage}", batch, *recompute, *offload])


def search_for(
    setting: Setting, rates: Rates, budget: int, gpus_per_node: int, *,
    compiled: bool = False, ramp: Sequence[int] = (),
) -> list[Candidate]:  # fmt: skip
    """All candidates, those that fit into `budget` bytes a rank first, the fastest of them first.

    compiled: blocks are; selective recomputation can't look into them. ramp: the batch's earlier sizes, which
    a layout has to make, too.
    """
    found = []
    for changed in _variants(setting, compiled, ramp):
        memory = plan_memory(changed)
        step = plan_step(changed, rates, gpus_per_node)
        found.append(Candidate(changed, memory, step, memory.peak <= budget))
    return sorted(found, key=lambda each: (not each.fits, each.step.seconds, each.memory.peak))


def _variants(setting: Setting, compiled: bool, ramp: Sequence[int]) -> Iterator[Setting]:
    share = setting.global_batch // setting.world_size
    sizes = micro_batches(math.gcd(setting.global_batch, *ramp) // setting.world_size)
    recomputes = [each for each in RECOMPUTE if not (compiled and each == "selective")]
    for stage, size, recompute, offload in itertools.product(range(4), sizes, recomputes, OFFLOADS):
        if not _makes_sense(setting, stage, offload):
            continue
        zero = {name: value for name, value in setting.zero.items() if not name.startswith("offload_")}
        zero |= {"stage": stage} | {name: {"device": device} for name, device in offload.items()}
        if stage:
            zero.setdefault("reduce_bucket_size", bucket_size(setting))
        yield replace(setting, zero=zero, micro_batch=size, accumulation=share // size, recompute=recompute)


def micro_batches(share: int) -> list[int]:
    """Sizes that divide a rank's share of the batch, from 1 to all of it; of many, some in even distances."""
    small = [size for size in range(1, math.isqrt(share) + 1) if share % size == 0]
    sizes = sorted({*small, *(share // size for size in small)})
    if len(sizes) <= MICRO_BATCHES:
        return sizes
    step = (len(sizes) - 1) / (MICRO_BATCHES - 1)
    return [sizes[round(number * step)] for number in range(MICRO_BATCHES)]


def _makes_sense(setting: Setting, stage: int, offload: dict[str, str]) -> bool:
    """What DeepSpeed allows, and what would do nothing."""
    if setting.on_cpu and offload:
        return False
    if setting.optimizer in LAYER_WISE and stage:
        return False
    if setting.optimizer == "Muon" and (stage or offload):
        return False
    if setting.stage and setting.zero.get("zero_hpz_partition_size", 1) > 1 and stage != 3:
        return False
    return not ("offload_param" in offload and stage < 3) and not (offload and stage == 0)


def bucket_size(setting: Setting) -> int:
    """Elements of a reduce bucket: the largest weight, or enough for a link; DeepSpeed's takes 1 GB."""
    largest = max(parameter.numel for parameter in setting.trained)
    total = sum(parameter.numel for parameter in setting.trained)
    return max(largest, min(total, 50_000_000))


def deepspeed_values(stated: dict[str, Any], candidate: Candidate) -> dict[str, Any]:
    """The user's DeepSpeed JSON with the candidate's choices, all else as it stands there.

    The accumulation follows from the number of ranks, unless the user states it.
    """
    s, stating = candidate.setting, "gradient_accumulation_steps"
    batch = {"train_batch_size": s.global_batch, "train_micro_batch_size_per_gpu": s.micro_batch}
    batch |= {stating: s.accumulation} if stating in stated else {}
    rest = {name: value for name, value in stated.items() if name not in (*batch, "zero_optimization")}
    return batch | rest | {"zero_optimization": dict(s.zero)}
