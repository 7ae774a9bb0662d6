"""The oracle: what a recipe means in plain torch. One process, one backward pass a step, no DeepSpeed.

Every step takes the global batch whole and minimises sum(token losses) / number of labels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bigtfm.assembly import batches_of, fresh_model
from bigtfm.data.loader import Batch
from bigtfm.engine.weights import read_weights, weight_shapes
from bigtfm.job import Job
from bigtfm.model.transformer import init_weights


@dataclass(frozen=True)
class Trained:
    """What a training came to, step by step and in the end."""

    losses: list[float]  # nats a label
    grad_norms: list[float]  # before clipping; none where DeepSpeed tells none
    weights: dict[str, NDArray[np.float32]]  # after the last step


@dataclass(frozen=True)
class Difference:
    """The largest relative differences of two trainings; a weight's to the largest of its tensor."""

    loss: float
    grad_norm: float | None  # None: one of them tells none
    weights: float

    @property
    def worst(self) -> float:
        return float(np.max([self.loss, self.weights, self.grad_norm or 0.0]))


def difference(one: Trained, oracle: Trained) -> Difference:
    """How far `one` is from `oracle`; NaN where it holds one."""
    assert one.weights.keys() == oracle.weights.keys()
    weights = [
        np.abs(one.weights[name] - right).max() / np.abs(right).max()
        for name, right in oracle.weights.items()
    ]
    return Difference(
        loss=relative(one.losses, oracle.losses),
        grad_norm=relative(one.grad_norms, oracle.grad_norms) if one.grad_norms else None,
        weights=float(np.max(weights)),
    )


def relative(values: Sequence[float], expected: Sequence[float]) -> float:
    """The largest relative difference, of as many numbers."""
    assert len(values) == len(expected)
    return float(np.max(np.abs(np.array(values) / np.array(expected) - 1.0)))


def train_plainly(job: Job, parts: int = 1) -> Trained:
    """Trains `job` to its last step.

    parts: add up the gradients of so many parts of the batch, which rounds otherwise, and no more.
    """
    values, schedule = job.deepspeed_values, job.resolved.batch
    params, clipping = values["optimizer"]["params"], values["gradient_clipping"]
    assert values["optimizer"]["type"] == "AdamW", "the oracle knows AdamW"
    model = fresh_model(job)
    init_weights(model)
    groups, betas = decay_groups(model, params["weight_decay"]), tuple(params["betas"])
    optimizer = torch.optim.AdamW(groups, lr=params["lr"], betas=betas, eps=params["eps"])
    losses, norms = [], []
    for step in range(job.resolved.steps):
        first, size = schedule.samples(step), schedule.at(step + 1)
        batches = [batch_of(job, first + part * size // parts, size // parts) for part in range(parts)]
        labels = sum(int((batch.labels != -100).sum()) for batch in batches)
        loss = 0.0
        for batch in batches:
            loss_sum, _ = model(**batch.model_inputs())
            (loss_sum / labels).backward()
            loss += loss_sum.item() / labels
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), clipping or math.inf)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
    return Trained(losses, norms, {name: p.detach().numpy() for name, p in model.named_parameters()})


def batch_of(job: Job, first_sample: int, count: int) -> Batch:
    """`count` consecutive training samples in one batch."""
    return batches_of(job, "train").batch(first_sample, count)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Weight decay for matrices, none for vectors and what the model exempts."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in model.parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)  # under ZeRO-3 a parameter is flat
        groups[len(shape) > 1 and not getattr(parameter, "no_weight_decay", False)].append(parameter)
    return [
        {"params": group, "weight_decay": weight_decay if decays else 0.0}
        for decays, group in groups.items()
        if group
    ]


def read_run(run_dir: Path) -> Trained:
    """What the run directory tells of a training, with the weights of its last checkpoint."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    last = max((run_dir / "checkpoints").glob("step-*"))
    assert last.name == f"step-{rows[-1]['step']:08d}"
    weights = {name: tensor.numpy() for name, tensor in read_weights(last, weight_shapes(last))}
    return Trained([row["loss"] for row in rows], [row["grad_norm"] for row in rows], weights)
