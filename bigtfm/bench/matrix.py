"""The matrix of a benchmark: a TOML file whose grids span the configurations (cells). No torch.

    [measure]
    steps = 10

    [[grid]]
    name = "ZeRO stages"
    zero_stage = [0, 1, 2, 3]     # a list is an axis: the grid is the product of its axes
    micro_batch = 4

Paths are read from the working directory, as on the command line.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from bigtfm.config.deepspeed import load_deepspeed_json
from bigtfm.config.problems import ConfigProblem, did_you_mean, shown
from bigtfm.config.sections import Backend, Section
from bigtfm.config.strict_toml import read_toml, validated

PRECISIONS = ("fp32", "bf16", "fp16")
LISTS = ("overrides",)  # of a cell: a list there is one value, a list of lists an axis


class Measure(Section):
    """How each cell is measured."""

    warm_up: int = Field(
        default=3, ge=1, description="steps before the measured ones: they compile and allocate"
    )
    steps: int = Field(default=10, ge=3, description="optimizer steps that are measured")
    repeats: int = Field(default=1, ge=1, description="times that each cell is run, in turns with the others")
    memory: bool = Field(
        default=True,
        description="train some steps more in which every tensor is counted: what the memory is for",
    )
    timeout_seconds: float = Field(default=300.0, gt=0, description="a cell that takes longer is ended")
    hang_seconds: float = Field(
        default=60.0, ge=0, description="guard.hang_seconds of the cells: a phase that lasts longer is a hang"
    )
    memory_gib: float | None = Field(
        default=None,
        gt=0,
        description="GiB of host memory that each rank may allocate; unset: what there is",
    )


class Cell(Section):
    """One configuration. What it leaves out stands in `model` and `deepspeed_config`."""

    model: str = Field(default="configs/quickstart.toml", description="run config with the model's shape")
    overrides: tuple[str, ...] = Field(
        default=(), strict=False, description="key=value for the run config, as on the command line"
    )
    deepspeed_config: str = Field(
        default="ds_configs/zero2_fp32.json", description="DeepSpeed JSON with optimizer and schedule"
    )
    deepspeed: dict[str, Any] = Field(default={}, description="keys that replace those of deepspeed_config")
    zero_stage: Literal[0, 1, 2, 3] = Field(default=0, description="ZeRO stage")
    precision: Literal["fp32", "bf16", "fp16"] = Field(default="fp32", description="training dtype")
    ranks: int = Field(default=1, ge=1, description="processes, one a GPU")
    threads: int | None = Field(
        default=None, ge=1, description="threads of each rank on a CPU; unset: the cores, shared by the ranks"
    )
    micro_batch: int = Field(default=4, ge=1, description="sequences per rank in one forward pass")
    accumulation: int | None = Field(
        default=None, ge=1, description="forward passes per rank in one optimizer step; unset: 1"
    )
    global_batch: int | None = Field(
        default=None, ge=1, description="sequences in one optimizer step, instead of accumulation"
    )
    seq_len: int | None = Field(
        default=None, ge=1, description="tokens in a sequence; unset: model.max_seq_len"
    )
    recompute: Literal["none", "full", "selective"] | int = Field(
        default="none", description="compute.recompute"
    )
    attention: Literal["auto", Backend] = Field(default="auto", description="compute.attention")
    compile: bool = Field(default=False, description="compute.compile_blocks")

    @model_validator(mode="after")
    def _divides(self) -> Cell:
        if self.global_batch is not None and self.accumulation is not None:
            raise ValueError("accumulation and global_batch both say how large a step is", "keep one of them")
        once = self.micro_batch * self.ranks
        if self.global_batch is not None and self.global_batch % once:
            raise ValueError(
                f"global_batch {self.global_batch} is not a multiple of {self.micro_batch} micro batch x "
                f"{self.ranks} ranks",
                f"use a multiple of {once}",
            )
        return self

    @property
    def steps_of_accumulation(self) -> int:
        """Forward passes per rank in one optimizer step."""
        if self.global_batch is not None:
            return self.global_batch // (self.micro_batch * self.ranks)
        return self.accumulation or 1

    @property
    def config(self) -> dict[str, Any]:
        """What a row of the results says of the cell: every axis as a number or a name."""
        values = self.model_dump(mode="json") | {"accumulation": self.steps_of_accumulation}
        del values["global_batch"]
        return values | {"model": Path(self.model).stem, "config": self.model}

    @property
    def deepspeed_values(self) -> dict[str, Any]:
        """The cell's DeepSpeed JSON.

        Raises:
            ConfigProblem: deepspeed_config is not there, or no valid DeepSpeed JSON.
        """
        values = _merged(load_deepspeed_json(Path(self.deepspeed_config)).values, self.deepspeed)
        values = {name: value for name, value in values.items() if name not in PRECISIONS}
        if self.precision != "fp32":
            values[self.precision] = {"enabled": True}
        accumulation = self.steps_of_accumulation
        return values | {
            "train_batch_size": self.micro_batch * accumulation * self.ranks,
            "train_micro_batch_size_per_gpu": self.micro_batch,
            "gradient_accumulation_steps": accumulation,
            "zero_optimization": values.get("zero_optimization", {}) | {"stage": self.zero_stage},
        }

    @property
    def run_overrides(self) -> list[str]:
        """What the cell sets in the run config."""
        sequence = [] if self.seq_len is None else [f"data.seq_len={self.seq_len}"]
        return [
            *self.overrides,
            *sequence,
            f"compute.recompute={self.recompute}",
            f"compute.attention={self.attention}",
            f"compute.compile_blocks={str(self.compile).lower()}",
        ]


@dataclass(frozen=True)
class Matrix:
    """A file of cells."""

    path: Path
    name: str
    data: str  # folder of the prepared data set
    measure: Measure
    cells: tuple[tuple[str, Cell], ...]  # name of the grid, cell

    def keys(self) -> Iterator[tuple[str, str, Cell]]:
        """(key, grid, cell); the key holds all that decides what is measured, and begins readably.

        Raises:
            ConfigProblem: a file that a cell names can't be read.
        """
        seen: set[str] = set()
        for grid, cell in self.cells:
            key = self._key(cell)
            if key not in seen:
                seen.add(key)
                yield key, grid, cell

    def with_timeout(self, seconds: float) -> Matrix:
        """The same with another measure.timeout_seconds."""
        return replace(self, measure=self.measure.model_copy(update={"timeout_seconds": seconds}))

    def _key(self, cell: Cell) -> str:
        content = json.dumps(
            [cell.config, _text(cell.model), cell.deepspeed_values, self.data, self.measure.warm_up],
            sort_keys=True,
        )
        digest = hashlib.sha256(content.encode()).hexdigest()[:8]
        length = f"-t{cell.seq_len}" if cell.seq_len else ""
        return (
            f"{Path(cell.model).stem}-z{cell.zero_stage}-{cell.precision}-r{cell.ranks}-m{cell.micro_batch}"
            f"x{cell.steps_of_accumulation}{length}-{digest}"
        )


def load_matrix(path: Path) -> Matrix:
    """Reads a matrix, strictly.

    Raises:
        ConfigProblem: it can't be read, or a key or value in it is wrong.
    """
    values = read_toml(path, "pass one that is there, for example benchmarks/matrices/quick.toml")
    for name in values.keys() - {"name", "data", "measure", "grid"}:
        raise ConfigProblem(
            f"unknown key '{name}'",
            where=str(path),
            fix=did_you_mean(name, ("name", "data", "measure", "grid")),
        )
    name, data = values.get("name", path.stem), values.get("data", "data/quickstart")
    for key, value in (("name", name), ("data", data)):
        if not isinstance(value, str):
            raise ConfigProblem(
                f"{key} must be a string, not {shown(value)}", where=str(path), fix="quote it"
            )
    measure = validated(Measure, values.get("measure", {}), f"{path}: [measure]")
    grids = values.get("grid", [])
    if not isinstance(grids, list) or not grids or not all(isinstance(grid, dict) for grid in grids):
        raise ConfigProblem("it has no [[grid]]", where=str(path), fix="write [[grid]] and the axes below it")
    cells = []
    for number, grid in enumerate(grids, 1):
        title = str(grid.pop("name", f"grid {number}"))
        cells += [
            (title, validated(Cell, point, f"{path}: [[grid]] {number}", ("name",)))
            for point in _product(grid, path)
        ]
    return Matrix(path, name, data, measure, tuple(cells))


def _product(grid: Mapping[str, Any], path: Path) -> Iterator[dict[str, Any]]:
    axes = {name: _axis(name, value) for name, value in grid.items()}
    for name, values in axes.items():
        if not values:
            raise ConfigProblem(
                f"{name} is an empty list", where=str(path), fix="give it a value, or remove it"
            )
    for point in itertools.product(*axes.values()):
        yield dict(zip(axes, point, strict=True))


def _axis(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        return [value]
    if name in LISTS and not (value and all(isinstance(each, list) for each in value)):
        return [value]
    return value


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigProblem(
            f"can't be read: {error}", where=path, fix="name a run config in `model`"
        ) from None


def _merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for name, value in changes.items():
        before = merged.get(name)
        if isinstance(before, dict) and isinstance(value, dict):
            value = _merged(before, value)
        merged[name] = value
    return merged
