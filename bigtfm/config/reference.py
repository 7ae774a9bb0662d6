"""The run config's keys as Markdown tables, made from its fields: python -m bigtfm.config.reference FILE

writes them into FILE, between the two marks; a test compares them with docs/configuration.md.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from bigtfm.config.run import RunConfig

BEGIN, END = "<!-- keys: begin -->", "<!-- keys: end -->"
BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def tables() -> str:
    """A table for each [table] of the run config: key, default, what it may be, what it means."""
    schema = RunConfig.model_json_schema()
    parts = []
    for name, place in schema["properties"].items():
        section = _definition(schema, place)
        parts.append(_table(f"[{name}]", section))
        for key, field in section["properties"].items():
            if "$ref" in field.get("items", {}):  # a list of tables
                parts.append(_table(f"[[{name}.{key}]]", _definition(schema, field["items"])))
    return "\n\n".join(parts)


def _definition(schema: dict[str, Any], place: dict[str, Any]) -> dict[str, Any]:
    return schema["$defs"][place["$ref"].rpartition("/")[2]]


def _table(name: str, section: dict[str, Any]) -> str:
    rows = [
        f"| `{key}` | {_default(field)} | {_allowed(field)} | {_cell(field['description'])} |"
        for key, field in section["properties"].items()
    ]
    head = ["| key | default | may be | meaning |", "|---|---|---|---|"]
    return "\n".join([f"### {name}", "", section["description"], "", *head, *rows])


def written_into(text: str) -> str:
    """`text` with today's tables between the marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}"


def _default(field: dict[str, Any]) -> str:
    if "default" not in field:
        return "to be stated"
    value = field["default"]
    return "unset" if value is None else f"`{json.dumps(value)}`"


def _allowed(field: dict[str, Any]) -> str:
    """A JSON schema in words."""
    if "anyOf" in field:
        kinds = [kind for kind in field["anyOf"] if kind.get("type") != "null"]
        return ", or ".join(map(_allowed, kinds))
    options = field.get("enum") or ([field["const"]] if "const" in field else [])
    if options:
        return ", ".join(f"`{option}`" for option in options)
    if field["type"] == "array":
        if "$ref" in field.get("items", {}):
            return "list of tables"
        items = field["prefixItems"] if "prefixItems" in field else None
        return (
            f"list of {len(items)} {_allowed(items[0])}s" if items else f"list of {_allowed(field['items'])}"
        )
    bounds = [f"{sign} {_number(field[name])}" for name, sign in BOUNDS.items() if name in field]
    return " ".join([field["type"], " and ".join(bounds)]).strip()


def _number(bound: float) -> str:
    whole = int(bound)
    power = whole.bit_length() - 1
    return f"2^{power}" if whole > 2**32 and whole == 2**power else f"{bound:g}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(written_into(path.read_text(encoding="utf-8")), encoding="utf-8")
