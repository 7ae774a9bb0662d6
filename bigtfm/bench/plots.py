"""The pictures of a report. Each function draws one, or says that there is nothing to draw."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bigtfm.bench.clock import SPLIT
from bigtfm.bench.results import Result, write_whole
from bigtfm.bench.views import fronts, scalings
from bigtfm.planner.memory import CATEGORIES

_BAR, _FAILED, _GRID = "#2f6db0", "#b03a2e", "#dddddd"
_COLOURS = ("#2f6db0", "#e08e2b", "#4a9a5b", "#b5485d", "#7a5fa8", "#8c6b4f", "#9a9a9a")
_GIB = 2**30
MOST_BARS = 150  # of a picture; the tables hold all


def draw_all(results: Sequence[Result], folder: Path) -> list[Path]:
    """Writes throughput.png, split.png, memory.png, scaling.png and pareto.png, those that show something."""
    pictures: dict[str, Callable[[Sequence[Result]], Any]] = {
        "throughput": throughput,
        "split": split,
        "memory": memory,
        "scaling": scaling,
        "pareto": pareto,
    }
    paths = []
    for name, draw in pictures.items():
        path = folder / f"{name}.png"
        path.unlink(missing_ok=True)
        figure = draw(results)
        if figure is not None:
            _save(figure, path)
            paths.append(path)
    return paths


def throughput(results: Sequence[Result]) -> Any:
    """Tokens a second of every cell with its quartiles; what failed by its status."""
    results = results[:MOST_BARS]
    figure, axes = _bars(results, "tokens a second (median, quartiles)")
    most = max((result.rates.high for result in results if result.ok), default=1.0)
    for place, result in enumerate(results):
        if result.ok:
            rate = result.rates
            error = [[rate.median - rate.low], [rate.high - rate.median]]
            axes.barh(place, rate.median, color=_BAR, xerr=error, ecolor="#222222", capsize=2)
        else:
            axes.text(most * 0.01, place, result.first["status"], va="center", color=_FAILED)
    return figure


def split(results: Sequence[Result]) -> Any:
    """Where the time of a step goes."""
    shown = [result for result in results if result.ok and result.first.get("split")][:MOST_BARS]
    if not shown:
        return None
    figure, axes = _bars(shown, "seconds of a step")
    _stack(axes, [{name: result.first["split"][name] for name in SPLIT} for result in shown], SPLIT)
    _legend(axes)
    return figure


def memory(results: Sequence[Result]) -> Any:
    """What the memory of the fullest rank is for, at its peak; a mark where the planner expected the peak."""
    shown = [result for result in results if result.ok and result.peak_bytes][:MOST_BARS]
    if not shown:
        return None
    size, unit = _unit(shown)
    figure, axes = _bars(shown, f"{unit} a rank at the peak")
    stacks = [_memory_stack(result, size) for result in shown]
    _stack(axes, stacks, (*CATEGORIES, "not told apart"))
    for place, result in enumerate(shown):
        expected = (result.first.get("predicted") or {}).get("memory", {}).get("peak")
        if expected:
            mark = {"marker": "|", "markersize": 14, "color": "black", "markeredgewidth": 2, "linestyle": ""}
            known = any(label == "planned" for label in axes.get_legend_handles_labels()[1])
            axes.plot(expected / size, place, label=None if known else "planned", **mark)
    _legend(axes)
    return figure


def _unit(results: Sequence[Result]) -> tuple[int, str]:
    """In what the memory of the largest of them is best read: bytes of it, and its name."""
    return (_GIB, "GiB") if max(result.peak_bytes or 0 for result in results) >= _GIB else (2**20, "MiB")


def _memory_stack(result: Result, size: int) -> dict[str, float]:
    found = result.first["memory"]
    parts = {name: found.get(name, 0) / size for name in CATEGORIES}
    return parts | {"not told apart": max(0.0, found["peak"] / size - sum(parts.values()))}


def scaling(results: Sequence[Result]) -> Any:
    """Tokens a second over ranks, beside what they would be if each rank were as fast as one alone."""
    series = scalings(results)
    if not series:
        return None
    kinds = sorted({one.kind for one in series}, reverse=True)
    figure, panels = _figure(4.6 * len(kinds) + 1, 4.2, len(kinds))
    for kind, axes in zip(kinds, panels, strict=True):
        axes.set(title=f"{kind} scaling", xlabel="ranks", ylabel="tokens a second")
        for colour, one in zip(_COLOURS * len(series), [s for s in series if s.kind == kind], strict=False):
            ranks = [result.ranks for result in one.results]
            rates = [result.rates.median for result in one.results]
            errors = [
                [result.rates.median - result.rates.low for result in one.results],
                [result.rates.high - result.rates.median for result in one.results],
            ]
            axes.errorbar(ranks, rates, errors, marker="o", capsize=2, color=colour, label=one.what)
            ideal = [rates[0] / ranks[0] * number for number in ranks]
            axes.plot(ranks, ideal, linestyle=(0, (4, 3)), linewidth=1, color=colour)
        axes.set_xticks(sorted({result.ranks for one in series for result in one.results}))
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=7, title="dashed: ideal", title_fontsize=7)
    return figure


def pareto(results: Sequence[Result]) -> Any:
    """Speed over memory: the cells that no other beats in both are joined."""
    found = {name: front for name, front in fronts(results).items() if front}
    if not found:
        return None
    figure, (axes,) = _figure(7, 4.6, 1)
    points = [result for result in results if result.ok and result.peak_bytes]
    size, unit = _unit(points)
    axes.set(xlabel=f"{unit} a rank at the peak", ylabel="tokens a second and rank")
    axes.scatter(*_places(points, size), s=14, color="#999999")
    for colour, (name, front) in zip(_COLOURS * len(found), found.items(), strict=False):
        axes.plot(*_places(front, size), marker="o", color=colour, label=name, drawstyle="steps-post")
        for result, x, y in zip(front, *_places(front, size), strict=True):
            axes.annotate(result.label, (x, y), fontsize=7, xytext=(4, 4), textcoords="offset points")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    return figure


def _places(results: Sequence[Result], size: int) -> tuple[list[float], list[float]]:
    memory = [(result.peak_bytes or 0) / size for result in results]
    return memory, [result.rates.median / result.ranks for result in results]


def _bars(results: Sequence[Result], title: str) -> tuple[Any, Any]:
    """A figure with a line for every result, the first on top."""
    figure, (axes,) = _figure(9, 1.2 + 0.3 * len(results), 1)
    title += f": the first {MOST_BARS} cells" if len(results) == MOST_BARS else ""
    many = len({result.grid for result in results}) > 1
    names = [f"{result.grid}: {result.label}" if many else result.label for result in results]
    axes.set_yticks(range(len(results)), names, fontsize=8)
    axes.set_ylim(len(results) - 0.5, -0.5)
    axes.set_xlabel(title)
    return figure, axes


def _stack(axes: Any, rows: Sequence[dict[str, float]], names: Sequence[str]) -> None:
    for colour, name in zip((*_COLOURS, "#cccccc"), names, strict=False):
        values = [row[name] for row in rows]
        if any(values):
            left = [sum(row[before] for before in names[: names.index(name)]) for row in rows]
            axes.barh(range(len(rows)), values, left=left, color=colour, label=name)


def _legend(axes: Any) -> None:
    """Beside the bars, none of which it may hide."""
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def _save(figure: Any, path: Path) -> None:
    """A PNG of few colours: a third of the bytes, for a report that is to be sent."""
    from PIL import Image

    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110)
    small = io.BytesIO()
    Image.open(drawn).convert("RGB").quantize(64).save(small, "png", optimize=True)
    write_whole(path, small.getvalue())


def _figure(width: float, height: float, panels: int) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(1, panels, squeeze=False)[0]
    for axes in all_axes:
        axes.grid(color=_GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    return figure, all_axes
