"""What `bigtfm compare` shows: a verdict in one line, a table, one JSON object, a picture."""

from __future__ import annotations

import io
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigtfm.compare.cause import likely_cause, plain
from bigtfm.compare.difference import Column, Comparison
from bigtfm.compare.runs import Run
from bigtfm.config.problems import ConfigProblem, Problem, StorageProblem
from bigtfm.whole_files import whole_file

if TYPE_CHECKING:
    from rich.console import RenderableType


def verdict(c: Comparison) -> str:
    """The answer in one line."""
    if c.step is not None:
        beyond = [_beyond(c, c.columns[name]) for name in c.differing]
        return f"differ from step {c.step} on: {', '.join(beyond)}"
    bits = all(not column.largest for column in c.columns.values())
    losses = f"losses within {c.columns['loss'].largest:.1e}"
    said = "equal to the bit" if bits else f"{losses}, digests identical"
    longer = [
        f"; {name} goes on to step {alone[-1]}"
        for name, run in (("A", c.a), ("B", c.b))
        if (alone := c.alone(run)) and alone[-1] > c.steps[-1]
    ]
    return f"same: {len(c.steps):,} step{'s' if len(c.steps) > 1 else ''}, {said}{''.join(longer)}"


def _beyond(c: Comparison, column: Column) -> str:
    assert c.step is not None
    a, b = (run.rows[c.step][column.name] for run in (c.a, c.b))
    if column.name == "sample_digest":
        return "other samples"
    name, difference = column.name.replace("_", " "), column.differences[c.step]
    return f"{name} {a:.6g} and {b:.6g}" if difference > 1e-4 else f"{name} by {_number(difference)}"


def to_json(c: Comparison, picture: Path) -> dict[str, Any]:
    """The whole comparison in plain values; a difference that is not finite is "Infinity"."""
    cause, keys = likely_cause(c)
    return {
        "same": c.step is None,
        "verdict": verdict(c),
        "cause": cause,
        "keys": list(keys),
        "tolerance": c.tolerance,
        "first_step": c.step,
        "runs": {
            name: {
                "path": str(run.path),
                "steps": len(run.rows),
                "only_here": _spans(c.alone(run)),
                "started_anew_before": list(run.starts),
            }
            for name, run in (("a", c.a), ("b", c.b))
        },
        "steps_compared": len(c.steps),
        "columns": {
            name: {
                "compared": len(column.differences),
                "bitwise": column.first_bit is None,
                "limit": column.limit,
                "first_step": column.first,
                "first_step_not_bitwise": column.first_bit,
                "steps_that_differ": len(column.beyond),
                "largest": column.largest if math.isfinite(column.largest) else "Infinity",
                "largest_step": column.largest_at,
            }
            for name, column in c.columns.items()
            if column.differences
        },
        "settings": [{"key": s.key, "a": s.a, "b": s.b, "decides_the_curve": s.decides} for s in c.settings],
        "picture": str(picture),
    }


def _spans(steps: Sequence[int]) -> list[list[int]]:
    """Runs of consecutive steps as [first, last]."""
    spans: list[list[int]] = []
    for step in steps:
        if spans and spans[-1][1] == step - 1:
            spans[-1][1] = step
        else:
            spans.append([step, step])
    return spans


def render(c: Comparison, picture: Path) -> RenderableType:
    """The same for a terminal."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    said = verdict(c)
    word, rest = said.split(maxsplit=1)
    lines: list[RenderableType] = [
        Text.assemble((word, "bold green" if c.step is None else "bold red"), " ", rest)
    ]
    if cause := likely_cause(c)[0]:
        lines.append(Text.assemble(("likely cause", "bold"), ": ", cause))
    for name, run in (("A", c.a), ("B", c.b)):
        lines.append(Text(f"{name}  {run.path}  {_extent(run, c.alone(run))}"))
    lines.append(Padding(_columns(c), (1, 0)))
    for title, decides in (("decides the curve", True), ("must not matter", False)):
        if any(setting.decides == decides for setting in c.settings):
            lines.append(Padding(_settings(c, title, decides), (0, 0, 1, 0)))
    return Group(*lines, Text(f"picture  {picture}"))


def _extent(run: Run, alone: list[int]) -> str:
    steps = list(run.rows)
    only = ", ".join(f"{a}-{b}" if a < b else f"{a}" for a, b in _spans(alone)[:3])
    anew = ", ".join(map(str, run.starts[:5])) + (", ..." if len(run.starts) > 5 else "")
    return "".join(
        [
            f"steps {steps[0]}-{steps[-1]}",
            f", {only} only here" if alone else "",
            f", started anew before {anew}" if run.starts else "",
        ]
    )


def _columns(c: Comparison) -> RenderableType:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for heading in ("steps", "differ", "from step", "largest", "at step", "bits from"):
        table.add_column(heading, justify="right")
    for column in c.columns.values():
        if column.differences:
            cells = (column.first, _number(column.largest), column.largest_at, column.first_bit)
            exact = column.name == "sample_digest"
            shown_cells = [
                "-" if cell in (None, "0") or (exact and place == 1) else str(cell)
                for place, cell in enumerate(cells)
            ]
            counts = f"{len(column.differences):,}", f"{len(column.beyond):,}"
            style = "red" if column.beyond else ""
            table.add_row(column.name, *counts, *shown_cells, style=style)
    return table


def _number(difference: float) -> str:
    return f"{difference:.1e}" if difference and math.isfinite(difference) else f"{difference:g}"


def _settings(c: Comparison, title: str, decides: bool) -> RenderableType:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in (title, "A", "B"):
        table.add_column(heading, overflow="fold")
    for setting in c.settings:
        if setting.decides == decides:
            table.add_row(setting.key, *(plain(value) for value in (setting.a, setting.b)))
    return table


# --- the picture -------------------------------------------------------------------------------------------

_INK, _GRID, _EDGE, _MARK = "#333333", "#e6e6e6", "#bbbbbb", "#777777"
_A, _B, _NORM = "#1f5fa8", "#e07b39", "#b9b9b9"
_MOST = 1e30  # drawn of a loss: an axis up to the largest float overflows
PNG = b"\x89PNG\r\n\x1a\n"


def draw(c: Comparison, path: Path) -> None:
    """The picture as a PNG at `path`. At the default place, which nobody asked for, a failure only warns.

    Raises:
        ConfigProblem: something else than a PNG is there, which is not to be replaced.
        StorageProblem: the picture can't be written.
    """
    try:
        _require_picture(path)
        _write(_picture(c), path)
    except Problem as problem:
        if path != c.a.path / f"compare-{c.b.path.resolve().name}.png":
            raise
        print(f"bigtfm: warning: no picture: {problem.where}: {problem.what}", file=sys.stderr, flush=True)


def _require_picture(path: Path) -> None:
    """Raises ConfigProblem unless `path` is free, or a PNG."""
    fix = "pass another --picture"
    if not path.name:
        raise ConfigProblem("is no name of a file", where=f"--picture {path}", fix=fix)
    if os.path.lexists(path):
        try:
            with open(path if path.is_file() else os.devnull, "rb") as file:  # a pipe would wait for ever
                is_picture = file.read(len(PNG)) == PNG
        except OSError as error:
            raise _unwritable(path, error) from None
        if not is_picture:
            raise ConfigProblem("is there already, and no PNG", where=str(path), fix=fix)


def _write(picture: bytes, path: Path) -> None:
    try:
        path.parent.resolve(strict=True)  # a folder with a typo in its name is not made
        with whole_file(path) as building:
            building.write_bytes(picture)
    except OSError as error:
        raise _unwritable(path, error) from None


def _unwritable(path: Path, error: OSError) -> StorageProblem:
    return StorageProblem(
        f"can't be written: {error.strerror}", where=str(path), fix="pass another --picture"
    )


def _picture(c: Comparison) -> bytes:
    """Both loss curves, and below them the relative differences on a logarithmic axis, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.5), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    for name, run, color, dashes, width in (("A", c.a, _A, "-", 2.0), ("B", c.b, _B, (0, (4, 2)), 1.2)):
        losses = [min(max(row["loss"], -_MOST), _MOST) for row in run.rows.values()]  # NaN stays
        label = f"{name}  {run.path.resolve().name[:60]}".replace("$", r"\$")  # else a formula
        every = max(1, len(losses) // 4000)  # more points than the picture has pixels only blacken it
        upper.plot(
            list(run.rows)[::every],
            losses[::every],
            color=color,
            linestyle=dashes,
            linewidth=width,
            label=label,
        )
    _draw_differences(lower, c)
    title = verdict(c) if c.step is None else verdict(c).partition(":")[0]
    upper.set_title(title, loc="left", color=_INK, fontsize=12, fontweight="bold", wrap=True)
    upper.set_ylabel("loss (nats / token)")
    lower.set_ylabel("relative difference")
    lower.set_xlabel("step")
    lower.xaxis.get_major_locator().set_params(integer=True)
    for axes in (upper, lower):
        if c.step is not None:
            axes.axvline(c.step, color=_MARK, linestyle=(0, (1, 2)), linewidth=1.2)
        axes.grid(color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_EDGE)
        axes.tick_params(which="both", color=_EDGE, labelcolor=_INK)
    upper.legend(loc="upper right", facecolor="white", edgecolor="none", framealpha=0.85)
    if lower.get_legend_handles_labels()[0]:
        lower.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3, frameon=False, borderpad=0)
    figure.align_ylabels()
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    return drawn.getvalue()


def _draw_differences(axes: Any, c: Comparison) -> None:
    """Points, since steps that are equal to the bit have none; of very many, the largest of neighbours."""
    for name, color, size in (("grad_norm", _NORM, 2.5), ("loss", _A, 3.5)):
        points = [(d, s) for s, d in c.columns[name].differences.items() if d and math.isfinite(d)]
        every = max(1, len(points) // 2000)
        kept = [max(points[at : at + every]) for at in range(0, len(points), every)]
        if kept:
            heights, steps = zip(*kept, strict=True)
            style = {"color": color, "linestyle": "", "marker": "o", "markersize": size}
            axes.semilogy(steps, heights, label=name.replace("_", " "), **style)
    if not axes.get_legend_handles_labels()[0]:
        axes.text(
            0.5, 0.5, "equal to the bit", transform=axes.transAxes, ha="center", va="center", color=_INK
        )
        axes.set_yticks([])
    elif c.tolerance:
        label = f"tolerance {c.tolerance:g} (loss)"
        axes.axhline(c.tolerance, color=_MARK, linewidth=1.2, linestyle=(0, (5, 4)), label=label)
