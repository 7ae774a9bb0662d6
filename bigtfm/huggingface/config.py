"""config.json to our [model] table and back, and which architecture a model of ours fits."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from bigtfm.config.problems import ConfigProblem, did_you_mean, shown
from bigtfm.config.sections import ModelSection, Objective
from bigtfm.huggingface.architectures import ARCHITECTURES
from bigtfm.huggingface.mapping import Architecture, Config, Head, Key
from bigtfm.run_directory import finding

# What our model has less than the architecture is written as zeros: the function stays the same.
_MAY_BE_ZEROS = ("bias", "qkv_bias", "head_bias", "token_types")
_DAMAGED = "pass a config.json that save_pretrained has written"
MOST_BLOCKS = 4096  # no model has as many; millions would be planned for hours
# What a value of the wrong type or size raises wherever it is first computed with.
MISTAKES = (TypeError, AttributeError, LookupError, ValueError, ArithmeticError, MemoryError, RuntimeError)
_OF_TRAINING = (
    "dropout",
    "attention_dropout",
    "init_std",
    "vocab_multiple",
    "vocab_size",
    "decoder_start_id",
)


def architecture_of(config: Config) -> Architecture:
    """The architecture of a config.json.

    Raises:
        ConfigProblem: it is none of ours.
    """
    known = sorted(ARCHITECTURES)
    architecture = ARCHITECTURES.get(str(config.get("model_type")))
    if architecture is None:
        raise _problem(
            f"model_type {shown(config.get('model_type'))} can't be converted",
            f"one of these can: {', '.join(known)}",
        )
    classes = config.get("architectures") or []
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise _problem(f"architectures {shown(classes)} is no list of names", _DAMAGED)
    for name in classes:
        if name not in architecture.classes:
            fix = f"save it as one of: {', '.join(architecture.classes)}"
            raise _problem(f"{name} can't be converted", fix)
    return architecture


def architecture_named(name: str) -> Architecture:
    """The architecture of a model type ("llama") or a class ("LlamaForCausalLM").

    Raises:
        ConfigProblem: there is none.
    """
    for architecture in ARCHITECTURES.values():
        heads = [head.name for head in architecture.heads.values() if isinstance(head, Head)]
        if name in (architecture.model_type, *architecture.classes, *heads):
            return architecture
    raise ConfigProblem(
        f"unknown architecture {shown(name)}", where="--architecture", fix=did_you_mean(name, ARCHITECTURES)
    )


def headed(architecture: Architecture, kind: str) -> tuple[Architecture, Head]:
    """The architecture with its head for an objective, whose class is the first.

    Raises:
        ConfigProblem: it has none that computes the same.
    """
    head = architecture.heads.get(kind, f"{architecture.model_type} has no such class")
    if isinstance(head, str):
        raise ConfigProblem(
            f"a head of {kind} can't be written: {head}",
            where="export-hf",
            fix="use it with bigtfm predict, or write its weights with bigtfm export",
        )
    tensors = {**architecture.tensors, **{ours: (theirs,) for ours, theirs in head.tensors.items()}}
    return replace(architecture, classes=(head.name, *architecture.classes), tensors=tensors), head


def to_model_section(config: Config, tensors: Collection[str] = ()) -> ModelSection:
    """The [model] table of a config.json, and of the names of the tensors beside it.

    Raises:
        ConfigProblem: it says what we can't do.
    """
    architecture = architecture_of(config)
    if config.get("quantization_config"):
        raise _problem("a quantised model can't be converted", "pass the model in fp32, fp16 or bf16")
    for name, value in architecture.required.items():
        if config.get(name, value) != value:
            raise _problem(f"{name} {shown(config[name])} can't be converted", f"only {shown(value)} can")
    fields = {field: _value(config, key) for field, key in architecture.keys.items()}
    for field in ("num_layers", "num_decoder_layers"):
        if isinstance(blocks := fields.get(field), int) and blocks > MOST_BLOCKS:
            raise _problem(f"{architecture.keys[field].name} {shown(blocks)} is too many", _DAMAGED)
    try:
        return ModelSection(**{**fields, **architecture.fixed, **architecture.read(config, tensors)})
    except ValidationError as error:
        field, said = finding(error)
        name = architecture.keys[field].name if field in architecture.keys else field
        raise _problem(f"{name}: {said}" if name else said, _DAMAGED) from None
    except MISTAKES:
        raise damaged() from None


def damaged() -> ConfigProblem:
    """For what no check above has a word for."""
    return _problem("a value in it has the wrong type or size", _DAMAGED)


def _value(config: Config, key: Key) -> Any:
    value = config.get(key.name, key.default)
    if value is ...:
        raise _problem(f"does not say {key.name}", _DAMAGED)
    if key.names is None:
        return value
    if not isinstance(value, str) or value not in key.names:
        raise _problem(f"{key.name} {shown(value)} can't be converted", f"only {', '.join(key.names)} can")
    return key.names[value]


def to_hf_config(
    section: ModelSection, vocab_size: int, architecture: Architecture, special: Config
) -> Config:
    """config.json of the model as that architecture, as far as it fits (see `misfits`).

    special: bos_token_id, eos_token_id, pad_token_id ... as they are to stand there.
    """
    ours = resolved(section)
    config: Config = {
        "architectures": [architecture.classes[0]],
        "model_type": architecture.model_type,
        "vocab_size": vocab_size,
        "dtype": "float32",
        "torch_dtype": "float32",  # its name before 4.56
        **special,
    }
    for field, key in architecture.keys.items():
        value = getattr(section, field) if ours[field] is None else ours[field]
        if key.names is not None:
            value = next((theirs for theirs, named in key.names.items() if named == value), key.default)
        config[key.name] = value
    if section.family == "encoder_decoder":
        config["is_encoder_decoder"] = True
        if section.decoder_start_id is not None:
            config["decoder_start_token_id"] = section.decoder_start_id
    return config | architecture.write(section, config)


def expressed(section: ModelSection, config: Config) -> ModelSection:
    """The model that a config made by `to_hf_config` describes: ours, with biases where it must have some."""
    tensors = set[str]()
    if not section.tied_embeddings:
        tensors.add("lm_head.weight")
    if section.next_sentence:
        tensors.add("pooler.dense.weight")
    found = to_model_section({**config, "architectures": []}, tensors)
    return found.model_copy(update={"num_labels": section.num_labels})


def misfits(section: ModelSection, architecture: Architecture) -> list[str]:
    """Our keys that the architecture can't express: what does not come back through its config."""
    config = to_hf_config(section, 1, architecture, {})
    ours, theirs = resolved(section), resolved(expressed(section, config))
    return [name for name, value in ours.items() if not _same(name, value, theirs[name])]


def _same(name: str, ours: Any, theirs: Any) -> bool:
    if name in _OF_TRAINING or (name in _MAY_BE_ZEROS and not ours):
        return True
    if isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=1e-9)
    return bool(ours == theirs)


def fitting(section: ModelSection, objective: Objective | None = None) -> Architecture:
    """The first architecture that expresses the model; the closest is one with the objective's head.

    Raises:
        ConfigProblem: there is none; the line names the keys that stand in the way of the closest.
    """
    family = [item for item in ARCHITECTURES.values() if item.fixed["family"] == section.family]
    headed = [item for item in family if isinstance(item.heads.get(objective or ""), Head)]

    def distance(architecture: Architecture) -> int:
        return len(misfits(section, architecture))

    closest = min(family, key=distance)
    if headed and distance(closest):
        closest = min(headed, key=distance)
    require_fit(
        section, closest, f"no Hugging Face architecture has this shape; {closest.model_type}, the closest,"
    )
    return closest


def require_fit(section: ModelSection, architecture: Architecture, subject: str = "") -> None:
    """Raises ConfigProblem, naming the keys, where the architecture can't express the model."""
    odd = misfits(section, architecture)
    if odd:
        values = ", ".join(f"model.{name} {shown(getattr(section, name, None))}" for name in odd)
        raise ConfigProblem(
            f"{subject or architecture.model_type} can't express {values}",
            where="export-hf",
            fix="choose another --architecture, or train a model without these",
        )


def resolved(section: ModelSection) -> dict[str, Any]:
    """All fields, with what follows from others in place of None, and nothing where nothing comes of it."""
    rotary, relative = section.positions == "rotary", section.positions == "relative"
    sliding = section.window is not None and section.global_every != 1  # 1: every block attends to all
    scaled = (
        section.positions == "sinusoidal" if section.scale_embeddings is None else section.scale_embeddings
    )
    derived = {
        "num_kv_heads": section.kv_heads,
        "head_dim": section.head_size,
        "ffn_hidden_size": section.ffn_size,
        "num_decoder_layers": section.decoder_layers if section.family == "encoder_decoder" else None,
        "qkv_bias": section.bias if section.qkv_bias is None else section.qkv_bias,
        "attention_scale": section.attention_scale or section.head_size**-0.5,
        "scale_embeddings": scaled,
        "rotary_base": section.rotary_base if rotary else None,
        "local_rotary_base": (section.local_rotary_base or section.rotary_base)
        if rotary and sliding
        else None,
        "relative_buckets": section.relative_buckets if relative else None,
        "relative_max_distance": section.relative_max_distance if relative else None,
        "window": section.window if sliding else None,
        "global_every": min(section.global_every, section.num_layers) if sliding else 0,
    }
    return {**section.model_dump(), **derived}


def _problem(what: str, fix: str) -> ConfigProblem:
    return ConfigProblem(what, where="config.json", fix=fix)
