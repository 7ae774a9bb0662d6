"""A run becomes a Hugging Face model: config.json, safetensors, a tokenizer that AutoTokenizer loads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from bigtfm.config.optional import quietly
from bigtfm.config.problems import NoCheckpoint
from bigtfm.config.run import RunConfig
from bigtfm.config.sections import HEADED, ModelSection, Objective, ObjectiveSection
from bigtfm.data.special import special_ids
from bigtfm.data.tokenizer import Tokenizer
from bigtfm.engine import weights
from bigtfm.huggingface import config as hf_config
from bigtfm.huggingface import tokenizer as hf_tokenizer
from bigtfm.huggingface.convert import (
    ORIGIN,
    compared,
    count,
    lines,
    made_whole,
    some,
    with_progress,
    write_json,
)
from bigtfm.huggingface.files import INDEX, WEIGHTS, read_json, require_finite
from bigtfm.huggingface.mapping import Architecture, Config, Conversion, Head, Shape, parameter_shapes
from bigtfm.run_directory import HUGGING_FACE, SavedRun, saved_run, saved_task

SHARD_BYTES = 5 * 10**9  # of an export, as save_pretrained's default was for years
_CLASSES_BIAS = "task_head.classifier.bias"
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Keys of an original config that say how its file was written, or the same as what we write otherwise.
_NOT_KEPT = ("_name_or_path", "transformers_version", "rope_parameters", "layer_types")


def export_hf(
    run_dir: Path, out: Path, *, architecture: str | None = None, compare: bool = True
) -> list[str]:
    """Makes a Hugging Face model of a run's newest checkpoint; returns what is to be told.

    out: a folder that is not there yet, or empty. architecture: a class or model type of transformers; None:
    what the run was imported from, or the one that it fits. compare: as in `import_hf`.

    Raises:
        ConfigProblem: no architecture, or not the one asked for, is this model's shape; or `out` is taken.
        NoCheckpoint: there is none, or its parameters are not the model's.
        DataProblem: the tokenizer is another's, or a weight is not finite.
        NumericsProblem: transformers disagrees.
    """
    saved = saved_run(run_dir)
    newest, section, vocab_size = saved.checkpoint, saved.run.model, saved.vocab_size
    kind, head, labels = saved.run.objective_kind, None, Config()
    if kind in HEADED:  # the pairs' head is gone, and the labels' number is no part of the shape
        section, labels = section.model_copy(update={"next_sentence": False}), _labels(run_dir, section)
    with made_whole(out) as building:
        _require_whole(saved)
        original = _original(run_dir)
        target = _target(architecture, original, section.model_copy(update={"num_labels": None}), kind)
        if kind in HEADED:
            target, head = hf_config.headed(target, kind)
        if original.get("model_type") != target.model_type:
            original = {}
        special = _special(original, saved, head)
        config = original | hf_config.to_hf_config(section, vocab_size, target, special) | labels
        write_json(building / "config.json", config)
        if section.family != "bert" and head is None:
            write_json(building / "generation_config.json", _generation(run_dir, bool(original), special))
        note = _write_tokenizer(building, run_dir, saved, bool(original), compare)

        theirs, objective = hf_config.expressed(section, config), saved.run.objective
        conversion = Conversion(target, theirs, vocab_size, vocab_size, target.position_offset(config))
        zeros = _write_weights(newest, building, conversion, objective, head)
        name = config["architectures"][0]
        parity = compared(newest, section, vocab_size, building, name, compare, objective)

    return lines(
        exported=f"{name} from {newest.name}, {count(weights.weight_shapes(newest))} parameters",
        zero=f"{some(zeros)}, which the run has not" if zeros else "",
        tokenizer=note,
        compared=parity,
        next=f"transformers.{_auto_class(name)}.from_pretrained({str(out)!r})",
    )


def _auto_class(name: str) -> str:
    """The class of transformers that loads a model of class `name` with its head."""
    for end, of in (
        ("LMHeadModel", "CausalLM"),
        ("ForConditionalGeneration", "Seq2SeqLM"),
        ("MTModel", "Seq2SeqLM"),
    ):
        if name.endswith(end):
            return f"AutoModelFor{of}"
    _, has_head, of = name.partition("For")
    return f"AutoModel{has_head}{of}"


def _labels(run_dir: Path, section: ModelSection) -> Config:
    """What config.json says of a head's classes: the task's labels, by number where these are not known."""
    task = saved_task(run_dir)
    known = task.labels if task is not None else ()
    names = [*known, *(f"LABEL_{n}" for n in range(len(known), section.num_labels or 2))]
    return {
        "id2label": {str(n): name for n, name in enumerate(names)},
        "label2id": {name: n for n, name in enumerate(names)},
        "problem_type": "single_label_classification",
    }


def _require_whole(saved: SavedRun) -> None:
    """Raises NoCheckpoint where the checkpoint's parameters are not those of its model."""
    model, found = saved.run.model, weights.weight_shapes(saved.checkpoint)
    rows = model.padded_vocab_size(saved.vocab_size)
    if max(model.num_layers, model.decoder_layers) > len(found):  # too many to name
        odd = ["num_layers"]
    elif rows != found.get("embed_tokens.weight", (0,))[0]:
        odd = ["embed_tokens.weight"]
    else:
        expected = parameter_shapes(model, saved.vocab_size, saved.run.objective)
        odd = sorted(name for name, _ in found.items() ^ expected.items())
    if odd:
        raise NoCheckpoint(
            f"its parameters are not those of the model in state.json: {odd[0]}",
            where=str(saved.checkpoint),
            fix="use another checkpoint of the run",
        )


def _original(run_dir: Path) -> Config:
    """config.json of the model that the run began with, less what an export says anew; {}: none."""
    path = run_dir / HUGGING_FACE / "config.json"
    original = read_json(path) if path.is_file() else {}
    return {key: value for key, value in original.items() if key not in _NOT_KEPT}


def _target(asked: str | None, original: Config, section: ModelSection, objective: Objective) -> Architecture:
    if asked is None and not original:
        return hf_config.fitting(section, objective)
    if asked is None:
        target = hf_config.architecture_of(original)
    else:
        target = hf_config.architecture_named(asked)
    hf_config.require_fit(section, target)
    return target


def _special(original: Config, saved: SavedRun, head: Head | None) -> Config:
    """bos_token_id and its like: the original's, else the tokenizer's."""
    tokenizer, section = saved.tokenizer, saved.run.model
    special = {name: original[name] for name in _IDS if name in original}
    if not original and tokenizer is not None:
        special = {
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": tokenizer.eos_id,
            "pad_token_id": hf_tokenizer.pad_id(tokenizer),
        }
        if section.family == "bert":  # ModernBERT's defaults lie beyond a small vocabulary
            special |= {"cls_token_id": tokenizer.bos_id, "sep_token_id": tokenizer.eos_id}
    if section.family == "encoder_decoder":
        start = section.decoder_start_id
        special["decoder_start_token_id"] = special.get("bos_token_id") if start is None else start
    if head is not None and tokenizer is not None:
        special["pad_token_id"] = _padding(tokenizer, saved.run)
    return special


def _padding(tokenizer: Tokenizer, run: RunConfig) -> int | None:
    """What pads a task's texts; None: nothing may. A decoder's class is that of the last token that does not
    pad, which is EOS in ours.
    """
    padding = hf_tokenizer.pad_id(tokenizer)
    return None if run.model.family == "gpt" and padding == tokenizer.eos_id else padding


def _generation(run_dir: Path, imported: bool, special: Config) -> Config:
    path = run_dir / HUGGING_FACE / "generation_config.json"
    return read_json(path) if imported and path.is_file() else special


def _write_tokenizer(
    folder: Path,
    run_dir: Path,
    saved: SavedRun,
    imported: bool,
    compare: bool,
) -> str:
    """The original's files if the tokenizer is still that one and they give its ids, else it, converted.

    Returns what is to be told of it.
    """
    tokenizer = saved.tokenizer
    if tokenizer is None:
        return "none in the run directory"
    candidates, headed = [_converted_tokenizer], saved.run.objective_kind in HEADED
    if (
        imported
        and not headed
        and read_json(run_dir / HUGGING_FACE / ORIGIN)["tokenizer"] == tokenizer.identity
    ):
        candidates.insert(0, _original_tokenizer)
    for candidate in candidates:
        files = candidate(run_dir, tokenizer, saved.run)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        if not compare or find_spec("transformers") is None or _gives_our_ids(folder, tokenizer):
            return ""
        if candidate is not candidates[-1]:
            for name in files:
                (folder / name).unlink()
    return "AutoTokenizer puts another in its place; PreTrainedTokenizerFast loads it"


def _original_tokenizer(run_dir: Path, tokenizer: Tokenizer, run: RunConfig) -> dict[str, bytes]:
    kept = [run_dir / HUGGING_FACE / name for name in hf_tokenizer.FILES]
    return {path.name: path.read_bytes() for path in kept if path.is_file()}


def _converted_tokenizer(run_dir: Path, tokenizer: Tokenizer, run: RunConfig) -> dict[str, bytes]:
    special = special_ids(tokenizer, run)
    named = {i: f"<extra_id_{k}>" for k, i in enumerate(special.sentinels)}
    if special.mask is not None:
        named[special.mask] = "<mask>"
    added = {i: name for i, name in named.items() if i >= tokenizer.vocab_size}
    if run.objective_kind in HEADED:
        pads = _padding(tokenizer, run) is not None
        return hf_tokenizer.hf_files(tokenizer, added, closes=True, pads=pads, longest=run.model.max_seq_len)
    closes, types = run.model.family != "gpt", run.model.token_types > 0
    return hf_tokenizer.hf_files(tokenizer, added, closes=closes, token_types=types)


def _gives_our_ids(folder: Path, tokenizer: Tokenizer) -> bool:
    """Whether AutoTokenizer loads the tokenizer in `folder` as ours. It follows the model's type, too."""
    from transformers import AutoTokenizer

    with quietly():
        try:
            theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception:  # whatever a tokenizer class says to files that are not its own
            return False
        encoded = ((theirs.encode(text, add_special_tokens=False), text) for text in hf_tokenizer.PROBE)
        return all(ids == tokenizer.encode(text) for ids, text in encoded)


def _write_weights(
    newest: Path, folder: Path, conversion: Conversion, objective: ObjectiveSection, head: Head | None
) -> list[str]:
    """Writes the safetensors; returns the parameters that are zeros because the checkpoint has none."""
    ours = weights.weight_shapes(newest)
    shapes = parameter_shapes(conversion.section, conversion.vocab_size, objective) | ours
    added = _folded(newest, head.folded, ours) if head is not None and head.folded else {}
    if added:
        shapes = {name: shape for name, shape in shapes.items() if name != _CLASSES_BIAS}
    zeros = [name for name in shapes if name not in ours]
    groups = weights.in_shards(shapes, SHARD_BYTES)
    stored = {name: conversion.stored(name, shape) for name, shape in shapes.items()}
    file_of: dict[str, str] = {}
    for number, names in enumerate(groups, start=1):
        file = WEIGHTS if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        parts = {theirs: shape for name in names for theirs, shape in stored[name].items()}
        tensors = _exported(newest, {name: shapes[name] for name in names}, ours, conversion, added)
        weights.write_safetensors(folder / file, parts, with_progress(tensors, parts, f"exporting {file}"))
        file_of.update(dict.fromkeys(parts, file))
    if len(groups) > 1:
        size = sum((folder / file).stat().st_size for file in set(file_of.values()))
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": file_of})
    return zeros


def _exported(
    newest: Path,
    shapes: Mapping[str, Shape],
    ours: Mapping[str, Shape],
    conversion: Conversion,
    added: Mapping[str, Tensor],
) -> Iterator[tuple[str, Tensor]]:
    read = weights.read_weights(newest, {name: shape for name, shape in shapes.items() if name in ours})
    for name, shape in shapes.items():
        value = next(read)[1] if name in ours else torch.zeros(shape)
        require_finite(name, value, newest)
        value = value + added[name] if name in added else value
        yield from conversion.to_theirs(name, value).items()


def _folded(newest: Path, name: str, ours: Mapping[str, Shape]) -> dict[str, Tensor]:
    """What parameter `name` is to have more for the classes to need no bias (see `mapping.Head`)."""
    classes = {each: ours[each] for each in ("task_head.classifier.weight", _CLASSES_BIAS)}
    weight, bias = (value.double() for _, value in weights.read_weights(newest, classes))
    return {name: (torch.linalg.pinv(weight) @ bias).float()}
