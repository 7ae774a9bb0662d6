"""What a training is made of: its model, its batches, and the checkpoint that it goes on from."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bigtfm.config.problems import ConfigProblem, DataProblem
from bigtfm.config.run import RunConfig
from bigtfm.data.indexed import Split, SplitName, TokenDataset
from bigtfm.data.loader import Loader, TokenStream
from bigtfm.data.mixture import training_order
from bigtfm.data.objectives import MakeExamples, make_objective
from bigtfm.data.order import MAX_SIZE, InOrder, Source, WholeDocuments, Windows
from bigtfm.data.special import SpecialIds
from bigtfm.data.streaming import StreamedTokens
from bigtfm.data.tokenizer import load_tokenizer
from bigtfm.data.vectors import load_vectors
from bigtfm.engine import checkpoint, checksums, loading
from bigtfm.engine.checkpoint import Progress
from bigtfm.engine.distributed import Ranks
from bigtfm.engine.probe import PROBE_TOKENS, Probe, require_same
from bigtfm.job import Job
from bigtfm.model.distillation import Distillation
from bigtfm.model.families import make_model
from bigtfm.model.heads import LanguageModel
from bigtfm.model.lora import add_adapters
from bigtfm.resilience import spikes
from bigtfm.run_directory import (
    SavedRun,
    brief,
    identity,
    refuse_changes,
    saved_identity,
    saved_run,
    starting_point,
)
from bigtfm.word_vectors import fill, rows_of


def fresh_model(job: Job) -> LanguageModel:
    """The model, to be filled with initial weights or a checkpoint's."""
    run = job.run
    model = make_model(
        run.model, job.special.vocab_size, seed=run.run.seed, objective=run.objective, compute=job.compute
    )
    add_adapters(model, run.tune)
    return model


def learn_from_teacher(job: Job, model: LanguageModel, ranks: Ranks) -> None:
    """Puts the run that distill.teacher names beside the model, if there is one, in the run's precision.

    Raises:
        ConfigProblem: the teacher reads or predicts other tokens than the model.
        NoCheckpoint: it has no checkpoint.
    """
    distill = job.run.distill
    if distill.teacher is None:
        return
    saved = saved_run(Path(distill.teacher))
    _require_same_tokens(job, saved, distill.teacher)
    compute = model.compute.model_copy(update={"recompute": "none"})
    teacher = make_model(saved.run.model, saved.vocab_size, objective=saved.run.objective, compute=compute)
    loading.load_weights(saved.checkpoint, teacher)
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    teacher.to(ranks.device, dtypes[job.resolved.precision])
    Distillation(teacher, distill.temperature, distill.weight).attach(model)


def _require_same_tokens(job: Job, teacher: SavedRun, where: str) -> None:
    there = checkpoint.read_state(teacher.checkpoint)["progress"]["identity"]
    tokenizer = there["tokenizer"] or "none"
    pairs = {
        "tokenizer": (brief(tokenizer), brief(job.dataset.header.tokenizer.identity)),
        "vocabulary": (teacher.vocab_size, job.special.vocab_size),
        "family": (teacher.run.model.family, job.run.model.family),
        "objective": (teacher.run.objective_kind, job.run.objective_kind),
    }
    for name, (its, ours) in pairs.items():
        if its != ours:
            raise ConfigProblem(
                f"the teacher's {name} is {its} and the run's is {ours}",
                where=f"distill.teacher {where}",
                fix="teach with a run on data of the same `bigtfm prepare`, of the same family and objective",
            )
    longest = teacher.run.model.max_seq_len
    if longest < job.run.seq_len and teacher.run.model.positions == "learned":
        raise ConfigProblem(
            f"the teacher knows {longest} positions and data.seq_len is {job.run.seq_len}",
            where=f"distill.teacher {where}",
            fix=f"set data.seq_len to {longest}, or choose another teacher",
        )


def batches_of(job: Job, split: SplitName) -> Loader:
    """A split's batches: training in each epoch's own order, or from a stream; validation as it stands."""
    run = job.run
    if split != "train":
        return as_it_stands(run, job.dataset, job.special, split)
    stream: TokenStream = Split.join([dataset.split(split) for dataset in job.datasets])
    if job.source is not None:
        stream = StreamedTokens.like(job.dataset, job.source, run.seq_len)
    return Loader(stream, job.order, run.seq_len, job.dataset.vocab_size, _objective(run, job.special))


def shuffled(run: RunConfig, datasets: Sequence[TokenDataset], special: SpecialIds) -> Loader:
    """The training batches of a run on prepared data sets."""
    stream = Split.join([dataset.split("train") for dataset in datasets])
    order = training_order(datasets, run.data, run.seq_len, run.run.seed)
    return Loader(stream, order, run.seq_len, datasets[0].vocab_size, _objective(run, special))


def as_it_stands(run: RunConfig, dataset: TokenDataset, special: SpecialIds, split: SplitName) -> Loader:
    """The batches of a split in the order of its tokens."""
    stream = dataset.split(split)
    order = InOrder(_pieces_of(run, stream, run.seq_len))
    return Loader(stream, order, run.seq_len, dataset.vocab_size, _objective(run, special))


def _pieces_of(run: RunConfig, split: Split, seq_len: int) -> Source:
    """A split as it stands: windows of text, or whole examples of a task."""
    if run.supervised:
        return WholeDocuments(split.document_starts(0, split.num_tokens), split.num_tokens, seq_len)
    return Windows(split.num_tokens, seq_len, full=False)


def _objective(run: RunConfig, special: SpecialIds) -> MakeExamples:
    causal = run.model.family == "gpt"
    return make_objective(run.objective, run.objective_kind, special, run.run.seed, causal=causal)


def start_stream(job: Job, stream: StreamedTokens, progress: Progress, ranks: Ranks) -> None:
    """Puts a stream where the run stands."""
    stream.start(
        progress.samples,
        progress.stream,
        accept_changes="data" in job.run.resume.allow,
        say=print if ranks.rank == 0 else lambda _: None,
    )


def resume(job: Job, engine: Any, ranks: Ranks) -> tuple[Progress, Probe | None]:
    """Fills the engine from the newest checkpoint of the run directory, if there is one.

    A fresh run begins with its initial weights, or with another's (run.init_from).

    Raises:
        ConfigProblem: something that decides the curve has changed.
        NoCheckpoint: none verifies, or the loss of the checkpoint's probe is not what it was.
    """
    ranks.pulse.enter("resume")
    now = identity(job)
    found = checkpoint.newest(job.checkpoints, ranks)
    if found is None:
        if job.run.run.init_from is not None:
            path, heads = starting_point(job, now, ranks)
            loading.start_from(path, engine, heads)
            if ranks.rank == 0:
                print(f"begins with the weights of {path}{' and a fresh head' if heads else ''}")
        if job.run.run.vectors is not None:
            begin_with_vectors(job, job.run.run.vectors, engine, ranks)
        return Progress(identity=now), fresh_probe(job, ranks)
    state = checkpoint.read_state(found)
    allow, before = job.run.resume.allow, saved_identity(state)
    refuse_changes(before, now, allow, job.run.run_dir)
    same_optimizer = before["recipe"]["optimizer"]["type"] == now["recipe"]["optimizer"]["type"]
    progress = loading.load(found, engine, ranks, moments=same_optimizer)
    if before["recipe"] != now["recipe"] and hasattr(engine.lr_scheduler, "last_batch_iteration"):
        engine.lr_scheduler.step(
            engine.lr_scheduler.last_batch_iteration
        )  # the new recipe's lr, at this step
    progress.identity = now
    same_mathematics = all(before[part] == now[part] for part in ("model", "objective"))
    if state.get("probe") is None or not same_mathematics:
        return progress, fresh_probe(job, ranks)
    probe = Probe.from_json(state["probe"], setting_of(job, ranks))
    if "probe" not in allow:
        loss = ranks.from_first(probe.loss(engine, ranks.device))
        require_same(
            state["probe"],
            probe,
            loss,
            lambda: checksums.changed_tensors(found, checksums.engine_checksums(engine, ranks)),
            where=str(found),
        )
    return progress, probe


def begin_with_vectors(job: Job, path: str, engine: Any, ranks: Ranks) -> None:
    """Puts a file's word vectors into the token embedding, and says how many tokens have one.

    Raises:
        ConfigProblem, DataProblem: it holds none, or none of the data's words.
    """
    with ranks.together("reading the word vectors"):
        vectors = load_vectors(Path(path))
        tokenizer = load_tokenizer(job.dataset.tokenizer_path)
        rows, values, coverage = rows_of(vectors, tokenizer, job.run.model, job.run.run.seed)
    fill(engine, rows, values)
    if ranks.rank == 0:
        print(coverage.line(path, job.run.model.hidden_size))


def require_samples(job: Job, progress: Progress) -> None:
    """Raises DataProblem where what was left out after spikes is more than the sources had to spare."""
    resolved, there = job.resolved, job.order.num_samples
    if not progress.spikes or there == MAX_SIZE:
        return
    to_come = range(progress.step + 1, resolved.steps + 1)
    needed = spikes.end(progress.samples, to_come, resolved.batch, progress.spikes)
    if needed > there:
        raise DataProblem(
            f"data.sources have {there} sequences within their max_epochs; {resolved.steps} steps need "
            f"{needed} with those left out after spikes of the loss",
            where="run config",
            fix="start again with fewer run.steps or a smaller guard.spike_skip; or with larger max_epochs "
            "and resume.allow=data",
        )


def fresh_probe(job: Job, ranks: Ranks) -> Probe | None:
    """The first short sample of the data set in which something is to be predicted; None: of 64 none is."""
    run, split = job.run, job.dataset.split("train")
    seq_len = min(run.seq_len, PROBE_TOKENS)
    loader = Loader(
        split,
        InOrder(_pieces_of(job.run, split, seq_len)),
        seq_len,
        job.dataset.vocab_size,
        _objective(job.run, job.special),
    )
    for sample in range(min(64, loader.num_samples)):
        batch = loader.batch(sample, 1)
        if batch.num_labels:
            return Probe(batch.model_inputs(), setting_of(job, ranks))
    return None


def setting_of(job: Job, ranks: Ranks) -> dict[str, str]:
    """What may move a loss beyond rounding in the last digits, besides the weights."""
    versions = {name: version(name) for name in ("torch", "deepspeed")}
    return {
        "precision": job.resolved.precision,
        "attention": job.attention.name,
        "device": ranks.device_name,
        **versions,
    }
