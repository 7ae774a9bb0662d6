"""`bigtfm plan`: whether a job fits, how long a step takes, what the run costs; nothing is run."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigtfm.config.deepspeed import DeepSpeedConfig, load_deepspeed_json
from bigtfm.config.problems import ConfigProblem, did_you_mean
from bigtfm.config.run import RunConfig, load_run_config
from bigtfm.data.indexed import HEADER_NAME, TokenDataset
from bigtfm.data.special import special_ids
from bigtfm.data.tokenizer import load_tokenizer
from bigtfm.planner.hardware import GIB, NAMES, Device, device_of
from bigtfm.planner.memory import CATEGORIES, MemoryPlan, plan_memory, size_text
from bigtfm.planner.search import Candidate, deepspeed_values, search
from bigtfm.planner.setting import Setting, setting_of
from bigtfm.planner.step_time import Rates, StepPlan, plan_step, table_rates
from bigtfm.planner.throughput import flops_per_token

if TYPE_CHECKING:
    from rich.table import Table

CONTEXT = 3 * GIB // 2  # of a GPU: CUDA's context, the libraries' workspaces, NCCL's buffers; assumed
PROCESS = GIB // 2  # of a CPU rank: the interpreter with torch and DeepSpeed
FRAGMENTATION = 0.05  # what an allocator holds beyond what is asked of it; assumed
BEST = 5  # candidates of a search that are shown


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
    steps: int | None  # of the run; None: neither file says
    mfu: float | None  # None: a CPU
    unknown: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.target.budget

    @property
    def hours(self) -> float | None:
        return self.steps * self.step.seconds / 3600 if self.steps else None

    @property
    def kilowatt_hours(self) -> float | None:
        """Of the GPUs at full power, without their hosts and cooling; None: not known."""
        if self.hours is None or self.target.device is None:
            return None
        return self.hours * self.target.ranks * self.target.device.power / 1000

    def to_dict(self) -> dict[str, Any]:
        """One JSON object. Bytes of one rank, seconds of one optimizer step."""
        s, hours = self.setting, self.hours
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
            "steps": self.steps, "hours": hours, "gpu_hours": hours and hours * self.target.ranks,
            "kilowatt_hours": self.kilowatt_hours, "source": self.step.source,
            "unknown": list(self.unknown),
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
) -> tuple[Planned, Rates, DeepSpeedConfig]:
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
    return (
        planned(setting, target, rates, _steps(run, deepspeed), run.compute.compile_blocks),
        rates,
        deepspeed,
    )


def show(
    config: Path | None,
    deepspeed_json: Path,
    overrides: Sequence[str],
    *,
    gpus: int,
    gpu: str,
    gpus_per_node: int,
    search: bool = False,
    write: Path | None = None,
    confirm: int = 0,
    calibration: Path | None = None,
    calibrate: Path | None = None,
    picture: Path | None = None,
    as_json: bool = False,
) -> bool:
    """The command: prints the plan, or what a search finds, and says whether it fits.

    Raises:
        ConfigProblem: as `plan`; or options don't go together.
    """
    from rich.console import Console

    _options_fit(search, write, confirm, calibration, calibrate)
    console = Console(stderr=as_json)
    if calibrate is not None:
        from bigtfm.bench.calibrate import calibrate as measure

        calibration = measure(
            calibrate, min(gpus, gpus_per_node), load_deepspeed_json(deepspeed_json).precision
        )
    stated, rates, deepspeed = plan(
        config, deepspeed_json, overrides, gpus=gpus, gpu=gpu, gpus_per_node=gpus_per_node,
        calibration=calibration,
    )  # fmt: skip
    if picture is not None:
        draw(stated, picture)
    said, fits = stated.to_dict(), stated.fits
    if not as_json:
        console.print(render(stated))
    if search:
        candidates = find(stated, rates)
        fits = candidates[0].fits
        if confirm and fits:
            from bigtfm.bench.confirm import confirmed

            data = load_run_config(config, overrides).data.paths[0]
            candidates = confirmed(candidates, confirm, config, deepspeed_json, overrides, data)
        if not as_json:
            console.print(render_candidates(candidates, stated))
        said["found"] = [found_dict(candidate) for candidate in candidates[:BEST] if candidate.fits]
        if write is not None and fits:
            write_json(deepspeed, candidates[0], write)
            recompute = candidates[0].setting.recompute
            console.print(f"wrote {write}; train with it and compute.recompute={recompute}", highlight=False)
    if as_json:
        print(json.dumps(said))
    return fits


def _options_fit(
    search: bool, write: Path | None, confirm: int, calibration: Path | None, calibrate: Path | None
) -> None:
    if not search and (write is not None or confirm):
        option = "--write" if write is not None else "--confirm"
        raise ConfigProblem(f"{option} is for what a search finds", where="command line", fix="add --search")
    if calibration is not None and calibrate is not None:
        fix = "leave one of them out"
        raise ConfigProblem("--calibration and --calibrate both say the rates", where="command line", fix=fix)


def found_dict(candidate: Candidate) -> dict[str, Any]:
    """A candidate as JSON has it."""
    s = candidate.setting
    return {
        "label": candidate.label, "zero_stage": s.stage, "micro_batch": s.micro_batch,
        "accumulation": s.accumulation, "recompute": s.recompute, "zero_optimization": dict(s.zero),
        "step_seconds": candidate.step.seconds, "tokens_per_second": candidate.step.tokens_per_second,
        "measured": candidate.measured,
        "memory": asdict(candidate.memory),
    }  # fmt: skip


def planned(
    setting: Setting, target: Target, rates: Rates, steps: int | None, compiled: bool = False
) -> Planned:
    """What a setting comes to there."""
    memory, step = plan_memory(setting), plan_step(setting, rates, target.gpus_per_node)
    peak = target.device.peak(setting.precision) if target.device else None
    flops = flops_per_token(setting.model, setting.vocab_size, setting.seq_len, setting.objective)
    mfu = step.tokens_per_second * flops / (peak * target.ranks) if peak else None
    unknown = tuple(_unknown(setting, target, step, steps, compiled))
    return Planned(setting, target, memory, step, steps, mfu, unknown)


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
        raise ConfigProblem(
            f"no GPU '{gpu}' in the table", where="command line: --gpu", fix=did_you_mean(gpu, NAMES)
        )
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
        ConfigProblem: the file holds none, or the GPU has no unit for this precision.
    """
    if calibration is not None:
        return Rates.read(calibration)
    if target.device is None:
        return _cpu_rates(setting.precision, min(target.ranks, target.gpus_per_node))
    rates = table_rates(target.device, setting.precision)
    if rates is None:
        raise ConfigProblem(
            f"{target.gpu} has no units for {setting.precision}",
            where="command line: --gpu",
            fix="use an fp16 or fp32 JSON, for example ds_configs/zero2_fp16.json",
        )
    return rates


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
        products=product / 0.8, attention=product / 0.3, traffic=ranks * traffic, operations=20e-6,
        update=ranks * traffic, tensors=30e-6, sent=ranks * 4 * traffic, between_nodes=0.0, calls=1e-3,
        moved=0.0, steps=1e-3,
        source=f"{peak.source}, and a copy; all else is assumed", measured=False,
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
    setting: Setting, target: Target, step: StepPlan, steps: int | None, compiled: bool
) -> list[str]:
    """What this plan does not know."""
    found = []
    if not step.measured:
        found.append(f"time: no calibration for {target.gpu}: {step.source}")
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
    if compiled:
        found.append("compile_blocks: compiled blocks keep less and are faster; by how much is not known")
    if steps is None:
        found.append("hours: neither run.steps nor a scheduler says how many steps")
    else:
        found.append("hours: without evaluations, checkpoints and interruptions")
    return found


def find(start: Planned, rates: Rates, compiled: bool = False) -> list[Candidate]:
    """The candidates for the same job, the best first."""
    return search(start.setting, rates, start.target.budget, start.target.gpus_per_node, compiled=compiled)


def write_json(deepspeed: DeepSpeedConfig, candidate: Candidate, path: Path) -> None:
    """The user's DeepSpeed JSON with the candidate's choices.

    Raises:
        ConfigProblem: the file is there already, or what was found is no valid JSON for DeepSpeed.
    """
    if path.exists():
        raise ConfigProblem("is there already", where=str(path), fix="name another file, or remove it")
    path.write_text(json.dumps(deepspeed_values(deepspeed.values, candidate), indent=2) + "\n", "utf-8")
    load_deepspeed_json(path)


def render(plan: Planned) -> Table:
    """For reading, as a table that rich can print."""
    from rich.table import Table

    table = Table(show_header=False, box=None)
    for name, value in _rows(plan).items():
        table.add_row(name, value)
    return table


def _rows(plan: Planned) -> dict[str, str]:
    s, memory, step, target = plan.setting, plan.memory, plan.step, plan.target
    offload = [f"{what} on {s.offload(what)}" for what in ("optimizer", "param") if s.offload(what) != "none"]
    budget = size_text(target.budget)
    verdict = f"fits into {budget}" if plan.fits else f"does NOT fit into {budget}"
    rows = {
        "job": f"{sum(p.numel for p in s.parameters):,} parameters, {s.precision}, "
        + ", ".join([f"ZeRO {s.stage}", *offload, f"recompute {s.recompute}"]),
        "batch": f"{s.global_batch:,} sequences of {s.seq_len:,} = {s.micro_batch} micro batch x "
        f"{s.accumulation} accumulation x {s.world_size} ranks",
        "on": f"{target.ranks} x {target.gpu}",
        "memory of a rank": f"{size_text(memory.peak)}: {verdict}; most in the {memory.moment}",
    }
    for name in CATEGORIES:
        if size := getattr(memory, name):
            rows[f"  {name}"] = f"{size_text(size)}  {size / memory.peak:.1%}"
    if memory.host or memory.nvme:
        rows["  offloaded"] = f"{size_text(memory.host)} in host memory, {size_text(memory.nvme)} on NVMe"
    parts = ", ".join(
        f"{name} {seconds / step.seconds:.0%}" for name, seconds in step.split.items() if seconds
    )
    rows["step"] = f"{step.seconds:.3g} s: {parts}"
    mfu = f", MFU {plan.mfu:.1%}" if plan.mfu else ""
    rows["speed"] = f"{step.tokens_per_second:,.0f} tokens/s{mfu}"
    sent = step.communication
    kinds = {
        "all-reduce": sent.all_reduce,
        "all-gather": sent.all_gather,
        "reduce-scatter": sent.reduce_scatter,
    }
    if sent.sent:
        said = ", ".join(f"{kind} {size_text(size)}" for kind, size in kinds.items() if size)
        between = sent.between_nodes(target.gpus_per_node)
        rows["sent by a rank"] = f"{size_text(sent.sent)} a step: {said}" + (
            f"; {size_text(between)} of it through its network card" if between else ""
        )
    if plan.hours is not None:
        energy = f", {plan.kilowatt_hours:,.0f} kWh at full power" if plan.kilowatt_hours else ""
        rows["run"] = (
            f"{plan.steps:,} steps: {plan.hours:,.1f} h, {plan.hours * target.ranks:,.1f} GPU-h{energy}"
        )
    for number, line in enumerate(plan.unknown):
        rows["not known" if not number else " " * (number + 1)] = line
    return rows


def render_candidates(candidates: Sequence[Candidate], stated: Planned) -> Table:
    """The best few of a search, and how much faster than what the files say."""
    from rich.table import Table

    fitting = sum(candidate.fits for candidate in candidates)
    table = Table(
        title=f"{fitting} of {len(candidates)} configurations fit; the fastest", title_justify="left"
    )
    tried = any(candidate.measured for candidate in candidates)
    names = (
        "configuration",
        "tokens/s",
        *(["measured"] if tried else []),
        "of the stated",
        "a rank's memory",
    )
    for name in names:
        table.add_column(name, justify="left" if name == "configuration" else "right")
    for candidate in [each for each in candidates if each.fits][:BEST]:
        measured = f"{candidate.measured:,.0f}" if candidate.measured else "not tried"
        table.add_row(
            candidate.label,
            f"{candidate.step.tokens_per_second:,.0f}",
            *([measured] if tried else []),
            f"{candidate.step.tokens_per_second / stated.step.tokens_per_second:.2f}",
            size_text(candidate.memory.peak),
        )
    return table


def draw(plan: Planned, path: Path) -> None:
    """The memory of a rank at its largest moment, at every ZeRO stage, against what the device has."""
    from dataclasses import replace

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bars = {}
    for stage in range(4):
        zero = dict(plan.setting.zero) | {"stage": stage}
        bars[f"ZeRO {stage}"] = plan_memory(replace(plan.setting, zero=zero))
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes, below = figure.subplots(), [0.0] * len(bars)
    for name in CATEGORIES:
        heights = [getattr(memory, name) / GIB for memory in bars.values()]
        axes.bar(list(bars), heights, bottom=below, label=name, width=0.6)
        below = [low + height for low, height in zip(below, heights, strict=True)]
    if max(below) > 0.2 * plan.target.budget / GIB:
        axes.axhline(plan.target.budget / GIB, color="black", linestyle="--", label="may take")
    s = plan.setting
    axes.set_ylabel("GiB of a rank")
    axes.margins(y=0.08)
    axes.set_title(
        f"{sum(p.numel for p in s.parameters):,} parameters, {s.precision}, micro batch {s.micro_batch} x "
        f"{s.seq_len}, recompute {s.recompute}, {plan.target.ranks} x {plan.target.gpu}; now ZeRO {s.stage}",
        fontsize=9,
    )
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=120)
