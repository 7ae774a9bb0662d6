"""TOML files beside the run config, read as strictly: unknown keys and wrong values are one line each."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from bigtfm.config.problems import ConfigProblem, did_you_mean, shown
from bigtfm.config.sections import Section

S = TypeVar("S", bound=Section)


def read_toml(path: Path, fix: str) -> dict[str, Any]:
    """What the file holds. fix: for one that is not there.

    Raises:
        ConfigProblem: it can't be read, or is no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigProblem("no such file", where=str(path), fix=fix) from None
    except (OSError, ValueError, RecursionError) as error:  # TOMLDecodeError is a ValueError
        raise ConfigProblem(f"can't be read: {error}", where=str(path), fix="pass a TOML file") from None


def validated(kind: type[S], values: Any, where: str, more: tuple[str, ...] = ()) -> S:
    """The table as a section. more: keys that the table may have besides, for the advice on an unknown one.

    A validator of the section raises ValueError(what, fix).

    Raises:
        ConfigProblem: it is no table, or a key or value is wrong.
    """
    if not isinstance(values, dict):
        raise ConfigProblem(f"it must be a table, not {shown(values)}", where=where, fix="write key = value")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        if first["type"] == "extra_forbidden":
            what, fix = f"unknown key '{name}'", did_you_mean(name, (*more, *kind.model_fields))
        elif first["type"] == "value_error":
            what, fix = first["ctx"]["error"].args
        elif first["type"] == "missing":
            what, fix = f"{name} is missing", f"{name} is: {kind.model_fields[name].description}"
        else:
            what = f"{name} can't be {shown(first['input'])}: {first['msg']}"
            fix = f"{name} is: {kind.model_fields[name].description}"
        raise ConfigProblem(what, where=where, fix=fix) from None
