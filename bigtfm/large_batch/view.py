"""What `bigtfm noise-scale` shows: a verdict in sentences, what each batch costs, and a picture."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigtfm.large_batch.command import Measured, Report

if TYPE_CHECKING:
    from rich.table import Table

_BAND, _STEPS, _EXAMPLES, _OWN = "#d9dee5", "#2f6db0", "#e08e2b", "#444444"
SPAN = 32  # times the noise scale, up and down, that batches are shown for


def to_json(report: Report) -> dict[str, Any]:
    """One JSON object; samples are sequences, and an infinite number of them is null."""
    return {
        "run": report.run,
        "micro_batch": report.micro_batch,
        "micro_batches": report.micro_batches,
        "checkpoints": [
            {
                "step": each.step,
                "loss": each.loss,
                "batch": each.batch,
                "tokens_per_sample": each.tokens_per_sample,
                "noise_scale": {name: _finite(value) for name, value in asdict(each.scale).items()},
                "noise_scale_tokens": _finite(each.scale.samples * each.tokens_per_sample),
                "batches": [
                    {"batch": size, "steps": each.scale.steps(size), "examples": each.scale.examples(size)}
                    for size in sizes(each)
                ],
                "verdict": verdict(each),
            }
            for each in report.measured
        ],
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def sizes(measured: Measured) -> list[int]:
    """Batches to show: the run's own, or else the scale's, times powers of two, not too far from either."""
    scale = measured.scale.samples
    if not 0 < scale < math.inf:
        return []
    own = measured.batch or max(1, round(scale))
    low, high = min(own, scale / SPAN), max(own, scale * SPAN)
    found = {own * 2**power for power in range(40)} | {own // 2**power for power in range(own.bit_length())}
    return sorted(size for size in found if low <= size <= high)


def verdict(measured: Measured) -> str:
    """Where the run's batch stands, and what another would bring."""
    scale, own = measured.scale, measured.batch
    if scale.samples == math.inf:
        return (
            "The gradient is not told from its noise: the noise scale is likely above "
            f"{_count(scale.low)} sequences. More --batches tell more."
        )
    if scale.samples == 0:
        return "No noise is seen: the sequences have the same gradient, and a batch of 1 suffices."
    tokens = scale.samples * measured.tokens_per_sample
    said = (
        f"The noise scale is {_count(scale.samples)} sequences ({_count(scale.low)} to "
        f"{_count(scale.high)}), {_count(tokens)} predicted tokens."
    )
    if own is None:
        return said
    said += (
        f" Batches of {own:,} take {scale.steps(own):.2f} times the fewest steps and "
        f"{scale.examples(own):.2f} times the fewest sequences. "
    )
    twice, half = 2 * own, own / 2
    if own < scale.samples:
        fewer = 1 - scale.steps(twice) / scale.steps(own)
        more = scale.examples(twice) / scale.examples(own) - 1
        return said + f"Twice the batch would save {fewer:.0%} of the steps for {more:.0%} more sequences."
    more = scale.steps(half) / scale.steps(own) - 1
    fewer = 1 - scale.examples(half) / scale.examples(own)
    return said + f"Half the batch would save {fewer:.0%} of the sequences for {more:.0%} more steps."


def _count(number: float) -> str:
    """Three digits that mean something: 12.3, 1,230, 12 k, 4.5 M."""
    if not math.isfinite(number):
        return "any number of"
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e4, " k")):
        if number >= size:
            return f"{number / (1e3 if size == 1e4 else size):,.3g}{unit}"
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def render(measured: Measured) -> Table:
    """What each batch costs, against the fewest and against the run's own."""
    from rich.table import Table

    scale, own = measured.scale, measured.batch
    table = Table(title=f"after step {measured.step:,}, loss {measured.loss:.3f}", title_justify="left")
    for name in ("batch", "tokens", "steps", "sequences", *(("steps", "sequences") if own else ())):
        table.add_column(name, justify="right")
    note = ["", "", "x fewest", "x fewest", *(["x the run's"] * 2 if own else [])]
    table.add_row(*note, style="dim")
    for size in sizes(measured):
        factors = [scale.steps(size), scale.examples(size)]
        factors += (
            [scale.steps(size) / scale.steps(own), scale.examples(size) / scale.examples(own)] if own else []
        )
        cells = [f"{size:,}", _count(size * measured.tokens_per_sample), *(f"{each:.2f}" for each in factors)]
        table.add_row(*cells, style="bold" if size == own else None)
    return table


def draw(report: Report, path: Path) -> None:
    """Left what each batch costs after the last checkpoint; right, of several, how the noise scale grew."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    several = len(report.measured) > 1
    figure = Figure(figsize=(11 if several else 6.5, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(1, 1 + several, squeeze=False).flat)
    for axes in panels:
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    _costs(panels[0], report.measured[-1])
    if several:
        _growth(panels[1], report)
    figure.savefig(path, dpi=120)


def _costs(axes: Any, measured: Measured) -> None:
    scale, shown = measured.scale, sizes(measured)
    axes.set(title=f"after step {measured.step:,}", xlabel="batch, sequences", ylabel="times the fewest")
    if not shown:
        axes.text(0.5, 0.5, "not measurable with so few micro-batches", ha="center", transform=axes.transAxes)
        return
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.axvspan(
        max(scale.low, shown[0] / 4), min(scale.high, 4 * shown[-1]), color=_BAND, label="noise scale, 95 %"
    )
    axes.plot(shown, [scale.steps(size) for size in shown], "o-", color=_STEPS, ms=4, label="steps")
    axes.plot(shown, [scale.examples(size) for size in shown], "o-", color=_EXAMPLES, ms=4, label="sequences")
    if measured.batch:
        axes.axvline(measured.batch, color=_OWN, linestyle="--", linewidth=1, label="the run's batch")
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.legend(fontsize=8, loc="upper center")


def _growth(axes: Any, report: Report) -> None:
    found = [each for each in report.measured if 0 < each.scale.samples < math.inf]
    steps, values = [each.step for each in found], [each.scale.samples for each in found]
    highest = 4 * max(values, default=1.0)
    below = [each.scale.samples - each.scale.low for each in found]
    above = [min(each.scale.high, highest) - each.scale.samples for each in found]
    axes.errorbar(steps, values, [below, above], fmt="o-", color=_STEPS, capsize=3, ms=4, label="noise scale")
    batches = [(each.step, each.batch) for each in report.measured if each.batch]
    if batches:
        axes.plot(*zip(*batches, strict=True), "--", color=_OWN, linewidth=1, label="the run's batch")
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.set(title="over the training", xlabel="step", ylabel="sequences")
    axes.legend(fontsize=8)
