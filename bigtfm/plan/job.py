"""A job, planned: both files and a device become memory, time and cost; nothing is run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bigtfm.config.batch import GlobalBatch, global_batch
from bigtfm.config.deepspeed import DeepSpeedConfig, load_deepspeed_json
from bigtfm.config.problems import ConfigProblem
from bigtfm.config.run import RunConfig, load_run_config
from bigtfm.data.indexed import HEADER_NAME, TokenDataset
from bigtfm.data.special import special_ids
from bigtfm.data.tokenizer import load_tokenizer
from bigtfm.planner.hardware import GIB, Device, device_of, names_like
from bigtfm.planner.memory import MemoryPlan, plan_memory, size_text
from bigtfm.planner.search import Candidate, search_for
from bigtfm.planner.setting import Setting, setting_of
from bigtfm.planner.step_time import NVME_BANDWIDTH, Rates, StepPlan, plan_step, table_rates
from bigtfm.planner.throughput import flops_per_token

CONTEXT = 3 * GIB // 2  # of a GPU: CUDA's context, the libraries' workspaces, NCCL's buffers; assumed
PROCESS = GIB // 2  # of a CPU rank: the interpreter with torch and DeepSpeed
FRAGMENTATION = 0.05  # what an allocator holds beyond what is asked of it; assumed


@dataclass(frozen=True)
class Target:
    """Where the job is to run."""

    gpu: str  # --gpu
    device: Device | None  # None: a CPU
    ranks: int
    gpus_per_node: int
    budget: int  # bytes that a rank's tensors may take

    @property
    def name(self) -> str:
        """As Setting.device takes it."""
        return self.gpu if self.device else "cpu"


@dataclass(frozen=True)
class Planned:
    """A job, planned."""

    setting: Setting
    target: Target
    memory: MemoryPlan
    step: StepPlan
    batch: GlobalBatch
    compiled: bool  # blocks are
    steps: int | None  # of the run; None: neither file says
    hours: float | None  # of all of them; in a ramp-up of the batch they are shorter
    mfu: float | None  # None: a CPU
    unknown: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.target.budget

    @property
    def tokens(self) -> int | None:
        """Of the run, where every sequence is full."""
        return None if self.steps is None else self.batch.samples(self.steps) * self.setting.seq_len

    @property
    def hours_per_billion(self) -> float:
        """Of 10^9 tokens, in steps of the whole batch."""
        return 1e9 / self.step.tokens_per_second / 3600

    def kilowatt_hours(self, hours: float | None) -> float | None:
        """Of the GPUs at full power, without their hosts and cooling; None: not known."""
        if hours is None or self.target.device is None:
            return None
        return hours * self.target.ranks * self.target.device.power / 1000

    def candidates(self) -> list[Candidate]:
        """The configurations at the same loss, the fastest that fits first."""
        target, ramp = self.target, self.batch.sizes
        return search_for(
            self.setting, self.step.rates, target.budget, target.gpus_per_node,
            compiled=self.compiled, ramp=ramp,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """One JSON object. Bytes of one rank, seconds of one optimizer step."""
        s, hours, billion = self.setting, self.hours, self.hours_per_billion
        return {
            "gpu": self.target.gpu, "gpus": self.target.ranks, "gpus_per_node": self.target.gpus_per_node,
            "zero_stage": s.stage, "micro_batch": s.micro_batch, "accumulation": s.accumulation,
            "global_batch": s.global_batch, "seq_len": s.seq_len, "precision": s.precision,
            "recompute": s.recompute, "parameters": sum(p.numel for p in s.parameters),
            "fits": self.fits, "budget": self.target.budget, "memory": asdict(self.memory),
            "step_seconds": self.step.seconds, "split": self.step.split,
            "tokens_per_second": self.step.tokens_per_second, "mfu": self.mfu,
            "communication": asdict(self.step.communication) | {
                "sent": self.step.communication.sent,
                "between_nodes": self.step.communication.between_nodes(self.target.gpus_per_node),
            },
            "steps": self.steps, "tokens": self.tokens,
            "hours": hours, "gpu_hours": hours and hours * self.target.ranks,
            "kilowatt_hours": self.kilowatt_hours(hours),
            "gpu_hours_per_billion_tokens": billion * self.target.ranks,
            "kilowatt_hours_per_billion_tokens": self.kilowatt_hours(billion),
            "source": self.step.rates.source, "unknown": list(self.unknown),
        }  # fmt: skip


def plan(
    config: Path | None,
    deepspeed_json: Path,
    overrides: Sequence[str],
    *,
    gpus: int,
    gpu: str,
    gpus_per_node: int = 8,
    calibration: Path | None = None,
) -> tuple[Planned, DeepSpeedConfig]:
    """The whole plan of a job, in one place.

    calibration: a file with measured rates; None: the data sheet's, or of a CPU what is measured now.

    Raises:
        ConfigProblem: a file or value is wrong, --gpu is not known, or the vocabulary's size is not.
        DataProblem: the data set is damaged.
    """
    run, deepspeed = load_run_config(config, overrides), load_deepspeed_json(deepspeed_json)
    target = target_of(gpu, gpus, gpus_per_node)
    setting = setting_of(
        run,
        deepspeed,
        vocab_size=vocab_size_of(run),
        world_size=gpus,
        device=target.name,
        attention=_attention(run, target),
        runs=runs_of(run, deepspeed.solve_batch(gpus).micro_batch),
    )
    rates = rates_for(target, setting, calibration)
    batch = global_batch(run.batch, setting.global_batch, setting.micro_batch, gpus)
    return _planned(setting, target, rates, batch, _steps(run, deepspeed), run), deepspeed


def _planned(
    setting: Setting, target: Target, rates: Rates, batch: GlobalBatch, steps: int | None, run: RunConfig
) -> Planned:
    """What a setting comes to there."""
    memory, step = plan_memory(setting), plan_step(setting, rates, target.gpus_per_node)
    peak = target.device.peak(setting.precision) if target.device else None
    flops = flops_per_token(
        setting.model, setting.vocab_size, setting.seq_len, setting.objective, setting.tune
    )
    mfu = step.tokens_per_second * flops / (peak * target.ranks) if peak else None
    unknown = tuple(_unknown(setting, target, step, steps, run))
    once, seconds = setting.micro_batch * setting.world_size, 0.0
    for size, count in batch.parts(steps or 0):
        each = replace(setting, accumulation=size // once)
        seconds += count * plan_step(each, rates, target.gpus_per_node).seconds
    hours, compiled = seconds / 3600 if steps else None, run.compute.compile_blocks
    return Planned(setting, target, memory, step, batch, compiled, steps, hours, mfu, unknown)


def target_of(gpu: str, gpus: int, gpus_per_node: int) -> Target:
    """The device by its name, and what its tensors may take.

    Raises:
        ConfigProblem: it is not in the table.
    """
    if gpu == "cpu":
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        share = total // min(gpus, gpus_per_node) - PROCESS
        return Target(gpu, None, gpus, gpus_per_node, int(share / (1 + FRAGMENTATION)))
    device = device_of(gpu)
    if device is None:
        raise ConfigProblem(f"no GPU '{gpu}' in the table", where="command line: --gpu", fix=names_like(gpu))
    budget = int((device.memory - CONTEXT) / (1 + FRAGMENTATION))
    return Target(gpu, device, gpus, gpus_per_node, budget)


def vocab_size_of(run: RunConfig) -> int:
    """Tokens that the model knows: from the data set where it is prepared, else model.vocab_size."""
    path = Path(run.data.paths[0])
    if (path / HEADER_NAME).is_file():
        return special_ids(load_tokenizer(TokenDataset.open(path).tokenizer_path), run).vocab_size
    if run.model.vocab_size is None:
        raise ConfigProblem(
            f"the size of the vocabulary is not known: {path} holds no prepared data set",
            where="run config: data.path",
            fix="prepare it, or state the size, e.g. model.vocab_size=50257",
        )
    return run.model.vocab_size


def runs_of(run: RunConfig, micro_batch: int) -> int:
    """Runs of documents of equal length in a micro batch; 1: none holds the end of a document."""
    path = Path(run.data.paths[0])
    if not (path / HEADER_NAME).is_file():
        return 2
    train = TokenDataset.open(path).header.splits["train"]
    per_document = train.tokens / max(train.documents, 1)
    return 1 if train.documents <= 1 else round(1 + micro_batch * run.seq_len / per_document + 1)


def rates_for(target: Target, setting: Setting, calibration: Path | None) -> Rates:
    """Measured rates where there are some, else the table's.

    Raises:
        ConfigProblem: the file holds none, or other hardware's, or the GPU has no unit for this precision.
    """
    measured = None if calibration is None else Rates.read(calibration)
    if measured is not None:
        measured.suit(target.name, setting.precision)
    if target.device is None:
        rates = _cpu_rates(setting.precision, min(target.ranks, target.gpus_per_node))
    else:
        estimated = table_rates(target.device, setting.precision)
        if estimated is None:
            raise ConfigProblem(
                f"{target.gpu} has no units for {setting.precision}",
                where="command line: --gpu",
                fix="use an fp16 or fp32 JSON, for example ds_configs/zero2_fp16.json",
            )
        rates = estimated
    return rates if measured is None else measured.completed(rates)


def _cpu_rates(precision: str, ranks: int) -> Rates:
    """A product and a copy, measured on this CPU in a quarter of a second, shared by the ranks."""
    import time

    import torch

    from bigtfm.planner.throughput import peak_flops

    peak = peak_flops("cpu", precision)
    assert peak is not None
    a = torch.ones(16 * 2**20)
    began, copies = time.perf_counter(), 4
    for _ in range(copies):
        a.clone()
    traffic = (time.perf_counter() - began) / (copies * 8 * a.numel())
    product = ranks / peak.flops
    return Rates(
        products=product / 0.8, attention=product / 0.3, traffic=ranks * traffic, logits=5e-9 * ranks,
        operations=20e-6, gathered=1e-3,
        update=ranks * traffic, tensors=30e-6, sent=ranks * 4 * traffic, between_nodes=0.0, calls=1e-3,
        moved=0.0, swapped=1 / NVME_BANDWIDTH, steps=1e-3,
        source=f"{peak.source}, and a copy; all else is assumed", device="cpu", precision=precision, ranks=0,
    )  # fmt: skip


def _attention(run: RunConfig, target: Target) -> str:
    if run.compute.attention != "auto":
        return run.compute.attention
    if run.model.attention_dropout:
        return "reference"
    return "sdpa" if target.device is None or run.model.positions == "relative" else "varlen"


def _steps(run: RunConfig, deepspeed: DeepSpeedConfig) -> int | None:
    if run.run.steps is None and deepspeed.horizon is None:
        return None
    return deepspeed.steps_of(run.run.steps)


def _unknown(
    setting: Setting, target: Target, step: StepPlan, steps: int | None, run: RunConfig
) -> list[str]:
    """What this plan does not know."""
    found = []
    rates = step.rates
    if not rates.measured:
        found.append(f"time: no calibration for {target.gpu}: {rates.source}")
    elif rates.ranks != target.ranks:
        found.append(f"time: rates of {rates.ranks} ranks, which may share less than {target.ranks} do")
    if setting.offload("optimizer") != "none" or setting.offload("param") != "none":
        on_disk = "nvme" in (setting.offload("optimizer"), setting.offload("param"))
        disks = f", {NVME_BANDWIDTH / 1e9:g} GB/s of a node's disks are assumed" if on_disk else ""
        found.append(f"offload: whether the host has that memory or space{disks}")
    if target.device is not None:
        found.append("memory: the arithmetic is checked against torch on CPUs, not on this GPU")
        found.append(
            f"memory: {size_text(CONTEXT)} for CUDA and NCCL, {FRAGMENTATION:.0%} for fragmentation: assumed"
        )
        if setting.attention == "varlen":
            found.append("attention: a fused kernel is assumed; `bigtfm check` on the machine names it")
        if target.ranks > target.gpus_per_node:
            rate = target.device.network * 8 / 1e9
            found.append(f"network: {rate:g} Gbit/s for each GPU between nodes is assumed")
    elif target.ranks > target.gpus_per_node:
        found.append("network: how fast it is between nodes; the plan takes it for no slower than memory")
    if run.compute.compile_blocks:
        found.append("compile_blocks: compiled blocks keep less and are faster; by how much is not known")
    if run.compute.fp8 != "none":
        found.append("fp8: products in 8 bits are faster and keep less; by how much is not known")
    if run.distill.teacher is not None:
        found.append("distill: the teacher's memory and time are left out")
    if steps is None:
        found.append("hours: neither run.steps nor a scheduler says how many steps")
    else:
        found.append("hours: without evaluations, checkpoints and interruptions")
    return found
