"""How long a step takes: its work by kind, and how fast each kind of work is done (a roofline).

    time = products / their rate + attention / its rate + other traffic / memory's rate + logits x exponential
           + operations x latency + update + communication

The rates are measured (`Rates.read`, a calibration that `bigtfm plan --calibrate` writes) or, where no
such hardware is at hand, a data sheet's times efficiencies that are named below. Williams et al. 2009,
"Roofline: an insightful visual performance model".
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from bigtfm.config.problems import ConfigProblem
from bigtfm.config.sections import ADAPTERS
from bigtfm.planner.activations import loss_bytes, segments
from bigtfm.planner.communication import CommunicationPlan, plan_communication
from bigtfm.planner.hardware import Device, device_of
from bigtfm.planner.parameters import MOMENTS, block_matrices, cross_matrices
from bigtfm.planner.setting import Setting
from bigtfm.planner.throughput import passes
from bigtfm.whole_files import write_whole

# Of a data sheet's peaks, what a training reaches. Products and memory are fitted to 63 published speeds
# (benchmarks/published_speeds.py); the others are assumed, attention after flash-attn 2 (Dao 2023; Shah et
# al. 2024: 35 % of an H100). Above POWER_LIMITED FLOP/s a chip's power limits its products: on an H200 one
# alone, 8192 x 8192 x 8192 in bf16, ran at 770 to 798 of 989 TFLOP/s.
EFFICIENCY = {"products": 0.77, "attention": 0.45, "memory": 0.5, "link": 0.75, "host_link": 0.5}
POWER_LIMITED, LIMITED = 5e14, {"products": 0.62, "attention": 0.35}
LAUNCH_SECONDS = 5e-6  # of an operation on a GPU; assumed
CALL_SECONDS = 30e-6  # of a collective; assumed
HOST_BANDWIDTH = 64e9  # bytes a second between a GPU and its host, PCIe 4 x16, both directions; assumed
HOST_UPDATE = 100e9  # bytes a second of an optimizer on the host's memory; assumed
NVME_BANDWIDTH = 6e9  # bytes a second to and from the disks of a node; assumed
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]  # seconds for a unit


@dataclass(frozen=True)
class Work:
    """A rank's work in an optimizer step, by kind."""

    products: float  # FLOPs of matrix products, with what is recomputed
    attention: float  # FLOPs of attention scores and their use
    traffic: float  # bytes that all other operations read and write
    logits: float  # of the loss over the vocabulary, each an exponential
    operations: float  # number of operations
    gathered: float  # tensors that stage 3 brings together, by hooks on the host
    update: float  # bytes that the optimizer reads and writes
    tensors: float  # that the optimizer updates, one after the other
    sent: float  # bytes
    between_nodes: float  # bytes through a GPU's network card
    calls: float  # of collectives
    moved: float  # bytes between GPU and host, by offload
    swapped: float  # bytes to and from the disks of its node, by offload to NVMe: those of all its ranks
    steps: float  # 1: what a step takes besides: its data, its row in the log


@dataclass(frozen=True)
class Rates:
    """Seconds for a unit of each kind of work."""

    products: Annotated[Rate, Field(gt=0)]
    attention: Rate
    traffic: Rate
    logits: Rate
    operations: Rate
    gathered: Rate
    update: Rate
    tensors: Rate
    sent: Rate
    between_nodes: Rate
    calls: Rate
    moved: Rate
    swapped: Rate
    steps: Rate
    source: str
    device: str  # "cpu", or a GPU's name
    precision: str
    ranks: Annotated[int, Field(ge=0)]  # that measured them; 0: none did, they are estimated

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, extra="forbid")

    @property
    def measured(self) -> bool:
        return self.ranks > 0

    @classmethod
    def read(cls, path: Path) -> Rates:
        """A calibration.

        Raises:
            ConfigProblem: the file holds none.
        """
        try:
            return TypeAdapter(cls).validate_json(path.read_bytes())
        except OSError as error:
            why = error.strerror or str(error)
        except ValidationError as error:
            first = error.errors()[0]
            why = f"{'.'.join(map(str, first['loc'])) or 'it'}: {first['msg']}"
        fix = "write one with bigtfm plan --calibrate"
        raise ConfigProblem(f"holds no calibration: {why}", where=str(path), fix=fix)

    def write(self, path: Path) -> None:
        write_whole(path, json.dumps(asdict(self), indent=2) + "\n")

    def suit(self, device: str, precision: str | None = None) -> None:
        """Refuses to speak for other hardware or, if given, another precision.

        Raises:
            ConfigProblem: they are others'.
        """
        here, there = (device_of(name) or name for name in (device, self.device))
        if here != there or precision not in (None, self.precision):
            wanted = device if precision is None else f"{device} in {precision}"
            raise ConfigProblem(
                f"its rates are those of {self.device} in {self.precision}, not of {wanted}",
                where="calibration",
                fix="write one with bigtfm plan --calibrate on that hardware and in that precision, or none",
            )

    def completed(self, others: Rates) -> Rates:
        """With those of `others` for what trainings on one machine don't show: offload, a network."""
        alone = ("sent", "calls") if self.ranks == 1 else ()
        unseen = ("between_nodes", "moved", "swapped", *alone)
        return replace(self, **{kind: getattr(others, kind) for kind in unseen})


@dataclass(frozen=True)
class StepPlan:
    """Seconds of an optimizer step."""

    seconds: float
    split: dict[str, float]  # products, attention, memory, launches, update, communication, offload, other
    tokens_per_second: float
    communication: CommunicationPlan
    rates: Rates


def plan_step(setting: Setting, rates: Rates, gpus_per_node: int = 8) -> StepPlan:
    """What a step takes at these rates."""
    work = work_of(setting, gpus_per_node)
    communication = plan_communication(setting, gpus_per_node)
    on_host = setting.offload("optimizer") != "none" and not setting.on_cpu
    split = {
        "products": work.products * rates.products,
        "attention": work.attention * rates.attention,
        "memory": work.traffic * rates.traffic + work.logits * rates.logits,
        "launches": work.operations * rates.operations + work.gathered * rates.gathered,
        "update": work.update * (1 / HOST_UPDATE if on_host else rates.update) + work.tensors * rates.tensors,
        # Both links are at work at a time.
        "communication": max(work.sent * rates.sent, work.between_nodes * rates.between_nodes)
        + work.calls * rates.calls,
        "offload": work.moved * rates.moved + work.swapped * rates.swapped,
        "other": work.steps * rates.steps,
    }
    overlaps = setting.zero.get("overlap_comm", setting.stage == 3) and not setting.on_cpu
    if overlaps:  # behind computation, as far as that reaches
        hidden = 0.8 * (split["products"] + split["attention"] + split["memory"])
        split["communication"] = max(split["communication"] - hidden, 0.1 * split["communication"])
    seconds = sum(split.values())
    return StepPlan(seconds, split, setting.tokens_per_step / seconds, communication, rates)


def work_of(setting: Setting, gpus_per_node: int = 8) -> Work:
    """A rank's work in one optimizer step."""
    batch, size = setting.batch, setting.value_bytes
    parts = segments(setting.shapes, batch)
    forward, again = _products(setting), 0.0
    attention, attention_again = _attention(setting), 0.0
    blocks = [part for part in parts if "block" in part.name]
    full = [part for part in blocks if part.recompute == "full"]
    if full and passes(setting.tune) > 1:
        share = len(full) / len(blocks)
        again, attention_again = share * forward[0], share * attention
    elements = sum(part.whole for part in parts)
    recomputed = sum(part.whole for part in parts if part.recompute != "none")
    logits = loss_bytes(setting.shapes, batch)[0]
    # Written and read in the forward; read, and a gradient written and read, in the backward.
    traffic = 5 * elements + 2 * recomputed + 8 * logits
    operations = sum(len(part.ops) * (4 if part.recompute != "none" else 3) for part in parts) * 3
    micro = setting.accumulation
    updated = _updated(setting)
    offloaded = setting.offload("optimizer") != "none" and not setting.on_cpu
    communication = plan_communication(setting, gpus_per_node)
    count, trained = (sum(p.numel for p in found) for found in (setting.parameters, setting.trained))
    moved = 0.0
    if offloaded:
        moved += 2 * size * updated
    if setting.offload("param") != "none" and not setting.on_cpu:
        moved += 2 * micro * size * count / setting.world_size
    return Work(
        products=micro * (passes(setting.tune) * sum(forward) + 3 * _adapter_products(setting) + again),
        attention=micro * ((3.5 if passes(setting.tune) > 1 else 1) * attention + attention_again),
        traffic=micro * (traffic + size * (2 * count + trained)),  # weights read twice, a gradient written
        logits=micro * setting.batch.labelled * setting.model.padded_vocab_size(setting.vocab_size),
        operations=micro * operations,
        gathered=micro * len(setting.parameters) if setting.stage == 3 else 0,
        update=updated * (16 + 8 * MOMENTS.get(setting.optimizer, 2) + 2 * size),
        tensors=len(setting.trained) * (micro if setting.stage else 1),
        sent=communication.sent,
        between_nodes=communication.between_nodes(gpus_per_node),
        calls=communication.calls,
        moved=moved,
        swapped=_swapped(setting) * min(setting.world_size, gpus_per_node),
        steps=1,
    )


def _swapped(setting: Setting) -> float:
    """Bytes that a rank reads from a disk and writes to it (Rajbhandari et al. 2021, ZeRO-Infinity).

    The optimizer's masters and moments are read and written, fp32 gradients written and read; weights are
    read for each forward and each backward, and written once.
    """
    size, updated = setting.value_bytes, _updated(setting)
    swapped = 0.0
    if setting.offload("optimizer") == "nvme":
        swapped += 2 * (4 + 4 * MOMENTS.get(setting.optimizer, 2) + 4) * updated
    if setting.offload("param") == "nvme":
        count = sum(p.numel for p in setting.parameters) / setting.world_size
        swapped += size * (2 * setting.accumulation * count + updated)
    return swapped


def _updated(setting: Setting) -> float:
    count = sum(parameter.numel for parameter in setting.trained)
    return count / (setting.world_size if setting.stage else 1)


def _products(setting: Setting) -> tuple[float, float]:
    """FLOPs of a forward pass of one micro batch, on one rank: in the blocks, in the head."""
    model, batch = setting.model, setting.batch
    block = sum(matrix.in_ * matrix.out for matrix in block_matrices(model))
    rows = batch.labelled * model.hidden_size * model.padded_vocab_size(setting.vocab_size)
    if model.family == "bert":
        rows += batch.labelled * model.hidden_size**2
    if model.family != "encoder_decoder":
        return 2.0 * model.num_layers * block * batch.tokens, 2.0 * rows
    queries, keys_values, out = (matrix.in_ * matrix.out for matrix in cross_matrices(model))
    decoder = (block + queries + out) * batch.tokens + keys_values * batch.read
    blocks = model.num_layers * block * batch.read + model.decoder_layers * decoder
    return 2.0 * blocks, 2.0 * rows


def _adapter_products(setting: Setting) -> float:
    """FLOPs of the adapters in a forward pass of one micro batch."""
    batch, read = setting.batch, setting.model.family == "encoder_decoder"
    return sum(
        2.0 * p.numel * (batch.read if read and p.name.startswith("encoder.") else batch.tokens)
        for p in setting.parameters
        if p.name.endswith(ADAPTERS)
    )


def _attention(setting: Setting) -> float:
    """FLOPs of a forward pass' scores and their use, of one micro batch; causal kernels do half of them."""
    model, batch = setting.model, setting.batch
    width, length = model.num_attention_heads * model.head_size, setting.seq_len
    reach = min(length, 2 * model.window) if model.window else length

    def pairs(queries: float, keys: float, causal: bool) -> float:
        return 4.0 * width * queries * keys * (0.5 if causal else 1.0)

    if model.family == "gpt":
        return model.num_layers * pairs(batch.tokens, reach, True)
    if model.family == "bert":
        return model.num_layers * pairs(batch.tokens, reach, False)
    text = setting.micro_batch * length
    read, written = length * batch.read / text, length * batch.tokens / text
    crossed = pairs(batch.tokens, read, False) + pairs(batch.tokens, written, True)
    return model.num_layers * pairs(batch.read, read, False) + model.decoder_layers * crossed


def table_rates(device: Device, precision: str) -> Rates | None:
    """A data sheet's rates times EFFICIENCY; None: the device has no such unit."""
    peak = device.peak(precision)
    if peak is None:
        return None
    efficiency = EFFICIENCY | (LIMITED if peak > POWER_LIMITED else {})
    memory = 1 / (efficiency["memory"] * device.bandwidth)
    return Rates(
        products=1 / (efficiency["products"] * peak),
        attention=1 / (efficiency["attention"] * peak),
        traffic=memory,
        logits=0.0,  # a GPU waits for their bytes
        operations=LAUNCH_SECONDS,
        gathered=0.0,
        update=memory,
        tensors=0.0,
        sent=1 / (efficiency["link"] * device.link),
        between_nodes=1 / (efficiency["link"] * device.network),
        calls=CALL_SECONDS,
        moved=1 / (efficiency["host_link"] * HOST_BANDWIDTH),
        swapped=1 / NVME_BANDWIDTH,
        steps=0.0,
        source=f"estimated: {device.source}, with efficiencies of published trainings",
        device=device.name,
        precision=precision,
        ranks=0,
    )
