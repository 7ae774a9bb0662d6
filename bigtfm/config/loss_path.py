"""Which way the loss over the vocabulary is computed: arithmetic, which the planner shares. No torch."""

from __future__ import annotations

from typing import Literal

LossPath = Literal["whole", "compiled", "chunked"]
# Of fp32 logits that a chunk holds: fewer make the output layer slow, whose gradient each chunk adds to. On a
# CPU more would leave its cache, on a GPU fewer leave it idle.
LOGITS_BYTES = 16 << 20
GPU_LOGITS_BYTES = 256 << 20
SHARE = 8  # a GPU's memory over what logits and their gradient may take of it


def loss_path(
    wanted: Literal["auto"] | LossPath, *, value_bytes: int, fp16: bool, logits: int, memory: int | None,
    compiles: bool = True,
) -> LossPath:  # fmt: skip
    """The wanted path, or with "auto" the fastest that fits.

    value_bytes: of a logit as the product makes it: 4, in 16 bits 2. logits: how many. memory: bytes of the
    GPU; None: a CPU. compiles: whether that GPU has what torch.compile needs.

    Compiled, neither fp32 logits nor log-probabilities are ever in memory, only the product's logits and
    their gradient. In chunks few of those are, but each adds to a gradient as large as the output layer:
    faster on a CPU in fp32 alone, whose cache holds a chunk. fp16 is never chunked: its gradients would be
    taken before the loss scale.
    """
    if wanted != "auto":
        return wanted
    if memory is None:
        return "chunked" if value_bytes == 4 else "whole"
    if 2 * value_bytes * logits > memory // SHARE and not fp16:
        return "chunked"
    return "compiled" if compiles else "whole"
