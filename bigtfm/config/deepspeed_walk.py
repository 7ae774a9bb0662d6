"""Compare a DeepSpeed JSON with the tables of its keys: every mistake, with where it is and the fix."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from bigtfm.config.deepspeed_schema import TOP, Key, Refusal, Section, Table, choice, only
from bigtfm.config.deepspeed_types import OPTIMIZERS, REFUSED_OPTIMIZERS, SCHEDULERS, TORCH_SCHEDULERS
from bigtfm.config.problems import did_you_mean, shown

EXAMPLES = {  # of the sections that must be there
    "optimizer": '"optimizer": { "type": "AdamW", "params": { "lr": 0.0003 } }',
    "optimizer.params": '"params": { "lr": 0.0003 }',
    "scheduler.params": '"params": { ... }',
}


class Finding(NamedTuple):
    """One thing that is wrong."""

    what: str
    fix: str


def findings(values: dict[str, Any]) -> list[Finding]:
    """Everything that is wrong with single keys, in the order of the file."""
    return list(_walk(values, schema(values), ""))


def schema(values: dict[str, Any]) -> Table:
    """The table of all keys, for the optimizer and scheduler that the JSON names."""
    return {
        **TOP,
        "optimizer": Section(
            {
                "type": choice(*OPTIMIZERS, required=True),
                "params": Section(_params_table(values.get("optimizer"), OPTIMIZERS), required=True),
                "legacy_fusion": only(False, "it is deprecated"),
            },
            required=True,
        ),
        "scheduler": Section(
            {
                "type": choice(*SCHEDULERS, required=True),
                "params": Section(_params_table(values.get("scheduler"), SCHEDULERS), required=True),
            }
        ),
    }


def _params_table(section: Any, tables: dict[str, Table]) -> Table | None:
    kind = section.get("type") if isinstance(section, dict) else None
    return tables.get(canonical(kind, tables)) if isinstance(kind, str) else None


def _walk(values: dict[str, Any], table: Table, prefix: str) -> Iterator[Finding]:
    """Every finding in an object and below it, in the order of the file, then what is missing."""
    for key, value in values.items():
        path = prefix + key
        spec = table.get(key)
        if spec is None:
            yield Finding(f"unknown key '{path}'", _unknown_fix(key, table, prefix))
        elif isinstance(spec, Refusal):
            if not spec.inert(value):
                yield Finding(f"{path} is refused: {spec.reason}", spec.fix)
        elif isinstance(spec, Section):
            yield from _walk_section(value, spec, path)
        elif value == "auto" and path in ("optimizer.type", "scheduler.type"):
            yield Finding(f'{path}: "auto" is refused: {spec.no_auto}', f"set {path} to {spec.says}")
        elif path == "optimizer.type" or path == "scheduler.type":
            yield from _walk_type(value, spec, path)
        else:
            yield from _walk_key(value, spec, path)
    for key, spec in table.items():
        if isinstance(spec, (Key, Section)) and spec.required and key not in values:
            fix = (
                f"set {prefix}{key} to {spec.says}"
                if isinstance(spec, Key)
                else f"add {EXAMPLES[prefix + key]}"
            )
            yield Finding(f"{prefix}{key} is missing", fix)


def _walk_section(value: Any, spec: Section, path: str) -> Iterator[Finding]:
    if value is None and spec.nullable:
        return
    if not isinstance(value, dict):
        yield Finding(
            f"{path} must be an object, not {shown(value)}", f'write "{path.rpartition(".")[2]}": {{ ... }}'
        )
    elif spec.keys is not None:
        yield from _walk(value, spec.keys, f"{path}.")


def _walk_key(value: Any, spec: Key, path: str) -> Iterator[Finding]:
    if value == "auto":
        if spec.no_auto is not None:
            yield Finding(f'{path}: "auto" is refused: {spec.no_auto}', f"set {path} to {spec.says}")
    elif not spec.test(value):
        fix = f"set {path} to {spec.says}"
        if isinstance(value, str) and spec.test(_unquoted(value)):
            fix = f"write {value} without quotes"
        yield Finding(f"{path} must be {spec.says}, not {shown(value)}", fix)


def _walk_type(value: Any, spec: Key, path: str) -> Iterator[Finding]:
    """The type of the optimizer or scheduler."""
    tables = OPTIMIZERS if path.startswith("optimizer") else SCHEDULERS
    if isinstance(value, str) and canonical(value, tables) in tables:
        return
    if isinstance(value, str) and tables is OPTIMIZERS and value.lower() in REFUSED_OPTIMIZERS:
        yield Finding(f"{path} {value} is refused: {REFUSED_OPTIMIZERS[value.lower()]}", f"use {spec.says}")
    elif isinstance(value, str) and tables is SCHEDULERS and value in TORCH_SCHEDULERS:
        reason = "DeepSpeed fails with torch's schedulers from ZeRO stage 1 on"
        yield Finding(f"{path} {value} is refused: {reason}", f"use {TORCH_SCHEDULERS[value]}")
    elif isinstance(value, str):
        yield Finding(f"{path}: unknown type '{value}'", did_you_mean(value, tables))
    else:
        yield Finding(f"{path} must be {spec.says}, not {shown(value)}", f"set {path} to {spec.says}")


def _unknown_fix(key: str, table: Table, prefix: str) -> str:
    """Did you mean: a key of this object, else the same key where it belongs, else what there is."""
    usable = [name for name, spec in table.items() if not isinstance(spec, Refusal) or spec.inert(None)]
    guess = did_you_mean(key, usable)
    place = place_of(key)
    if place and key not in table and not guess.startswith("did you mean"):
        return f"did you mean '{place}'?"
    if prefix or guess.startswith("did you mean"):
        return guess
    return "remove it: DeepSpeed has no such key and would ignore it"


def place_of(key: str) -> str | None:
    """Where `key` belongs in a DeepSpeed JSON, as a dotted path; None if in no place or in several."""
    common = {"optimizer": {"type": "AdamW"}, "scheduler": {"type": "WarmupCosineLR"}}
    places = [path for path in paths(schema(common)) if path.rpartition(".")[2] == key]
    return places[0] if len(places) == 1 else None


def paths(table: Table, prefix: str = "") -> Iterator[str]:
    """The dotted path of every key."""
    for key, spec in table.items():
        yield prefix + key
        if isinstance(spec, Section) and spec.keys is not None:
            yield from paths(spec.keys, f"{prefix}{key}.")


def canonical(kind: str, tables: dict[str, Table]) -> str:
    """DeepSpeed takes optimizer types in any case, and scheduler types as they are written."""
    if tables is OPTIMIZERS:
        return next((name for name in tables if name.lower() == kind.lower()), kind)
    return kind


def _unquoted(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None
