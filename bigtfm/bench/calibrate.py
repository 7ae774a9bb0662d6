"""The rates of this machine for the planner, from trainings of a few steps: fitted to their times by kind."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median

from bigtfm.bench.cell import Trial
from bigtfm.bench.matrix import Cell, Matrix, Measure
from bigtfm.bench.results import Row
from bigtfm.bench.runner import devices_of, environment_row, run_matrix
from bigtfm.config.problems import ConfigProblem
from bigtfm.job import Job, check_job
from bigtfm.planner.hardware import Device, device_of
from bigtfm.planner.setting import Setting, setting_of
from bigtfm.planner.step_time import Rates, Work, work_of

MEASURE = Measure(warm_up=3, steps=8, memory=False, timeout_seconds=300)
# Which kinds of work a part of the step is made of.
PARTS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("forward", "backward"): ("products", "attention", "traffic", "logits", "operations", "gathered"),
    ("update",): ("update", "tensors"),
    ("collectives",): ("sent", "calls"),
    ("data", "record"): ("steps",),
}


def calibrate(path: Path, ranks: int, precision: str, tell: Callable[[str], None]) -> None:
    """Trains the sweep on `ranks` ranks here, and writes what was found.

    tell: is given a line after each training.

    Raises:
        ConfigProblem: a training of the sweep has failed.
    """
    cells = tuple(sweep(ranks, precision))
    with tempfile.TemporaryDirectory() as folder:
        matrix = Matrix(Path("calibration"), "calibration", "data/quickstart", MEASURE, cells)
        rows = []
        for row in run_matrix(matrix, Path(folder)):
            _require_ok(row)
            rows.append(row)
            tell(f"calibration {len(rows)} of {len(cells)}: {median(row['seconds']):.3f} s a step")
        fit_rows(rows, Path(folder)).write(path)


def require_here(wanted: Device | None, name: str, ranks: int) -> None:
    """Refuses to measure for another device than this machine's, or for more ranks than it has of them.

    wanted: the device that is planned for; None: a CPU. name: as the user calls it.

    Raises:
        ConfigProblem: this machine can't say.
    """
    here = devices_of(environment_row())
    if device_of(here[0]) != wanted or (wanted is None and here != ["cpu"]):
        fix = (
            f"run it where the job will run, or plan for --gpu {'cpu' if here == ['cpu'] else repr(here[0])}"
        )
        raise ConfigProblem(f"this machine has {here[0]}, not {name}", where="command line: --gpu", fix=fix)
    if wanted is not None and ranks > len(here):
        raise ConfigProblem(
            f"this machine has {len(here)} GPUs, and {ranks} are to be measured",
            where="command line: --gpus",
            fix=f"measure with --gpus {len(here)} --calibrate FILE first, then plan with --calibration FILE",
        )


def sweep(ranks: int, precision: str) -> Iterator[tuple[str, Cell]]:
    """Small trainings that differ in what they are made of; on a GPU eight times as wide and long."""
    import torch

    scale = 8 if torch.cuda.is_available() else 1

    def cell(hidden: int, layers: int, seq_len: int, micro_batch: int, stage: int, **more: object) -> Cell:
        hidden, seq_len = hidden * scale, seq_len * scale
        shape = [f"model.hidden_size={hidden}", f"model.num_layers={layers}"]
        shape += [f"model.num_attention_heads={hidden // 32}", f"model.max_seq_len={seq_len}"]
        overrides = (*shape, *(str(each) for each in more.pop("overrides", ())))  # type: ignore[attr-defined]
        bucket = {"zero_optimization": {"reduce_bucket_size": 50_000_000}}
        return Cell.model_validate(
            {
                "overrides": overrides, "deepspeed": bucket, "zero_stage": stage, "precision": precision,
                "ranks": ranks, "micro_batch": micro_batch, **more,
            }
        )  # fmt: skip

    for each in (
        cell(192, 4, 128, 4, 0),
        cell(192, 4, 128, 16, 2),
        cell(192, 4, 128, 4, 3),
        cell(384, 2, 128, 8, 0),
        cell(384, 4, 64, 2, 1),
        cell(128, 8, 64, 4, 2, accumulation=2),
        cell(128, 8, 64, 4, 3, accumulation=2),
        cell(96, 4, 512, 2, 0),
        cell(128, 2, 128, 8, 1, overrides=("model.vocab_size=16384",)),
    ):
        yield "calibration", each


def setting_of_job(job: Job, device: str = "cpu", runs: int = 2) -> Setting:
    """What the planner has to know of a checked job on this machine."""
    return setting_of(
        job.run,
        job.deepspeed,
        vocab_size=job.resolved.vocab_size,
        world_size=job.resolved.world_size,
        device=device,
        attention=job.attention.name,
        runs=runs,
    )


def setting_of_row(row: Row, out: Path) -> Setting:
    """The setting of a result, by the files that its trial left in the benchmark's folder."""
    trial = Trial.read(out / "cells" / row["key"] / "trial.json")
    job = check_job(Path(trial.config), Path(trial.deepspeed_json), trial.overrides, row["ranks"])
    return setting_of_job(job, row.get("device", "cpu"))


def fit_rows(rows: Sequence[Row], out: Path) -> Rates:
    """Rates by which the planner gives the times of these results; `out`: their benchmark's folder.

    Raises:
        ConfigProblem: one of them has failed.
    """
    for row in rows:
        _require_ok(row)
    works = [work_of(setting_of_row(row, out)) for row in rows]
    values = dict.fromkeys(asdict(works[0]), 0.0)
    for phases, kinds in PARTS.items():
        times = [sum(row["split"][phase] for phase in phases) for row in rows]
        values |= fit(works, times, kinds, [median(row["seconds"]) for row in rows])
    device, threads = rows[0]["device"], rows[0]["threads_used"]
    source = f"measured: {len(rows)} trainings on {rows[0]['ranks']} ranks, {device}, {threads} threads each"
    return Rates(
        **values, source=source, device=device, precision=rows[0]["precision"], ranks=rows[0]["ranks"]
    )


def _require_ok(row: Row) -> None:
    if row["status"] != "ok":
        raise ConfigProblem(
            f"{row['key']} ended as {row['status']}: {row['why']}",
            where="calibration",
            fix="see `bigtfm doctor`, or plan without a calibration",
        )


def fit(
    works: Sequence[Work], times: Sequence[float], kinds: Sequence[str], scales: Sequence[float]
) -> dict[str, float]:
    """Seconds of a unit of each kind, none negative: least squares of the errors relative to `scales`.

    By coordinates: each in turn takes its best value given the others, until nothing moves.
    """
    columns = {
        kind: [getattr(work, kind) / scale for work, scale in zip(works, scales, strict=True)]
        for kind in kinds
    }
    target = [seconds / scale for seconds, scale in zip(times, scales, strict=True)]
    found = dict.fromkeys(kinds, 0.0)
    for _ in range(20_000):
        moved = 0.0
        for kind in kinds:
            column = columns[kind]
            square = sum(x * x for x in column)
            if not square:
                continue
            rest = [
                y - sum(columns[other][n] * found[other] for other in kinds if other != kind)
                for n, y in enumerate(target)
            ]
            value = max(0.0, sum(x * y for x, y in zip(column, rest, strict=True)) / square)
            moved = max(moved, abs(value - found[kind]) * square**0.5)
            found[kind] = value
        if moved < 1e-9:
            break
    return found


def read_rows_of(out: Path) -> list[Row]:
    """The results of a benchmark's folder that ended well."""
    lines = (out / "results.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["status"] == "ok"]
