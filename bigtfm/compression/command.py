"""From a run to a compressed run: checked, compressed, written, loaded again and measured."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bigtfm.assembly import as_it_stands
from bigtfm.compression.heads import without_heads
from bigtfm.compression.measure import Side, measured, size_of
from bigtfm.compression.pruning import magnitude, two_of_four
from bigtfm.compression.quantization import quantized
from bigtfm.compression.result import Compressed
from bigtfm.config.problems import ConfigProblem, did_you_mean
from bigtfm.config.run import RunConfig, to_toml
from bigtfm.config.sections import DataSection, EvalSection, RunSection
from bigtfm.data.loader import Loader
from bigtfm.engine import checkpoint, shards, weights
from bigtfm.engine.checkpoint import Progress
from bigtfm.engine.probe import Probe
from bigtfm.evaluate import require_labels
from bigtfm.huggingface.convert import made_whole
from bigtfm.model.families import make_model
from bigtfm.model.heads import LanguageModel
from bigtfm.model.quantized import Quantized, put
from bigtfm.run_directory import HUGGING_FACE, TASK, SavedRun, data_of, open_run, saved_run, stated_by

METHODS = ("int8", "int8-dynamic", "int4", "magnitude", "2:4", "heads")
SHARED = ("magnitude", "heads")  # methods that take away a share
REPORT = "compression.json"


@dataclass(frozen=True)
class Report:
    """What `bigtfm compress` tells, and keeps in compression.json."""

    method: str
    settings: dict[str, Any]
    source: str  # the checkpoint that was compressed
    out: str
    before: Side
    after: Side
    threads: int
    torch: str
    next: str  # the command that goes on from here


def compress(
    run_dir: Path,
    out: Path,
    method: str,
    *,
    share: float | None = None,
    group_size: int | None = None,
    data: Path | None = None,
    eval_tokens: int | None = None,
) -> Report:
    """Makes the run directory `out`, which is not there yet or empty, of the newest checkpoint of `run_dir`.

    share: what is pruned, of the blocks' weights (magnitude) or of each layer's heads (heads); None: half.
    group_size: columns that share a scale (int4); None: 64. data: the prepared data set whose validation
    split the loss is measured on, and whose training split tells which heads matter; None: the run's own.
    eval_tokens: of validation; None: as many as the run's evaluations.

    Raises:
        ConfigProblem: a setting is wrong, the run is quantised already, or `out` is taken.
        DataProblem: the data set is missing or has another tokenizer.
        NoCheckpoint: the run has no checkpoint.
    """
    _check(method, share, group_size)
    with made_whole(out) as building:
        saved = saved_run(run_dir)
        _require_unquantised(saved)
        stated = stated_by(run_dir)
        model, _, special = open_run(run_dir)
        dataset, *_ = data_of(saved, stated, data)
        validation = as_it_stands(_run_of(saved), dataset, special, "validation")
        tokens = eval_tokens or stated.get("eval", {}).get("tokens", EvalSection().tokens)
        require_labels(validation, tokens)

        train = as_it_stands(_run_of(saved), dataset, special, "train")
        made = _compressed(model, method, 0.5 if share is None else share, group_size or 64, train)
        _write(building, run_dir, saved, made, str(data or dataset.path))
        after, _, _ = open_run(building)
        sizes = [sum(4 * parameter.numel() for parameter in model.parameters()), size_of(building)]
        sides = measured([model, after], sizes, validation, special, tokens)
        report = Report(
            method, dict(made.settings), str(saved.checkpoint), str(out), *sides,
            torch.get_num_threads(), torch.__version__, _next(saved, method, out),
        )  # fmt: skip
        text = json.dumps(asdict(report), indent=2) + "\n"
        (building / REPORT).write_text(text, encoding="utf-8")
    return report


def _check(method: str, share: float | None, group_size: int | None) -> None:
    if method == "distill":
        raise ConfigProblem(
            "distillation is a training, of a smaller model",
            where="--method distill",
            fix="bigtfm train with distill.teacher=RUN and a smaller [model]",
        )
    if method not in METHODS:
        raise ConfigProblem(
            f"unknown method '{method}'", where="--method", fix=did_you_mean(method, (*METHODS, "distill"))
        )
    if share is not None and method not in SHARED:
        fix = f"leave it out; it is for {' and '.join(SHARED)}"
        raise ConfigProblem(f"--share does nothing for {method}", where="command line", fix=fix)
    if share is not None and not 0 < share < 1:
        fix = "pass a share between 0 and 1, such as 0.5"
        raise ConfigProblem(f"--share {share} is out of range", where="command line", fix=fix)
    if group_size is not None and method != "int4":
        fix = "leave it out; it is for int4"
        raise ConfigProblem(f"--group-size does nothing for {method}", where="command line", fix=fix)


def _require_unquantised(saved: SavedRun) -> None:
    if kinds := shards.quantized_kinds(checkpoint.read_index(saved.checkpoint)):
        raise ConfigProblem(
            f"its weights are {' and '.join(kinds)} already",
            where=str(saved.checkpoint),
            fix="pass the run that it was made of",
        )


def _run_of(saved: SavedRun) -> RunConfig:
    """What the model's batches depend on, the seed of hidden tokens too."""
    identity = checkpoint.read_state(saved.checkpoint)["progress"]["identity"]
    seed = identity.get("seed", RunSection().seed)
    return saved.run.model_copy(update={"run": RunSection(seed=seed)})


def _compressed(
    model: LanguageModel, method: str, share: float, group_size: int, train: Loader
) -> Compressed:
    if method == "magnitude":
        return magnitude(model, share)
    if method == "2:4":
        return two_of_four(model)
    if method == "heads":
        return without_heads(model, share, train)
    if method == "int4":
        return quantized(model, "int4", group_size)
    return quantized(model, "int8" if method == "int8" else "int8_dynamic", group_size)


def _write(folder: Path, run_dir: Path, saved: SavedRun, made: Compressed, data: str) -> None:
    """The run directory: tokenizer, run.toml to train on with, and the checkpoint with its probe."""
    before = checkpoint.read_state(saved.checkpoint)["progress"]["identity"]
    shape = {**made.section.model_dump(mode="json"), "vocab_size": saved.vocab_size}
    identity = {
        "model": shape,
        "objective": before["objective"],
        "tokenizer": before["tokenizer"],
        "data": {"seq_len": saved.run.seq_len, "packing": saved.run.data.packing},
    }
    packing = saved.run.data.packing
    run = RunConfig(
        model=made.section,
        data=DataSection(path=data, seq_len=saved.run.seq_len, packing=packing),
        objective=saved.run.objective,
    )
    head = f"# What `bigtfm compress` made of {saved.checkpoint}; every other value is its default."
    (folder / "run.toml").write_text(to_toml(run, head), encoding="utf-8")
    if (run_dir / TASK).is_file():
        shutil.copyfile(run_dir / TASK, folder / TASK)
    for part in ("tokenizer", HUGGING_FACE):
        if (run_dir / part).is_dir():
            shutil.copytree(run_dir / part, folder / part)
    probe = None
    if (kept := checkpoint.read_state(saved.checkpoint).get("probe")) is not None:
        setting = {"precision": "fp32", "attention": "sdpa", "device": "cpu", "torch": torch.__version__}
        model = _assembled(made, saved)
        probe = Probe.from_json(kept, setting).with_loss(model, torch.device("cpu"))
    weights.save_quantized(folder / "checkpoints", made.parameters, Progress(identity=identity), probe)


def _assembled(made: Compressed, saved: SavedRun) -> LanguageModel:
    """The compressed model, without a file."""
    model = make_model(made.section, saved.vocab_size, objective=saved.run.objective)
    with torch.no_grad():
        for name, parameter in list(model.named_parameters()):
            value = made.parameters[name]
            if isinstance(value, Quantized):
                put(model, name, value)
            else:
                parameter.copy_(value)
    return model.eval()


def _next(saved: SavedRun, method: str, out: Path) -> str:
    if method in ("magnitude", "2:4", "heads"):
        config = out / "run.toml"
        return f"bigtfm train --deepspeed_config FILE --config {config} run.init_from={out} run.name=NAME"
    if saved.run.supervised:
        return f"bigtfm predict --run {out} --data FILE"
    return f"bigtfm generate --run {out}"
