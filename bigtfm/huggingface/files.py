"""The files of a Hugging Face model: read by name, and every tensor assigned before the first is read.

Only safetensors: nothing is unpickled.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bigtfm.config.problems import DataProblem
from bigtfm.huggingface.mapping import Architecture, Config, Conversion, Shape, parameter_shapes
from bigtfm.model.layers import sinusoids

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = ("F64", "F32", "F16", "BF16")
_HEADS = r"lm_head\.|mlm_head\.|next_sentence\."  # what a bare model lacks
_SINUSOID_ERROR = 1e-3  # of a stored table: fp16 has 5e-4


class TensorFiles:
    """The tensors of a folder's safetensors, by name; read one at a time.

    Raises:
        DataProblem: there are none, or they are damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, str] = {}  # as safetensors calls them
        self.bytes = 0
        self._file_of: dict[str, Any] = {}
        for path in self._paths():
            try:
                if path.exists() and not path.is_file():  # a pipe would be waited for
                    raise OSError("no regular file")
                file = safe_open(path, framework="pt").__enter__()
                for name in file.keys():
                    if name in self.shapes:
                        what = f"{name} stands in {path.name} and in another file, too"
                        raise self._problem(what, "download it again")
                    part = file.get_slice(name)
                    self.shapes[name], self.dtypes[name] = tuple(part.get_shape()), part.get_dtype()
                    self._file_of[name] = file
            except (OSError, SafetensorError) as error:
                fix = "download it again"
                raise DataProblem(f"can't be read: {error}", where=str(path), fix=fix) from None
            self.bytes += path.stat().st_size

    def read(self, name: str) -> Tensor:
        """The tensor as it is stored."""
        tensor: Tensor = self._file_of[name].get_tensor(name)
        return tensor

    def _paths(self) -> list[Path]:
        index = self.folder / INDEX
        if (self.folder / WEIGHTS).is_file():
            return [self.folder / WEIGHTS]
        if index.is_file():
            names = read_json(index).get("weight_map")
            if isinstance(names, dict) and all(isinstance(name, str) for name in names.values()):
                return [self.folder / Path(name).name for name in sorted(set(names.values()))]
            raise DataProblem("has no weight_map", where=str(index), fix="download it again")
        pickled = sorted(
            path.name for pattern in ("*.bin", "*.pt", "*.ckpt") for path in self.folder.glob(pattern)
        )
        if pickled:
            raise self._problem(
                f"its weights are pickled ({pickled[0]}), and nothing is unpickled here",
                "save it as safetensors: AutoModel.from_pretrained(...).save_pretrained(...)",
            )
        raise self._problem(f"has no {WEIGHTS}", "pass a folder that save_pretrained has written")

    def _problem(self, what: str, fix: str) -> DataProblem:
        return DataProblem(what, where=str(self.folder), fix=fix)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        DataProblem: the file is missing or holds no object.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise OSError("no regular file")
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        fix = "pass a folder that save_pretrained has written"
        raise DataProblem(f"has no {path.name}", where=str(path.parent), fix=fix) from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataProblem(f"is no JSON: {error}", where=str(path), fix="download it again") from None
    if not isinstance(values, dict):
        raise DataProblem("holds no object", where=str(path), fix="download it again")
    return values


def require_finite(name: str, tensor: Tensor, where: Path) -> None:
    """Raises DataProblem where a weight is NaN or infinite."""
    if not tensor.isfinite().all():
        fix = "use weights from before the training diverged, or download them again"
        raise DataProblem(f"{name} holds NaN or infinity", where=str(where), fix=fix)


def said(error: Exception) -> str:
    """The first line of a library's message."""
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__


@dataclass(frozen=True)
class Plan:
    """Where each of our parameters comes from."""

    conversion: Conversion
    shapes: dict[str, Shape]  # of all our parameters
    sources: dict[str, list[str]]  # parameter -> names in the files
    zeros: list[str]  # biases that the architecture has not
    fresh: list[str]  # what a bare model lacks: to be initialised as a fresh run's
    dropped: list[str]  # names in the files that are not taken

    def read(self, name: str, files: TensorFiles) -> Tensor:
        """Our parameter `name`, which is in `sources` or `zeros`.

        Raises:
            DataProblem: it is not finite.
        """
        if name in self.sources:
            theirs = [files.read(source) for source in self.sources[name]]
            ours = self.conversion.to_ours(name, self.shapes[name], theirs)
            require_finite(" or ".join(self.sources[name]), ours, files.folder)
            return ours
        return torch.zeros(self.shapes[name])


def plan_import(files: TensorFiles, config: Config, conversion: Conversion) -> Plan:
    """Assigns every tensor of the files.

    Raises:
        DataProblem: one is missing, unexpected or misshapen, or is not what it should repeat.
    """
    architecture, section = conversion.architecture, conversion.section
    shapes = parameter_shapes(section, conversion.our_vocab_size)
    parts = {name: conversion.stored(name, shape) for name, shape in shapes.items()}
    aliases = dict(architecture.aliases)
    if section.tied_embeddings:
        output, embedding = (architecture.their_names(f"{m}.weight")[0] for m in ("lm_head", "embed_tokens"))
        aliases[output] = embedding
    wanted = {theirs for stored in parts.values() for theirs in stored}
    found = _canonical_names(files, architecture, wanted | set(aliases))
    _settle(files, found, aliases, architecture)
    plan = Plan(conversion, shapes, {}, [], [], [])
    no_decoder = not any(
        part in found for name in parts if name.startswith("decoder.") for part in parts[name]
    )
    fresh = _HEADS + (r"|decoder\." if section.family == "encoder_decoder" and no_decoder else "")
    zeros = architecture.zeros(config)
    for name, stored in parts.items():
        missing = [theirs for theirs in stored if theirs not in found]
        if not missing:
            plan.sources[name] = [_checked(files, found[theirs], shape) for theirs, shape in stored.items()]
        elif zeros and re.search(zeros, name):
            plan.zeros.append(name)
        elif re.match(fresh, name):
            plan.fresh.append(name)
        else:
            raise DataProblem(f"has no {missing[0]}", where=str(files.folder), fix="pass a whole checkpoint")
    left = [name for theirs, name in found.items() if theirs not in wanted]
    plan.dropped.extend(
        name for name in left if architecture.dropped and re.search(architecture.dropped, name)
    )
    if unexpected := [name for name in left if name not in plan.dropped]:
        more = f" (and {len(unexpected) - 1} more)" if unexpected[1:] else ""
        raise DataProblem(
            f"holds {unexpected[0]}{more}, which no {architecture.classes[0]} has",
            where=str(files.folder),
            fix=_unexpected_fix(unexpected[0], architecture, wanted),
        )
    return plan


def _unexpected_fix(name: str, architecture: Architecture, wanted: set[str]) -> str:
    of_first = re.sub(r"\.\d+\.", ".0.", name, count=1)
    if wanted.isdisjoint((of_first, architecture.prefix + of_first)):
        return "save the model without its own head: model.base_model.save_pretrained(...)"
    decoder = "num_decoder_layers" in architecture.keys and "decoder." in name
    key = architecture.keys["num_decoder_layers" if decoder else "num_layers"].name
    return f"set {key} in config.json to the number of blocks that the files hold"


def _canonical_names(files: TensorFiles, architecture: Architecture, known: set[str]) -> dict[str, str]:
    """Name as the class with the output layer has it -> name in the files, without what is ignored."""
    found: dict[str, str] = {}
    for name in files.shapes:
        if re.search(architecture.ignored, name):
            continue
        canonical = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))  # TensorFlow's, in BERT
        if canonical not in known and architecture.prefix + canonical in known:
            canonical = architecture.prefix + canonical
        if canonical in found:
            raise DataProblem(
                f"{found[canonical]} and {name} are the same tensor",
                where=str(files.folder),
                fix="remove one of them: save_pretrained writes each once",
            )
        found[canonical] = name
    return found


def _settle(
    files: TensorFiles, found: dict[str, str], aliases: dict[str, str], architecture: Architecture
) -> None:
    """Takes out of `found` what only repeats another tensor, or follows from the config."""
    for alias, original in aliases.items():
        if alias not in found:
            continue
        name = found.pop(alias)
        if original not in found:
            found[original] = name
        elif not torch.equal(files.read(name), files.read(found[original])):
            raise DataProblem(
                f"{name} differs from {found[original]}, which the config says it is tied to",
                where=str(files.folder),
                fix='set "tie_word_embeddings" in config.json to what the model was trained with',
            )
    for name in [
        name for name in found if architecture.sinusoids and re.search(architecture.sinusoids, name)
    ]:
        table = files.read(found.pop(name)).float()
        if (table - sinusoids(torch.arange(len(table)), table.shape[1])).abs().max() > _SINUSOID_ERROR:
            raise DataProblem(
                f"{name} are not the position encodings of Vaswani et al.",
                where=str(files.folder),
                fix="convert a model with the usual ones",
            )


def _checked(files: TensorFiles, name: str, shape: Shape) -> str:
    if files.shapes[name] != shape:
        raise DataProblem(
            f"{name} is {list(files.shapes[name])}, config.json needs {list(shape)}",
            where=str(files.folder),
            fix="pass config.json and weights of the same model",
        )
    if files.dtypes[name] not in _FLOATS:
        raise DataProblem(
            f"{name} is stored as {files.dtypes[name]}: quantised weights can't be trained",
            where=str(files.folder),
            fix="pass the model in fp32, fp16 or bf16",
        )
    return name
