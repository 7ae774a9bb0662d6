"""Trials of what a search has found: the best candidates, each trained for some steps by itself."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from bigtfm.bench.matrix import Cell, Matrix, Measure
from bigtfm.bench.runner import run_matrix
from bigtfm.config.deepspeed import load_deepspeed_json
from bigtfm.config.problems import ConfigProblem
from bigtfm.planner.search import Candidate, deepspeed_values

MEASURE = Measure(warm_up=3, steps=8, memory=False)


def confirmed(
    candidates: Sequence[Candidate],
    count: int,
    config: Path | None,
    deepspeed_json: Path,
    overrides: Sequence[str],
    data: str,
) -> list[Candidate]:
    """The first `count` candidates with what was measured of them, fastest first; then the others.

    One that fails its trial, whatever the reason, is left out.

    Raises:
        ConfigProblem: there is no run config, or all have failed.
    """
    if config is None:
        raise ConfigProblem(
            "--confirm trains, and needs a run config of its own", where="command line", fix="add --config"
        )
    tried, rest = [each for each in candidates if each.fits][:count], list(candidates[count:])
    stated = load_deepspeed_json(deepspeed_json).values
    with tempfile.TemporaryDirectory() as folder:
        cells = tuple(_cells(tried, stated, config, deepspeed_json, overrides))
        matrix = Matrix(Path("confirm"), "confirm", data, MEASURE, cells)
        speeds = {}
        for number, row in enumerate(run_matrix(matrix, Path(folder))):
            if row["status"] == "ok":
                speeds[number] = row["tokens_per_second"]["median"]
            why = row["why"]
    if not speeds:
        raise ConfigProblem(f"none of them runs here: {why}", where="--confirm", fix="see `bigtfm doctor`")
    found = [replace(tried[number], measured=speed) for number, speed in speeds.items()]
    return sorted(found, key=lambda each: -(each.measured or 0)) + rest


def _cells(
    tried: Sequence[Candidate], stated: dict[str, object], config: Path, deepspeed_json: Path,
    overrides: Sequence[str],
) -> Iterator[tuple[str, Cell]]:  # fmt: skip
    for candidate in tried:
        setting = candidate.setting
        values = json.loads(json.dumps(deepspeed_values(dict(stated), candidate)))
        yield "confirm", Cell.model_validate(
            {
                "model": str(config), "overrides": tuple(overrides), "deepspeed_config": str(deepspeed_json),
                "deepspeed": {"zero_optimization": values["zero_optimization"]}, "zero_stage": setting.stage,
                "precision": setting.precision, "ranks": setting.world_size,
                "micro_batch": setting.micro_batch, "accumulation": setting.accumulation,
                "recompute": setting.recompute, "attention": setting.attention,
            }
        )  # fmt: skip
