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
    rows = [
        f"| {fault.title} | {_cell(seen[name].get('bigtfm'))} | {_cell(seen[name].get('raw'))} "
        f"| `make chaos FAULTS={name}` |"
        for name, fault in FAULTS.items()
        if name in seen
    ]
    return f"{before}{BEGIN}\n\n" + "\n".join([*head, *rows]) + f"\n\n{END}{after}"


def _cell(seen: Mapping[str, Any] | None) -> str:
    if seen is None or seen["what"].startswith("not measured"):
        return "-"
    code = f"; exit code {seen['code']}" if seen["code"] else ""
    line = re.sub(r"(/[\w.-]+)+/faults/", "", seen["line"])[:300].replace("|", "\\|")
    return seen["what"].replace("|", "\\|") + code + (f". `{line}`" if line else "")
