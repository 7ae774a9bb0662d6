"""Training: `train` holds the loop; what it calls stands below it in the order of the calls."""

from __future__ import annotations

import json
import math
import time
from contextlib import ExitStack, closing, nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import torch

from bigtfm.config.launch import Launch
from bigtfm.config.problems import DataProblem, NoCheckpoint
from bigtfm.data.indexed import Split
from bigtfm.data.loader import Batch, Loader, TokenStream
from bigtfm.data.objectives import make_objective
from bigtfm.data.order import MAX_SIZE, InOrder, Order, Windows, digest
from bigtfm.data.prefetch import Prefetcher
from bigtfm.data.streaming import StreamedTokens
from bigtfm.data.verification import Verification
from bigtfm.engine import checkpoint, distributed, gradients, replicas
from bigtfm.engine.build import build_engine
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
from bigtfm.resilience import events, numerics, spikes
from bigtfm.resilience.claim import claim
from bigtfm.resilience.lifeline import Lifeline
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
            if lifeline.saves:
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
    require_samples(job, progress)
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
            first = progress.samples + ranks.rank * micro_batch
            starts = range(first, first + stride * accumulation, stride)
            batches = reader.step(starts, micro_batch, stride * accumulation)
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
                loss, _ = engine(**inputs, l1_scale=labels / (ranks.world_size * accumulation))
                # The gradient of sum(token losses) / labels in the global batch: DeepSpeed averages
                # over ranks, hence the factor; else it would average averages.
                pulse.enter("backward")
                scale = ranks.world_size / max(labels, 1)
                engine.backward(gradients.marked(loss) * scale, scale_wrt_gas=False)
                loss_sum += loss.detach()
                pulse.enter("update")
                grad_norm, lr = gradients.step(engine, ranks, lr_factor)

            taken = loader.order.pieces(progress.samples, stride * accumulation)
            progress.step += 1
            progress.samples += stride * accumulation
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


def require_samples(job: Job, progress: Progress) -> None:
    """Raises DataProblem where what was left out after spikes is more than the sources had to spare."""
    resolved, there = job.resolved, job.order.num_samples
    if not progress.spikes or there == MAX_SIZE:
        return
    left = resolved.steps - progress.step
    needed = spikes.end(progress.samples, left, resolved.global_batch, progress.spikes)
    if needed > there:
        raise DataProblem(
            f"data.sources have {there} sequences within their max_epochs; {resolved.steps} steps need "
            f"{needed} with those left out after spikes of the loss",
            where="run config",
            fix="start again with fewer run.steps or a smaller guard.spike_skip; or with larger max_epochs "
            "and resume.allow=data",
        )


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


def find_culprit(
    engine: Any, ranks: Ranks, step: int, batches: list[Batch], labels: float, own_loss: float
) -> numerics.Culprit:
    """Runs the step that was left out again, to see what was the first to be not finite, and on which rank.

    own_loss: this rank's, of the step itself.

    Raises:
        NumericsProblem: it is a weight, or some ranks have applied the step.
    """
    ranks.pulse.enter("record")
    numerics.require_agreement(step, ranks.gather(engine.was_step_applied()))
    numerics.require_finite_weights(step, ranks.gather(gradients.broken_weights(engine)))
    watch = numerics.Watch()
    with watch.hooks(engine.module):
        gradients.replay(engine, batches, labels, ranks, watch)
    return numerics.culprit(ranks.gather((watch.found, own_loss)))


def note_left_out(
    job: Job, progress: Progress, loss: float, culprit: numerics.Culprit, recorder: Recorder | None
) -> None:
    """Notes that the step which progress stands at was left out: an event and a line.

    Raises:
        NumericsProblem: it is one too many in a row.
    """
    what = "the gradient is not finite" if math.isfinite(loss) else f"the loss is {loss}"
    progress.skipped.append(progress.step)
    if recorder is not None:
        details = culprit.details
        events.note(job.run.run_dir, "step left out", step=progress.step, loss=str(loss), **details)
        recorder.warning(f"step {progress.step} is left out: {what}: {culprit.said}")
    allowed = job.run.guard.bad_steps
    if numerics.in_a_row(progress.step, progress.skipped) > allowed:
        raise numerics.too_many(progress.step, allowed, f"{what}: {culprit.said}")


def go_back(
    job: Job,
    engine: Any,
    ranks: Ranks,
    progress: Progress,
    loss: float,
    saver: Saver,
    reader: Prefetcher,
    stream: StreamedTokens | None,
    recorder: Recorder | None,
) -> None:
    """After a spike: takes engine and progress back to the newest checkpoint.

    Raises:
        NumericsProblem: it is one spike too many.
        DataProblem: too few sequences are left.
    """
    guard, step = job.run.guard, progress.step
    if len(progress.spikes) >= guard.spikes:
        raise spikes.too_many(step, loss, progress.spikes)
    saver.wait()
    reader.forget()
    ranks.pulse.enter("resume")
    before, _ = resume(job, engine, ranks)
    found = spikes.spike(
        step, progress.samples, (before.step, before.samples), job.resolved.global_batch, guard
    )
    before.spikes = [*progress.spikes, found]
    require_samples(job, before)
    saver.went_back(before.step)
    if stream is not None:
        start_stream(job, stream, before, ranks)
    if recorder is not None:
        cut = f"spike-{len(before.spikes)}-step-{step}.jsonl"
        recorder.went_back(before.step, cut)
        events.note(job.run.run_dir, "spike", loss=loss, cut=f"logs/{cut}", **found)
        left_out = f"samples {found['first_sample']} to {found['end_sample'] - 1}"
        recorder.warning(f"loss {loss:.4f} at step {step}: back to step {before.step}, without {left_out}")
    vars(progress).update(vars(before))


def note_spike(job: Job, progress: Progress, loss: float, recorder: Recorder | None) -> None:
    """Notes a spike before the first checkpoint, after which the run goes on."""
    if recorder is not None:
        events.note(job.run.run_dir, "spike", loss=loss, step=progress.step, back_to=None)
        recorder.warning(
            f"loss {loss:.4f} at step {progress.step}, and no checkpoint to go back to: it goes on"
        )


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
