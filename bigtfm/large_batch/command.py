"""`bigtfm noise-scale`: from a run's checkpoints and data to which batch pays; alone, or as several ranks."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bigtfm.assembly import shuffled
from bigtfm.config.batch import GlobalBatch
from bigtfm.config.launch import Launch
from bigtfm.config.problems import ConfigProblem
from bigtfm.config.sections import DataSection, RunSection, TuneSection
from bigtfm.console import progress_bar
from bigtfm.data.loader import Loader
from bigtfm.data.special import SpecialIds
from bigtfm.engine import checkpoint
from bigtfm.large_batch.gradients import Gradients, gradients_of
from bigtfm.large_batch.noise import NoiseScale, noise_scale
from bigtfm.mlflow_sender import read_json
from bigtfm.run_directory import SavedRun, data_of, open_run, saved_run, stated_by

Step = Callable[[int, int], Any]


@dataclass(frozen=True)
class Measured:
    """The noise scale of one checkpoint."""

    step: int
    loss: float  # nats a token, of the samples that it was measured on
    tokens_per_sample: float  # predicted ones
    scale: NoiseScale
    batch: int | None  # sequences of the run's step behind it; None: an imported run has none


@dataclass(frozen=True)
class Report:
    """What `bigtfm noise-scale` finds, checkpoints in the order of their steps."""

    run: str
    micro_batch: int
    micro_batches: int
    measured: tuple[Measured, ...]


def measure(
    run_dir: Path,
    *,
    batches: int = 64,
    micro_batch: int | None = None,
    data: Path | None = None,
    steps: Sequence[int] = (),
    every_checkpoint: bool = False,
) -> Report | None:
    """Measures on the samples that the run comes to next, in its own order.

    As one of several ranks each takes every n-th micro-batch, and None is returned but by the first.

    batches: how many micro-batches. micro_batch: sequences in each; None: the run's own, else 4. data: a
    prepared data set; None: the run's own. steps: of which checkpoints; (): the newest.

    Raises:
        ConfigProblem: the run names no data set, or streams it, or trains a part of its weights.
        DataProblem: the data set is missing, too small, or has another tokenizer.
        NoCheckpoint: the run has none, or not this one. NumericsProblem: a gradient is not finite.
    """
    from bigtfm.engine import distributed

    stated = stated_by(run_dir)
    _require_all_trained(run_dir, stated)
    kept = sorted(checkpoint.steps_in(run_dir / "checkpoints")) if every_checkpoint else []
    resolved = read_json(run_dir / "resolved.json")
    size = micro_batch or resolved.get("micro_batch", 4)
    launch = Launch.from_environment(os.environ, None)
    ranks = distributed.start(launch) if launch.world_size > 1 else None
    rank, world_size = (ranks.rank, ranks.world_size) if ranks is not None else (0, 1)
    device = ranks.device if ranks is not None else "cuda" if torch.cuda.is_available() else "cpu"
    measured = []
    with progress_bar("measuring", on=rank == 0) as tell:
        for step in kept or steps or (None,):
            saved = saved_run(run_dir, step)
            model, _, special = open_run(run_dir, step)
            loader = _loader(saved, stated, data, special)
            progress = checkpoint.read_state(saved.checkpoint)["progress"]
            first = _first(loader, progress.get("samples", 0), batches * size)
            starts = range(first + rank * size, first + batches * size, world_size * size)
            part = gradients_of(model.to(device), loader, starts, size, tell)
            parts = ranks.gather(part) if ranks is not None else [part]
            if rank == 0:
                at = progress.get("step", 0)
                measured.append(_measured(Gradients.of(parts), at, size, _batch(resolved, at)))
    if ranks is not None:
        ranks.close()
    return Report(str(run_dir), size, batches, tuple(measured)) if rank == 0 else None


def _require_all_trained(run_dir: Path, stated: dict[str, Any]) -> None:
    tune = TuneSection.model_validate(stated.get("tune", {}))
    if tune.freezes:
        raise ConfigProblem(
            "the run trains a part of its weights ([tune]), and what would be measured is the noise of all",
            where=str(run_dir),
            fix="measure a run that trains all",
        )


def _measured(found: Gradients, step: int, size: int, batch: int | None) -> Measured:
    labels = found.labels.sum()
    loss, tokens = float(found.losses.sum() / labels), float(labels / (size * len(found.labels)))
    return Measured(step, loss, tokens, noise_scale(found.gram, size), batch)


def _batch(resolved: dict[str, Any], step: int) -> int | None:
    """Sequences of the step behind `step`."""
    batch = resolved.get("batch")
    return GlobalBatch(**batch).at(step + 1) if batch else resolved.get("global_batch")


def _loader(saved: SavedRun, stated: dict[str, Any], data: Path | None, special: SpecialIds) -> Loader:
    """The training batches of the run, or those that it would have of another data set."""
    identity = checkpoint.read_state(saved.checkpoint)["progress"]["identity"]
    seed = identity.get("seed", RunSection().seed)
    section = saved.run.data.model_copy(update={"path": str(data)})
    if data is None and stated:
        section = DataSection.model_validate(stated["data"])
    if section.stream:
        raise ConfigProblem(
            "the run's data are a stream, which is not read a second time",
            where=str(saved.checkpoint),
            fix="pass --data with a prepared sample of the same text and tokenizer",
        )
    run = saved.run.model_copy(update={"run": RunSection(seed=seed), "data": section})
    return shuffled(run, data_of(saved, stated, data), special)


def _first(loader: Loader, samples: int, needed: int) -> int:
    """The first sample to measure on: the run's next one, or earlier where too few are left."""
    if loader.num_samples < needed:
        raise ConfigProblem(
            f"the data have {loader.num_samples} sequences, and {needed} are asked for",
            where="bigtfm noise-scale",
            fix="pass fewer --batches, or a smaller --micro-batch",
        )
    return min(samples, loader.num_samples - needed)
