"""Steps that are not finite and spikes of the loss: what the loop does about them."""

from __future__ import annotations

import math
from typing import Any

from bigtfm.assembly import require_samples, resume, start_stream
from bigtfm.data.loader import Batch
from bigtfm.data.prefetch import Prefetcher
from bigtfm.data.streaming import StreamedTokens
from bigtfm.engine import gradients
from bigtfm.engine.checkpoint import Progress
from bigtfm.engine.distributed import Ranks
from bigtfm.engine.saver import Saver
from bigtfm.job import Job
from bigtfm.recorder import Recorder
from bigtfm.resilience import events, numerics, spikes


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
    found = spikes.spike(step, progress.samples, (before.step, before.samples), job.resolved.batch, guard)
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
