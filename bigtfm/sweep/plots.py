"""The pictures of a sweep: the metric against each swept key, and the trials' curves with the rungs."""

from __future__ import annotations

import math
from typing import Any

from bigtfm.sweep.report import Report
from bigtfm.sweep.space import LOG_UNIFORM, Axis
from bigtfm.tracking import iterate_metrics
from bigtfm.whole_files import whole_file

_REST, _FAR, _BEST, _FAILED, _GRID = "#b9c6d6", "#2f6db0", "#e08e2b", "#b03a2e", "#dddddd"
_COLUMNS = 3


def draw(report: Report) -> list[str]:
    """Writes space.png and curves.png into the sweep's folder; the names of those that show something."""
    drawn = {"space.png": _space(report), "curves.png": _curves(report)}
    for name, figure in drawn.items():
        if figure is not None:
            with whole_file(report.study.out / name) as building:
                figure.savefig(building, format="png", dpi=110)
    return [name for name, figure in drawn.items() if figure is not None]


def _space(report: Report) -> Any:
    """A panel for each swept key: dark who came to the end, a cross at the upper edge who failed."""
    axes_of = [axis for axis in report.study.sweep.axes if axis.is_swept]
    lines = math.ceil(len(axes_of) / _COLUMNS)
    columns = min(len(axes_of), _COLUMNS)
    figure, panels = _figure(4.2 * columns + 0.4, 3.4 * lines, lines, columns)
    for axes, axis in zip(panels, axes_of, strict=False):
        _panel(axes, axis, report)
    for axes in panels[len(axes_of) :]:
        axes.set_visible(False)
    return figure


def _panel(axes: Any, axis: Axis, report: Report) -> None:
    last, metric = len(report.study.rungs) - 1, report.study.sweep.settings.metric
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in axis.values)
    names = list(dict.fromkeys(map(str, axis.values)))

    def place(value: Any) -> Any:
        return value if numbers else names.index(str(value))

    points = [(place(row["point"][axis.key]), row) for row in report.rows]
    for far, colour in ((False, _REST), (True, _FAR)):
        there = [
            (x, row["value"])
            for x, row in points
            if row["value"] is not None and (row["rung"] == last) == far
        ]
        axes.scatter(*zip(*there, strict=True), s=22, color=colour) if there else None
    failed = [x for x, row in points if row["value"] is None]
    if failed:
        axes.plot(failed, [0.97] * len(failed), "x", color=_FAILED, transform=axes.get_xaxis_transform())
    if report.best is not None:
        axes.scatter(
            [place(report.best["point"][axis.key])], [report.best["value"]], s=60, color=_BEST, zorder=3
        )
    if axis.kind == LOG_UNIFORM or (
        numbers and min(axis.values) > 0 and max(axis.values) >= 10 * min(axis.values)
    ):
        axes.set_xscale("log")
    if not numbers:
        axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.set(xlabel=axis.key, ylabel=metric)


def _curves(report: Report) -> Any:
    """The metric over the steps, of every trial that measured it more than once; dashed: the rungs."""
    metric, best = report.study.sweep.settings.metric, report.best
    figure, (axes,) = _figure(7.5, 4.6, 1, 1)
    shown = False
    for row in reversed(report.rows):  # the best on top
        path = report.study.folder(row["trial"]) / "metrics.jsonl"
        points = [(each["step"], each[metric]) for each in iterate_metrics(path) if metric in each]
        points = [point for point in points if math.isfinite(point[1])]
        if points:
            shown = True
            is_best = best is not None and row["trial"] == best["trial"]
            colour = _BEST if is_best else _FAILED if row["value"] is None else _REST
            label = f"trial {row['trial']}, the best" if is_best else None
            marker = "o" if len(points) < 60 else ""
            axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=3, label=label)
    for steps in report.study.rungs[:-1]:
        axes.axvline(steps, color="#777777", linestyle=(0, (4, 3)), linewidth=1)
    axes.set(xlabel="step", ylabel=metric)
    if best is not None and shown:
        axes.legend(fontsize=8)
    return figure if shown else None


def _figure(width: float, height: float, lines: int, columns: int) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes in panels:
        axes.grid(color=_GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels
