"""A run's directory: the user's files byte for byte, what they resolve to, the tokenizer; and reading it."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from bigtfm.config.problems import ConfigProblem, DataProblem, NoCheckpoint, first_change
from bigtfm.config.run import RunConfig
from bigtfm.config.sections import DataSection, DistillSection, ModelSection, ObjectiveSection, TuneSection
from bigtfm.data.indexed import TaskHeader, TokenDataset
from bigtfm.data.special import SpecialIds, special_ids
from bigtfm.data.tokenizer import Tokenizer, load_tokenizer
from bigtfm.engine import checkpoint, checksums, loading
from bigtfm.engine.distributed import Ranks
from bigtfm.engine.probe import Probe, require_same
from bigtfm.evaluate import unigram_bits_per_byte
from bigtfm.export import chosen
from bigtfm.job import Job
from bigtfm.model.families import make_model
from bigtfm.model.heads import LanguageModel

TASK = "task.json"  # what the run's examples are: their labels, how rows become examples
HUGGING_FACE = "huggingface"  # folder of an imported run: the original config


def identity(job: Job) -> dict[str, Any]:
    """What decides the loss curve; the keys are those of resume.allow."""
    run, values = job.run, job.deepspeed_values
    parts = {
        "data": _data_identity(job),
        "tokenizer": job.dataset.header.tokenizer.identity,
        "model": {**run.model.model_dump(mode="json"), "vocab_size": job.special.vocab_size},
        "objective": {**run.objective.model_dump(mode="json"), "kind": run.objective_kind},
        "seed": run.run.seed,
        "distill": _teacher_identity(run.distill),
        "recipe": {
            "global_batch": job.resolved.global_batch,
            **{key: values.get(key) for key in ("optimizer", "scheduler", "gradient_clipping")},
            **({"fp8": run.compute.fp8} if run.compute.fp8 != "none" else {}),
            "tune": run.tune.model_dump(mode="json"),
            **({"batch": run.batch.model_dump(mode="json")} if run.batch.rampup_sizes else {}),
        },
    }
    return json.loads(json.dumps(parts))  # as it will be read back


def saved_identity(state: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint's state says of its run; keys that came after it was saved have their defaults."""
    saved = dict(state["progress"]["identity"])
    for part, section in (("model", ModelSection()), ("objective", ObjectiveSection())):
        saved[part] = json.loads(section.model_dump_json()) | saved[part]
    recipe = saved.get("recipe")  # imported weights have none
    if isinstance(recipe, dict):
        saved["recipe"] = recipe | {"tune": TuneSection().model_dump(mode="json") | recipe.get("tune", {})}
    return saved


def _teacher_identity(distill: DistillSection) -> dict[str, Any] | None:
    """Which weights teach, and how; None: no teacher."""
    if distill.teacher is None:
        return None
    saved = next(iter(checkpoint.steps_in(Path(distill.teacher) / "checkpoints").values()), None)
    manifest = saved / "manifest.json" if saved is not None else None
    known = manifest is not None and manifest.is_file()
    sha256 = hashlib.sha256(manifest.read_bytes()).hexdigest() if known and manifest else None
    return {"teacher": sha256, "temperature": distill.temperature, "weight": distill.weight}


def _data_identity(job: Job) -> dict[str, Any]:
    """What the training samples are; a part that says nothing new of one data set in windows is left out."""
    data = job.run.data
    parts: dict[str, Any] = {"sha256": job.dataset.identity, "seq_len": job.run.seq_len}
    if data.packing != "windows":
        parts["packing"] = data.packing
    if job.source is not None:
        parts["stream"] = job.source.identity
    if len(job.datasets) > 1:
        parts["sources"] = {
            str(n): {"sha256": dataset.identity, "weight": source.weight, "max_epochs": source.max_epochs}
            for n, (dataset, source) in enumerate(zip(job.datasets, data.sources, strict=True), 1)
        }
    return parts


def refuse_changes(
    saved: dict[str, Any],
    now: dict[str, Any],
    allow: tuple[str, ...],
    where: Path,
    undo: str = "undo it, give the new run another run.name",
) -> None:
    """Raises ConfigProblem when a run would go on as another one than was saved, and names every part."""
    parts = [part for part, value in now.items() if saved.get(part) != value and part not in allow]
    if parts:
        changes = [first_change(part, saved.get(part), now[part]) for part in parts]
        said = [f"{name} was {brief(before)} when this run was saved and is {brief(value)} now"
                for name, before, value in changes]  # fmt: skip
        accept = f", or accept the change with resume.allow={','.join(parts)}"
        fits = not any(name.removeprefix("model.") in SHAPE for name, *_ in changes)
        raise ConfigProblem("; ".join(said), where=str(where), fix=f"{undo}{accept if fits else ''}")


def brief(value: Any) -> Any:
    if value is None:
        return "unset"
    return f"{value[:12]}..." if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else value


# Of a model: no weights that were saved would fit another.
SHAPE = ("family", "hidden_size", "num_layers", "num_decoder_layers", "num_kv_heads", "head_dim",
         "ffn_hidden_size", "vocab_size", "num_labels")  # fmt: skip
# Of a model whose weights a fresh run takes over:
FREE_TO_CHANGE = ("dropout", "attention_dropout", "init_std")
HEADS = ("lm_head.", "mlm_head.", "next_sentence.", "task_head.")  # these differ where the objectives do
HEAD_KEYS = ("head_bias", "tied_embeddings", "next_sentence", "num_labels", "vocab_size")


def starting_point(job: Job, now: dict[str, Any], ranks: Ranks) -> tuple[Path, tuple[str, ...]]:
    """The checkpoint that run.init_from names, of a model that is this one but for the head, where that is
    another objective's: then also the beginnings of the heads' names.

    Raises:
        ConfigProblem: its model or its tokenizer is another.
        NoCheckpoint: there is none.
    """
    source = Path(job.run.run.init_from or "")
    found = checkpoint.newest(source / "checkpoints", ranks)
    if found is None:
        raise NoCheckpoint(
            "run.init_from has no checkpoint",
            where=str(source),
            fix="pass the directory of a run that has saved one, or what `bigtfm import-hf` wrote",
        )
    saved = saved_identity(checkpoint.read_state(found))
    before, after = dict(saved["model"]), dict(now["model"])
    other_head = job.run.supervised and saved["objective"]["kind"] != job.run.objective_kind
    free = FREE_TO_CHANGE + (("max_seq_len",) if job.run.model.positions != "learned" else ())
    for name in free + (HEAD_KEYS if other_head else ()):
        before[name] = after[name]
    refuse_changes(
        {"model": before, "tokenizer": saved["tokenizer"]},
        {"model": after, "tokenizer": now["tokenizer"]},
        job.run.resume.allow,
        found,
        undo=f"take the [model] table of {source / 'run.toml'} and what overrides it was trained with, "
        "and its tokenizer for `bigtfm prepare`",
    )
    return found, HEADS if other_head else ()


def lay_out(job: Job) -> None:
    """Writes everything but metrics and checkpoints."""
    folder, validation = job.run.run_dir, job.dataset.header.splits["validation"]
    job.checkpoints.mkdir(parents=True, exist_ok=True)
    if job.config_path is None:
        (folder / "run.toml").write_text(
            "# Started without --config: every value is its default.\n", encoding="utf-8"
        )
    else:
        _copy(job.config_path, folder / "run.toml")
    kept = folder / "deepspeed.json"
    if job.deepspeed.path.resolve() != kept.resolve():
        kept.write_bytes(job.deepspeed.text.encode())  # as it was read: the file may have changed since
    resolved = {
        **asdict(job.resolved),
        "unigram_bits_per_byte": unigram_bits_per_byte(job.dataset)
        if validation.tokens and job.run.objective_kind == "causal_lm"
        else None,
        "run_config": job.run.model_dump(mode="json"),
    }
    (folder / "resolved.json").write_text(json.dumps(resolved, indent=1) + "\n", encoding="utf-8")
    shutil.copytree(job.dataset.tokenizer_path, folder / "tokenizer", dirs_exist_ok=True)
    if job.run.supervised and job.dataset.header.task is not None:
        (folder / TASK).write_text(job.dataset.header.task.model_dump_json(indent=1) + "\n", encoding="utf-8")
    imported = Path(job.run.run.init_from or "") / HUGGING_FACE
    if job.run.run.init_from and imported.is_dir():  # what the model was there: an export makes it that again
        shutil.copytree(imported, folder / HUGGING_FACE, dirs_exist_ok=True)
    (folder / "failure.json").unlink(missing_ok=True)  # an earlier start's


def _copy(source: Path, target: Path) -> None:
    if source.resolve() != target.resolve():  # a run may be started from its own copies
        shutil.copyfile(source, target)


@dataclass(frozen=True)
class SavedRun:
    """What a run's checkpoint says of its model."""

    checkpoint: Path
    run: RunConfig  # [model], [objective] and data.seq_len
    vocab_size: int
    tokenizer: Tokenizer | None  # None: the run directory has none


def saved_run(run_dir: Path, step: int | None = None, best: bool = False) -> SavedRun:
    """Reads it, of the checkpoint that `bigtfm.export.chosen` finds; nothing is built.

    Raises:
        ConfigProblem, NoCheckpoint: as `chosen`; or its state is damaged.
        DataProblem: the tokenizer is damaged, or another's.
    """
    found = chosen(run_dir, step, best)
    try:
        saved = checkpoint.read_state(found)["progress"]["identity"]
        run = RunConfig(
            model=ModelSection.model_validate(saved["model"]),
            data=DataSection(
                seq_len=saved["data"]["seq_len"], packing=saved["data"].get("packing", "windows")
            ),
            objective=ObjectiveSection.model_validate(saved["objective"]),
        )
        identity, vocab_size = saved["tokenizer"], run.model.vocab_size
        if vocab_size is None:
            raise KeyError("vocab_size")
    except (KeyError, TypeError, ValueError) as error:
        lack = f"it lacks {error}" if isinstance(error, KeyError) else "a value has the wrong type"
        why = ": ".join(filter(None, finding(error))) if isinstance(error, ValidationError) else lack
        raise NoCheckpoint(
            f"state.json describes no model: {why}", where=str(found), fix="use a run of this version"
        ) from None
    tokenizer = load_tokenizer(run_dir / "tokenizer") if (run_dir / "tokenizer").exists() else None
    if tokenizer is not None and tokenizer.identity != identity:
        raise DataProblem(
            "not the tokenizer that the model was trained with",
            where=str(run_dir / "tokenizer"),
            fix="put the one of the run's data set back",
        )
    return SavedRun(found, run, vocab_size, tokenizer)


def saved_task(run_dir: Path) -> TaskHeader | None:
    """What the run's examples are; None: it has learnt text.

    Raises:
        DataProblem: the file that says so is damaged.
    """
    path = run_dir / TASK
    try:
        return TaskHeader.model_validate_json(path.read_bytes()) if path.is_file() else None
    except ValidationError as error:
        raise DataProblem(
            f"damaged: {error.errors()[0]['msg']}",
            where=str(path),
            fix="start the training again: it writes it",
        ) from None


def stated_by(run_dir: Path) -> dict[str, Any]:
    """The run config that a run was started with; {}: it was imported."""
    path = run_dir / "resolved.json"
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))["run_config"] if path.exists() else {}
        return dict(stated)
    except (ValueError, KeyError, TypeError):
        raise ConfigProblem("is damaged", where=str(path), fix="remove it, and pass --data") from None


def data_of(saved: SavedRun, stated: dict[str, Any], data: Path | None) -> list[TokenDataset]:
    """The data sets that a run has learnt from, or `data` instead.

    Raises:
        ConfigProblem: the run names none.
        DataProblem: one is missing, or has another tokenizer than the run.
    """
    if data is None and not stated:
        fix = "pass --data with a folder that `bigtfm prepare` wrote with the run's tokenizer"
        raise ConfigProblem("the run names no data set", where=str(saved.checkpoint), fix=fix)
    paths = [str(data)] if data is not None else DataSection.model_validate(stated["data"]).paths
    datasets = [TokenDataset.open(Path(path)) for path in paths]
    for path, dataset in zip(paths, datasets, strict=True):
        if saved.tokenizer is not None and dataset.header.tokenizer.identity != saved.tokenizer.identity:
            raise DataProblem(
                "has another tokenizer than the run",
                where=path,
                fix="pass a --data that `bigtfm prepare --tokenizer RUN/tokenizer` has written",
            )
    return datasets


def finding(error: ValidationError) -> tuple[str, str]:
    """The first field that a validator refused ("": several together), and a clause that says why."""
    first = error.errors()[0]
    said = first["ctx"]["error"].args[0] if first["type"] == "value_error" else first["msg"]
    return ".".join(map(str, first["loc"])), str(said)


def open_run(
    run_dir: Path, step: int | None = None, best: bool = False
) -> tuple[LanguageModel, Tokenizer, SpecialIds]:
    """The model of a checkpoint (fp32, evaluation mode), its tokenizer and the ids it works with.

    Without DeepSpeed.

    Raises:
        ConfigProblem, NoCheckpoint, DataProblem: as saved_run; the tokenizer is missing.
    """
    saved = saved_run(run_dir, step, best)
    try:
        model = make_model(saved.run.model, saved.vocab_size, objective=saved.run.objective)
    except (TypeError, ValueError, RuntimeError) as error:
        raise NoCheckpoint(
            f"its model can't be built: {error}",
            where=str(saved.checkpoint),
            fix="use a run of this version, and a machine with memory for the model",
        ) from None
    tokenizer = saved.tokenizer or load_tokenizer(run_dir / "tokenizer")  # says that there is none
    special = special_ids(tokenizer, saved.run)
    loading.load_weights(saved.checkpoint, model, quantized=True)
    _require_probe(saved.checkpoint, model)
    return model.eval(), tokenizer, special


def _require_probe(found: Path, model: LanguageModel) -> None:
    """Raises NoCheckpoint when the model does not have the loss that the checkpoint keeps."""
    kept = checkpoint.read_state(found).get("probe")
    if kept is None:  # imported weights
        return
    probe = Probe.from_json(kept, {"precision": "fp32", "device": "cpu", "torch": version("torch")})

    def changed() -> list[str]:
        return checksums.changed_tensors(found, checksums.stored_checksums(found))

    require_same(kept, probe, probe.loss(model, torch.device("cpu")), changed, where=str(found))
