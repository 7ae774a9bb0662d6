"""Memory of a rank: what lasts, by ZeRO stage, and what a step adds, moment by moment; arithmetic alone.

What lasts: Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models",
with the buffers that DeepSpeed 0.19.8 really makes (deepspeed/runtime/zero/stage_1_and_2.py, stage3.py,
runtime/fp16/unfused_optimizer.py, fused_optimizer.py). A step is followed through forward, loss, backward and
update; its largest moment is the peak.
"""

from __future__ import annotations

from dataclasses import dataclass

from bigtfm.config.deepspeed import reduce_bucket
from bigtfm.config.sections import HEADED
from bigtfm.planner.activations import Segment, loss_bytes, segments
from bigtfm.planner.parameters import MOMENTS, Parameter
from bigtfm.planner.setting import BYTES, Setting

CATEGORIES = ("weights", "gradients", "optimizer", "buckets", "activations", "logits", "working")


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one rank. The categories are what is there at the largest moment: they sum to the peak."""

    weights: int
    gradients: int
    optimizer: int  # fp32 masters and moments
    buckets: int  # what ZeRO communicates in: reduce buckets, stage 3's gathered weights
    activations: int  # what the forward has kept
    logits: int  # logits, and cross-entropy's tensors
    working: int  # gradients of activations, and what operations take for a moment
    peak: int
    moment: str  # "loss", "backward" or "update", and where
    kept: int  # activations and logits between forward and backward
    states: int  # weights, gradients and optimizer, before the update
    host: int  # in the host's memory, by offload
    nvme: int  # on a disk, by offload

    @property
    def line(self) -> str:
        """The peak and what it is made of, largest first, in a few words."""
        parts = sorted(((getattr(self, name), name) for name in CATEGORIES), reverse=True)
        largest = ", ".join(f"{size_text(size)} {name}" for size, name in parts if size > 0.02 * self.peak)
        return f"{size_text(self.peak)} in the {self.moment}: {largest}"


def size_text(count: float) -> str:
    """Bytes for reading."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def plan_memory(setting: Setting) -> MemoryPlan:
    """What a step takes on the rank that takes most."""
    lasting = _lasting(setting)
    step = _Step(setting, lasting)
    step.run()
    return MemoryPlan(
        **step.at_peak,
        peak=step.peak,
        moment=step.moment,
        kept=step.kept,
        states=step.states,
        host=lasting.host,
        nvme=lasting.nvme,
    )


@dataclass
class _Lasting:
    """Bytes that are there between steps, by category, and what a step needs to know of them."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    buckets: int = 0
    host: int = 0
    nvme: int = 0
    partition: int = 0  # elements that a rank updates, padding included
    largest: int = 0  # elements of the largest tensor that the optimizer updates
    owned: int = 0  # elements of the parameters that a rank updates a part of
    persistent: int = 0  # stage 3: bytes of the small weights that stay gathered


def _groups(setting: Setting) -> list[list[Parameter]]:
    """Matrices, which decay, and vectors: `engine.build.parameter_groups`."""
    if setting.optimizer == "Adagrad":
        return [setting.trained]
    unused = setting.model.next_sentence and not setting.objective.next_sentence
    matrices = [
        p for p in setting.trained
        if len(p.shape) > 1 and not (unused and p.name.startswith("next_sentence."))
    ]  # fmt: skip
    vectors = [p for p in setting.trained if p not in matrices]
    return [group for group in (matrices, vectors) if group]


def _lasting(setting: Setting) -> _Lasting:
    ranks, size, stage = setting.world_size, setting.value_bytes, setting.stage
    groups = _groups(setting)
    frozen = [p for p in setting.parameters if not setting.tune.learns(p.name)]
    total = sum(p.numel for p in setting.trained)
    moments = 4 * MOMENTS.get(setting.optimizer, 2)
    state = _Lasting()
    if stage == 0:
        state.weights, state.partition = size * sum(p.numel for p in setting.parameters), total
        state.largest = max(p.numel for p in setting.trained)
        state.owned = total
        state.optimizer = total * (moments + (4 if size == 2 else 0))
        return state
    if stage < 3:
        flats = [_padded(sum(p.numel for p in group), 2 * ranks) for group in groups]
        shares = [flat // ranks for flat in flats]
        state.weights = size * (sum(flats) + sum(p.numel for p in frozen))
        state.owned = max(
            sum(_overlapping(group, share, rank) for group, share in zip(groups, shares, strict=True))
            for rank in {0, ranks // 2, ranks - 1}
        )
    else:
        shares = [sum(-(-p.numel // ranks) for p in group) for group in groups]
        state.weights = size * (sum(shares) + sum(-(-p.numel // ranks) for p in frozen))
        state.owned = sum(shares)
        state.gradients = BYTES[setting.grad_accum_dtype] * sum(shares)
        state.buckets = size * _bucket(setting) * _contiguous(setting)
        state.persistent = size * sum(p.numel for p in setting.parameters if _persists(setting, p))
    state.partition, state.largest = sum(shares), max(shares)
    state.optimizer = state.partition * (4 + moments)
    _move_off(setting, state)
    return state


def _move_off(setting: Setting, state: _Lasting) -> None:
    """Offload: on a CPU both are the same memory."""
    optimizer, param = setting.offload("optimizer"), setting.offload("param")
    if optimizer != "none":
        moved = state.optimizer + 4 * state.partition + state.gradients  # fp32 gradients go along
        if setting.on_cpu and optimizer == "cpu":
            state.optimizer += 4 * state.partition
        else:
            state.optimizer = state.gradients = 0
            _note(state, optimizer, moved)
    if param != "none" and setting.stage == 3 and not (setting.on_cpu and param == "cpu"):
        _note(state, param, state.weights)
        state.weights = 0


def _note(state: _Lasting, where: str, count: int) -> None:
    if where == "cpu":
        state.host += count
    else:
        state.nvme += count


def _padded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _overlapping(group: list[Parameter], share: int, rank: int) -> int:
    """Elements of the parameters of which a rank's share of the flat group holds a part."""
    first, end, at, total = rank * share, (rank + 1) * share, 0, 0
    for parameter in group:
        if at < end and at + parameter.numel > first:
            total += parameter.numel
        at += parameter.numel
    return total


_SIZES = {  # deepspeed/runtime/zero/config.py
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": 100_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
}


def _elements(setting: Setting, key: str) -> int:
    return int(setting.zero.get(key, _SIZES[key]))


def _bucket(setting: Setting) -> int:
    return reduce_bucket(setting.zero, sum(parameter.numel for parameter in setting.trained))


def _contiguous(setting: Setting) -> bool:
    return bool(setting.zero.get("contiguous_gradients", True))


def _persists(setting: Setting, parameter: Parameter) -> bool:
    return parameter.numel <= _elements(setting, "stage3_param_persistence_threshold")


class _Step:
    """A step, followed; the last micro batch of it, before which the others have left their gradients."""

    def __init__(self, setting: Setting, lasting: _Lasting) -> None:
        self.setting, self.lasting, self.size = setting, lasting, setting.value_bytes
        self.live = dict.fromkeys(CATEGORIES, 0)
        for name in ("weights", "gradients", "optimizer", "buckets"):
            self.live[name] = getattr(lasting, name)
        self.live["buckets"] += lasting.persistent
        self.peak = self.kept = self.states = 0
        self.moment, self.at_peak = "", dict(self.live)
        self.in_bucket = self.gathered = 0  # elements
        self.in_flight = 0  # bytes
        self.partition_kept = False
        self.accumulated = setting.accumulation > 1
        self.tied_gradient = 0

    def run(self) -> None:
        parts = segments(self.setting.shapes, self.setting.batch)
        self._gradients_of_earlier_micro_batches()
        self._look("start")
        self._look("forward", activations=max(segment.whole for segment in parts))
        if self.setting.tune.train == "head":
            parts = []  # no backward goes through the stack
        for segment in parts:
            self.live["activations"] += segment.kept
        self._gather_weights()
        kept, most = loss_bytes(self.setting.shapes, self.setting.batch)
        self.kept = self.live["activations"] + kept
        self._look("loss", logits=most)
        self._head_backward()
        for segment in reversed(parts):
            self._backward(segment)
        self._embedding_backward()
        self._reduce_the_rest()
        self.states = sum(self.live[name] for name in ("weights", "gradients", "optimizer"))
        self._update()

    def _look(self, moment: str, **more: int) -> None:
        """Compares what is there, with `more` of some categories for a moment, with the peak."""
        total = sum(self.live.values()) + sum(more.values())
        if total > self.peak:
            self.peak, self.moment = total, moment
            self.at_peak = {name: self.live[name] + more.get(name, 0) for name in CATEGORIES}

    def _gradients_of_earlier_micro_batches(self) -> None:
        stage, total = self.setting.stage, sum(p.numel for p in self.setting.trained)
        if not self.accumulated:
            return
        if stage < 2:
            self.live["gradients"] += total * self._gradient_bytes
        elif stage == 2:
            self.live["gradients"] += self._partition_gradients
        if stage == 1:
            self._make_bucket()

    @property
    def _gradient_bytes(self) -> int:
        """Of a gradient that waits for the update, stages 0 and 1."""
        return max(self.size, BYTES[self.setting.grad_accum_dtype]) if self.setting.stage else self.size

    @property
    def _partition_gradients(self) -> int:
        """Bytes of the reduced gradients that a rank keeps, stages 1 and 2."""
        if self.setting.grad_accum_dtype == "fp32" and self.size == 2:
            return 4 * self.lasting.partition
        return self.size * self.lasting.owned

    def _make_bucket(self) -> None:
        if self.setting.stage in (1, 2) and _contiguous(self.setting) and not self.live["buckets"]:
            double = 2 if self.setting.zero.get("overlap_comm") else 1
            size = self._gradient_bytes if self.setting.stage == 1 else self.size
            self.live["buckets"] = double * size * _bucket(self.setting)

    def _gather_weights(self) -> None:
        """Stage 3: weights that will be used again within max_reuse_distance stay from forward to backward.

        They are gathered some at a time, into one tensor that is there until the last of them is asked for.
        """
        if self.setting.stage < 3:
            return
        sizes = [p.numel for p in self.setting.parameters if not _persists(self.setting, p)]
        largest = max(sizes, default=0)
        reach = _elements(self.setting, "stage3_max_reuse_distance") // 2
        ahead = _elements(self.setting, "stage3_prefetch_bucket_size") + largest
        most = max(_elements(self.setting, "stage3_max_live_parameters"), largest)
        self.gathered = min(sum(sizes), reach + ahead, most)
        self.live["buckets"] += self.size * self.gathered
        self.in_flight = self.size * min(sum(sizes) - sizes[0] if sizes else 0, ahead)
        self._look("forward", buckets=self.in_flight)
        if self.gathered == sum(sizes):
            self.in_flight = 0  # the backward finds all of them there

    def _release(self, weights: tuple[Parameter, ...]) -> None:
        """Stage 3, behind a backward: what is released, unless others take its place."""
        if self.setting.stage == 3:
            gone = sum(p.numel for p in weights if not _persists(self.setting, p))
            gone = min(gone, self.gathered)
            self.gathered -= gone
            self.live["buckets"] -= self.size * gone

    def _head_backward(self) -> None:
        setting, batch = self.setting, self.setting.batch
        model, size = setting.model, self.size
        if setting.objective.kind in HEADED:
            self._arrive([p for p in setting.parameters if p.name.startswith("task_head.")])
            return
        rows, padded = batch.labelled, setting.model.padded_vocab_size(setting.vocab_size)
        one, product = 4 * rows * setting.vocab_size, size * rows * padded
        path = setting.shapes.loss
        if path == "chunked":
            product = 0
        if path == "whole" and size == 2:
            self._look("loss", logits=one + one // 2)
        if path == "whole" and padded != setting.vocab_size:
            self._look("loss", logits=2 * product)
        owner = "embed_tokens" if model.tied_embeddings else "lm_head"
        weight = padded * model.hidden_size * size * setting.tune.learns(f"{owner}.weight")
        features = rows * model.hidden_size * size
        self._look("backward of the output layer", logits=product, working=features + weight)
        if model.tied_embeddings:
            self.live["working"] += weight  # until the embedding's own is added
            self.tied_gradient = weight
        else:
            self._arrive([p for p in setting.parameters if p.name.startswith("lm_head.")])

    def _backward(self, segment: Segment) -> None:
        if segment.recompute != "none":
            shared = 0 if self._copied_input else segment.input
            products = segment.kept - segment.input
            self.live["activations"] += segment.whole - shared - products
        flow = segment.input or segment.ops[-1].leaves
        for op in reversed(segment.ops):
            owned = [p for p in segment.weights if any(part in p.name for part in op.owns)]
            owned = [p for p in owned if self.setting.tune.learns(p.name)]
            made = self.size * sum(p.numel for p in owned)
            moment = f"backward of {segment.name}, {op.name}"
            self._look(moment, working=flow + op.needs + made, buckets=self.in_flight)
            self.live["activations"] -= op.keeps
            flow = op.leaves
            self._arrive(owned, flow)
        if segment.recompute != "none" and self._copied_input:
            self.live["activations"] -= segment.input
        self._release(segment.weights)

    @property
    def _copied_input(self) -> bool:
        """RMSNorm keeps an fp32 copy of its input, not the input itself: on a CPU in 16 bits."""
        model = self.setting.model
        return (
            self.size == 2 and self.setting.on_cpu and model.norm == "rmsnorm" and model.norm_order == "pre"
        )

    def _embedding_backward(self) -> None:
        setting = self.setting
        weight = setting.parameters[0]
        if not setting.tune.learns(weight.name):
            return
        stream = setting.batch.tokens * setting.model.hidden_size * self.size
        self._look("backward of the embedding", working=stream + weight.numel * self.size)
        self.live["working"] -= self.tied_gradient
        self._arrive([weight], stream)

    def _arrive(self, weights: list[Parameter], flow: int = 0) -> None:
        """Gradients of weights: where a stage puts them."""
        stage, size = self.setting.stage, self.size
        for weight in weights:
            if not self.setting.tune.learns(weight.name):
                continue
            made = weight.numel * size
            if stage in (1, 2):
                self._make_bucket()
            if stage < 2:
                if not self.accumulated:
                    self.live["gradients"] += weight.numel * self._gradient_bytes
                self._look(f"backward, gradient of {weight.name}", working=flow + made * self.accumulated)
                continue
            if self.in_bucket + weight.numel > _bucket(self.setting):
                self._flush(flow + made)
            self.in_bucket += weight.numel
            self._look(f"backward, gradient of {weight.name}", working=flow + made)

    def _flush(self, flow: int) -> None:
        """Stages 1 to 3: the bucket is flattened into a copy, reduced, and a rank's part of it kept."""
        copy = self.in_bucket * self.size
        if self.setting.stage == 2 and not self.partition_kept:
            self.live["gradients"] += self._partition_gradients
            self.partition_kept = True
        self._look("reduction of gradients", working=flow, buckets=copy)
        self.in_bucket = 0

    def _reduce_the_rest(self) -> None:
        setting = self.setting
        if setting.stage == 1:
            total = sum(p.numel for p in setting.trained)
            self.in_bucket = min(total, _bucket(setting))
            self.live["gradients"] -= self.in_bucket * self._gradient_bytes
            self._look("reduction of gradients", buckets=self.in_bucket * self._gradient_bytes)
            self.live["gradients"] = self._partition_gradients
            self._look("reduction of gradients", buckets=self.in_bucket * self._gradient_bytes)
        elif setting.stage:
            self._flush(0)
        elif setting.world_size > 1:  # engine.buffered_allreduce_fallback, MEMORY_OPT_ALLREDUCE_SIZE
            self._look("reduction of gradients", buckets=self.size * min(self.lasting.partition, 500_000_000))
        if setting.stage in (1, 2):
            if setting.stage == 2 and self.accumulated and self.partition_kept:
                self.live["gradients"] = self._partition_gradients
            self.live["buckets"] = 0
        if setting.stage == 3:
            self.live["buckets"] = self.lasting.buckets

    def _update(self) -> None:
        """fp32 gradients and the optimizer's temporaries."""
        setting, lasting = self.setting, self.lasting
        if setting.offload("optimizer") != "none" and not setting.on_cpu:
            return
        temporaries = self._optimizer_temporaries()
        if setting.stage == 0:
            fp32 = 4 * lasting.partition if self.size == 2 else 0
            self._look("update", working=fp32 + temporaries)
            return
        flat = self.size * lasting.largest if self.size == 2 else 0
        self._look("update", working=4 * lasting.largest + max(flat, temporaries))

    def _optimizer_temporaries(self) -> int:
        """torch's Adam makes a denominator, twice for a moment; the fused ones nothing."""
        setting = self.setting
        fused = setting.on_cpu or not setting.torch_adam  # torch's on a CPU, DeepSpeed's
        if (setting.optimizer in ("Adam", "AdamW") and fused) or (
            setting.optimizer == "Muon" and not setting.torch_adam
        ):
            return 0
        if setting.on_cpu or setting.stage:
            return 8 * self.lasting.largest
        return 4 * self.lasting.partition  # all parameters at once (foreach)
