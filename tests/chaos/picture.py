"""A campaign as a picture: runs that climb to their last step however often they are killed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chaos.job import SAVE_EVERY, STEPS
from chaos.kills import End, Kill, Row

INK, GRID, EDGE, CLIMB = "#333333", "#e9e9e9", "#bbbbbb", "#8fb0d6"
BANDS = ("#ffffff", "#f6f7f9")
COLORS = {
    "all": "#222222",
    "rank 0": "#d1495b",
    "rank 1": "#e07b39",
    "trainer": "#7a4fb5",
    "supervisor": "#1f8a70",
    "data worker": "#c9a227",
    "launcher": "#1f5fa8",
}


def draw(rows: Sequence[Row], lost: Mapping[int, int], path: Path, title: str) -> None:
    """Above, the step over time, a mark a kill; below, steps computed again and seconds until all is gone."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    climb, again, gone = figure.subplots(3, 1, sharex=True, height_ratios=[5, 1.6, 1.6])
    _climb(climb, rows)
    clock = _ends(rows)
    kills = [(at, row) for at, row in zip(clock, rows, strict=True) if isinstance(row, Kill)]
    for victim, color in COLORS.items():
        mine = [(at, kill) for at, kill in kills if kill.plan.victim == victim]
        if not mine:
            continue
        times = [at for at, _ in mine]
        style: dict[str, Any] = {
            "color": color,
            "linestyle": "",
            "marker": "o",
            "markersize": 4.5,
            "zorder": 3,
        }
        climb.plot(times, [kill.reached for _, kill in mine], label=f"{victim} killed ({len(mine)})", **style)
        paid = [(at, lost[kill.kill]) for at, kill in mine if kill.kill in lost]
        again.vlines([at for at, _ in paid], 0, [steps for _, steps in paid], color=color, linewidth=1.6)
        again.plot([at for at, _ in paid], [steps for _, steps in paid], **style | {"markersize": 3})
        gone.plot(times, [kill.attempt.gone for _, kill in mine], **style | {"markersize": 3.5})
    again.axhline(SAVE_EVERY, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    again.annotate(
        "a save interval",
        (1, SAVE_EVERY),
        xycoords=("axes fraction", "data"),
        ha="right",
        va="bottom",
        fontsize=8,
        color=INK,
    )
    gone.axhline(10, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    gone.set_yscale("log")
    climb.set_ylabel("optimizer step")
    again.set_ylabel("steps\nagain")
    gone.set_ylabel("seconds\nuntil gone")
    gone.set_xlabel("seconds of the campaign")
    headline, _, details = title.partition(": ")
    figure.suptitle(headline, x=0.01, ha="left", fontsize=14, fontweight="bold", color=INK)
    climb.set_title(details, loc="left", fontsize=9, color=INK)
    for axes in (climb, again, gone):
        axes.grid(color=GRID, linewidth=0.7, axis="y")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(EDGE)
        axes.tick_params(which="both", color=EDGE, labelcolor=INK)
        axes.set_xlim(0, max(clock, default=1.0) * 1.005)
    again.set_ylim(bottom=0)
    if kills:
        figure.legend(
            *climb.get_legend_handles_labels(),
            loc="outside lower center",
            ncols=4,
            fontsize=9,
            frameon=False,
        )
    figure.align_ylabels()
    figure.savefig(path, format="png")


def _ends(rows: Sequence[Row]) -> list[float]:
    """When each start ended, in seconds of the campaign."""
    ends, clock = [], 0.0
    for row in rows:
        clock += row.attempt.seconds
        ends.append(clock)
        clock += row.attempt.gone
    return ends


def _climb(axes: Any, rows: Sequence[Row]) -> None:
    """A line from where each start went on to where it was killed; a band for each run."""
    ends = _ends(rows)
    begin = 0.0
    for number, (end, row) in enumerate(zip(ends, rows, strict=True)):
        if row.attempt.resumed is not None:
            reached = row.reached if isinstance(row, Kill) else STEPS
            axes.plot([begin, end], [row.attempt.resumed, reached], color=CLIMB, linewidth=1.3, zorder=2)
            axes.fill_between(
                [begin, end], [row.attempt.resumed, reached], color=CLIMB, alpha=0.18, linewidth=0
            )
        if isinstance(row, End):
            axes.plot([end], [STEPS], marker="*", markersize=12, color=INK, zorder=4, linestyle="")
        last = number + 1 == len(rows) or rows[number + 1].run != row.run
        begin = end + row.attempt.gone
        if last:
            first = next(n for n, other in enumerate(rows) if other.run == row.run)
            left = ends[first] - rows[first].attempt.seconds
            axes.axvspan(left, begin, color=BANDS[row.run % 2], zorder=0, linewidth=0)
            middle = ((left + begin) / 2, 0.99)
            style = {"ha": "center", "va": "top", "fontsize": 7, "color": "#777777"}
            if begin - left > 0.09 * ends[-1]:  # else there is no room for it
                axes.annotate(row.layout, middle, xycoords=("data", "axes fraction"), **style)
    axes.set_ylim(0, STEPS * 1.12)
