"""From Hugging Face, through the loop, and back: every architecture trains and stays what it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import hf_models
import pytest
import rank_runner
import torch
from conftest import losses
from safetensors.torch import load_file

from bigtfm.data.tokenizer import load_tokenizer
from bigtfm.huggingface.export_hf import export_hf
from bigtfm.huggingface.import_hf import import_hf

pytestmark = pytest.mark.launcher

VOCAB = 640  # the tokenizer's 512, and what objectives add
QUIET = ("track.mlflow=false", "eval.every=0", "eval.tokens=512", "save.every=0", "run.steps=2")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """Of each model NAME (Hugging Face's), runs/NAME-start (imported) and runs/NAME (after 2 steps)."""
    folder = tmp_path_factory.mktemp("imported")
    content = {
        "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.1}},
        "zero_optimization": {"stage": 2},
    }
    (folder / "zero2.json").write_text(json.dumps(content))
    jobs = []
    with pytest.MonkeyPatch.context() as patch:
        for name, (config_class, arguments, model_class) in list(hf_models.MODELS.items()):
            changed: tuple[str, dict[str, Any], str] = (
                config_class,
                arguments | {"vocab_size": VOCAB},
                model_class,
            )
            patch.setitem(hf_models.MODELS, name, changed)
            hf_models.make(name, folder)
            shutil.copy(tiny_data / "tokenizer/tokenizer.model", folder / name)
            start = folder / f"runs/{name}-start"
            import_hf(str(folder / name), start)
            data = [f"data.path={tiny_data}", f"run.name={name}", f"run.init_from={start}"]
            jobs.append(["zero2.json", *hf_models.overrides(start / "run.toml"), *data, *QUIET])
    finished = rank_runner.train_all(jobs, folder, world_size=1)
    assert finished.code == 0, finished.output[-3000:]
    return folder


@pytest.mark.parametrize("name", hf_models.MODELS)
def test_trained_and_back_again(name: str, trained: Path, tmp_path: Path) -> None:
    import transformers

    assert all(0 < loss < 100 for loss in losses(trained / "runs" / name))
    told = export_hf(trained / "runs" / name, tmp_path / "back")  # which compares
    assert any("largest difference" in line for line in told)
    config = json.loads((tmp_path / "back/config.json").read_text())
    original = json.loads((trained / name / "config.json").read_text())
    special = ("model_type", "vocab_size", "pad_token_id", "eos_token_id", "decoder_start_token_id")
    assert {key: config.get(key) for key in special} == {key: original.get(key) for key in special}
    ours = load_tokenizer(trained / "runs" / name / "tokenizer")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    if config["model_type"] != "qwen2":  # transformers takes no other tokenizer for it than its own
        assert theirs.encode("My  people\n", add_special_tokens=False) == ours.encode("My  people\n")
    before, after = (load_file(path / "model.safetensors") for path in (trained / name, tmp_path / "back"))
    shared = [key for key in after if key in before and after[key].dim() == 2]
    assert name.endswith("-bare") or shared
    assert any(not torch.equal(before[key], after[key]) for key in shared) or not shared
    getattr(transformers, config["architectures"][0]).from_pretrained(tmp_path / "back")
