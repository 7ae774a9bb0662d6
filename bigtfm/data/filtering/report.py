"""What the filters dropped and why, with examples: filters.json and filters.html in the data set's folder."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bigtfm.config.problems import DataProblem, counted
from bigtfm.data.filtering.duplicates import compared, places
from bigtfm.data.filtering.units import (
    EXACT,
    EXAMPLES,
    MASKED,
    NEAR,
    REASONS,
    Filtering,
    Judged,
    judged_folder,
    snippet,
)
from bigtfm.data.sources import Unit

NAMES = ("filters.json", "filters.html")


def found(filtering: Filtering, units: Sequence[Unit], judged: Sequence[Judged]) -> dict[str, Any]:
    """What filters.json holds; a function of input and filters alone."""
    reasons: dict[str, dict[str, Any]] = {}
    for reason in REASONS:
        counts = [each.dropped[reason] for each in judged if reason in each.dropped]
        if counts:
            examples = sorted(tuple(pair) for each in judged for pair in each.examples.get(reason, []))
            reasons[reason] = {
                "documents": sum(documents for documents, _ in counts),
                "bytes": sum(size for _, size in counts),
                "examples": [{"text": text} for _, text in examples[:EXAMPLES]],
            }
    if filtering.filters.compares:
        reasons |= _duplicates(filtering, units)
    documents, size = sum(each.documents for each in judged), sum(each.bytes for each in judged)
    masks: dict[str, int] = {}
    for each in judged:
        for kind, count in each.masked.items():
            masks[kind] = masks.get(kind, 0) + count
    return {
        "documents": documents,
        "bytes": size,
        "kept_documents": documents - sum(each["documents"] for each in reasons.values()),
        "kept_bytes": size - sum(each["bytes"] for each in reasons.values()),
        "dropped": reasons,
        "masked": dict(sorted(masks.items())),
        "filters": filtering.filters.identity,
    }


def require_some(values: dict[str, Any]) -> None:
    """Raises DataProblem where nothing is left, and says which filter took most."""
    if values["kept_documents"] or not values["documents"]:
        return
    most = sorted(values["dropped"].items(), key=lambda item: -item[1]["documents"])[:3]
    said = ", ".join(f"{name} {each['documents'] / values['documents']:.0%}" for name, each in most)
    raise DataProblem(
        f"the filters leave nothing of {counted(values['documents'], 'document')} ({said})",
        where="bigtfm prepare",
        fix="loosen the filter that took most, or see what --input holds",
    )


def _duplicates(filtering: Filtering, units: Sequence[Unit]) -> dict[str, dict[str, Any]]:
    earlier, offsets, exact = compared(filtering)
    reasons: dict[str, dict[str, Any]] = {}
    totals = {EXACT: [0, 0], NEAR: [0, 0]}
    examples: dict[str, list[tuple[int, int]]] = {EXACT: [], NEAR: []}
    for number in range(len(offsets) - 1):
        start, stop = int(offsets[number]), int(offsets[number + 1])
        folder = judged_folder(filtering, number)
        sizes = np.load(folder / "sizes.npy")[np.flatnonzero(np.load(folder / "verdicts.npy") <= MASKED)]
        first, same = np.asarray(earlier[start:stop]), np.asarray(exact[start:stop])
        for name, there in ((EXACT, same), (NEAR, (first >= 0) & ~same)):
            totals[name][0] += int(there.sum())
            totals[name][1] += int(sizes[there].sum())
            room = EXAMPLES - len(examples[name])
            examples[name] += [(start + int(at), int(first[at])) for at in np.flatnonzero(there)[:room]]
    for name, (documents, size) in totals.items():
        if documents:
            texts = [
                {"text": _text(filtering, units, at), "like": _text(filtering, units, before)}
                for at, before in examples[name]
            ]
            reasons[name] = {"documents": documents, "bytes": size, "examples": texts}
    return reasons


def _text(filtering: Filtering, units: Sequence[Unit], document: int) -> str:
    """The beginning of a document, read from the input."""
    _, offsets, _ = compared(filtering)
    number, place = places(filtering, offsets, document)
    for at, text in enumerate(text for span in units[number] for text in filtering.documents(span)):
        if at == place:
            return snippet(text)
    raise DataProblem(
        "the input has changed meanwhile", where=f"unit {number}", fix="run the same command again"
    )


def write(values: dict[str, Any], folder: Path) -> None:
    """Both files."""
    (folder / NAMES[0]).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    (folder / NAMES[1]).write_text(page(values), encoding="utf-8", errors="backslashreplace")


def page(values: dict[str, Any]) -> str:
    """One HTML file that needs no other."""
    total = max(values["documents"], 1)
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{each['documents']:,}</td>"
        f"<td>{each['documents'] / total:.2%}</td><td>{each['bytes']:,}</td>"
        f"<td><i style='width:{200 * each['documents'] / total:.0f}px'></i></td></tr>"
        for name, each in sorted(values["dropped"].items(), key=lambda item: -item[1]["documents"])
    )
    masks = "".join(f"<tr><td>{kind}</td><td>{count:,}</td></tr>" for kind, count in values["masked"].items())
    masked = f"<h2>Masked, before duplicates were dropped</h2><table>{masks}</table>" if masks else ""
    examples = "".join(_examples(name, each["examples"]) for name, each in values["dropped"].items())
    settings = html.escape(json.dumps(values["filters"], indent=1))
    return (
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>Filters</title><style>"
        "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}"
        "td,th{text-align:right;padding:.15em .8em;border-bottom:1px solid #ddd}td:first-child,"
        "th:first-child,td:last-child{text-align:left}i{display:inline-block;height:.8em;background:#2f6db0}"
        "pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f5f5f5;padding:.6em}"
        "pre+pre{border-left:3px solid #e08e2b}</style>"
        f"<h1>What the filters dropped</h1><p>{values['kept_documents']:,} of {values['documents']:,} "
        f"documents stay, {values['kept_bytes']:,} of {values['bytes']:,} bytes.</p>"
        "<table><tr><th>reason</th><th>documents</th><th>share</th><th>bytes</th><th></th></tr>"
        f"{rows}</table>{masked}<h2>Examples</h2>{examples or '<p>None.</p>'}"
        f"<h2>Filters</h2><pre>{settings}</pre></html>\n"
    )


def _examples(name: str, examples: Sequence[dict[str, str]]) -> str:
    shown = "".join(
        f"<pre>{html.escape(each['text'])}</pre>"
        + (f"<pre>like: {html.escape(each['like'])}</pre>" if "like" in each else "")
        for each in examples
    )
    return f"<details><summary>{html.escape(name)}</summary>{shown}</details>"
