"""Hugging Face models to run directories and back: `bigtfm import-hf` and `bigtfm export-hf`.

Everything is checked before a tensor is read. What is written stands in a hidden folder until it is whole and
transformers agrees with it. No more than one tensor is held at a time, but for that comparison.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigtfm.config.problems import ConfigProblem, NoCheckpoint
from bigtfm.config.run import DataSection, ModelSection, ObjectiveSection, RunConfig, RunSection
from bigtfm.data import hf_tokenizer
from bigtfm.data.special import special_ids
from bigtfm.data.tokenizer import Tokenizer, load_tokenizer
from bigtfm.engine import checkpoint, weights
from bigtfm.engine.checkpoint import Progress
from bigtfm.model import hf_config
from bigtfm.model.families import make_model
from bigtfm.model.hf import VOCABULARY, Architecture, Config, Conversion, Shape, parameter_shapes
from bigtfm.model.hf_files import INDEX, WEIGHTS, Plan, TensorFiles, plan_import, read_json
from bigtfm.model.transformer import initial_value
from bigtfm.parity import require_parity
from bigtfm.run_directory import HUGGING_FACE

SHARD_BYTES = 5 * 10**9  # of an export, as save_pretrained's default was for years
SHOWN_BYTES = 10**9  # from here on, progress is shown
_ORIGIN = "imported.json"  # beside the original config.json: which tokenizer belongs to it
_FETCHED = ["*.safetensors", "*.json", "*.model", "*.spm", "*.txt", "*.jinja"]
_HF_FILES = ("config.json", "generation_config.json", *hf_tokenizer.FILES)
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Keys of an original config that say how its file was written, or the same as what we write otherwise.
_NOT_KEPT = ("_name_or_path", "transformers_version", "rope_parameters", "layer_types")


def import_hf(source: str, out: Path, *, vocab_size: int | None = None, compare: bool = True) -> list[str]:
    """Makes a run directory of a Hugging Face model; returns what is to be told.

    source: a folder, or a name on the hub. out: a folder that is not there yet, or empty. vocab_size: tokens
    that the model is to know; fewer than it does: the first; more: new rows are the mean of all. compare:
    whether transformers, if it is installed, has to give the same outputs.

    Raises:
        ConfigProblem: the model can't be converted, or `out` is taken.
        DataProblem: a file is missing or damaged, or a tensor is not what the config says.
        NumericsProblem: transformers disagrees.
    """
    folder = _folder_of(source)
    with _made_whole(out) as building:
        config = read_json(folder / "config.json")
        architecture = hf_config.architecture_of(config)
        files = TensorFiles(folder)
        section = hf_config.to_model_section(config, files.shapes)
        tokenizer = hf_tokenizer.read_tokenizer(folder)
        conversion = _conversion(architecture, section, config, tokenizer, vocab_size)
        plan = plan_import(files, config, conversion)
        section = conversion.section

        objective = ObjectiveSection(kind=architecture.objective)
        run = RunConfig(model=section, objective=objective)
        (building / "run.toml").write_text(_toml(run, source), encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save(building / "tokenizer")
        _keep_originals(folder, building / HUGGING_FACE, tokenizer)
        progress = Progress(identity=_identity(run, conversion.our_vocab_size, tokenizer))
        tensors = _with_progress(_imported(plan, files), plan.shapes, "importing")
        saved = weights.save_weights(building / "checkpoints", plan.shapes, tensors, progress)
        name = _comparable(plan)
        parity = _compare(saved, section, conversion.our_vocab_size, folder, name, compare)

    return _lines(
        imported=f"{(config.get('architectures') or [name])[0]} as {section.family}, "
        f"{_count(plan.shapes)} parameters",
        initialised=f"{_some(plan.fresh)}, as a fresh run's" if plan.fresh else "",
        zero=f"{_some(plan.zeros)}, which it has not" if plan.zeros else "",
        dropped=_some(plan.dropped),
        vocabulary=_vocabulary(conversion, tokenizer),
        compared=parity,
        next=f"bigtfm train --deepspeed_config FILE --config {out / 'run.toml'} run.init_from={out} "
        "run.name=NAME data.path=DATA",
    )


def _folder_of(source: str) -> Path:
    """The folder itself, or the hub's files of that name."""
    if Path(source).is_dir():
        return Path(source)
    if Path(source).exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source):
        raise ConfigProblem("no such folder", where=source, fix="pass a folder with config.json and weights")
    from huggingface_hub import snapshot_download

    try:  # "*/*": other formats stand in subfolders
        found = snapshot_download(source, allow_patterns=_FETCHED, ignore_patterns=["*/*", "consolidated*"])
    except Exception as error:
        said = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        raise ConfigProblem(
            f"neither a folder nor to be had from the Hugging Face hub: {said}",
            where=source,
            fix="check the name and the network, or pass a folder",
        ) from None
    return Path(found)


def _conversion(
    architecture: Architecture,
    section: ModelSection,
    config: Config,
    tokenizer: Tokenizer | None,
    asked: int | None,
) -> Conversion:
    theirs, known = config.get("vocab_size"), tokenizer.vocab_size if tokenizer else 0
    if not isinstance(theirs, int) or theirs < 1:
        raise ConfigProblem("does not say vocab_size", where="config.json", fix="restore the file")
    ours = asked or theirs
    if ours < known or (section.decoder_start_id or 0) >= ours:
        what = f"the tokenizer's {known}" if ours < known else f"decoder_start_id {section.decoder_start_id}"
        raise ConfigProblem(
            f"a vocabulary of {ours} is too small for {what}",
            where="--vocab-size" if asked else "config.json",
            fix=f"pass --vocab-size {max(known, (section.decoder_start_id or 0) + 1)} or more",
        )
    section = section.model_copy(update={"vocab_size": None if ours == known else ours})
    return Conversion(architecture, section, theirs, ours, architecture.position_offset(config))


def _imported(plan: Plan, files: TensorFiles) -> Iterator[tuple[str, Tensor]]:
    conversion, seed = plan.conversion, RunSection().seed
    for name, shape in plan.shapes.items():
        if name in plan.fresh:
            value = initial_value(name, shape, conversion.section, seed)
            if name in VOCABULARY:
                value[conversion.our_vocab_size :] = 0
            yield name, value
        else:
            yield name, plan.read(name, files)


def _identity(run: RunConfig, vocab_size: int, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """What a run that begins with these weights is compared with."""
    return {
        "model": {**run.model.model_dump(mode="json"), "vocab_size": vocab_size},
        "objective": {**run.objective.model_dump(mode="json"), "kind": run.objective_kind},
        "tokenizer": tokenizer.identity if tokenizer else None,
        "data": {"seq_len": run.seq_len},
    }


def _keep_originals(folder: Path, target: Path, tokenizer: Tokenizer | None) -> None:
    """The small files of the model, so that an export gives them back."""
    target.mkdir()
    for name in _HF_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)
    origin = {"tokenizer": tokenizer.identity if tokenizer else None}
    (target / _ORIGIN).write_text(json.dumps(origin) + "\n", encoding="utf-8")


def _toml(run: RunConfig, source: str) -> str:
    """A run config that says what differs from the defaults."""
    lines = [f"# What `bigtfm import-hf {source}` found; every other value is its default."]
    for table in ("model", "objective"):
        changed = getattr(run, table).model_dump(exclude_defaults=True, exclude_none=True)
        if changed:
            lines += ["", f"[{table}]", *(f"{key} = {json.dumps(value)}" for key, value in changed.items())]
    return "\n".join(lines) + "\n"


def export_hf(
    run_dir: Path, out: Path, *, architecture: str | None = None, compare: bool = True
) -> list[str]:
    """Makes a Hugging Face model of a run's newest checkpoint; returns what is to be told.

    out: a folder that is not there yet, or empty. architecture: a class or model type of transformers; None:
    what the run was imported from, or the one that it fits. compare: as in `import_hf`.

    Raises:
        ConfigProblem: no architecture, or not the one asked for, is this model's shape; or `out` is taken.
        NoCheckpoint: there is none.
        NumericsProblem: transformers disagrees.
    """
    newest = checkpoint.newest(run_dir / "checkpoints")
    if newest is None:
        raise NoCheckpoint(
            "no checkpoint", where=str(run_dir), fix="pass the directory of a run that has one"
        )
    with _made_whole(out) as building:
        identity = checkpoint.read_state(newest)["progress"]["identity"]
        section = ModelSection.model_validate(identity["model"])
        vocab_size: int = identity["model"]["vocab_size"]
        original = _original(run_dir)
        target = _target(architecture, original, section)
        if original.get("model_type") != target.model_type:
            original = {}
        tokenizer = load_tokenizer(run_dir / "tokenizer") if (run_dir / "tokenizer").is_dir() else None
        special = _special(original, tokenizer, section)
        config = original | hf_config.to_hf_config(section, vocab_size, target, special)
        _write_json(building / "config.json", config)
        if section.family != "bert":
            _write_json(building / "generation_config.json", _generation(run_dir, bool(original), special))
        for name, content in _tokenizer_files(run_dir, tokenizer, identity, bool(original)).items():
            (building / name).write_bytes(content)

        note = _tokenizer_note(tokenizer, building) if compare else ""
        theirs = hf_config.expressed(section, config)
        conversion = Conversion(target, theirs, vocab_size, vocab_size, target.position_offset(config))
        zeros = _write_weights(newest, building, conversion)
        parity = _compare(newest, section, vocab_size, building, config["architectures"][0], compare)

    return _lines(
        exported=f"{config['architectures'][0]} from {newest.name}, {_count(weights.weight_shapes(newest))} "
        "parameters",
        zero=f"{_some(zeros)}, which the run has not" if zeros else "",
        tokenizer=note,
        compared=parity,
        next=f"transformers.AutoModel.from_pretrained({str(out)!r})",
    )


def _original(run_dir: Path) -> Config:
    """config.json of the model that the run began with, less what an export says anew; {}: none."""
    path = run_dir / HUGGING_FACE / "config.json"
    original = read_json(path) if path.is_file() else {}
    return {key: value for key, value in original.items() if key not in _NOT_KEPT}


def _target(asked: str | None, original: Config, section: ModelSection) -> Architecture:
    if asked is None and not original:
        return hf_config.fitting(section)
    target = hf_config.architecture_named(asked) if asked else hf_config.architecture_of(original)
    hf_config.require_fit(section, target)
    return target


def _special(original: Config, tokenizer: Tokenizer | None, section: ModelSection) -> Config:
    """bos_token_id and its like: the original's, else the tokenizer's."""
    special = {name: original[name] for name in _IDS if name in original}
    if not original and tokenizer is not None:
        special = {
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": tokenizer.eos_id,
            "pad_token_id": hf_tokenizer.pad_id(tokenizer),
        }
    if section.family == "encoder_decoder":
        start = section.decoder_start_id
        special["decoder_start_token_id"] = special.get("bos_token_id") if start is None else start
    return special


def _generation(run_dir: Path, imported: bool, special: Config) -> Config:
    path = run_dir / HUGGING_FACE / "generation_config.json"
    return read_json(path) if imported and path.is_file() else special


def _tokenizer_files(
    run_dir: Path, tokenizer: Tokenizer | None, identity: dict[str, Any], imported: bool
) -> dict[str, bytes]:
    """The original's files if the tokenizer is still that one, else ours converted."""
    if tokenizer is None:
        return {}
    originals = run_dir / HUGGING_FACE
    if imported and read_json(originals / _ORIGIN)["tokenizer"] == tokenizer.identity:
        kept = [originals / name for name in hf_tokenizer.FILES if (originals / name).is_file()]
        return {path.name: path.read_bytes() for path in kept}
    run = RunConfig(
        model=ModelSection.model_validate(identity["model"]),
        data=DataSection(seq_len=identity["data"]["seq_len"]),
        objective=ObjectiveSection.model_validate(identity["objective"]),
    )
    special = special_ids(tokenizer, run)
    named = {i: f"<extra_id_{k}>" for k, i in enumerate(special.sentinels)}
    if special.mask is not None:
        named[special.mask] = "<mask>"
    added = {i: name for i, name in named.items() if i >= tokenizer.vocab_size}
    return hf_tokenizer.hf_files(tokenizer, added, closes=run.model.family != "gpt")


def _tokenizer_note(tokenizer: Tokenizer | None, folder: Path) -> str:
    """What is to be told of the tokenizer in `folder`, as AutoTokenizer loads it; "": it gives our ids."""
    if tokenizer is None:
        return "none in the run directory"
    if find_spec("transformers") is None:
        return ""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    same = all(
        theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text) for text in hf_tokenizer.PROBE
    )
    return "" if same else "AutoTokenizer puts another in its place; PreTrainedTokenizerFast loads it"


def _write_weights(newest: Path, folder: Path, conversion: Conversion) -> list[str]:
    """Writes the safetensors; returns the parameters that are zeros because the checkpoint has none."""
    ours = weights.weight_shapes(newest)
    shapes = parameter_shapes(conversion.section, conversion.vocab_size) | ours
    zeros = [name for name in shapes if name not in ours]
    groups = weights.in_shards(shapes, SHARD_BYTES)
    stored = {name: conversion.stored(name, shape) for name, shape in shapes.items()}
    file_of: dict[str, str] = {}
    for number, names in enumerate(groups, start=1):
        file = WEIGHTS if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        parts = {theirs: shape for name in names for theirs, shape in stored[name].items()}
        tensors = _exported(newest, {name: shapes[name] for name in names}, ours, conversion)
        weights.write_safetensors(folder / file, parts, _with_progress(tensors, parts, f"exporting {file}"))
        file_of.update(dict.fromkeys(parts, file))
    if len(groups) > 1:
        size = sum((folder / file).stat().st_size for file in set(file_of.values()))
        _write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": file_of})
    return zeros


def _exported(
    newest: Path, shapes: Mapping[str, Shape], ours: Mapping[str, Shape], conversion: Conversion
) -> Iterator[tuple[str, Tensor]]:
    read = weights.read_weights(newest, {name: shape for name, shape in shapes.items() if name in ours})
    for name, shape in shapes.items():
        value = next(read)[1] if name in ours else torch.zeros(shape)
        yield from conversion.to_theirs(name, value).items()


def _comparable(plan: Plan) -> str:
    """The class of transformers whose outputs depend on nothing that was initialised here."""
    architecture, section = plan.conversion.architecture, plan.conversion.section
    if not plan.fresh:
        config = hf_config.to_hf_config(section, 1, architecture, {})
        return str(config["architectures"][0])
    no_decoder = any(name.startswith("decoder.") for name in plan.fresh)
    return architecture.classes[-1 if no_decoder else 1]


def _compare(
    saved: Path, section: ModelSection, vocab_size: int, folder: Path, name: str, wanted: bool
) -> str:
    """What came of comparing a checkpoint with the class `name` of transformers in `folder`."""
    if not wanted:
        return "no (--no-compare)"
    if find_spec("transformers") is None:
        return "no: transformers is not installed (pip install 'bigtfm[hf]')"
    from transformers import __version__

    model = make_model(section, vocab_size)
    checkpoint.load_weights(saved, model)
    return f"with {name} of transformers {__version__}: {require_parity(model.eval(), folder, name)}"


@contextmanager
def _made_whole(out: Path) -> Iterator[Path]:
    """A hidden folder to write into, which becomes `out` at the end; of a failure nothing stays."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigProblem("is there already", where=str(out), fix="choose another OUT, or remove it")
    out = Path(os.path.abspath(out))
    building = out.parent / f".building-{out.name}"
    shutil.rmtree(building, ignore_errors=True)  # a killed one's
    building.mkdir(parents=True)
    try:
        yield building
        building.rename(out)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _with_progress(
    tensors: Iterable[tuple[str, Tensor]], shapes: Mapping[str, Shape], label: str
) -> Iterator[tuple[str, Tensor]]:
    """The same tensors, with a bar on a terminal where there are many bytes of them."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    total = 4 * sum(map(math.prod, shapes.values()))
    columns = (TextColumn(label), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    shown = total >= SHOWN_BYTES and console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not shown) as bar:
        task = bar.add_task(label, total=total)
        for name, tensor in tensors:
            yield name, tensor
            bar.advance(task, 4 * tensor.numel())


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _lines(**facts: str) -> list[str]:
    return [f"{name:<12} {value}" for name, value in facts.items() if value]


def _count(shapes: Mapping[str, Shape]) -> str:
    return f"{sum(map(math.prod, shapes.values())):,}"


def _some(names: list[str]) -> str:
    """A few names and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _vocabulary(conversion: Conversion, tokenizer: Tokenizer | None) -> str:
    parts = [f"{conversion.our_vocab_size:,} tokens"]
    if conversion.our_vocab_size != conversion.vocab_size:
        parts.append(f"the model's {conversion.vocab_size:,} were cut or extended")
    parts.append(f"the tokenizer's {tokenizer.vocab_size:,}" if tokenizer else "no tokenizer found")
    return "; ".join(parts)
