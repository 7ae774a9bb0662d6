"""Training by DeepSpeed alone, as its documentation shows it: a micro-batch's mean loss, backward, step."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import deepspeed
from plain_torch import Trained, batch_of, decay_groups

from bigtfm.assembly import fresh_model
from bigtfm.engine.distributed import Ranks
from bigtfm.job import Job
from bigtfm.model.transformer import init_weights


def train_raw(job: Job, ranks: Ranks) -> Trained:
    """Trains `job` to its last step, with the model, the initial weights and the batches of bigtfm.

    The loss of a step is what users log: the mean over micro-batches and ranks.
    """
    config = copy.deepcopy(job.deepspeed_values)
    config["optimizer"]["params"]["torch_adam"] = True  # no compilation of DeepSpeed's own on a CPU
    engine = _engine(job, config)
    micro_batch, accumulation = job.resolved.micro_batch, job.resolved.accumulation
    losses, norms = [], []
    for step in range(job.resolved.steps):
        means = []
        for turn in range(accumulation):
            place = turn * ranks.world_size + ranks.rank
            batch = batch_of(job, step * job.resolved.global_batch + place * micro_batch, micro_batch)
            loss_sum, labels = engine(**batch.model_inputs())
            loss = loss_sum / labels.clamp(min=1)  # torch's own mean over no labels is NaN
            engine.backward(loss)
            engine.step()
            means.append(loss.item())
        losses.append(sum(ranks.sum(means)) / accumulation / ranks.world_size)
        if (norm := engine.get_global_grad_norm()) is not None:  # there is none at stage 0
            norms.append(float(norm))
    parameters = dict(engine.module.named_parameters())
    sharded = engine.zero_optimization_stage() == 3
    with deepspeed.zero.GatheredParameters(list(parameters.values())) if sharded else nullcontext():
        weights = {name: weight.detach().clone().numpy() for name, weight in parameters.items()}
    return Trained(losses, norms, weights)


def _engine(job: Job, config: dict[str, object]) -> deepspeed.DeepSpeedEngine:
    sharded = job.resolved.zero_stage == 3
    with deepspeed.zero.Init(config_dict_or_path=copy.deepcopy(config)) if sharded else nullcontext():
        model = fresh_model(job)
    gather = deepspeed.zero.GatheredParameters
    init_weights(model, lambda weight: gather([weight], modifier_rank=0) if sharded else nullcontext())
    groups = decay_groups(model, job.deepspeed_values["optimizer"]["params"]["weight_decay"])
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=config)
    return engine
