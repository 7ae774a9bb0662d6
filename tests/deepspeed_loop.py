"""A user's own loop around one of our models, with DeepSpeed's `save_checkpoint`; run by rank_runner."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import rank_runner
import torch


def run(tasks: Sequence[dict[str, Any]], folder: Path, world_size: int) -> None:
    """Does the tasks one after the other in the same processes; each names what is done and its arguments.

    train: the loop below. go_on: an import by rank 0, which `bigtfm train` then goes on from, on all ranks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ranks = rank_runner.start([json.dumps(list(tasks))], folder, world_size, program=program)
    finished = rank_runner.finish(ranks, folder, timeout=280)
    assert finished.codes == [0] * world_size, finished.output[-3000:]


def program() -> None:
    from bigtfm.config.launch import Launch
    from bigtfm.engine import distributed

    launch = Launch.from_environment(os.environ, None)
    ranks = distributed.start(launch)
    for task in json.loads(sys.argv[1]):
        {"train": train, "go_on": go_on}[task.pop("do")](launch=launch, ranks=ranks, **task)
    ranks.close()


def train(
    config: str,
    overrides: list[str],
    out: str,
    save_at: int,
    steps: int,
    launch: Any,
    ranks: Any,
    variant: str = "",
) -> None:
    """Trains `steps` steps, saves after `save_at` and writes every loss to out/losses.json.

    The batches and the weights of the loss are those of a run; everything else is DeepSpeed's. variant:
    "wrapped" (the model is part of a module), "frozen" (its embedding is).
    """
    import deepspeed

    from bigtfm.assembly import batches_of
    from bigtfm.job import check_job
    from bigtfm.model.families import make_model
    from bigtfm.model.transformer import init_weights

    job = check_job(None, Path(config), overrides, launch.world_size)
    model = make_model(job.run.model, job.special.vocab_size, seed=7)
    init_weights(model)
    model.embed_tokens.weight.requires_grad_(variant != "frozen")
    matrices = [
        parameter for parameter in model.parameters() if parameter.dim() >= 2 and parameter.requires_grad
    ]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    values = json.loads(Path(config).read_text())
    engine, *_ = deepspeed.initialize(
        model=Wrapped(model) if variant == "wrapped" else model, model_parameters=groups, config=values
    )
    loader, losses = batches_of(job, "train"), []
    micro, turns = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
    for step in range(steps):
        first = (step * turns * ranks.world_size + ranks.rank) * micro
        batches = [loader.batch(first + turn * ranks.world_size * micro, micro) for turn in range(turns)]
        labels, total = ranks.sum([sum(batch.num_labels for batch in batches)])[0], 0.0
        for batch in batches:
            loss, _ = engine(**batch.model_inputs())
            engine.backward(loss * (ranks.world_size / labels), scale_wrt_gas=False)
            engine.step()
            total += float(loss)
        losses.append(ranks.sum([total])[0] / labels)
        if step + 1 == save_at:
            engine.save_checkpoint(out)
    if ranks.rank == 0:
        (Path(out) / "losses.json").write_text(json.dumps(losses))


class Wrapped(torch.nn.Module):
    """What a loop may put around a model."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)


def go_on(
    source: str,
    config: str,
    overrides: list[str],
    out: str,
    steps: int,
    launch: Any,
    ranks: Any,
    spoil: str = "",
) -> None:
    """Imports a checkpoint and trains on to `steps`. spoil: what the import forgets, for controls."""
    from bigtfm.engine import weights
    from bigtfm.import_deepspeed import import_deepspeed
    from bigtfm.job import check_job
    from bigtfm.train import train as train_run

    arguments = [*overrides, f"steps={steps}"]
    save = weights.save_training
    if ranks.rank == 0:
        if spoil:
            weights.save_training = forgetful(save, spoil)
        import_deepspeed(Path(source), Path(out), Path(config), None, arguments)
        weights.save_training = save
    ranks.from_first(None)
    place = [f"run.dir={Path(out).parent}", f"run.name={Path(out).name}"]
    train_run(check_job(None, Path(config), [*arguments, *place], launch.world_size), launch, ranks)


def forgetful(save: Callable[..., Path], what: str) -> Callable[..., Path]:
    """save_training that writes zeros for a moment, or for the "updates"."""

    def broken(
        root: Path, shapes: Any, tensors: Any, progress: Any, moments: Any, updates: float, state: Any
    ) -> Path:
        forgotten = ((name, tensor * 0 if name.endswith(f"|{what}") else tensor) for name, tensor in tensors)
        return save(root, shapes, forgotten, progress, moments, 0 if what == "updates" else updates, state)

    return broken
