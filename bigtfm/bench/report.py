"""The report of a benchmark: report.md, results.csv, pictures, and all of it in one report.html."""

from __future__ import annotations

import base64
import csv
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigtfm.bench.against import Change, changes
from bigtfm.bench.clock import SPLIT
from bigtfm.bench.plots import draw_all
from bigtfm.bench.results import AXES, RESULTS, Result, Spread, read_results, together, write_whole
from bigtfm.bench.views import scalings
from bigtfm.config.problems import ConfigProblem
from bigtfm.planner.memory import CATEGORIES

_GIB = 2**30
_DEFINITIONS = (
    "Throughput: median over the measured steps, quartiles in brackets; a step lasts from one wish for data "
    "to the next, on the slowest rank. MFU: 6 N + 12 L d T operations a token (N: weights of the matrix "
    "products; recomputation not counted) over the device's peak. Share: the same over the best matrix "
    "product that the same process got out of its device. Memory: of the fullest rank. Data, forward, "
    "backward, update, record: a rank's own work; collectives: time in them, waiting for others included."
)


@dataclass(frozen=True)
class Table:
    """A table of texts; numbers are aligned by whoever shows it."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    brief: tuple[str, ...] | None = None  # the columns for a narrow terminal; None: all

    def is_brief(self, column: str) -> bool:
        """Whether it is for a narrow terminal, too."""
        return self.brief is None or column in self.brief


@dataclass(frozen=True)
class Report:
    """A benchmark's results as they are shown."""

    name: str
    about: tuple[tuple[str, str], ...]  # what it ran on
    results: tuple[Result, ...]
    changes: tuple[Change, ...]
    elsewhere: str = ""  # in what else the earlier benchmark differs: hardware, versions

    @property
    def tables(self) -> list[Table]:
        grids = list(dict.fromkeys(result.grid for result in self.results))
        tables = [_grid(grid, [each for each in self.results if each.grid == grid]) for grid in grids]
        done = [result for result in self.results if result.ok]
        extra = [_split(done), _memory(done), _scaling(done), _predictions(done), _failed(self.results)]
        extra.append(_against(self.changes, self.elsewhere))
        return tables + [table for table in extra if table.rows]


def make_report(out: Path, against: Path | None = None) -> Report:
    """Writes the report of the results in `out`, beside those in `against` if given.

    Raises:
        ConfigProblem: there are no results.
        StorageProblem: they can't be read.
    """
    results = results_of(out)
    name, about = str(results[0].first.get("matrix") or out.resolve().name), _about(results)
    before = results_of(against) if against is not None else []
    compared = changes(before, results) if before else []
    elsewhere = _differences(before, results) if before else ""
    report = Report(name, tuple(about.items()), tuple(results), tuple(compared), elsewhere)
    pictures = draw_all(results, out)
    write_whole(out / "report.md", to_markdown(report, pictures).encode())
    write_whole(out / "results.csv", to_csv(results).encode())
    write_whole(out / "report.html", to_html(report, pictures).encode())
    return report


def _differences(before: Sequence[Result], now: Sequence[Result]) -> str:
    """What a comparison also compares: another machine, other versions, another matrix."""
    old, new = _about(before), _about(now)
    names = [name for name in {**old, **new} if name != "commit" and old.get(name) != new.get(name)]
    found = [f"{name}: {old.get(name, 'none')} before, {new.get(name, 'none')} now" for name in names]
    if not {result.key for result in before} & {result.key for result in now}:
        found.append("no cell is in both: another matrix, model or DeepSpeed JSON")
    return "; ".join(found)


def results_of(folder: Path) -> list[Result]:
    """The cells of a benchmark's folder.

    Raises:
        ConfigProblem: there are none.
        StorageProblem: they can't be read.
    """
    path = folder / RESULTS if folder.is_dir() else folder
    results = together(read_results(path))
    if not results:
        raise ConfigProblem(
            "no results of a benchmark", where=str(path), fix="name a folder that `bigtfm bench` has written"
        )
    return results


def _about(results: Sequence[Result]) -> dict[str, str]:
    """What all rows have in common; several values where they differ."""
    rows = [row for result in results for row in result.rows]

    def all_of(*names: str) -> str:
        found = []
        for row in rows:
            value: Any = row
            for name in names:
                value = (value or {}).get(name)
            found.append("" if value is None else str(value))
        return ", ".join(dict.fromkeys(filter(None, found)))

    about = {
        "device": all_of("device"),
        "processor": all_of("hardware", "cpu"),
        "cores": all_of("hardware", "cores"),
        "GPUs": all_of("hardware", "gpus"),
        "commit": all_of("commit"),
        **{name: all_of("versions", name) for name in ("torch", "deepspeed", "python")},
        "peak": all_of("peak_source"),
    }
    return {name: value for name, value in about.items() if value}


def _grid(grid: str, results: Sequence[Result]) -> Table:
    done = [result for result in results if result.ok]
    columns = {
        "cell": [result.label for result in done],
        "batch": [_batch(result) for result in done],
        "tokens/s": [_spread(result) for result in done],
        "a rank": [f"{result.rates.median / result.ranks:,.0f}" for result in done],
        "s a step": [f"{result.seconds.median:.3f}" for result in done],
        "MFU": [_percent(result.mean("mfu")) for result in done],
        "share": [_percent(result.mean("matmul_share")) for result in done],
        "peak": [_gib(result.peak_bytes) for result in done],
        "loss": [_number(result.mean("loss"), ".5f") for result in done],
    }
    columns = {name: values for name, values in columns.items() if any(values)}
    rows, brief = tuple(zip(*columns.values(), strict=True)), ("cell", "tokens/s", "MFU", "share", "peak")
    return Table(grid, tuple(columns), rows, _sentence(results), brief)


def _split(results: Sequence[Result]) -> Table:
    rows = [
        (_full_name(result), *(_percent(found[name] / sum(found.values())) for name in SPLIT))
        for result in results
        if (found := result.first.get("split"))
    ]
    return Table("Where a step's time goes", ("cell", *SPLIT), tuple(rows), brief=())


def _memory(results: Sequence[Result]) -> Table:
    rows = [
        (_full_name(result), *(_gib(found.get(name, 0)) for name in CATEGORIES), _gib(found["peak"]))
        for result in results
        if "weights" in (found := result.first.get("memory") or {})
    ]
    return Table("What memory is for, at its peak", ("cell", *CATEGORIES, "peak"), tuple(rows), brief=())


def _sentence(results: Sequence[Result]) -> str:
    """What the cells have in common."""
    if not any(result.ok for result in results):
        return "none was measured: see Failed"
    first = results[0].first
    axes = ("model", "zero_stage", "precision", "ranks", "seq_len", "parameters")
    same = {axis for axis in axes if len({result.axis(axis) for result in results}) == 1 and first.get(axis)}
    words = {
        "model": f"{first['model']}",
        "parameters": f"{first.get('parameters', 0):,} parameters",
        "seq_len": f"sequences of {first.get('seq_len')} tokens",
        "precision": str(first.get("precision")),
        "zero_stage": f"ZeRO {first.get('zero_stage')}",
        "ranks": f"{first.get('ranks')} rank{'' if first.get('ranks') == 1 else 's'}",
    }
    return ", ".join(text for axis, text in words.items() if axis in same)


def _scaling(results: Sequence[Result]) -> Table:
    rows = [
        (one.kind, one.what, str(result.ranks), f"{result.rates.median:,.0f}", _percent(efficiency))
        for one in scalings(results)
        for result, efficiency in zip(one.results, one.efficiency, strict=True)
    ]
    note = "Efficiency: tokens a second and rank, over those of the fewest ranks."
    return Table("Scaling", ("kind", "cells", "ranks", "tokens/s", "efficiency"), tuple(rows), note)


def _predictions(results: Sequence[Result]) -> Table:
    rows, off = [], {"peak memory": [], "step": []}  # type: tuple[list[tuple[str, ...]], dict[str, list[float]]]
    for result in results:
        expected = (result.first.get("predicted") or {}) if result.ok else {}
        pairs = {
            "peak memory": (expected.get("memory", {}).get("peak"), result.peak_bytes),
            "step": (expected.get("step_seconds"), result.seconds.median if result.ok else None),
        }
        errors = {name: one / two - 1 for name, (one, two) in pairs.items() if one and two}
        for name, error in errors.items():
            off[name].append(abs(error))
        if errors:
            texts = [_full_name(result)]
            for name, show in (("peak memory", _gib), ("step", _seconds)):
                texts += [*map(show, pairs[name]), f"{errors[name]:+.1%}"] if name in errors else [""] * 3
            rows.append(tuple(texts))
    said = [
        f"{name}: {Spread.of(errors).median:.1%} off in the median, {max(errors):.1%} at worst"
        for name, errors in off.items()
        if errors
    ]
    columns = ("cell", "peak, planned", "measured", "off", "step, planned", "measured ", "off ")
    return _filled("Planned and measured", columns, rows, "; ".join(said))


def _filled(title: str, columns: Sequence[str], rows: Sequence[tuple[str, ...]], note: str = "") -> Table:
    """Without the columns in which nothing stands."""
    kept = [place for place in range(len(columns)) if any(row[place] for row in rows)]
    shown = tuple(tuple(row[place] for place in kept) for row in rows)
    return Table(title, tuple(columns[place] for place in kept), shown, note)


def _failed(results: Sequence[Result]) -> Table:
    rows = [
        (_full_name(result), result.first["status"], str(result.first.get("why", "")))
        for result in results
        if not result.ok
    ]
    return Table("Failed", ("cell", "how", "why"), tuple(rows))


def _against(compared: Sequence[Change], elsewhere: str) -> Table:
    rows = [
        (
            f"{change.grid}: {change.label}",
            change.verdict,
            _number(change.speed, ".3f"),
            "" if change.noise is None else f"+-{change.noise:.1%}",
            _number(change.memory, ".3f"),
        )
        for change in sorted(compared, key=lambda change: not change.is_regression)
    ]
    note = "Now over before; a speed that differs by more than the noise of both is a change."
    note += f" The earlier one was made elsewhere: {elsewhere}." if elsewhere else ""
    columns = ("cell", "verdict", "tokens/s, now / before", "noise", "peak memory, now / before")
    return Table("Against the earlier benchmark", columns, tuple(rows), note)


def to_markdown(report: Report, pictures: Sequence[Path]) -> str:
    """The report to read in a terminal or on a forge."""
    about = _plain("; ".join(f"{name}: {value}" for name, value in report.about))
    parts = [f"# {_plain(report.name)}", about, _DEFINITIONS]
    for table in report.tables:
        parts.append(f"## {_plain(table.title)}")
        parts += [_plain(table.note)] if table.note else []
        if table.rows:
            head = [table.columns, ("---",) * len(table.columns)]
            parts.append("\n".join(f"| {' | '.join(map(_cell, row))} |" for row in (*head, *table.rows)))
    parts += [f"![{path.stem}]({path.name})" for path in pictures]
    return "\n\n".join(parts) + "\n"


def _cell(text: str) -> str:
    return _plain(text).replace("|", "\\|").replace("\n", " ")


def _plain(text: str) -> str:
    """No HTML, of which a forge would make tags."""
    return text.replace("&", "&amp;").replace("<", "&lt;")


def to_csv(results: Sequence[Result]) -> str:
    """A line for each run of a cell, every number by itself."""
    columns = [
        *("key", "repeat", "matrix", "grid", "status", "why", *AXES, "parameters", "tokens_per_step"),
        *("tokens_per_second", "tokens_per_second_low", "tokens_per_second_high"),
        *("tokens_per_second_per_rank", "step_seconds", "mfu", "matmul_share", "loss"),
        *(f"{name}_seconds" for name in SPLIT),
        *(f"{name}_bytes" for name in (*CATEGORIES, "peak", "reserved")),
        *("predicted_peak_bytes", "predicted_step_seconds"),
        *("device", "commit", "torch", "deepspeed", "cpu", "cores"),
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(_flat(row) for result in results for row in result.rows)
    return text.getvalue()


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    rate, seconds = row.get("tokens_per_second") or {}, row.get("step_seconds") or {}
    predicted = row.get("predicted") or {}
    return {
        **row,
        "overrides": " ".join(row.get("overrides") or []),
        "tokens_per_second": rate.get("median"),
        "tokens_per_second_low": rate.get("low"),
        "tokens_per_second_high": rate.get("high"),
        "step_seconds": seconds.get("median"),
        **{f"{name}_seconds": value for name, value in (row.get("split") or {}).items()},
        **{f"{name}_bytes": value for name, value in (row.get("memory") or {}).items()},
        "predicted_peak_bytes": predicted.get("memory", {}).get("peak"),
        "predicted_step_seconds": predicted.get("step_seconds"),
        **(row.get("versions") or {}),
        **(row.get("hardware") or {}),
    }


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{name}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 72em; padding: 0 1em }}
table {{ border-collapse: collapse; font-size: 13px; margin: .6em 0 1.6em }}
th, td {{ border-bottom: 1px solid #ddd; padding: .25em .7em; text-align: right; white-space: nowrap }}
th {{ cursor: pointer; text-align: right }} td:first-child, th:first-child, td.text {{ text-align: left }}
td.text {{ white-space: normal }} .slower, .larger, .broken, .gone {{ color: #b03a2e; font-weight: bold }}
.faster, .smaller, .mended {{ color: #2e7d32 }} img {{ max-width: 100% }} .note {{ color: #555 }}
.wide {{ overflow-x: auto }}
</style></head><body>
<h1>{name}</h1>
{body}
<script>
document.querySelectorAll("th").forEach(head => head.onclick = () => {{
  const rows = head.closest("table").tBodies[0], place = head.cellIndex, down = head.down = !head.down;
  const value = row => {{
    const text = row.cells[place].textContent, number = parseFloat(text.replace(/[,%]/g, ""));
    return isNaN(number) ? text : number;
  }};
  const order = (a, b) => (value(a) > value(b) ? 1 : -1) * (down ? -1 : 1);
  [...rows.rows].sort(order).forEach(row => rows.append(row));
}});
</script></body></html>
"""


def to_html(report: Report, pictures: Sequence[Path]) -> str:
    """The report as one file that needs no other: tables that sort by a click on a head, and the pictures."""
    about = "".join(
        f"<tr><td>{_escaped(n)}</td><td class=text>{_escaped(v)}</td></tr>" for n, v in report.about
    )
    body = [f"<table>{about}</table>"]
    for path in pictures:
        data = base64.b64encode(path.read_bytes()).decode()
        body.append(f'<h2>{path.stem}</h2><img alt="{path.stem}" src="data:image/png;base64,{data}">')
    body += [_html_table(table) for table in report.tables]
    body.append(f"<p class=note>{_escaped(_DEFINITIONS)}</p>")
    return _PAGE.format(name=_escaped(report.name), body="\n".join(body))


def _html_table(table: Table) -> str:
    note = f"<p class=note>{_escaped(table.note)}</p>" if table.note else ""
    if not table.rows:
        return f"<h2>{_escaped(table.title)}</h2>{note}"
    head = "".join(f"<th>{_escaped(name)}</th>" for name in table.columns)
    lines = []
    for row in table.rows:
        cells = []
        for name, text in zip(table.columns, row, strict=True):
            kind = f" class={text}" if name == "verdict" else " class=text" if name == "why" else ""
            cells.append(f"<td{kind}>{_escaped(text)}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    rows = "\n".join(lines)
    return (
        f"<h2>{_escaped(table.title)}</h2>{note}<div class=wide><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )


def _escaped(text: str) -> str:
    return html.escape(text, quote=True)


def _batch(result: Result) -> str:
    row = result.first
    sequences = row["micro_batch"] * row["accumulation"] * row["ranks"]
    return f"{sequences} = {row['micro_batch']} x {row['accumulation']} x {row['ranks']}"


def _spread(result: Result) -> str:
    rate = result.rates
    return f"{rate.median:,.0f} ({rate.low:,.0f} to {rate.high:,.0f})"


def _full_name(result: Result) -> str:
    return f"{result.grid}: {result.label}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _gib(count: float | None) -> str:
    if count is None:
        return ""
    return f"{count / _GIB:.2f} GiB" if count >= _GIB else f"{count / 2**20:.1f} MiB"


def _seconds(value: float | None) -> str:
    return _number(value, ".3f") and f"{value:.3f} s"
