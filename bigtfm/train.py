"""Training: `train` holds the loop; what it calls stands below it in the order of the calls."""

from __future__ import annotations

import json
import math
import time
from contextlib import ExitStack, closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from bigtfm.assembly import batches_of, fresh_model, learn_from_teacher, require_samples, resume, start_stream
from bigtfm.config.launch import Launch
from bigtfm.config.problems import NoCheckpoint
from bigtfm.data.loader import Loader
from bigtfm.data.order import digest
from bigtfm.data.prefetch import Prefetcher
from bigtfm.data.streaming import StreamedTokens
from bigtfm.data.verification import Verification
from bigtfm.engine import checkpoint, distributed, gradients, replicas
from bigtfm.engine.build import build_engine
from bigtfm.engine.checkpoint import Progress, Retention
from bigtfm.engine.distributed import Ranks
from bigtfm.engine.probe import Probe
from bigtfm.engine.saver import Saver
from bigtfm.evaluate import require_labels, validation_loss
from bigtfm.job import Job
from bigtfm.mishaps import find_culprit, go_back, note_left_out, note_spike
from bigtfm.preflight import (
    require_room,
    require_same_on_all,
    told_when_out_of_memory,
    told_when_too_large,
    verification_of,
)
from bigtfm.recorder import Recorder
from bigtfm.resilience import events, numerics, spikes
from bigtfm.resilience.claim import claim
from bigtfm.resilience.lifeline import Lifeline
from bigtfm.resilience.signals import stopped
from bigtfm.run_directory import lay_out


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
            if lifeline.saves:
                require_room(job)
    require_same_on_all(job, ranks)
    pulse = ranks.pulse
    pulse.enter("build")
    with told_when_too_large(job, ranks):
        engine = build_engine(partial(fresh_model, job), job.deepspeed_values, job.compute, run.tune)
    learn_from_teacher(job, engine.module, ranks)
    loader = batches_of(job, "train")
    validation = batches_of(job, "validation") if dataset.header.splits["validation"].tokens else None
    if validation is not None:
        require_labels(validation, run.eval.tokens)
    progress, probe = resume(job, engine, ranks)
    require_samples(job, progress)
    stream = loader.stream if isinstance(loader.stream, StreamedTokens) else None
    if stream is not None:
        start_stream(job, stream, progress, ranks)
    with ranks.together("writing the run directory"):
        if ranks.rank == 0:
            lay_out(job)

    micro_batch = engine.train_micro_batch_size_per_gpu()
    stride = ranks.world_size * micro_batch
    data = json.dumps(progress.identity["data"], sort_keys=True)
    with (
        claimed,
        verification_of(job, ranks) as verification,
        Recorder(job, progress, ranks.device_name) if ranks.rank == 0 else nullcontext() as recorder,
        closing(make_saver(job, engine, ranks, probe, progress, recorder)) as saver,
        Prefetcher(loader, run.data.workers, pin_memory=True) as reader,
        closing(stream) if stream is not None else nullcontext(),
        lifeline.heeded(),
        told_when_out_of_memory(job, ranks, progress, lifeline),
    ):
        if validation is not None and progress.unevaluated:
            late: dict[str, Any] = {}
            improved = evaluate(job, engine, validation, progress, late, ranks, lifeline)
            if not late:
                save_and_stop(job, progress, saver, ranks, lifeline)
            if recorder is not None:
                recorder.late_evaluation(late, improved)
        while progress.step < steps and not out_of_patience(run.eval.patience, progress):
            began = time.perf_counter()
            pulse.enter("data", step=progress.step + 1)
            progress.samples = spikes.position(progress.samples, progress.spikes)
            lr_factor = spikes.lr_factor(progress.step + 1, progress.spikes)
            size = job.resolved.batch.at(progress.step + 1)
            gradients.begin(engine, size)
            first = progress.samples + ranks.rank * micro_batch
            batches = reader.step(range(first, first + size, stride), micro_batch, size)
            labels, stop_asked, failed = ranks.sum(
                [
                    sum(batch.num_labels for batch in batches),
                    lifeline.stop.signal,
                    saver.failed or verification.failed,
                ]
            )
            if failed:
                end_for_storage(saver, verification, ranks)
            if stop_asked:
                save_and_stop(job, progress, saver, ranks, lifeline)

            loss_sum = torch.zeros((), device=ranks.device)
            for batch in batches:
                pulse.enter("forward")
                inputs = batch.to(ranks.device).model_inputs()
                loss, _ = engine(**inputs, l1_scale=labels / (ranks.world_size * len(batches)))
                # The gradient of sum(token losses) / labels in the global batch: DeepSpeed averages
                # over ranks, hence the factor; else it would average averages.
                pulse.enter("backward")
                scale = ranks.world_size / max(labels, 1)
                engine.backward(gradients.marked(loss) * scale, scale_wrt_gas=False)
                loss_sum += loss.detach()
                pulse.enter("update")
                grad_norm, lr = gradients.step(engine, ranks, lr_factor)

            taken = loader.order.pieces(progress.samples, size)
            progress.step += 1
            progress.samples += size
            progress.tokens += taken.num_tokens
            progress.stream = stream.mark_of(progress.samples) if stream is not None else None
            total_loss, left_out = ranks.sum([float(loss_sum), not engine.was_step_applied()])
            mean_loss = total_loss / labels if labels else math.nan  # no token of the step had a label
            row: dict[str, Any] = {"step": progress.step, "loss": mean_loss, "lr": lr, "grad_norm": grad_norm}
            if progress.spikes:
                row["rewinds"] = len(progress.spikes)
            if left_out and not gradients.is_of_loss_scale(engine, total_loss):
                row["skipped"] = True
                culprit = find_culprit(engine, ranks, progress.step, batches, labels, float(loss_sum))
                note_left_out(job, progress, total_loss, culprit, recorder)

            seconds = time.perf_counter() - began
            last = progress.step == steps
            improved = False
            if validation is not None and (last or due(run.eval.every, progress.step)):
                improved = evaluate(job, engine, validation, progress, row, ranks, lifeline)
            pulse.enter("record")
            if recorder is not None:
                rate = taken.num_tokens / seconds
                recorder.step(row, progress.tokens, rate, seconds, digest(taken.ids, of=data), improved)
            if not left_out and spikes.is_spike(progress.recent, mean_loss, run.guard):
                if saver.saved is not None:
                    go_back(job, engine, ranks, progress, mean_loss, saver, reader, stream, recorder)
                    continue
                note_spike(job, progress, mean_loss, recorder)
            progress.recent = spikes.with_last(progress.recent, mean_loss, run.guard)
            save = improved or save_due(run.save.every, progress, last)
            if due(run.guard.replicas_every, progress.step) or (save and run.guard.replicas_every):
                replicas.require_equal(engine, progress.step, ranks)
            if save:
                saver.save(progress)
            if progress.unevaluated:
                save_and_stop(job, progress, saver, ranks, lifeline)
            lifeline.stepped()
        pulse.enter("end")
        last_checkpoint = finish(job, engine, progress, saver, ranks)
    if recorder is not None:
        recorder.summary(progress, last_checkpoint)
    if own_ranks:
        ranks.close()
    numerics.require_all_applied(progress.skipped, where=str(run.run_dir))


def end_for_storage(saver: Saver, verification: Verification, ranks: Ranks) -> None:
    """Raises, on all ranks, why a save has failed or which file of the data is not what it was."""
    with ranks.together("reading the data"):
        verification.require_sound()
    saver.wait()


def due(every: int, step: int) -> bool:
    """Whether something done every so many steps (0: never) is done after `step`."""
    return every > 0 and step % every == 0


def save_due(every: int, progress: Progress, last: bool) -> bool:
    """Whether a regular save is due: after this step, or after those right before it that were left out.

    A step that was left out waits: the weights may be why, and good checkpoints must not go for them.
    """
    step = progress.step
    if progress.skipped[-1:] == [step]:
        return False
    first = step - numerics.in_a_row(step - 1, progress.skipped)
    return last or any(due(every, number) for number in range(first, step + 1))


def out_of_patience(patience: int, progress: Progress) -> bool:
    return 0 < patience <= progress.stale_evaluations


def save_and_stop(job: Job, progress: Progress, saver: Saver, ranks: Ranks, lifeline: Lifeline) -> NoReturn:
    """Grants what a signal, to any of the ranks, has asked for. Raises RequeueRequested."""
    _, interrupted, orphaned = ranks.sum(lifeline.stop.flags)
    saver.save(progress)
    saver.wait()
    raise stopped(progress.step, job.run.run_dir, interrupted, orphaned)


def evaluate(
    job: Job,
    engine: Any,
    validation: Loader,
    progress: Progress,
    row: dict[str, Any],
    ranks: Ranks,
    lifeline: Lifeline,
) -> bool:
    """Adds val_loss to the row, and says whether it is the best.

    A signal cuts it short: `progress.unevaluated`; the next start makes up for it.
    """
    options, micro_batch = job.run.eval, engine.train_micro_batch_size_per_gpu()
    loss = validation_loss(engine, validation, ranks, micro_batch, options.tokens, lifeline.stop)
    progress.unevaluated = loss is None
    if loss is None:
        return False
    numerics.require_finite(progress.step, "validation loss", loss)
    row["val_loss"] = loss
    return note_evaluation(engine, progress, loss, options.min_delta)


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


def make_saver(
    job: Job,
    engine: Any,
    ranks: Ranks,
    probe: Probe | None,
    progress: Progress,
    recorder: Recorder | None,
) -> Saver:
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
        flush_log=recorder.flush if recorder is not None else lambda: None,
    )


def finish(job: Job, engine: Any, progress: Progress, saver: Saver, ranks: Ranks) -> Path:
    """The last checkpoint, verified, of weights that are all finite.

    Raises:
        NumericsProblem: a weight is not finite.
        NoCheckpoint: the checkpoint on the disk is not what was written.
    """
    numerics.require_finite_weights(progress.step, ranks.gather(gradients.broken_weights(engine)))
    saver.save(progress)  # after an early stop; else it is there
    saver.wait()
    path = checkpoint.folder_of(job.checkpoints, progress.step)
    if checkpoint.newest(job.checkpoints, ranks) != path:
        raise NoCheckpoint(
            "the last checkpoint does not verify", where=str(path), fix="check the disk, then resume"
        )
    return path
