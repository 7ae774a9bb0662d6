"""Memory of a training by what it is for: the bytes of live tensors, counted as torch makes and frees them.

Resident memory shows nothing of it on a CPU, where freed blocks stay with the process; on a GPU the allocator
knows how much, but not what for. What a kernel allocates and frees inside one operation is not seen.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from bigtfm.planner.memory import CATEGORIES
from bigtfm.resilience.pulse import OWN_WORK, Pulse

WARM_UP = 3  # steps: the optimizer makes its moments in the first, stage 3 learns what to prefetch in two
STEPS = (
    WARM_UP + 2
)  # that a job must have: the first of them finds the peak, the next says what it is made of


@dataclass
class Measured:
    """Bytes of a rank's live tensors in a step, once all that lasts is there."""

    peak: int = 0
    moment: str = ""  # the phase in which it was
    at_peak: dict[str, int] = field(default_factory=dict)  # by category
    kept: dict[str, int] = field(default_factory=dict)  # between a micro batch's forward and its backward
    states: dict[str, int] = field(default_factory=dict)  # between a step's last backward and its update
    phases: dict[str, int] = field(default_factory=dict)  # the most in each phase of a step
    largest: list[str] = field(default_factory=list)  # what is alive at the peak, largest first


@dataclass(frozen=True)
class _Born:
    nbytes: int
    phase: str
    shape: tuple[int, ...]
    operation: str


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations of this thread make, from their birth to their end.

        counter = LiveBytes(vocab_sizes)
        ranks = distributed.start(launch, pulse=counter.pulse)
        with counter:
            train(job, launch, ranks)  # of `STEPS` steps or more
        counter.result

    vocab_sizes: last dimensions by which logits are known.
    """

    def __init__(self, vocab_sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.vocab_sizes, self.result, self.pulse = vocab_sizes, Measured(), _TellingPulse(self)
        self._phase, self._step, self._total = "start", 0, 0
        self.live: dict[int, _Born] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                self._see(tensor, func)
        return out

    def enter(self, phase: str, step: int | None) -> None:
        """The loop has come to another phase of its step."""
        if self._step > WARM_UP:
            if phase == "backward":
                self.result.kept = self._by_category()[0]
            elif phase == "update":
                self.result.states = self._by_category()[0]
        self._phase, self._step = phase, self._step if step is None else step

    def _see(self, tensor: Tensor, operation: Any) -> None:
        storage = tensor.untyped_storage()
        key, nbytes = storage._cdata, storage.nbytes()
        born = self.live.get(key)
        if born is not None and born.nbytes == nbytes:
            return
        if born is None:
            weakref.finalize(storage, self._gone, key)
        self._total += nbytes - (born.nbytes if born is not None else 0)
        self.live[key] = _Born(nbytes, self._phase, tuple(tensor.shape), str(operation))
        if self._step > WARM_UP and self._phase in OWN_WORK:
            self._look()

    def _gone(self, key: int) -> None:
        self._total -= self.live.pop(key).nbytes

    def _look(self) -> None:
        result = self.result
        result.phases[self._phase] = max(self._total, result.phases.get(self._phase, 0))
        if self._total > result.peak:
            result.peak, result.moment, result.at_peak = self._total, self._phase, {}
        if self._step > WARM_UP + 1 and self._total == result.peak and not result.at_peak:
            result.at_peak, result.largest = self._by_category()

    def _by_category(self) -> tuple[dict[str, int], list[str]]:
        lasting, sums = dict(_lasting(self.live)), dict.fromkeys(CATEGORIES, 0)
        seen = []
        for key, born in self.live.items():
            category = lasting.get(key) or self._kind(born)
            sums[category] += born.nbytes
            seen.append((born.nbytes, f"{born.nbytes} {category} {born.phase} {born.shape} {born.operation}"))
        return sums, [line for _, line in sorted(seen, reverse=True)]

    def _kind(self, born: _Born) -> str:
        if born.phase in ("forward", "backward") and born.shape and born.shape[-1] in self.vocab_sizes:
            return "logits"
        return "activations" if born.phase == "forward" else "working"


class _TellingPulse(Pulse):
    """The loop's pulse, heard by a counter, too."""

    def __init__(self, counter: LiveBytes) -> None:
        super().__init__()
        self.counter = counter

    def _enter(self, phase: str, step: int | None, site: str) -> None:
        self.counter.enter(phase, step)
        super()._enter(phase, step, site)


def _lasting(live: Container[int]) -> Iterator[tuple[int, str]]:
    """The storages of what an engine keeps from step to step, with their categories.

    The loop keeps the engine to itself. Those of earlier jobs may still be there: theirs are not alive here.
    """
    engines = [found for found in gc.get_objects() if type(found).__name__ == "DeepSpeedEngine"]
    engine = max(engines, key=lambda engine: sum(_storage(p) in live for p in engine.module.parameters()))
    optimizer, parameters = engine.optimizer, list(engine.module.parameters())
    kept = vars(optimizer)
    found: dict[str, Any] = {"optimizer": [kept.get(name) for name in _MASTERS]}
    wrapped = getattr(optimizer, "optimizer", optimizer)
    found["optimizer"] += [state for state in wrapped.state.values()]
    found["gradients"] = [kept.get(name) for name in _GRADIENTS]
    found["gradients"] += [(p.grad, getattr(p, "grad_accum", None)) for p in parameters]
    found["buckets"] = [bucket.buffer for bucket in kept.get("ipg_buckets", {}).values()]
    found["weights"] = [kept.get(name) for name in _WEIGHTS] + [
        getattr(p, "ds_tensor", None) for p in parameters
    ]
    # Stage 3: the parameters themselves are there while they are gathered.
    gathered = "buckets" if hasattr(optimizer, "fp32_partitioned_groups_flat") else "weights"
    found[gathered] += parameters
    for category, tensors in found.items():
        for tensor in _tensors(tensors):
            yield tensor.untyped_storage()._cdata, category


def _tensors(tree: Any) -> Iterator[Tensor]:
    """Those in lists and dicts; in DeepSpeed's own kinds of lists, too, which torch's pytree leaves whole."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict | list | tuple):
        for branch in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors(branch)


def _storage(parameter: Any) -> int:
    return int(getattr(parameter, "ds_tensor", parameter).untyped_storage()._cdata)


# Where DeepSpeed's optimizers keep what they keep (runtime/zero, runtime/fp16).
_MASTERS = (
    "single_partition_of_fp32_groups",
    "fp32_partitioned_groups_flat",
    "fp32_groups",
    "fp32_groups_flat",
)
_GRADIENTS = ("averaged_gradients", "all_grad_tensors", "grads_in_partition", "grad_partitions_flat_buffer")
_WEIGHTS = ("bit16_groups_flat", "fp16_groups_flat", "lp_param_buffer")
