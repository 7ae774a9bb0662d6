"""The table of faults in docs/reliability.md, made from faults.json."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from chaos.faults import FAULTS

BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"


def written_into(text: str, seen: Mapping[str, Mapping[str, Any]]) -> str:
    """`text` with the table between the marks; a side that was not measured has a dash."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    head = ["| fault | bigtfm | raw DeepSpeed | command |", "|---|---|---|---|"]
    rows: dict[tuple[str, str, str], list[str]] = {}  # cells of NaN that are alike make one row
    for name, fault in FAULTS.items():
        if name in seen:
            title, _, cell = fault.title.partition(", stage ")
            cells = _cell(seen[name].get("bigtfm")), _cell(seen[name].get("raw"))
            rows.setdefault((title, *cells), []).append(f"{name} {cell}")
    lines = [
        f"| {title}{_stages(names)} | {ours} | {raw} | `make chaos FAULTS={names[0].split()[0]}` |"
        for (title, ours, raw), names in rows.items()
    ]
    return f"{before}{BEGIN}\n\n" + "\n".join([*head, *lines]) + f"\n\n{END}{after}"


def _stages(names: list[str]) -> str:
    """ ", stages 0 1 2 3 bf16" of names such as "nan-once-zero0-bf16 0, bf16"."""
    precisions: dict[str, list[str]] = {}
    for name in names:
        stage, _, precision = name.partition(" ")[2].partition(", ")
        if precision:
            precisions.setdefault(precision, []).append(stage)
    return "".join(f", ZeRO {'/'.join(stages)} {precision}" for precision, stages in precisions.items())


def _cell(seen: Mapping[str, Any] | None) -> str:
    if seen is None or seen["what"].startswith("not measured"):
        return "-"
    code = f"; exit code {seen['code']}" if seen["code"] else ""
    line = re.sub(r"(?:/[\w.-]+)+/faults/[\w-]+/", "", seen["line"])[:300].replace("|", "\\|")
    return seen["what"].replace("|", "\\|") + code + (f". `{line}`" if line else "")
