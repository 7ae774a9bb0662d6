"""What a run comes to: both files and the data sets' headers together, checked and resolved; no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

from bigtfm.config.batch import GlobalBatch, global_batch
from bigtfm.config.deepspeed import DeepSpeedConfig, acting_stage
from bigtfm.config.problems import ConfigProblem
from bigtfm.config.run import RunConfig
from bigtfm.config.sections import TuneSection
from bigtfm.data.indexed import TokenDataset
from bigtfm.data.mixture import Mixture
from bigtfm.data.order import Order
from bigtfm.planner.parameters import adapted_matrices, block_matrices, parameters_of

if TYPE_CHECKING:
    from rich.table import Table

BUFFER_SIZE = 100_000_000  # DeepSpeed's default, in elements


@dataclass(frozen=True)
class Share:
    """What a run takes of one data set."""

    path: str
    share: float  # of this run's sequences
    train_tokens: int  # tokens in its training split
    sequences: int  # in one pass over it
    epochs: float  # passes over it in this run


@dataclass(frozen=True)
class Resolved:
    """The truths of a run, each as a number or a name."""

    name: str
    run_dir: str
    world_size: int  # ranks
    micro_batch: int  # sequences per rank in one forward pass
    accumulation: int  # forward passes per rank in one optimizer step
    global_batch: int  # sequences in one optimizer step, behind a ramp-up
    batch: GlobalBatch  # sequences in every step
    seq_len: int  # tokens in a sequence, at most
    packing: str  # how documents become sequences
    tokens_per_step: int  # of best_fit, whose sequences are not all full, and of a ramp-up the mean
    steps: int  # optimizer steps of this run
    horizon: int | None  # the scheduler's total steps, if it has them
    train_tokens: int | None  # tokens in the training splits; None: not known of a stream
    steps_per_epoch: float | None  # of global_batch
    epochs: float | None  # passes over as many sequences as the training splits have
    sources: tuple[Share, ...]
    family: str
    objective: str
    parameters: int  # shared ones counted once, adapters included
    trained: int  # of them; the others stay as they begin
    vocab_size: int  # tokens that the model knows
    padded_vocab_size: int  # rows of the embedding
    precision: Literal["fp32", "bf16", "fp16"]
    zero_stage: int
    offload_optimizer: str  # none, cpu or nvme
    offload_param: str
    optimizer: str
    scheduler: str | None
    lr: float  # the peak
    gradient_clipping: float  # largest L2 norm; 0: no limit
    recompute: str | int
    fp8: str  # recipe of the blocks' 8-bit products, or none

    def to_json(self) -> str:
        """One JSON object, a key a line."""
        return json.dumps(asdict(self), indent=2) + "\n"


def resolve(
    config: RunConfig,
    deepspeed: DeepSpeedConfig,
    world_size: int,
    datasets: Sequence[TokenDataset],
    order: Order,
    vocab_size: int,
) -> Resolved:
    """Everything that follows from both files, the number of ranks, the data and the model's vocabulary.

    order: of the training samples; a mixture's sources are the data sets.

    Raises:
        ConfigProblem: the two files, or one of them and the number of ranks or the data, don't fit together.
    """
    _evaluates(config, deepspeed, datasets[0])
    _recomputes_exactly(config, deepspeed)
    if config.compute.loss == "chunked" and deepspeed.precision == "fp16":
        raise ConfigProblem(
            "compute.loss chunked takes gradients before fp16's loss scale, which would lose the small ones",
            where="run config",
            fix="set compute.loss to auto, or use a bf16 JSON",
        )
    _keeps_zeros(config, deepspeed)
    _multiplies_in_8_bits(config, deepspeed)
    _tunes(config, deepspeed)
    steps = deepspeed.steps_of(config.run.steps)
    micro_batch, accumulation, final = deepspeed.solve_batch(world_size)
    batch = global_batch(config.batch, final, micro_batch, world_size)
    padded_vocab_size = config.model.padded_vocab_size(vocab_size)
    largest = max(matrix.in_ * matrix.out for matrix in block_matrices(config.model))
    _buffers_hold(max(largest, padded_vocab_size * config.model.hidden_size), deepspeed, world_size)
    parameters = parameters_of(config.model, vocab_size, config.objective_kind, config.tune)
    _lasts(order, steps, batch)
    samples = batch.samples(steps)
    shares, tokens = _taken(config, datasets, order, samples)
    sequences = sum(share.sequences for share in shares) if shares else None
    return Resolved(
        name=config.run.name,
        run_dir=str(config.run_dir),
        world_size=world_size,
        micro_batch=micro_batch,
        accumulation=accumulation,
        global_batch=final,
        batch=batch,
        seq_len=config.seq_len,
        packing=config.data.packing,
        tokens_per_step=round(tokens / steps),
        steps=steps,
        horizon=deepspeed.horizon,
        train_tokens=sum(share.train_tokens for share in shares) if shares else None,
        steps_per_epoch=sequences / final if sequences else None,
        epochs=samples / sequences if sequences else None,
        sources=shares,
        family=config.model.family,
        objective=config.objective_kind,
        parameters=sum(parameter.numel for parameter in parameters),
        trained=sum(parameter.numel for parameter in parameters if config.tune.learns(parameter.name)),
        vocab_size=vocab_size,
        padded_vocab_size=padded_vocab_size,
        precision=deepspeed.precision,
        zero_stage=deepspeed.zero_stage,
        offload_optimizer=deepspeed.offload("optimizer"),
        offload_param=deepspeed.offload("param"),
        optimizer=deepspeed.optimizer_type,
        scheduler=deepspeed.scheduler_type,
        lr=deepspeed.lr,
        gradient_clipping=deepspeed.clipping,
        recompute=config.compute.recompute,
        fp8=config.compute.fp8,
    )


def _taken(
    config: RunConfig, datasets: Sequence[TokenDataset], order: Order, samples: int
) -> tuple[tuple[Share, ...], float]:
    """What a run of so many samples takes of each data set, none of them of a stream; and its tokens."""
    if not isinstance(order, Mixture):
        return (), samples * config.seq_len
    taken = order.counts(samples).tolist()
    shares = tuple(
        Share(path, n / samples, dataset.split("train").num_tokens, source.size, n / source.size)
        for path, n, dataset, source in zip(config.data.paths, taken, datasets, order.sources, strict=True)
    )
    return shares, sum(n * source.tokens_per_sample for n, source in zip(taken, order.sources, strict=True))


def _lasts(order: Order, steps: int, batch: GlobalBatch) -> None:
    """There are sequences for every step."""
    if order.num_samples < batch.samples(steps):
        possible = batch.steps_within(order.num_samples)
        sizes = " and ".join(str(size) for size, _ in batch.parts(steps))
        fewer = f"set run.steps to {possible} or less, " if possible else ""
        raise ConfigProblem(
            f"data.sources have {order.num_samples} sequences within their max_epochs: {possible} steps of "
            f"{sizes}, and the run has {steps}",
            where="run config",
            fix=f"{fewer}set larger max_epochs, or leave one of them out",
        )


def _buffers_hold(largest: int, deepspeed: DeepSpeedConfig, world_size: int) -> None:
    """On NVMe, a rank's share of the largest parameter has to fit into one of DeepSpeed's buffers."""
    if deepspeed.offload("param") != "nvme":
        return
    share = -(-largest // world_size)
    buffer = deepspeed.zero["offload_param"].get("buffer_size", BUFFER_SIZE)
    if share > buffer:
        raise ConfigProblem(
            f"zero_optimization.offload_param.buffer_size {int(buffer)} is less than a rank's share of the "
            f"largest parameter, {share} elements",
            where=str(deepspeed.path),
            fix=f'write "buffer_size": {share} or more, or use more ranks',
        )


def _evaluates(config: RunConfig, deepspeed: DeepSpeedConfig, dataset: TokenDataset) -> None:
    """What waits for evaluations needs some."""
    waiting = {
        "scheduler ReduceOnPlateau": deepspeed.scheduler_type == "ReduceOnPlateau",
        "eval.patience": config.eval.patience > 0,
    }
    for what, on in waiting.items():
        if on and config.eval.every == 0:
            raise ConfigProblem(
                f"{what} waits for evaluations, and eval.every is 0: there is one at the end only",
                where="run config",
                fix="set eval.every to a number of steps",
            )
        if on and not dataset.split("validation").num_tokens:
            raise ConfigProblem(
                f"{what} waits for evaluations, and {dataset.path} has no validation split",
                where="run config",
                fix="prepare the data set with a --validation-fraction above 0",
            )


def _recomputes_exactly(config: RunConfig, deepspeed: DeepSpeedConfig) -> None:
    """At stage 3 DeepSpeed's own linear adds the bias in place into the product that recomputation saved."""
    if (
        config.compute.recompute == "selective"
        and config.model.bias
        and deepspeed.zero_stage == 3
        and deepspeed.zero.get("memory_efficient_linear") is True
    ):
        raise ConfigProblem(
            "zero_optimization.memory_efficient_linear true gives wrong gradients together with "
            "compute.recompute selective and model.bias true",
            where=str(deepspeed.path),
            fix='write "memory_efficient_linear": false',
        )


def _keeps_zeros(config: RunConfig, deepspeed: DeepSpeedConfig) -> None:
    """Muon makes the update of a matrix out of all of it: a weight moves without a gradient of its own."""
    if config.model.keep_zeros and deepspeed.optimizer_type == "Muon":
        raise ConfigProblem(
            "Muon's update of a matrix leaves none of its zeros, and model.keep_zeros is true",
            where=str(deepspeed.path),
            fix="use AdamW, or another optimizer",
        )


FP8_MULTIPLE = 16  # of a matrix's sides, in 8-bit products


def _multiplies_in_8_bits(config: RunConfig, deepspeed: DeepSpeedConfig) -> None:
    if config.compute.fp8 == "none":
        return
    for matrix in block_matrices(config.model):  # what a decoder has besides takes the same sides
        if matrix.in_ % FP8_MULTIPLE or matrix.out % FP8_MULTIPLE:
            raise ConfigProblem(
                f"compute.fp8 takes matrices whose sides are multiples of {FP8_MULTIPLE}, and the model has "
                f"one of {matrix.out} x {matrix.in_}",
                where="run config",
                fix="change hidden_size, ffn_hidden_size or head_dim of [model], or set compute.fp8 to none",
            )
    if deepspeed.zero_stage == 3 and config.compute.recompute not in ("full", 1):
        raise ConfigProblem(
            "compute.fp8 keeps the weights that stage 3 gathers until the backward pass, all of them at once",
            where="run config",
            fix="set compute.recompute to full, or use a JSON of ZeRO stage 2",
        )


def _tunes(config: RunConfig, deepspeed: DeepSpeedConfig) -> None:
    """The optimizer can leave weights alone, and adapters are smaller than their matrices."""
    tune = config.tune
    if tune != TuneSection() and deepspeed.optimizer_type == "Muon":
        raise ConfigProblem(
            "Muon is for the training of whole matrices, and [tune] leaves some out or gives them other lrs",
            where=str(deepspeed.path),
            fix="use AdamW, or leave [tune] out",
        )
    if tune.freezes and deepspeed.offload("param") == "nvme":
        raise ConfigProblem(
            "weights that [tune] leaves as they are can't be read from NVMe for a checkpoint",
            where=str(deepspeed.path),
            fix='write "offload_param": {"device": "cpu"}, or leave [tune] out',
        )
    if tune.freezes and config.compute.fp8 != "none":
        raise ConfigProblem(
            "compute.fp8 computes the gradients of all matrices, and [tune] leaves some as they are",
            where="run config",
            fix="set compute.fp8 to none, or leave [tune] out",
        )
    sides = [side for matrix in adapted_matrices(config.model, tune) for side in (matrix.in_, matrix.out)]
    if sides and tune.lora_rank > min(sides):
        raise ConfigProblem(
            f"tune.lora_rank {tune.lora_rank} is more than the {min(sides)} rows or columns of a matrix",
            where="run config",
            fix="set tune.lora_rank to 8 or so: it is meant to be small",
        )


def render(resolved: Resolved, attention: str) -> Table:
    """The same for reading, as a table that rich can print; `attention`: the backend of this machine."""
    from rich.table import Table

    r = resolved
    offload = [f"{what} on {where}" for what, where in _offloads(r) if where != "none"]
    zero = {"stage": r.zero_stage}
    acts = acting_stage(zero, optimizer=r.optimizer, precision=r.precision, world_size=r.world_size)
    acting = (
        [] if offload or acts == r.zero_stage else [f"which acts as {acts}: one rank has nothing to share"]
    )
    rows = {
        "run": f"{r.name} in {r.run_dir}",
        "batch": f"{r.global_batch:,} sequences = {r.micro_batch} micro batch x {r.accumulation} "
        f"accumulation x {r.world_size} ranks",
        **{
            f"  ramp-up {n}": f"{size:,} sequences in {count:,} steps"
            for n, (size, count) in enumerate(zip(r.batch.sizes, r.batch.steps, strict=True), 1)
        },
        "tokens per step": f"{r.tokens_per_step:,} "
        + ("in the mean, of" if r.batch.sizes else "=" if r.packing == "windows" else "of")
        + f" {r.global_batch:,} x {r.seq_len:,}",
        "steps": f"{r.steps:,}"
        + (f" of the schedule's {r.horizon:,}" if r.horizon not in (None, r.steps) else ""),
        "training tokens": _known(r.train_tokens, ",d"),
        "packing": r.packing,
        "steps per epoch": _known(r.steps_per_epoch, ",.1f"),
        "epochs": _known(r.epochs, ",.2f"),
        **{
            f"source {n}": f"{s.path}: {s.share:.1%} of the sequences, {s.train_tokens:,} tokens, "
            f"{s.epochs:,.2f} epochs"
            for n, s in enumerate(r.sources, 1)
            if len(r.sources) > 1
        },
        "model": f"{r.family}, {r.objective}, {r.parameters:,} parameters"
        + (f", of which {r.trained:,} are trained" if r.trained < r.parameters else ""),
        "vocabulary": f"{r.vocab_size:,} (padded to {r.padded_vocab_size:,})",
        "precision": r.precision + (f", the blocks' products in fp8, {r.fp8}" if r.fp8 != "none" else ""),
        "ZeRO stage": ", ".join([str(r.zero_stage), *offload, *acting]),
        "optimizer": f"{r.optimizer}, lr {r.lr:g}, {r.scheduler or 'constant'}",
        "clipping": f"gradient norm {r.gradient_clipping:g}" if r.gradient_clipping else "none",
        "recompute": str(r.recompute),
        "attention here": attention,
    }
    table = Table(show_header=False, box=None)
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _known(number: float | None, form: str) -> str:
    return "not known: streamed" if number is None else format(number, form)


def _offloads(resolved: Resolved) -> list[tuple[str, str]]:
    return [("optimizer", resolved.offload_optimizer), ("parameters", resolved.offload_param)]
