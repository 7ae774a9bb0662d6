"""Ranks in which a number stops being finite: a program for rank_runner. A run's name says what, and when.

PLACE-VALUE-WHEN-TURN-...: `value` is put into the loss, a gradient or a weight of rank 1 at step 2 ("once",
"transient") or from it on ("always"), in a micro-batch. What is due is decided by the samples that a forward
gets, so a step that is run again is struck again; "transient" strikes once. "none" leaves all as it is;
"reduced" is the gradient behind the sum over ranks; in a setting "control" we do not look at gradients.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import rank_runner

STEP, SEQ_LEN, GLOBAL_BATCH = 2, 32, 8
PARAMETER = "layers.1.mlp.down.weight"


class Fault:
    """Of one run."""

    def __init__(self, name: str) -> None:
        self.place, value, self.when, turn, self.setting, *_ = name.split("-")
        self.value, self.turn = float(value), int(turn)  # micro-batch of the step
        self.done = self.active = False
        self.before: dict[str, Any] = {}  # what the rank held before the last step
        self.hooked = False

    def is_due(self, engine: Any, token_keys: Any) -> bool:
        step = int(token_keys.min()) // SEQ_LEN // GLOBAL_BATCH + 1
        turn = engine.micro_steps % engine.gradient_accumulation_steps()
        due = step >= STEP if self.when == "always" else step == STEP
        return due and turn == self.turn and not (self.when == "transient" and self.done)


def held(engine: Any) -> dict[str, Any]:
    """Copies of all weights, moments and update counts that this rank holds."""
    from bigtfm.engine import fragments

    named = engine.module.named_parameters()
    tensors: dict[str, Any] = {n: getattr(p, "ds_tensor", p).detach().clone() for n, p in named}
    for fragment in fragments.owned_fragments(engine):
        for key, view in fragments.moments(engine, fragment).items():
            tensors[f"{fragment.name}|{key}"] = view.clone()
        tensors[f"{fragment.name}|updates"] = fragments.update_count(engine, fragment)
    return tensors


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    import torch

    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k] for k in a
    )


@contextmanager
def broken(job: Any) -> Iterator[dict[str, Any]]:
    """Wraps what train calls. Yields "untouched": after each step left out, whether all was as before it."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    from bigtfm import train as module
    from bigtfm.engine import fragments, gradients

    fault, untouched = Fault(job.run.run.name), list[bool]()
    forward, find, last_look = DeepSpeedEngine.forward, module.find_culprit, gradients._last_look
    rank = int(os.environ["RANK"])

    def poison(gradient: Any) -> Any:
        if fault.active:
            gradient = gradient.clone()
            gradient.view(-1)[0] = fault.value
        return gradient

    def broken_forward(engine: Any, *args: Any, **kwargs: Any) -> Any:
        if not engine.module.training:
            return forward(engine, *args, **kwargs)
        if engine.micro_steps % engine.gradient_accumulation_steps() == 0:
            fault.before = held(engine)
        due = fault.is_due(engine, kwargs["token_keys"])
        fault.done = fault.done or due
        fault.active = due and rank == 1 and fault.place == "gradient"
        if fault.place == "gradient" and not fault.hooked:
            fault.hooked = True
            named = engine.module.named_parameters()
            next(p for name, p in named if name.endswith(PARAMETER)).register_hook(poison)
        if due and fault.place == "weight":
            if rank == 1:
                fragment = next(fragments.owned_fragments(engine))
                fragment.view(fragment.flat)[0] = fault.value
            fragments.weights_follow_masters(engine)
        loss, count = forward(engine, *args, **kwargs)
        if due and rank == 1 and fault.place == "loss":
            loss = loss + fault.value  # its gradient is finite
        return loss, count

    def found(engine: Any, *rest: Any) -> Any:
        before = fault.before  # the step run again has another
        culprit = find(engine, *rest)
        untouched.append(same(before, held(engine)))
        return culprit

    def broken_look(engine: Any, ranks: Any) -> float | None:
        if fault.place == "reduced" and engine.global_steps + 1 == STEP and rank == 1:
            next(engine.module.parameters()).grad.view(-1)[0] = fault.value
        return 0.0 if fault.setting == "control" else last_look(engine, ranks)

    DeepSpeedEngine.forward, module.find_culprit = broken_forward, found
    gradients._last_look = broken_look
    try:
        yield {"untouched": untouched}
    finally:
        DeepSpeedEngine.forward, module.find_culprit, gradients._last_look = forward, find, last_look


def train_jobs() -> None:
    """The program."""
    rank_runner.train_broken_jobs(broken)
