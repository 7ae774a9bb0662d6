"""Why two runs differ: what a good engineer would look at first, said in one or two sentences."""

from __future__ import annotations

import math
import statistics
from typing import Any

from bigtfm.compare.difference import PRECISION, Column, Comparison, Setting
from bigtfm.compare.runs import Run
from bigtfm.config.problems import shown

# Settings that can move a column, by the order in which to suspect them.
SAMPLES = ("data.", "run.seed", "train_batch_size", "batch.", "tokenizer.")
START = ("run.init_from", "model.", "objective.", *PRECISION, *SAMPLES)
UPDATE = ("optimizer.", "gradient_clipping", "scheduler.")
SUSPECTS = {
    "sample_digest": SAMPLES,
    "tokens": SAMPLES,
    "lr": ("optimizer.", "scheduler.", "eval."),
    "loss": START,
    "grad_norm": START,
    "val_loss": ("eval.", *START),
}
LAYOUT = (
    *("ranks", "zero_optimization.", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
    "compute.",
)
JUMP = 30.0  # times the largest difference of the steps before: rounding does not grow so much in one step
BEFORE = 20  # steps


def likely_cause(c: Comparison) -> tuple[str, tuple[str, ...]]:
    """A sentence, and the keys that it names. "" where the runs are the same."""
    if c.step is None:
        return "", ()
    if said := _went_back(c, c.step) or _left_out(c, c.step):
        return said, ()
    name = c.differing[0]
    if name in ("sample_digest", "tokens") and (said := _another_batch(c, c.step)):
        return said, ("train_batch_size",)
    suspects = SUSPECTS[name]
    if c.step > 1 and name in ("loss", "grad_norm", "val_loss"):  # an update lies before it
        suspects = (*suspects, *UPDATE)
    guilty = [setting for setting in c.settings if setting.decides and setting.key.startswith(suspects)]
    story = {"sample_digest": _samples, "tokens": _samples, "lr": _schedule}.get(name, _numbers)
    if guilty and name == "grad_norm" and c.step == 1:
        return f"the loss is the same and its gradient is not: {_named(guilty)}", _keys(guilty)
    if guilty:
        return _named(guilty), _keys(guilty)
    return story(c, c.columns[name])


def _went_back(c: Comparison, step: int) -> str:
    """Which run has left out samples after a spike of its loss that the other has not had."""
    for name, run, other in (("A", c.a, c.b), ("B", c.b, c.a)):
        for spike in run.spikes:
            if spike["back_to"] < step and spike not in other.spikes:
                samples = f"samples {spike['first_sample']} to {spike['end_sample'] - 1}"
                went = f"{name} went back from step {spike['step']} to step {spike['back_to']}"
                return f"{went} when its loss had jumped, and left out {samples}"
    return ""


def _left_out(c: Comparison, step: int) -> str:
    """Which run alone has left that step out."""
    out = [name for name, run in (("A", c.a), ("B", c.b)) if run.rows[step].get("skipped")]
    if len(out) != 1:
        return ""
    return f"{out[0]} left out step {step}, whose loss or gradient was not finite (its events.jsonl says why)"


def _another_batch(c: Comparison, step: int) -> str:
    """Which run takes more or fewer tokens a step than before, without a ramp-up that would tell why."""
    if any(key.startswith("batch.") for run in (c.a, c.b) for key in run.settings):
        return ""
    for name, run in (("A", c.a), ("B", c.b)):
        now, earlier = _tokens(run, step), {_tokens(run, at) for at in range(max(1, step - BEFORE), step)}
        before = earlier.pop() if len(earlier) == 1 else None  # packed documents come in varying numbers
        if now and before and now != before:
            takes = f"{name} takes {now:,} tokens a step from step {step} on, {before:,} before"
            return f"{takes}: it was resumed with another global batch"
    return ""


def _samples(c: Comparison, column: Column) -> tuple[str, tuple[str, ...]]:
    """Other samples, though every recorded setting that chooses them is the same."""
    step = c.step or 0
    if len(column.beyond) == 1 and _follows(c, step):
        return f"step {step} alone, and the losses agree: that row was altered after it was written", ()
    there = {row["sample_digest"]: at for at, row in c.a.rows.items()}.get(c.b.rows[step]["sample_digest"])
    if there is not None:
        move = f"{abs(step - there)} step{'s' if abs(step - there) > 1 else ''}"
        way = "behind" if there < step else "ahead"
        resumed = _resumed(c, step)
        return f"B takes at step {step} the samples of A's step {there}: it is {move} {way}{resumed}", ()
    if step > 1:
        return f"other samples from step {step} on{_resumed(c, step) or ': a resume lost its place'}", ()
    return "other data, though no recorded setting differs that chooses the samples", ()


def _schedule(c: Comparison, column: Column) -> tuple[str, tuple[str, ...]]:
    step = c.step or 0
    if step > 1:
        return f"the schedule left its course{_resumed(c, step) or ': was it restored by a resume?'}", ()
    return "no recorded setting of optimizer or schedule differs", ()


def _numbers(c: Comparison, column: Column) -> tuple[str, tuple[str, ...]]:
    """Same samples, same lr, same recipe; other numbers."""
    step = c.step or 0
    for name, run in (("A", c.a), ("B", c.b)):
        if not math.isfinite(run.rows[step][column.name]):
            return f"{column.name} of {name} is {run.rows[step][column.name]} at step {step}: numerics", ()
    if column.name == "loss" and len(column.beyond) == 1 and _follows(c, step):
        return (
            f"step {step} alone, and the run goes on the same: that row was altered after it was written",
            (),
        )
    layout = [setting for setting in c.settings if setting.key.startswith(LAYOUT)]
    between = (
        _named(layout)
        if layout
        else "no recorded setting explains it: another machine or version, or kernels?"
    )
    if step == 1:
        return f"the first {column.name} differs already; {between}", _keys(layout)
    at = list(column.differences).index(step)
    largest = max(list(column.differences.values())[max(0, at - BEFORE) : at], default=0.0)
    if column.differences[step] > JUMP * largest:
        before = f"within {largest:.1e}" if largest else "equal to the bit"
        resumed = _resumed(c, step) or ", though no resume shows"
        return f"a jump at step {step}, {before} until then{resumed}; {between}", _keys(layout)
    within = 1.06 * c.same_within  # it will be rounded, but never down
    enough = f" (the same within --tolerance {within:.1e})" if math.isfinite(within) else ""
    return f"rounding{_growth(column, step)}, as between layouts{enough}; {between}", _keys(layout)


def _growth(column: Column, step: int) -> str:
    """How fast the largest difference so far grows, by a straight line through its logarithm."""
    steps, logs, largest = [], [], 0.0
    for at, difference in column.differences.items():
        largest = max(largest, difference)
        if at <= step and largest:
            steps.append(at)
            logs.append(math.log10(largest))
    slope = statistics.linear_regression(steps, logs).slope if len(steps) > 2 else 0.0
    return f" that grows tenfold in {1 / slope:,.0f} steps" if slope > 0 else ""


def _follows(c: Comparison, step: int) -> bool:
    """Whether the losses are the same from the step after `step` on: then nothing can have differed in it."""
    loss = c.columns["loss"]
    after = [difference for at, difference in loss.differences.items() if at > step]
    return bool(after) and max(after) <= loss.limit


def _tokens(run: Run, step: int) -> int | None:
    """Tokens of one step; None where its row or the one before it is not there."""
    if step not in run.rows or "tokens" not in run.rows[step]:
        return None
    before = run.rows.get(step - 1, {}).get("tokens") if step > 1 else 0
    return None if before is None else run.rows[step]["tokens"] - before


def _resumed(c: Comparison, step: int) -> str:
    """Which of the runs was started anew right before that step, as a clause."""
    names = [name for name, run in (("A", c.a), ("B", c.b)) if step in run.starts]
    return f", and {' and '.join(names)} was started anew there" if names else ""


def _keys(settings: list[Setting]) -> tuple[str, ...]:
    return tuple(setting.key for setting in settings)


def _named(settings: list[Setting]) -> str:
    few = [f"{s.key} is {plain(s.a)} in A and {plain(s.b)} in B" for s in settings[:3]]
    more = f", and {len(settings) - 3} more" if len(settings) > 3 else ""
    return "; ".join(few) + more


def plain(value: Any) -> str:
    """A value without quotes; of a SHA-256 its beginning."""
    text = value if isinstance(value, str) else shown(value)
    return f"{text[:12]}..." if len(text) == 64 and set(text) <= set("0123456789abcdef") else text
