"""Training: `train` holds the loop; what it calls stands below it in the order of the calls."""

from __future__ import annotations

import json
import math
import time
from contextlib import ExitStack, closing, nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bigtfm.config.launch import Launch
from bigtfm.config.problems import NoCheckpoint, NumericsProblem
from bigtfm.data.indexed import Split
from bigtfm.data.loader import Loader, TokenStream
from bigtfm.data.objectives import make_objective
from bigtfm.data.order import InOrder, Order, Windows, digest
from bigtfm.data.prefetch import Prefetcher
from bigtfm.data.streaming import StreamedTokens
from bigtfm.data.verification import Verification
from bigtfm.engine import checkpoint, distributed, fragments
from bigtfm.engine.build import build_engine, local_grad_norm
from bigtfm.engine.checkpoint import Progress, Retention
from bigtfm.engine.distributed import Ranks
from bigtfm.engine.probe import PROBE_TOKENS, Probe, require_same
from bigtfm.engine.saver import Saver
from bigtfm.evaluate import require_labels, validation_loss
from bigtfm.job import Job
from bigtfm.model.families import make_model
from bigtfm.model.heads import LanguageModel
from bigtfm.preflight import (
    require_room,
    require_same_on_all,
    told_when_out_of_memory,
    verification_of,
)
from bigtfm.recorder import Recorder
from bigtfm.resilience import events
from bigtfm.resilience.claim import claim
from bigtfm.resilience.lifeline import Lifeline
from bigtfm.resilience.numerics import require_finite
from bigtfm.resilience.signals import stopped
from bigtfm.run_directory import identity, lay_out, refuse_changes, starting_point


def train(job: Job, launch: Launch, ranks: Ranks | None = None, lifeline: Lifeline | None = None) -> None:
    """Trains to `job.resolved.steps`, an early stop or a signal, from what stands in the run directory on.

    Returning (exit code 0) means: finite weights, every step applied, a verified checkpoint.

    ranks: a process group that the caller has started and keeps, to train several jobs in one process.
    lifeline: the line to a supervisor, if there is one.

    Raises:
        Problem: its subclass says what failed and with which exit code the process should end.
    """
    run, dataset, steps = job.run, job.dataset, job.resolved.steps
    lifeline = lifeline or Lifeline()
    own_ranks = ranks is None
    ranks = ranks or distributed.start(launch, pulse=lifeline.pulse)
    lifeline.meet(ranks.from_first)
    claimed = ExitStack()
    with ranks.together("claiming the run directory"):
        if ranks.rank == 0:
            claimed.enter_context(claim(run.run_dir))
            require_room(job)
    require_same_on_all(job, ranks)
    pulse = ranks.pulse
    pulse.enter("build")
    engine = build_engine(partial(fresh_model, job), job.deepspeed_values, run.compute)
    loader = batches_of(job, "train")
    validation = batches_of(job, "validation") if dataset.header.splits["validation"].tokens else None
    if validation is not None:
        require_labels(validation, run.eval.tokens)
    progress, probe = resume(job, engine, ranks)
    stream = loader.stream if isinstance(loader.stream, StreamedTokens) else None
    if stream is not None:
        start_stream(job, stream, progress, ranks)
    with ranks.together("writing the run directory"):
        if ranks.rank == 0:
            lay_out(job)

    micro_batch, accumulation = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
    stride = ranks.world_size * micro_batch
    data = json.dumps(progress.identity["data"], sort_keys=True)
    with (
        claimed,
        verification_of(job, ranks) as verification,
        Recorder(job, progress, ranks.device_name) if ranks.rank == 0 else nullcontext() as recorder,
        closing(make_saver(job, engine, ranks, probe, progress)) as saver,
        Prefetcher(loader, run.data.workers, pin_memory=True) as reader,
        closing(stream) if stream is not None else nullcontext(),
        lifeline.heeded(),
        told_when_out_of_memory(job, ranks, progress, lifeline),
    ):
        while progress.step < steps and not out_of_patience(run.eval.patience, progress):
            began = time.perf_counter()
            pulse.enter("data", step=progress.step + 1)
            first = progress.samples + ranks.rank * micro_batch
            starts = range(first, first + stride * accumulation, stride)
            batches = reader.step(starts, micro_batch, stride * accumulation)
            failed, labels, stop_asked, interrupted, orphaned = ranks.sum(
                [
                    saver.failed or verification.failed,
                    sum(batch.num_labels for batch in batches),
                    *lifeline.stop.flags,
                ]
            )
            if failed:
                end_for_storage(saver, verification, ranks)
            if stop_asked:
                saver.save(progress)
                saver.wait()
                raise stopped(progress.step, run.run_dir, interrupted, orphaned)

            loss_sum = torch.zeros((), device=ranks.device)
            grad_norm = None
            for turn, batch in enumerate(batches):
                pulse.enter("forward")
                inputs = batch.to(ranks.device).model_inputs()
                loss, _ = engine(**inputs, l1_scale=labels / (ranks.world_size * accumulation))
                # The gradient of sum(token losses) / labels in the global batch: DeepSpeed averages
                # over ranks, hence the factor; else it would average averages.
                pulse.enter("backward")
                engine.backward(loss * (ranks.world_size / max(labels, 1)), scale_wrt_gas=False)
                loss_sum += loss.detach()
                if turn == accumulation - 1:
                    grad_norm, lr = local_grad_norm(engine), engine.get_lr()[0]
                pulse.enter("update")
                engine.step()

            taken = loader.order.pieces(progress.samples, stride * accumulation)
            progress.step += 1
            progress.samples += stride * accumulation
            progress.tokens += taken.num_tokens
            progress.stream = stream.mark_of(progress.samples) if stream is not None else None
            total_loss = ranks.sum([float(loss_sum)])[0]
            grad_norm = float(engine.get_global_grad_norm() if grad_norm is None else grad_norm)
            require_finite(progress.step, total_loss, grad_norm, overflow_allowed=engine.fp16_enabled())
            mean_loss = total_loss / labels if labels else math.nan  # no token of the step had a label
            row: dict[str, Any] = {"step": progress.step, "loss": mean_loss, "lr": lr, "grad_norm": grad_norm}

            seconds = time.perf_counter() - began
            last = progress.step == steps
            improved = False
            if validation is not None and (last or due(run.eval.every, progress.step)):
                row["val_loss"] = validation_loss(engine, validation, ranks, micro_batch, run.eval.tokens)
                require_finite(progress.step, row["val_loss"], 0.0, overflow_allowed=False)
                improved = note_evaluation(engine, progress, row["val_loss"], run.eval.min_delta)
            pulse.enter("record")
            if recorder is not None:
                rate = taken.num_tokens / seconds
                recorder.step(row, progress.tokens, rate, seconds, digest(taken.ids, of=data), improved)
            if last or improved or due(run.save.every, progress.step):
                saver.save(progress)
            lifeline.stepped()
        pulse.enter("end")
        last_checkpoint = finish(job, engine, progress, saver, ranks)
    if recorder is not None:
        recorder.summary(progress, last_checkpoint)
    if own_ranks:
        ranks.close()


def end_for_storage(saver: Saver, verification: Verification, ranks: Ranks) -> None:
    """Raises, on all ranks, why a save has failed or which file of the data is not what it was."""
    with ranks.together("reading the data"):
        verification.require_sound()
    saver.wait()


def fresh_model(job: Job) -> LanguageModel:
    """The model, to be filled with initial weights or a checkpoint's."""
    run, compute = job.run, job.run.compute.model_copy(update={"attention": job.attention.name})
    return make_model(
        run.model, job.special.vocab_size, seed=run.run.seed, objective=run.objective, compute=compute
    )


def batches_of(job: Job, split: str) -> Loader:
    """A split's batches: training in each epoch's own order, or from a stream; validation as it stands."""
    run = job.run
    stream: TokenStream = job.dataset.split(split)
    order: Order = InOrder(Windows(stream.num_tokens, run.seq_len, full=False))
    if split == "train":
        stream = Split.join([dataset.split(split) for dataset in job.datasets])
        if job.source is not None:
            stream = StreamedTokens.like(job.dataset, job.source, run.seq_len)
        order = job.order
    objective = make_objective(run.objective, run.objective_kind, job.special, run.run.seed)
    return Loader(stream, order, run.seq_len, job.dataset.vocab_size, objective)


def start_stream(job: Job, stream: StreamedTokens, progress: Progress, ranks: Ranks) -> None:
    """Puts a stream where the run stands."""
    stream.start(
        progress.samples,
        progress.stream,
        accept_changes="data" in job.run.resume.allow,
        say=print if ranks.rank == 0 else lambda _: None,
    )


def resume(job: Job, engine: Any, ranks: Ranks) -> tuple[Progress, Probe | None]:
    """Fills the engine from the newest checkpoint of the run directory, if there is one.

    A fresh run begins with its initial weights, or with another's (run.init_from).

    Raises:
        ConfigProblem: something that decides the curve has changed.
        NoCheckpoint: none verifies, or the loss of the checkpoint's probe is not what it was.
    """
    ranks.pulse.enter("resume")
    now = identity(job)
    found = checkpoint.newest(job.checkpoints, ranks)
    if found is None:
        if job.run.run.init_from is not None:
            checkpoint.start_from(starting_point(job, now, ranks), engine)
        return Progress(identity=now), fresh_probe(job, ranks)
    state = checkpoint.read_state(found)
    allow, before = job.run.resume.allow, state["progress"]["identity"]
    refuse_changes(before, now, allow, job.run.run_dir)
    same_optimizer = before["recipe"]["optimizer"]["type"] == now["recipe"]["optimizer"]["type"]
    progress = checkpoint.load(found, engine, ranks, moments=same_optimizer)
    if before["recipe"] != now["recipe"] and hasattr(engine.lr_scheduler, "last_batch_iteration"):
        engine.lr_scheduler.step(
            engine.lr_scheduler.last_batch_iteration
        )  # the new recipe's lr, at this step
    progress.identity = now
    same_mathematics = all(before[part] == now[part] for part in ("model", "objective"))
    if state.get("probe") is None or not same_mathematics:
        return progress, fresh_probe(job, ranks)
    probe = Probe.from_json(state["probe"], setting_of(job, ranks))
    if "probe" not in allow:
        loss = ranks.from_first(probe.loss(engine, ranks.device))
        require_same(
            state["probe"],
            probe,
            loss,
            lambda: checkpoint.changed_tensors(found, checkpoint.engine_checksums(engine, ranks)),
            where=str(found),
        )
    return progress, probe


def fresh_probe(job: Job, ranks: Ranks) -> Probe | None:
    """The first short sample of the data set in which something is to be predicted; None: of 64 none is."""
    run, split = job.run, job.dataset.split("train")
    seq_len = min(run.seq_len, PROBE_TOKENS)
    objective = make_objective(run.objective, run.objective_kind, job.special, run.run.seed)
    order = InOrder(Windows(split.num_tokens, seq_len, full=False))
    loader = Loader(split, order, seq_len, job.dataset.vocab_size, objective)
    for sample in range(min(64, loader.num_samples)):
        batch = loader.batch(sample, 1)
        if batch.num_labels:
            return Probe(batch.model_inputs(), setting_of(job, ranks))
    return None


def setting_of(job: Job, ranks: Ranks) -> dict[str, str]:
    """What may move a loss beyond rounding in the last digits, besides the weights."""
    versions = {name: version(name) for name in ("torch", "deepspeed")}
    return {
        "precision": job.resolved.precision,
        "attention": job.attention.name,
        "device": ranks.device_name,
        **versions,
    }


def due(every: int, step: int) -> bool:
    """Whether something done every so many steps (0: never) is done after `step`."""
    return every > 0 and step % every == 0


def out_of_patience(patience: int, progress: Progress) -> bool:
    return 0 < patience <= progress.stale_evaluations


def note_evaluation(engine: Any, progress: Progress, val_loss: float, min_delta: float) -> bool:
    """Keeps the best evaluation, tells a schedule that listens, and says whether this one is the best."""
    if hasattr(engine.lr_scheduler, "observe"):
        engine.lr_scheduler.observe(val_loss)
    improved = progress.best_loss is None or val_loss < progress.best_loss - min_delta
    if improved:
        progress.best_loss, progress.best_step, progress.stale_evaluations = val_loss, progress.step, 0
    else:
        progress.stale_evaluations += 1
    return improved


def make_saver(job: Job, engine: Any, ranks: Ranks, probe: Probe | None, progress: Progress) -> Saver:
    """What writes this run's checkpoints."""
    options = job.run.save
    retention = Retention(options.keep, options.keep_every)
    return Saver(
        job.checkpoints,
        engine,
        ranks,
        probe,
        retention,
        saved=progress.step,
        asynchronous=options.asynchronous,
        retry_seconds=options.retry_seconds,
        tell=partial(events.tell, job.run.run_dir),
    )


def finish(job: Job, engine: Any, progress: Progress, saver: Saver, ranks: Ranks) -> Path:
    """The last checkpoint, verified, of weights that are all finite.

    Raises:
        NumericsProblem: a weight is not finite.
        NoCheckpoint: the checkpoint on the disk is not what was written.
    """
    broken = [
        f.name for f in fragments.owned_fragments(engine) if not bool(torch.isfinite(f.view(f.flat)).all())
    ]
    for names in ranks.gather(broken):
        if names:
            raise NumericsProblem(
                f"weight {names[0]} is not finite",
                where=f"step {progress.step}",
                fix="start the same command again: it resumes from the last checkpoint, which is finite",
            )
    saver.save(progress)  # after an early stop; else it is there
    saver.wait()
    path = checkpoint.folder_of(job.checkpoints, progress.step)
    if checkpoint.newest(job.checkpoints, ranks) != path:
        raise NoCheckpoint(
            "the last checkpoint does not verify", where=str(path), fix="check the disk, then resume"
        )
    return path
