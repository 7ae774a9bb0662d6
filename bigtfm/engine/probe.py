"""A gate on loading: one fixed sample, whose loss is kept in a checkpoint and computed again after a load.

SHA-256 says that the bytes are those that were written. Whether they still mean the same model (each tensor
in its place, the weights behind the fp32 masters, the same mathematics in another version) the loss says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bigtfm.config.problems import NoCheckpoint

TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-2}  # relative; of the coarser of the two precisions
PROBE_TOKENS = 64  # a sample that is short, since every save computes its loss
MAX_SHOWN = 3


@dataclass(frozen=True)
class Probe:
    """A sample that always has the same loss under the same weights.

    inputs: keyword arguments of the model's forward: int tensors [n] on the host, tuples of ints.
    setting: what else may move the loss: precision, attention backend, versions, device.
    """

    inputs: dict[str, Any]
    setting: dict[str, str]

    @classmethod
    def from_json(cls, saved: dict[str, Any], setting: dict[str, str]) -> Probe:
        """The probe of a checkpoint, to be computed under today's `setting`."""
        inputs = {
            name: torch.tensor(value["values"], dtype=getattr(torch, value["dtype"]))
            if isinstance(value, dict)
            else tuple(value)
            for name, value in saved["inputs"].items()
        }
        return cls(inputs, setting)

    def with_loss(self, model: Any, device: torch.device) -> dict[str, Any]:
        """What a checkpoint keeps: inputs, setting and the loss."""
        inputs = {
            name: {"dtype": str(value.dtype).removeprefix("torch."), "values": value.tolist()}
            if torch.is_tensor(value)
            else list(value)
            for name, value in self.inputs.items()
        }
        return {"inputs": inputs, "setting": self.setting, "loss": self.loss(model, device)}

    def loss(self, model: Any, device: torch.device) -> float:
        """Mean loss in nats a token, without dropout. Under ZeRO-3 every rank has to call it."""
        inputs = {name: v.to(device) if torch.is_tensor(v) else v for name, v in self.inputs.items()}
        training = model.training
        model.eval()
        with torch.no_grad():
            loss_sum, count = model(**inputs)
        model.train(training)
        return float(loss_sum) / float(count)


def require_same(
    saved: dict[str, Any], probe: Probe, loss: float, changed: Callable[[], Sequence[str]], where: str
) -> None:
    """Raises NoCheckpoint when the loss has drifted, and says which tensors have changed, or what else has.

    saved: the checkpoint's. changed: names of the tensors that are not those that were saved; called only on
    a drift.
    """
    precisions = (saved["setting"]["precision"], probe.setting["precision"])
    tolerance = max(TOLERANCE[precision] for precision in precisions)
    if math.isfinite(loss) and abs(loss - saved["loss"]) <= tolerance * abs(saved["loss"]):
        return
    names = changed()
    if names:
        more = f" and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else ""
        cause = f"changed since: {', '.join(names[:MAX_SHOWN])}{more}"
        fix = "restore this folder from a backup or remove it: the next start takes an earlier one"
    else:
        before, now = saved["setting"], probe.setting
        differ = [f"{key} {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key]]
        cause = "every tensor is as it was saved, so the model computes otherwise"
        cause += f" ({', '.join(differ)})" if differ else ""
        fix = "go back to what it was saved under"
    raise NoCheckpoint(
        f"the probe batch has loss {loss:.6g} and had {saved['loss']:.6g} when it was saved; {cause}",
        where=where,
        fix=f"{fix}, or accept it with resume.allow=probe",
    )
