"""Finite or stopped: DeepSpeed alone trains on NaN in fp32 and skips steps without a word in bf16."""

from __future__ import annotations

import math

from bigtfm.config.problems import NumericsProblem


def require_finite(step: int, loss: float, grad_norm: float, *, overflow_allowed: bool) -> None:
    """Ends the run on a NaN or infinite loss or gradient, before a checkpoint could hold it.

    `overflow_allowed`: fp16's loss scale overflows by design now and then, and skips that step.

    Raises:
        NumericsProblem
    """
    for name, value in (("loss", loss), ("gradient norm", grad_norm)):
        if not math.isfinite(value) and not (overflow_allowed and name == "gradient norm"):
            raise NumericsProblem(
                f"{name} is {value}",
                where=f"step {step}",
                fix="lower the lr or warm up longer (DeepSpeed JSON), and look for extreme values in the run "
                "config; what was saved is finite",
            )
