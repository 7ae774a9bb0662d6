"""bigtfm's own `train`, with its supervisor; and its model in a loop of plain torch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from statistics import mean

from bigtfm.bench.clock import StepClock
from bigtfm.config.launch import Launch
from bigtfm.config.sections import GuardSection
from bigtfm.resilience.lifeline import Enough, Lifeline
from bigtfm.resilience.supervisor import supervise
from peers import turns
from peers.workload import BETAS, CLIPPING, EPS, LEARNING_RATE, WEIGHT_DECAY, Workload


class TurnClock(StepClock):
    """Waits for a turn between two steps. The wait is counted as the phase before, which nobody looks at."""

    def __init__(self, lifeline: Lifeline, own: turns.Turns) -> None:
        assert lifeline.pulse is not None
        super().__init__(lifeline.pulse.memory, 10**9, 10**9, lambda: None)
        self._turns = own

    def _enter(self, phase: str, step: int | None, site: str) -> None:
        if phase == "data":
            self._turns.notes["data_seconds"] = mean(
                [step.phases["data"] for step in self.steps[-5:]] or [0.0]
            )
            try:
                self._turns.step()
            except turns.Enough:
                raise Enough from None
        super()._enter(phase, step, site)


def job_arguments(shape: Workload, folder: Path, stage: int) -> tuple[Path, list[str]]:
    """The DeepSpeed JSON, written, and the overrides of the run config."""
    name = f"{shape.name}-{stage}-{os.getpid()}"
    path = folder / f"{name}.json"
    path.write_text(json.dumps(shape.deepspeed(stage)), encoding="utf-8")
    return path, [*shape.run_config(folder), f"run.dir={folder}", f"run.name={name}", "run.steps=1000000"]


def run(shape: Workload, folder: Path, own: turns.Turns, stage: int) -> None:
    launch = Launch.from_environment(os.environ)
    path, overrides = job_arguments(shape, folder, stage)
    run_dir = folder / overrides[-2].partition("=")[2]

    def trainer(lifeline: Lifeline, _: object) -> None:
        from bigtfm.job import check_job
        from bigtfm.train import train

        lifeline.pulse, lifeline.saves = TurnClock(lifeline, own), False
        try:
            train(check_job(None, path, overrides, launch.world_size), launch, lifeline=lifeline)
        except Enough:
            return

    # A turn of the others is no hang.
    raise SystemExit(supervise(launch, run_dir, GuardSection(hang_seconds=0, start_seconds=0), trainer))


def run_plainly(shape: Workload, folder: Path, own: turns.Turns) -> None:
    """The same model, batches and optimizer without an engine."""
    import torch
    from plain_torch import decay_groups

    from bigtfm.assembly import batches_of, fresh_model
    from bigtfm.job import check_job
    from bigtfm.model.transformer import init_weights

    path, overrides = job_arguments(shape, folder, 0)
    job = check_job(None, path, overrides, 1)
    model, loader = fresh_model(job), batches_of(job, "train")
    init_weights(model)
    optimizer = torch.optim.AdamW(
        decay_groups(model, WEIGHT_DECAY), lr=LEARNING_RATE, betas=BETAS, eps=EPS, fused=True
    )
    own.step()
    for step in range(10**9):
        batch = loader.batch(step * shape.batch, shape.batch)
        loss_sum, _ = model(**batch.model_inputs())
        (loss_sum / batch.num_labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIPPING)
        optimizer.step()
        optimizer.zero_grad()
        own.notes["loss"] = loss_sum.item() / batch.num_labels
        own.step()
