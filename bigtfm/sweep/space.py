"""The file of a sweep, and the trials that it spans: each a function of seed and number. No torch.

    config = "configs/quickstart.toml"
    deepspeed_config = "ds_configs/zero2_fp32.json"
    method = "halving"
    trials = 16

    [space]
    optimizer.params.lr = { log_uniform = [1e-4, 1e-2] }
    model.dropout = [0.0, 0.1]

Paths are read from the working directory, as on the command line.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field

from bigtfm.config.deepspeed_types import OPTIMIZERS, SCHEDULERS
from bigtfm.config.deepspeed_walk import paths, schema
from bigtfm.config.problems import ConfigProblem, did_you_mean, shown
from bigtfm.config.run import RunConfig
from bigtfm.config.sections import Section
from bigtfm.config.strict_toml import read_toml, validated

UNIFORM: Final = "uniform"
LOG_UNIFORM: Final = "log_uniform"
HORIZON = "scheduler.params.total_num_steps"
_OURS = ("run.name", "run.dir", "run.steps")  # what the sweep itself sets
_MOST_POINTS = 1_000_000  # of a space of lists alone, which is gone through without a repetition
_EXAMPLE = "pass one like that in docs/sweep.md"


class SweepSection(Section):
    """The top of the file."""

    config: str | None = Field(default=None, description="run config; unset: the defaults")
    deepspeed_config: str = Field(description="DeepSpeed JSON")
    overrides: tuple[str, ...] = Field(
        default=(), strict=False, description="key=value for the run config of all trials"
    )
    method: Literal["random", "halving", "asha"] = Field(
        default="random",
        description="random: every trial is trained to the end; halving: all are trained a part of the way, "
        "and the best of them go on (successive halving); asha: the same without waiting for each other",
    )
    trials: int = Field(ge=1, description="points of the space that are tried")
    steps: int | None = Field(
        default=None, ge=1, description="optimizer steps of a whole training; unset: the schedule's"
    )
    eta: int = Field(default=3, ge=2, description="of how many trials one goes on, and how much further")
    min_steps: int = Field(default=1, ge=1, description="least optimizer steps of a trial")
    metric: str = Field(
        default="val_loss", min_length=1, description="key of metrics.jsonl by which trials are compared"
    )
    goal: Literal["min", "max"] = Field(default="min", description="whether less or more of it is better")
    seed: int = Field(default=0, ge=0, description="seed of the points; the trainings' is run.seed")
    ranks: int = Field(default=1, ge=1, description="processes of a trial, one a GPU")


@dataclass(frozen=True)
class Axis:
    """A key and its values: those of a list, or a range."""

    key: str
    kind: Literal["list", "uniform", "log_uniform"]
    values: tuple[Any, ...]  # of a range: its ends

    @property
    def of_run_config(self) -> bool:
        """Whether the key is the run config's; else it is the DeepSpeed JSON's."""
        return self.key.partition(".")[0] in RunConfig.model_fields

    @property
    def is_swept(self) -> bool:
        """Whether trials can differ in it."""
        return len(self.values) > 1

    def draw(self, number: random.Random) -> Any:
        """A value. A range of whole numbers has whole numbers; others have six digits."""
        where = number.random()
        if self.kind == "list":
            return self.values[int(where * len(self.values))]
        low, high = self.values
        if self.kind == UNIFORM:
            whole = isinstance(low, int) and isinstance(high, int)
            return (
                low + int(where * (high - low + 1)) if whole else float(f"{low + where * (high - low):.6g}")
            )
        value = math.exp(math.log(low) + where * (math.log(high) - math.log(low)))
        return round(value) if isinstance(low, int) and isinstance(high, int) else float(f"{value:.6g}")


@dataclass(frozen=True)
class Sweep:
    """A file, read."""

    path: Path
    settings: SweepSection
    axes: tuple[Axis, ...]

    @property
    def swept(self) -> list[str]:
        """The keys in which trials can differ."""
        return [axis.key for axis in self.axes if axis.is_swept]

    @cached_property
    def size(self) -> int | None:
        """Points of the space; None: a range has no number of them."""
        if any(axis.kind != "list" for axis in self.axes):
            return None
        return math.prod(len(axis.values) for axis in self.axes)

    def point(self, trial: int) -> dict[str, Any]:
        """Key -> value of a trial, by seed and number alone.

        A key's draws do not depend on the other keys. Where all are lists, no point comes twice.
        """
        if self.size is None or self.size > _MOST_POINTS:
            seed = self.settings.seed
            return {axis.key: axis.draw(random.Random(f"{seed} {trial} {axis.key}")) for axis in self.axes}
        place, point = self._order[trial], {}
        for axis in self.axes:
            place, index = divmod(place, len(axis.values))
            point[axis.key] = axis.values[index]
        return point

    @cached_property
    def _order(self) -> list[int]:
        order = list(range(self.size or 0))
        random.Random(f"{self.settings.seed}").shuffle(order)
        return order


def load_sweep(path: Path) -> Sweep:
    """Reads a sweep, strictly.

    Raises:
        ConfigProblem: it can't be read, a key or value in it is wrong, or its space is empty or too small.
    """
    values = read_toml(path, _EXAMPLE)
    space = values.pop("space", {})
    settings = validated(SweepSection, values, str(path), ("space",))
    if not isinstance(space, dict):
        raise ConfigProblem(
            f"space must be a table, not {shown(space)}", where=str(path), fix="write [space]"
        )
    where = f"{path}: [space]"
    axes = tuple(_axis(key, value, where) for key, value in _leaves(space))
    sweep = Sweep(path, settings, axes)
    if not sweep.swept:
        fix = "write a key of either file with its values, such as optimizer.params.lr = [1e-3, 3e-3]"
        raise ConfigProblem("the space is empty", where=where, fix=fix)
    if sweep.size is not None and settings.trials > sweep.size:
        raise ConfigProblem(
            f"the space has {sweep.size} points, and trials is {settings.trials}",
            where=where,
            fix=f"set trials to {sweep.size} or less, or give more values",
        )
    return sweep


def _leaves(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, values); "a.b" = [...] and a.b = [...] are the same."""
    for name, value in table.items():
        if isinstance(value, dict) and not {UNIFORM, LOG_UNIFORM} & value.keys():
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _axis(key: str, value: Any, where: str) -> Axis:
    _known(key, where)
    if key == HORIZON:
        whole = isinstance(value, int) and not isinstance(value, bool)
        what = f"{key} can't be swept: trials are compared at the end of one schedule"
        _require(whole, what, where, "give it one number")
    if isinstance(value, dict):
        ((kind, ends), *more) = value.items()
        _require(not more, f"{key} has {len(value)} ranges", where, "keep one of them")
        return _range(key, kind, ends, where)
    if not isinstance(value, list):
        return Axis(key, "list", (value,))
    _require(bool(value), f"{key} is an empty list", where, "give it a value, or remove it")
    return Axis(key, "list", tuple(value))


def _range(key: str, kind: str, ends: Any, where: str) -> Axis:
    fine = isinstance(ends, list) and len(ends) == 2 and all(_is_number(end) for end in ends)
    _require(fine and ends[0] < ends[1], f"{key}: {kind} can't be {shown(ends)}", where, "write [low, high]")
    positive = kind == UNIFORM or ends[0] > 0
    _require(positive, f"{key}: {kind} begins at {shown(ends[0])}", where, f"begin above 0, or use {UNIFORM}")
    return Axis(key, UNIFORM if kind == UNIFORM else LOG_UNIFORM, tuple(ends))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _known(key: str, where: str) -> None:
    """Raises ConfigProblem unless one of the two files has such a key."""
    _require(
        key not in _OURS, f"{key} is set by the sweep itself", where, "set `steps` at the top, or remove it"
    )
    table = key.partition(".")[0]
    if table in RunConfig.model_fields:
        fields = RunConfig.model_fields[table].annotation.model_fields  # type: ignore[union-attr]
        known = [f"{table}.{field}" for field in fields]
        if key not in known:
            raise ConfigProblem(f"unknown key '{key}'", where=where, fix=did_you_mean(key, known))
        return
    kinds = [("optimizer", kind) for kind in OPTIMIZERS] + [("scheduler", kind) for kind in SCHEDULERS]
    common = dict.fromkeys(
        path for section, kind in kinds for path in paths(schema({section: {"type": kind}}))
    )  # which of them has which: the training will say
    if key in common:
        return
    both = [f"{table}.{field}" for table, model in _tables().items() for field in model.model_fields]
    elsewhere = [path for path in (*both, *common) if path.rpartition(".")[2] == key.rpartition(".")[2]]
    fix = f"did you mean '{elsewhere[0]}'?" if elsewhere else did_you_mean(key, [*both, *common])
    raise ConfigProblem(f"unknown key '{key}'", where=where, fix=fix if len(fix) < 200 else "see both files")


def _tables() -> dict[str, Any]:
    return {name: field.annotation for name, field in RunConfig.model_fields.items()}


def _require(holds: bool, what: str, where: str, fix: str) -> None:
    if not holds:
        raise ConfigProblem(what, where=where, fix=fix)
