"""What of a run its memory and time depend on."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from bigtfm.config.deepspeed import DeepSpeedConfig, acting_stage
from bigtfm.config.loss_path import LossPath, loss_path
from bigtfm.config.run import RunConfig
from bigtfm.config.sections import ModelSection, ObjectiveSection, TuneSection
from bigtfm.planner.activations import Batch, Shapes, batch_of
from bigtfm.planner.hardware import device_of
from bigtfm.planner.parameters import Parameter, parameters_of

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Setting:
    """One configuration on a number of ranks. Sizes in elements, tokens and sequences, as both files say."""

    model: ModelSection
    objective: ObjectiveSection
    vocab_size: int
    seq_len: int
    micro_batch: int
    accumulation: int
    world_size: int
    precision: Literal["fp32", "bf16", "fp16"]
    grad_accum_dtype: str
    optimizer: str
    torch_adam: bool
    clips: bool
    zero: Mapping[str, Any]  # the section zero_optimization, without "auto"
    recompute: str | int
    attention: str  # the backend's name
    device: str  # "cpu", or a GPU's name
    runs: int = 2  # of documents of equal length in a micro batch, at most
    loss: Literal["auto"] | LossPath = "auto"  # as compute.loss
    tune: TuneSection = field(default_factory=TuneSection)

    @property
    def on_cpu(self) -> bool:
        return self.device == "cpu"

    @property
    def stage(self) -> int:
        kind, precision, ranks = self.optimizer, self.precision, self.world_size
        return acting_stage(self.zero, optimizer=kind, precision=precision, world_size=ranks)

    @property
    def value_bytes(self) -> int:
        """Bytes of a weight that the model computes with, and of its gradient."""
        return BYTES[self.precision]

    @property
    def global_batch(self) -> int:
        return self.micro_batch * self.accumulation * self.world_size

    @property
    def tokens_per_step(self) -> int:
        """Of all ranks, where every sequence is full."""
        return self.global_batch * self.seq_len

    @cached_property
    def parameters(self) -> list[Parameter]:
        return parameters_of(self.model, self.vocab_size, self.objective.kind, self.tune)

    @cached_property
    def trained(self) -> list[Parameter]:
        """Those that learn; the others are weights in the model's precision, and nothing else."""
        return [parameter for parameter in self.parameters if self.tune.learns(parameter.name)]

    @cached_property
    def shapes(self) -> Shapes:
        grouped = self.attention == "reference" or self.attention.startswith("sdpa")
        device = device_of(self.device)
        path = loss_path(
            self.loss,
            value_bytes=self.value_bytes,
            fp16=self.precision == "fp16",
            logits=self.batch.labelled * self.vocab_size,
            memory=None if self.on_cpu else device.memory if device else sys.maxsize,
        )
        return Shapes(
            self.model,
            self.vocab_size,
            self.value_bytes,
            self.on_cpu,
            grouped,
            self.recompute,
            self.objective,
            path,
            self.tune,
        )

    @cached_property
    def batch(self) -> Batch:
        """A micro batch of one rank."""
        tokens = self.micro_batch * self.seq_len
        return batch_of(self.model, self.objective, tokens, self.seq_len, self.runs)

    def offload(self, what: str) -> str:
        """Where `what` ("optimizer" or "param") is offloaded to: none, cpu or nvme."""
        return str((self.zero.get(f"offload_{what}") or {}).get("device", "none"))


def setting_of(
    run: RunConfig,
    deepspeed: DeepSpeedConfig,
    *,
    vocab_size: int,
    world_size: int,
    device: str,
    attention: str,
    runs: int = 2,
) -> Setting:
    """Both files on `world_size` ranks.

    Raises:
        ConfigProblem: the batch has no solution on so many ranks.
    """
    batch = deepspeed.solve_batch(world_size)
    zero = deepspeed.resolved(run.model, 1).get("zero_optimization", {})
    return Setting(
        model=run.model,
        objective=run.objective,
        vocab_size=vocab_size,
        seq_len=run.seq_len,
        micro_batch=batch.micro_batch,
        accumulation=batch.accumulation,
        world_size=world_size,
        precision=deepspeed.precision,
        grad_accum_dtype=deepspeed.grad_accum_dtype,
        optimizer=deepspeed.optimizer_type,
        torch_adam=bool(deepspeed.optimizer_params.get("torch_adam")) or device == "cpu",
        clips=deepspeed.clipping > 0,
        zero=zero,
        recompute=run.compute.recompute,
        attention=attention,
        device=device,
        runs=runs,
        loss=run.compute.loss,
        tune=run.tune,
    )
