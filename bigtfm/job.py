"""A checked job: what `bigtfm check` shows and training carries out. It imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bigtfm.check import Resolved, resolve
from bigtfm.config.deepspeed import DeepSpeedConfig, load_deepspeed_json
from bigtfm.config.problems import ConfigProblem, DataProblem
from bigtfm.config.run import RunConfig, load_run_config
from bigtfm.config.sections import LABELLED, ComputeSection
from bigtfm.data.indexed import TokenDataset
from bigtfm.data.mixture import training_order
from bigtfm.data.order import Order
from bigtfm.data.special import SpecialIds, special_ids
from bigtfm.data.stream_source import StreamSource
from bigtfm.data.streaming import ShuffledBlocks
from bigtfm.data.tokenizer import load_tokenizer
from bigtfm.data.vectors import form_of
from bigtfm.model.backends import (
    Choice,
    choose,
    choose_kernels,
    has_liger,
    installed_kernels,
    needs_of,
    this_device,
)
from bigtfm.resilience.out_of_memory import remembered


@dataclass(frozen=True)
class Job:
    """Both files, the data sets, and all that follows from them."""

    config_path: Path | None
    run: RunConfig
    deepspeed: DeepSpeedConfig
    datasets: tuple[TokenDataset, ...]  # of the mixture, or the only one
    source: StreamSource | None  # of the training text, where it is streamed
    order: Order  # of the training samples
    special: SpecialIds
    resolved: Resolved
    stated_micro_batch: int  # the JSON's; memory that ran out may have made it smaller

    @property
    def dataset(self) -> TokenDataset:
        """The first data set: tokenizer, vocabulary and validation are its."""
        return self.datasets[0]

    @cached_property
    def deepspeed_values(self) -> dict[str, Any]:
        """The DeepSpeed JSON with every "auto" resolved."""
        return self.deepspeed.resolved(self.run.model, self.resolved.steps, self.resolved.world_size)

    @cached_property
    def attention(self) -> Choice:
        """The attention backend on this machine, and why.

        Raises:
            ConfigProblem: compute.attention names one that can't serve here.
        """
        return choose(
            self.run.compute.attention,
            device=this_device(),
            needs=needs_of(self.run.model, self.resolved.precision),
            installed=installed_kernels(),
        )

    @cached_property
    def compute(self) -> ComputeSection:
        """How this machine computes the run: the run config's section with "auto" of its kernels resolved.

        Raises:
            ConfigProblem: a kernel that it names can't serve here.
        """
        kernels = choose_kernels(
            self.run.compute, model=self.run.model, device=this_device(), installed=has_liger()
        )
        return self.run.compute.model_copy(update={"attention": self.attention.name, "kernels": kernels})

    @cached_property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints."""
        return self.run.run_dir / "checkpoints"


def of_task(run: RunConfig, datasets: Sequence[TokenDataset]) -> RunConfig:
    """The run, with as many labels as its data sets have where it learns a task of theirs.

    Raises:
        ConfigProblem: the data are of another task, or of one while the run does not say what it learns, or
            their examples are longer than the run's sequences.
        DataProblem: data sets of a mixture differ in what they are for.
    """
    first, *others = (dataset.header.task for dataset in datasets)
    for dataset, other in zip(datasets[1:], others, strict=True):
        if other != first:
            raise DataProblem(
                f"not prepared for the same task as {datasets[0].path}",
                where=str(dataset.path),
                fix="prepare both with the same --task, labels and options",
            )
    kind, where = run.objective_kind, str(datasets[0].path)
    if first is not None and run.objective.kind is None and kind not in first.kinds:
        raise ConfigProblem(
            f"holds examples of {first.name}, and objective.kind does not say what is to be learnt",
            where=where,
            fix=f"set objective.kind to {' or '.join(first.kinds)}; or to {kind}, for the text alone",
        )
    if not run.supervised:
        return run
    if first is None or kind not in first.kinds:
        holds = f"examples of {first.name}" if first is not None else "text"
        raise ConfigProblem(
            f"objective.kind {kind} can't learn {holds}",
            where=where,
            fix=f"set objective.kind to {' or '.join(first.kinds)}"
            if first is not None
            else "prepare examples with `bigtfm prepare --task`",
        )
    if run.seq_len < first.max_tokens:
        key = "data.seq_len" if run.model.max_seq_len >= first.max_tokens else "model.max_seq_len"
        raise ConfigProblem(
            f"data.seq_len {run.seq_len} is less than the {first.max_tokens} tokens that an example may have",
            where=where,
            fix=f"set {key} to {first.max_tokens}, or prepare with --max-tokens {run.seq_len}",
        )
    labels = run.model.num_labels or len(first.labels)
    if kind not in LABELLED:
        return run
    if labels < len(first.labels):
        raise ConfigProblem(
            f"model.num_labels {labels} is less than the {len(first.labels)} labels of the data",
            where="run config",
            fix="leave model.num_labels out",
        )
    return run.model_copy(update={"model": run.model.model_copy(update={"num_labels": labels})})


def check_job(config: Path | None, deepspeed_json: Path, overrides: Sequence[str], world_size: int) -> Job:
    """Reads and checks everything that a run is made of.

    Raises:
        ConfigProblem: one of the files, or what they say together, is wrong.
        DataProblem: the data set is missing, damaged or too small, its tokenizer lacks what the objective
            needs, data.stream can't be trained on, data sets of several tasks are mixed, or run.vectors is no
            file of word vectors, which a fresh run alone reads.
    """
    deepspeed = load_deepspeed_json(deepspeed_json)
    run = load_run_config(config, overrides)
    stated = deepspeed.solve_batch(world_size).micro_batch
    if run.guard.halve_micro_batch:
        deepspeed = deepspeed.with_micro_batch(remembered(run.run_dir, stated), world_size)
    datasets = tuple(TokenDataset.open(path) for path in run.data.paths)
    run = of_task(run, datasets)
    special = special_ids(load_tokenizer(datasets[0].tokenizer_path), run)
    source = StreamSource.open(run.data.stream, run.data.text_column) if run.data.stream else None
    order: Order = ShuffledBlocks(run.seq_len, run.run.seed)
    if source is None:
        order = training_order(datasets, run.data, run.seq_len, run.run.seed)
    resolved = resolve(run, deepspeed, world_size, datasets, order, special.vocab_size)
    if run.run.vectors is not None and not any((run.run_dir / "checkpoints").glob("step-*")):
        form_of(Path(run.run.vectors))
    for dataset in datasets:
        if dataset.small:
            dataset.verify()
    return Job(config, run, deepspeed, datasets, source, order, special, resolved, stated)
