"""The same as PNGs, for a paper or a message."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from bigtfm.inspection.report import Maps, Report
from bigtfm.whole_files import whole_file

_LABELLED = 48  # words along a side that can still be read
_LENS_WORDS = 24  # words across the logit lens, above which only colours are drawn
_COLUMNS = 96  # characters of a line of the loss's picture
_BLUES, _REDS, _INK, _FAINT, _LINE = "Blues", "OrRd", "#1b1f24", "#667080", "#d9dee5"
_MISSING = "□"  # a character that the font has no picture of


def draw_all(report: Report, folder: Path) -> list[Path]:
    """Writes attention-*.png, rollout-*.png, loss.png, lens.png and norms-*.png."""
    drawn: dict[str, Any] = {}
    for maps in report.maps:
        drawn[f"attention-{maps.name}"] = attention(report, maps)
        if maps.rollout is not None:
            drawn[f"rollout-{maps.name}"] = rolled(report, maps)
    if report.judged:
        drawn["loss"] = loss(report)
    if report.lens:
        drawn["lens"] = lens(report)
    for side in report.norms:
        drawn[f"norms-{side}"] = norms(report, side)
    paths = []
    for name, figure in drawn.items():
        paths.append(folder / f"{name}.png")
        with whole_file(paths[-1]) as building:
            figure.savefig(building, format="png", dpi=130, facecolor="white")
    return paths


def attention(report: Report, maps: Maps) -> Any:
    """A map for each chosen layer (down) and head (across); where it is one alone, with its words."""
    layers, heads = maps.weights.shape[:2]
    if layers * heads == 1:
        figure, axes = _map_figure(report, maps)
        title = f"{_name(maps)}, layer {maps.layers[0]}, head {maps.heads[0]}"
        _heat(figure, axes, report, maps, maps.weights[0, 0].numpy(), title)
        return figure
    size = 1.25 if heads <= 12 else 0.8
    figure, grid = _figure(size * heads + 0.9, size * layers + 0.9, layers, heads)
    for row, layer in enumerate(maps.layers):
        for column, head in enumerate(maps.heads):
            axes, weights = grid[row][column], maps.weights[row, column].numpy()
            axes.imshow(np.sqrt(weights), cmap=_BLUES, vmin=0, interpolation="auto", aspect="auto")
            axes.set(xticks=[], yticks=[])
            if row == 0:
                axes.set_title(f"head {head}", fontsize=8)
            if column == 0:
                axes.set_ylabel(f"layer {layer}", fontsize=8)
    figure.suptitle(f"{_name(maps)}: queries down, keys across; square root of the weight", fontsize=9)
    return figure


def rolled(report: Report, maps: Maps) -> Any:
    """The rollout behind the last of the chosen layers."""
    assert maps.rollout is not None
    figure, axes = _map_figure(report, maps)
    title = f"attention rollout of the {maps.name}, behind layer {maps.layers[-1]}"
    _heat(figure, axes, report, maps, maps.rollout[-1].numpy(), title)
    return figure


def _name(maps: Maps) -> str:
    return (
        "attention of the decoder to the encoder" if maps.name == "cross" else f"attention of the {maps.name}"
    )


def _map_figure(report: Report, maps: Maps) -> tuple[Any, Any]:
    rows, columns = len(report.words[maps.queries]), len(report.words[maps.keys])
    figure, grid = _figure(min(11, 2.6 + 0.2 * columns), min(11, 2.2 + 0.2 * rows), 1, 1)
    return figure, grid[0][0]


def _heat(figure: Any, axes: Any, report: Report, maps: Maps, weights: Any, title: str) -> None:
    image = axes.imshow(np.sqrt(weights), cmap=_BLUES, vmin=0, aspect="auto", interpolation="auto")
    _words(axes.xaxis, report.words[maps.keys], rotation=90)
    _words(axes.yaxis, report.words[maps.queries])
    axes.xaxis.tick_top()
    axes.set_xlabel(title, fontsize=9)
    bar = figure.colorbar(image, ax=axes, shrink=0.6)
    most = float(weights.max())
    bar.set_ticks([0, np.sqrt(most) / 2, np.sqrt(most)], labels=["0", f"{most / 4:.2g}", f"{most:.2g}"])
    bar.ax.tick_params(labelsize=8)


def _words(axis: Any, words: Sequence[str], **style: Any) -> None:
    """Words along an axis, every n-th where there are many."""
    step = -(-len(words) // _LABELLED)
    places = range(0, len(words), step)
    axis.set_ticks(
        places, [drawable(words[place]) for place in places], fontsize=8, parse_math=False, **style
    )


def loss(report: Report) -> Any:
    """The text, each word on the colour of its loss."""
    from matplotlib import colormaps

    lines: list[list[tuple[int, float, str]]] = [[]]  # of each line (place, start, word)
    start = 0.0
    for place, word in enumerate(map(drawable, report.said)):
        width = len(word) + 1.0
        if lines[-1] and start + width > _COLUMNS:
            lines.append([])
            start = 0.0
        lines[-1].append((place, start, word))
        start += width
        if word.endswith("↵"):
            lines.append([])
            start = 0.0
    figure, ((axes,),) = _figure(0.088 * _COLUMNS + 0.6, 0.27 * len(lines) + 1.0, 1, 1)
    most = max(one.loss for one in report.judged.values())
    for number, line in enumerate(lines):
        for place, at, word in line:
            one = report.judged.get(place)
            colour = "white" if one is None else colormaps[_REDS](0.85 * one.loss / (most or 1))
            _chip(axes, at, number, word, colour)
    axes.set(xlim=(0, _COLUMNS), ylim=(len(lines) - 0.4, -0.6))
    axes.axis("off")
    said = f"loss of each token, from 0 (white) to {most:.2f} nats; mean {report.mean_loss:.3f}"
    axes.set_title(said, fontsize=9, loc="left")
    return figure


def _chip(axes: Any, x: float, y: float, word: str, colour: Any) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((x, y - 0.42), len(word) + 0.7, 0.84, facecolor=colour, edgecolor=_LINE, lw=0.5))
    axes.text(x + 0.35, y, word, family="DejaVu Sans Mono", fontsize=9, va="center", color=_ink(colour),
              parse_math=False)  # fmt: skip


def _ink(colour: Any) -> str:
    from matplotlib.colors import to_rgb

    red, green, blue = (part**2.2 for part in to_rgb(colour))
    return _INK if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.2 else "white"


def lens(report: Report) -> Any:
    """The likeliest token at each layer (down) and place (across), coloured by its probability."""
    words = report.words["decoder" if "decoder" in report.words else "encoder"]
    rows, columns = len(report.lens), len(words)
    written = columns <= _LENS_WORDS
    width = 0.85 * columns + 2 if written else 11
    figure, ((axes,),) = _figure(max(4.5, width), 0.3 * rows + 1.6, 1, 1)
    found = np.array([[expected[0][1] for expected in row] for row in report.lens])
    image = axes.imshow(found, cmap=_BLUES, vmin=0, vmax=1, aspect="auto")
    for row, layer in enumerate(report.lens if written else ()):
        for column, expected in enumerate(layer):
            word, probability = expected[0]
            style = {"fontsize": 7.5, "color": "white" if probability > 0.6 else _INK}
            axes.text(column, row, _brief(word), ha="center", va="center", parse_math=False, **style)
    _words(axes.xaxis, words, rotation=0 if written and max(map(len, words)) < 9 else 90)
    axes.xaxis.tick_top()
    axes.set_yticks(range(rows), ["embedding", *(f"layer {n}" for n in range(rows - 1))], fontsize=8)
    axes.set_xlabel("logit lens: the likeliest token, had the model ended at that layer", fontsize=9)
    figure.colorbar(image, ax=axes, shrink=0.8).ax.tick_params(labelsize=8)
    return figure


def norms(report: Report, side: Any) -> Any:
    """L2 norms by layer: the median over the tokens, and the middle half of them as a band."""
    found = report.norms[side]
    layers = len(found.neurons)
    series: list[tuple[str, Sequence[Any], int]] = [
        ("residual stream", found.features, -1),
        ("neurons", found.neurons, 0),
    ]
    if found.gradients is not None and found.parameters is not None:
        series += [
            ("gradient by the residual stream", found.gradients, -1),
            ("gradient by a block's weights", found.parameters, 0),
        ]
    figure, (panels,) = _figure(2.9 * len(series), 2.9, 1, len(series))
    for axes, (title, values, first) in zip(panels, series, strict=True):
        table = (
            np.array(values, ndmin=2) if first == -1 or np.ndim(values) == 2 else np.array(values)[:, None]
        )
        places = range(first, first + len(table))
        low, middle, high = np.quantile(table, [0.25, 0.5, 0.75], axis=1)
        axes.fill_between(places, low, high, alpha=0.2, color="#2f6db0", linewidth=0)
        axes.plot(places, middle, marker="o", markersize=3, color="#2f6db0")
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("layer (-1: embedding)" if first else "layer", fontsize=8)
        axes.set_xlim(-1.3, layers - 0.7)
        axes.set_ylim(bottom=0)
        axes.tick_params(labelsize=8)
        axes.locator_params(axis="x", integer=True)
        axes.grid(color=_LINE, linewidth=0.6)
    return figure


def _brief(word: str) -> str:
    word = drawable(word)
    return word if len(word) <= 10 else f"{word[:9]}…"


def drawable(word: str) -> str:
    """The word without what matplotlib's own font, the one that is always there, has no picture of."""
    known = _characters()
    return "".join(character if ord(character) in known else _MISSING for character in word)


@cache
def _characters() -> frozenset[int]:
    from matplotlib.font_manager import FontProperties, findfont, get_font

    families = ("DejaVu Sans", "DejaVu Sans Mono")
    fonts = [get_font(findfont(FontProperties(family=family))) for family in families]
    return frozenset.intersection(*(frozenset(font.get_charmap()) for font in fonts))


def _figure(width: float, height: float, rows: int, columns: int) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)
