"""A Hugging Face model becomes a run directory.

Everything is checked before a tensor is read. What is written stands in a hidden folder until it is whole and
transformers agrees with it. No more than one tensor is held at a time, but for that comparison.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from bigtfm.config.problems import ConfigProblem, shown
from bigtfm.config.run import RunConfig, to_toml
from bigtfm.config.sections import ModelSection, ObjectiveSection, RunSection
from bigtfm.data.tokenizer import Tokenizer
from bigtfm.engine import weights
from bigtfm.engine.checkpoint import Progress
from bigtfm.huggingface import config as hf_config
from bigtfm.huggingface import tokenizer as hf_tokenizer
from bigtfm.huggingface.convert import ORIGIN, compared, count, lines, made_whole, some, with_progress
from bigtfm.huggingface.files import Plan, TensorFiles, plan_import, read_json, said
from bigtfm.huggingface.mapping import VOCABULARY, Architecture, Config, Conversion
from bigtfm.model.transformer import initial_value
from bigtfm.run_directory import HUGGING_FACE

MOST_TOKENS = 2**24  # many times what any model knows
_FETCHED = ["*.safetensors", "*.json", "*.model", "*.spm", "*.txt", "*.jinja"]
_KEPT = ("config.json", "generation_config.json", *hf_tokenizer.FILES)


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
    with made_whole(out) as building:
        config = read_json(folder / "config.json")
        architecture = hf_config.architecture_of(config)
        files = TensorFiles(folder)
        section = hf_config.to_model_section(config, files.shapes)
        tokenizer, missing = hf_tokenizer.read_tokenizer(folder, architecture.model_type)
        try:
            conversion = _conversion(architecture, section, config, tokenizer, vocab_size)
            plan = plan_import(files, config, conversion)
        except hf_config.MISTAKES:
            raise hf_config.damaged() from None
        section = conversion.section

        objective = ObjectiveSection(kind=architecture.objective)
        run = RunConfig(model=section, objective=objective)
        head = f"# What `bigtfm import-hf {source}` found; every other value is its default."
        (building / "run.toml").write_text(to_toml(run, head), encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save(building / "tokenizer")
        _keep_originals(folder, building / HUGGING_FACE, tokenizer)
        progress = Progress(identity=identity_of(run, conversion.our_vocab_size, tokenizer))
        tensors = with_progress(_imported(plan, files), plan.shapes, "importing")
        saved = weights.save_weights(building / "checkpoints", plan.shapes, tensors, progress)
        name = _comparable(plan)
        parity = compared(saved, section, conversion.our_vocab_size, folder, name, compare)

    return lines(
        imported=f"{(config.get('architectures') or [name])[0]} as {section.family}, "
        f"{count(plan.shapes)} parameters",
        initialised=f"{some(plan.fresh)}, as a fresh run's" if plan.fresh else "",
        zero=f"{some(plan.zeros)}, which it has not" if plan.zeros else "",
        dropped=some(plan.dropped),
        vocabulary=_vocabulary(conversion, tokenizer, missing),
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
        raise ConfigProblem(
            f"neither a folder nor to be had from the Hugging Face hub: {said(error)}",
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
    theirs, known = _tokens(config.get("vocab_size"), "config.json"), tokenizer.vocab_size if tokenizer else 0
    ours = theirs if asked is None else _tokens(asked, "--vocab-size")
    if ours < known or (section.decoder_start_id or 0) >= ours:
        what = f"the tokenizer's {known}" if ours < known else f"decoder_start_id {section.decoder_start_id}"
        raise ConfigProblem(
            f"a vocabulary of {ours} is too small for {what}",
            where="--vocab-size" if asked else "config.json",
            fix=f"pass --vocab-size {max(known, (section.decoder_start_id or 0) + 1)} or more",
        )
    section = section.model_copy(update={"vocab_size": None if ours == known else ours})
    return Conversion(architecture, section, theirs, ours, architecture.position_offset(config))


def _tokens(value: Any, where: str) -> int:
    if type(value) is not int or not 1 <= value <= MOST_TOKENS:
        fix = f"it must be an integer from 1 to {MOST_TOKENS}"
        raise ConfigProblem(f"vocab_size can't be {shown(value)}", where=where, fix=fix)
    return value


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


def identity_of(run: RunConfig, vocab_size: int, tokenizer: Tokenizer | None) -> dict[str, Any]:
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
    for name in _KEPT:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)
    origin = {"tokenizer": tokenizer.identity if tokenizer else None}
    (target / ORIGIN).write_text(json.dumps(origin) + "\n", encoding="utf-8")


def _comparable(plan: Plan) -> str:
    """The class of transformers whose outputs depend on nothing that was initialised here."""
    architecture, section = plan.conversion.architecture, plan.conversion.section
    if not plan.fresh:
        config = hf_config.to_hf_config(section, 1, architecture, {})
        return str(config["architectures"][0])
    no_decoder = any(name.startswith("decoder.") for name in plan.fresh)
    return architecture.classes[-1 if no_decoder else 1]


def _vocabulary(conversion: Conversion, tokenizer: Tokenizer | None, missing: str) -> str:
    parts = [f"{conversion.our_vocab_size:,} tokens"]
    if conversion.our_vocab_size != conversion.vocab_size:
        parts.append(f"the model's {conversion.vocab_size:,} were cut or extended")
    parts.append(f"the tokenizer's {tokenizer.vocab_size:,}" if tokenizer else missing)
    return "; ".join(parts)
