"""What is done with a run of adapters: every command gets it merged, and merged it is the same model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import hf_models
import pytest
import rank_runner
import small_models
import torch
from compression_runs import QUIET, ds_json
from safetensors.torch import load_file
from typer.testing import CliRunner

from bigtfm.cli import app
from bigtfm.config.problems import NoCheckpoint
from bigtfm.config.sections import TuneSection
from bigtfm.engine import checkpoint, shards, weights
from bigtfm.engine.shards import Shards
from bigtfm.export import export
from bigtfm.huggingface.export_hf import export_hf
from bigtfm.huggingface.import_hf import import_hf
from bigtfm.model.families import make_model
from bigtfm.model.lora import add_adapters, is_adapter
from bigtfm.run_directory import open_run

pytestmark = [pytest.mark.launcher, pytest.mark.slow]
NAMES = ("gpt2", "bert", "t5")
VOCAB = 640  # the tokenizer's 512, and what objectives add
TUNE = TuneSection(lora_rank=4, lora_alpha=12)
LORA = ("tune.lora_rank=4", "tune.lora_alpha=12")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """runs/NAME-start, imported; runs/NAME, adapters trained on it; runs/again, adapters on runs/gpt2."""
    folder = tmp_path_factory.mktemp("lora-used")
    adam = {"type": "AdamW", "params": {"lr": 3e-2, "weight_decay": 0.1}}
    path = str(ds_json(folder, optimizer=adam, zero_optimization={"stage": 3}))
    jobs = []
    with pytest.MonkeyPatch.context() as patch:
        for name in NAMES:
            kind, arguments, model = hf_models.MODELS[name]
            patch.setitem(hf_models.MODELS, name, (kind, arguments | {"vocab_size": VOCAB}, model))
            hf_models.make(name, folder)
            shutil.copy(tiny_data / "tokenizer/tokenizer.model", folder / name)
            start = folder / f"runs/{name}-start"
            import_hf(str(folder / name), start)
            shape = [
                *hf_models.overrides(start / "run.toml"),
                f"data.path={tiny_data}",
                *QUIET,
                "run.steps=4",
            ]
            jobs.append([path, *shape, f"run.name={name}", f"run.init_from={start}", *LORA])
            if name == "gpt2":
                again = ["run.name=again", f"run.init_from={folder / 'runs/gpt2'}", *LORA]
                jobs.append([path, *shape, *again])
    finished = rank_runner.train_all(jobs, folder, world_size=2)
    assert finished.codes == [0, 0], finished.output[-3000:]
    return folder


def newest(run: Path) -> Path:
    found = checkpoint.newest(run / "checkpoints")
    assert found is not None
    return found


def as_trained(run: Path, merged: Any) -> torch.nn.Module:
    """The model with its adapters beside its matrices."""
    model = make_model(merged.config, merged.vocab_size, objective=merged.objective)
    add_adapters(model, TUNE)
    with Shards(newest(run), merged=False) as shards, torch.no_grad():
        shards.require_all_used(model)
        for name, parameter in model.named_parameters():
            values = torch.empty(parameter.numel())
            shards.fill(values, name, "fp32", 0)
            parameter.copy_(values.view(parameter.shape))
    return model.eval()


def logits_of(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """What its loss is computed of, [T, V]."""
    seen: list[torch.Tensor] = []

    def loss(x: torch.Tensor, *_: Any) -> tuple[torch.Tensor, int]:
        seen.append(model.project(x))
        return x.sum(), 0

    model.loss = loss
    with torch.no_grad():
        model(**inputs)
    return seen[0]


@pytest.mark.parametrize("name", NAMES)
def test_merged_it_has_the_same_logits(name: str, folder: Path, tmp_path: Path) -> None:
    run = folder / "runs" / name
    merged, _, _ = open_run(run)
    start, _, _ = open_run(folder / f"runs/{name}-start")
    inputs = small_models.batch(merged, [5, 9, 2])
    found = {
        "merged": logits_of(merged, inputs),
        "trained": logits_of(as_trained(run, merged), inputs),
        "start": logits_of(start, inputs),
    }
    assert float((found["merged"] - found["trained"]).abs().max()) <= 1e-5
    assert float((found["merged"] - found["start"]).abs().max()) > 1e-2, "the adapters have learnt"
    said = export_hf(run, tmp_path / "hf")  # which compares the merged model with transformers'
    assert any("largest difference" in line for line in said)
    exported = load_file(tmp_path / "hf/model.safetensors")
    assert not any("lora" in key for key in exported)
    original = load_file(folder / name / "model.safetensors")
    changed = [key for key in exported if key in original and not torch.equal(exported[key], original[key])]
    assert changed
    assert all(exported[key].dim() == 2 for key in changed), "no bias, no norm"


def test_one_file_of_merged_weights(folder: Path, tmp_path: Path) -> None:
    run, out = folder / "runs/gpt2", tmp_path / "out.safetensors"
    export(run, out, dtype="fp32", step=None, best=False, force=False)
    merged, _, _ = open_run(run)
    assert load_file(out).keys() == {name for name, _ in merged.named_parameters()}
    for name, values in load_file(out).items():
        assert torch.equal(values, merged.get_parameter(name))


def test_another_run_begins_with_merged_weights(folder: Path) -> None:
    """Its frozen weights are the other's, merged: at stage 3 by two ranks, in pieces, to the bit."""
    source, again = newest(folder / "runs/gpt2"), newest(folder / "runs/again")
    with Shards(again, merged=False) as shards:
        for name, values in weights.read_weights(source, weights.weight_shapes(source)):
            frozen = torch.empty(values.numel())
            shards.fill(frozen, name, "fp32", 0)
            assert torch.equal(frozen, values.flatten()), name
    first = {name for name in checkpoint.read_index(source) if is_adapter(name)}
    assert first == {name for name in checkpoint.read_index(again) if is_adapter(name)}


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "--run", "RUN", "--prompt", "My", "--max-new-tokens", "4"],
        ["inspect", "--run", "RUN", "--text", "My fellow Americans", "--out", "OUT"],
        ["compress", "--run", "RUN", "--out", "OUT", "--method", "int8"],
        ["evaluate", "--run", "RUN", "--data", "TEXT"],
    ],
    ids=lambda command: command[0],
)
def test_commands_take_it(command: list[str], folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("My fellow Americans, the state of the Union is strong.\n")
    places = {"RUN": folder / "runs/gpt2", "OUT": tmp_path / "out", "TEXT": tmp_path / "text.txt"}
    result = CliRunner().invoke(app, [str(places.get(word, word)) for word in command])
    assert result.exit_code == 0, result.output


def test_another_scale_is_found_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: merged otherwise than it was trained, the probe has another loss."""
    open_run(folder / "runs/bert")
    monkeypatch.setattr(shards, "_adapter_scale", lambda _: 6.0)
    with pytest.raises(NoCheckpoint, match="the model computes otherwise"):
        open_run(folder / "runs/bert")
