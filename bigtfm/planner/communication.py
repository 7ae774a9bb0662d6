"""What a rank sends in an optimizer step, by ZeRO stage and link.

A ring's all-reduce sends 2 (n - 1) / n of the tensor from each rank, its all-gather and reduce-scatter half
of that (Patarasuk and Yuan 2009). Rajbhandari et al. 2020, section 7: 2 parameters a step at stages 0 to 2,
3 at stage 3. DeepSpeed 0.19.8 differs: stages 1 and 2 all-reduce (use_multi_rank_bucket_allreduce) and gather
the updated weights besides; stages 2 and 3 reduce in every micro batch; stage 3 gathers a second time, for
the backward, only what did not stay (stage3_max_reuse_distance).
"""

from __future__ import annotations

from dataclasses import dataclass

from bigtfm.config.deepspeed import reduce_bucket
from bigtfm.planner.setting import Setting

REUSE_DISTANCE = 1_000_000_000  # elements; DeepSpeed's default, as the next
PREFETCH_BUCKET = 50_000_000


@dataclass(frozen=True)
class CommunicationPlan:
    """Bytes that one rank sends in an optimizer step, and the calls that it makes."""

    all_reduce: int
    all_gather: int
    reduce_scatter: int
    calls: int
    nodes: int

    @property
    def sent(self) -> int:
        return self.all_reduce + self.all_gather + self.reduce_scatter

    def between_nodes(self, gpus_per_node: int) -> int:
        """Bytes through one GPU's network card.

        A ring over all ranks crosses from node to node once for each node, and a node's GPUs lead one ring
        each: what crosses is shared among their cards.
        """
        return 0 if self.nodes == 1 else round(self.sent / gpus_per_node)


def plan_communication(setting: Setting, gpus_per_node: int) -> CommunicationPlan:
    """The collectives of one optimizer step."""
    ranks, size, accumulation = setting.world_size, setting.value_bytes, setting.accumulation
    count, trained = (sum(p.numel for p in found) for found in (setting.parameters, setting.trained))
    nodes = -(-ranks // gpus_per_node)
    if ranks == 1:
        return CommunicationPlan(0, 0, 0, 0, 1)
    tensors, share = len(setting.parameters), size * (ranks - 1) / ranks
    gathered, once = count * share, trained * share
    buckets = -(-trained // reduce_bucket(setting.zero, trained))
    if setting.stage == 0:
        return CommunicationPlan(round(2 * once), 0, 0, buckets, nodes)
    if setting.stage < 3:
        reductions = accumulation if setting.stage == 2 else 1
        return CommunicationPlan(
            round(2 * once * reductions), round(once), 0, reductions * buckets + 2, nodes
        )
    prefetched = int(setting.zero.get("stage3_prefetch_bucket_size", PREFETCH_BUCKET))
    stays = int(setting.zero.get("stage3_max_reuse_distance", REUSE_DISTANCE)) // 2
    again = max(0.0, 1 - stays / count)
    gathers = 1 + (min(tensors, count // prefetched) if prefetched else tensors)
    calls = accumulation * round(gathers * (1 + again) + buckets) + 1
    return CommunicationPlan(
        0, round(gathered * accumulation * (1 + again)), round(once * accumulation), calls, nodes
    )
