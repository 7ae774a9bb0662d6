"""What a plan and a search look like on a terminal, and the picture of a rank's memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bigtfm.plan.job import Planned
from bigtfm.planner.hardware import GIB
from bigtfm.planner.memory import CATEGORIES, plan_memory, size_text
from bigtfm.planner.search import Candidate

if TYPE_CHECKING:
    from rich.table import Table

BEST = 5  # candidates of a search that are shown


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
        ranks = min(target.ranks, target.gpus_per_node)
        places = {"host memory": memory.host, "files on NVMe": memory.nvme}
        rows["  offloaded"] = ", ".join(
            f"{size_text(size)} in {name} ({size_text(ranks * size)} a node)"
            for name, size in places.items()
            if size
        )
    parts = ", ".join(
        f"{name} {seconds / step.seconds:.0%}" for name, seconds in step.split.items() if seconds
    )
    rows["step"] = f"{_duration(step.seconds)}: {parts}"
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
        rows["run"] = f"{plan.steps:,} steps, {_count(plan.tokens or 0)} tokens: {_cost(plan, plan.hours)}"
    rows["a billion tokens"] = _cost(plan, plan.hours_per_billion)
    for number, line in enumerate(plan.unknown):
        rows["not known" if not number else " " * (number + 1)] = line
    return rows


def _cost(plan: Planned, hours: float) -> str:
    energy = plan.kilowatt_hours(hours)
    power = "" if energy is None else f", {energy:,.1f} kWh at full power"
    return (
        f"{hours:,.2f} h, {hours * plan.target.ranks:,.2f} {'GPU' if plan.target.device else 'rank'}-h{power}"
    )


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:,.1f} ms"
    return f"{seconds:,.2f} s" if seconds < 100 else f"{seconds:,.0f} s"


def _count(number: float) -> str:
    """As run configs have it: 21 G."""
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:,.0f}"


def advice(best: Candidate) -> str:
    """What to do about a job that does not fit; `best`: what a search has found to be the best."""
    if not best.fits:
        return "nothing that leaves the loss alone fits: take more GPUs, or larger ones"
    speed, size = f"{best.step.tokens_per_second:,.0f} tokens/s", size_text(best.memory.peak)
    return f"{best.label} fits: {size}, {speed}, the same loss; --search lists more, --write writes its JSON"


def render_candidates(candidates: Sequence[Candidate], stated: Planned) -> Table:
    """The best few of a search, and how much faster than what the files say."""
    from rich.table import Table

    fitting = sum(candidate.fits for candidate in candidates)
    table = Table(
        title=f"{fitting} of {len(candidates)} configurations fit; the fastest", title_justify="left"
    )
    caption = (
        ""
        if stated.step.rates.measured
        else "of estimated rates: what differs by little, --confirm tells apart"
    )
    table.caption, table.caption_justify = caption, "left"
    tried = any(candidate.measured for candidate in candidates)
    names = (
        "configuration",
        "tokens/s",
        *(["measured"] if tried else []),
        "against yours",
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
            f"{candidate.step.tokens_per_second / stated.step.tokens_per_second:.2f} x",
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
