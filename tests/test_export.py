"""`bigtfm export`: all weights of a run in one safetensors file."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peak_memory import peak_memory
from safetensors import safe_open
from safetensors.torch import load_file

from bigtfm.cli import app
from bigtfm.config.sections import DataSection, ModelSection
from bigtfm.data.tokenizer import load_tokenizer
from bigtfm.engine import checkpoint, weights
from bigtfm.engine.checkpoint import Progress
from bigtfm.model.families import make_model
from bigtfm.run_directory import open_run

Export = Callable[..., tuple[int, str]]


def save(run: Path, step: int, section: ModelSection, data: Path, best_step: int | None = None) -> Path:
    """A checkpoint as of `step`, whose weights that number decides."""
    tokenizer = load_tokenizer(data / "tokenizer")
    model = make_model(section, tokenizer.vocab_size)
    generator = torch.Generator().manual_seed(step)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    tensors = [(name, torch.randn(shape, generator=generator)) for name, shape in shapes.items()]
    identity = {
        "model": {**section.model_dump(mode="json"), "vocab_size": tokenizer.vocab_size},
        "objective": {"kind": "causal_lm"},
        "tokenizer": tokenizer.identity,
        "data": {"seq_len": DataSection().seq_len or section.max_seq_len},
    }
    progress = Progress(step=step, best_step=best_step, identity=identity)
    tokenizer.save(run / "tokenizer")
    return weights.save_weights(run / "checkpoints", shapes, tensors, progress)


@pytest.fixture
def run_dir(tmp_path: Path, tiny_data: Path) -> Path:
    """A run with checkpoints of steps 3 (the best evaluation) and 5."""
    section = ModelSection(hidden_size=32, num_layers=2, num_attention_heads=2, max_seq_len=32)
    save(tmp_path / "run", 3, section, tiny_data, best_step=3)
    save(tmp_path / "run", 5, section, tiny_data, best_step=3)
    return tmp_path / "run"


@pytest.fixture
def export(run_dir: Path, capfd: pytest.CaptureFixture[str]) -> Export:
    """Runs `bigtfm export` on the run; returns its exit code and what it said."""

    def command(*args: object) -> tuple[int, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            app(["export", str(run_dir), *map(str, args)])
        said = capfd.readouterr()
        return int(ended.value.code or 0), said.err or said.out

    return command


def test_it_is_the_runs_model_to_the_bit(export: Export, run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "model.safetensors"
    code, said = export(out)
    assert code == 0, said
    assert "step 5" in said
    model, _, _ = open_run(run_dir)
    found = load_file(out)
    assert found.keys() == dict(model.named_parameters()).keys()  # tied weights once
    assert all(torch.equal(found[name], parameter) for name, parameter in model.named_parameters())
    assert not [path for path in out.parent.iterdir() if path != out]
    assert out.stat().st_mode & 0o777 == 0o666 & ~current_umask()


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_the_metadata_are_enough_to_make_the_model(export: Export, tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    assert export(out)[0] == 0
    with safe_open(out, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert metadata["step"] == "5"
    assert json.loads(metadata["tied"]) == {"lm_head.weight": "embed_tokens.weight"}
    section = ModelSection.model_validate(json.loads(metadata["model"]))
    make_model(section, int(metadata["vocab_size"])).load_state_dict(load_file(out))


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_other_dtypes_are_the_weights_rounded(
    export: Export, run_dir: Path, tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    out = tmp_path / "model.safetensors"
    assert export(out, "--dtype", name)[0] == 0
    model, _, _ = open_run(run_dir)
    found = load_file(out)
    assert all(torch.equal(found[name], parameter.to(dtype)) for name, parameter in model.named_parameters())


@pytest.mark.parametrize(("choice", "step"), [(["--step", "3"], "3"), (["--best"], "3"), ([], "5")])
def test_which_checkpoint(
    export: Export, run_dir: Path, tmp_path: Path, choice: list[str], step: str
) -> None:
    out = tmp_path / "model.safetensors"
    assert export(out, *choice)[0] == 0
    with safe_open(out, framework="pt") as file:
        assert file.metadata()["step"] == step
        folder = checkpoint.folder_of(run_dir / "checkpoints", int(step))
        for name, values in weights.read_weights(folder, weights.weight_shapes(folder)):
            assert torch.equal(file.get_tensor(name), values)


def refused(result: tuple[int, str], code: int, said: str) -> None:
    assert result[0] == code, result[1]
    assert result[1].count("\n") == 1, result[1]
    assert said in result[1]


def test_what_is_there_stays_unless_forced(export: Export, tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    out.write_text("mine")
    refused(export(out), 64, "is there already")
    assert out.read_text() == "mine"
    assert export(out, "--force")[0] == 0
    assert load_file(out)
    (tmp_path / "folder").mkdir()
    refused(export(tmp_path / "folder", "--force"), 64, "is there already")


def test_force_replaces_a_file_and_nothing_else(export: Export, run_dir: Path, tmp_path: Path) -> None:
    pipe, linked = tmp_path / "pipe", tmp_path / "linked"
    os.mkfifo(pipe)
    refused(export(pipe, "--force"), 64, "is there already, and no plain file")
    assert pipe.is_fifo()
    linked.symlink_to(run_dir / "checkpoints")
    shard = linked / "step-00000005" / "shard-00000.safetensors"
    for out in (shard, linked / "new" / "model.safetensors"):
        refused(export(out, "--force"), 64, "lies among the run's checkpoints")
    assert checkpoint.defect(shard.parent) is None
    assert not (linked / "new").exists()


def test_a_checkpoint_that_a_training_prunes_meanwhile(
    export: Export, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, read = run_dir / "checkpoints", weights.weight_shapes
    later = tmp_path / "later"
    checkpoint.folder_of(root, 5).rename(later)

    def pruned(folder: Path) -> dict[str, weights.Shape]:
        """Reads the shapes, after step 5 was saved and step 3 pruned."""
        if later.exists():
            later.rename(checkpoint.folder_of(root, 5))
            shutil.rmtree(checkpoint.folder_of(root, 3))
        return read(folder)

    monkeypatch.setattr(weights, "weight_shapes", pruned)
    code, said = export(tmp_path / "model.safetensors")
    assert code == 0, said
    assert "step 5" in said


def test_a_failure_to_read_names_what_was_read(
    export: Export, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, index = weights.read_weights, run_dir / "checkpoints" / "step-00000005" / "index.json"

    def lost(*args: Any) -> Any:
        index.unlink(missing_ok=True)
        return read(*args)

    monkeypatch.setattr(weights, "read_weights", lost)
    refused(export(tmp_path / "model.safetensors"), 74, "index.json: No such file")
    assert not list(tmp_path.glob("*model.safetensors*"))


def test_no_such_checkpoint(export: Export, run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    refused(
        export(out, "--step", "4"), 76, "step-00000004: is not there. Fix: there are: step-00000003, step-"
    )
    refused(export(out, "--step", "3", "--best"), 64, "--step and --best at once")
    refused(export(out, "--dtype", "fp8"), 64, "no dtype fp8")
    for name in ("step-00000003", "step-00000005"):
        shard = run_dir / "checkpoints" / name / "shard-00000.safetensors"
        shard.write_bytes(shard.read_bytes()[:-1])
    refused(export(out), 76, "no checkpoint verifies")
    refused(export(out, "--step", "3"), 76, "step-00000003: shard-00000.safetensors has")
    assert not out.exists()


def test_what_fp16_cannot_hold(export: Export, run_dir: Path, tmp_path: Path) -> None:
    folder = checkpoint.folder_of(run_dir / "checkpoints", 5)
    shapes = weights.weight_shapes(folder)
    large = [(name, values * 1e5) for name, values in weights.read_weights(folder, shapes)]
    progress = Progress(**checkpoint.read_state(folder)["progress"])
    weights.save_weights(run_dir / "checkpoints", shapes, large, progress)
    refused(export(tmp_path / "model.safetensors", "--dtype", "fp16"), 70, "beyond 65504")
    assert not list(tmp_path.glob("*model.safetensors*"))


def test_a_full_disk_leaves_no_file(export: Export, tmp_path: Path) -> None:
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        refused(export(tmp_path / "model.safetensors"), 74, "model.safetensors: File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not [path for path in tmp_path.iterdir() if path.name != "run"]


@pytest.mark.slow
def test_it_holds_a_few_tensors_at_most(tmp_path: Path) -> None:
    shapes = {f"weight.{number}": (1024, 1024) for number in range(64)}  # 4 MiB each, 256 MiB in all
    identity = {"model": {"vocab_size": 1, "tied_embeddings": False}}
    ones = ((name, torch.ones(shape)) for name, shape in shapes.items())
    weights.save_weights(tmp_path / "run/checkpoints", shapes, ones, Progress(step=1, identity=identity))
    prepare = "from pathlib import Path; from bigtfm.export import export"
    run, out = tmp_path / "run", tmp_path / "out.safetensors"
    assert peak_memory(prepare, f"export(Path({str(run)!r}), Path({str(out)!r}), dtype='bf16')") < 32
    everything = f"load_file({str(out)!r})['weight.0']; [v.float() for v in load_file({str(out)!r}).values()]"
    assert peak_memory("from safetensors.torch import load_file", everything) > 200  # the measure sees it
