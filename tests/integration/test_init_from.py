"""A fresh run that begins with another's weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import rank_runner
import torch
from conftest import TINY, losses
from safetensors.torch import load_file
from task_runs import prepared

from bigtfm.config.sections import ModelSection
from bigtfm.model.transformer import initial_value

pytestmark = pytest.mark.launcher


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """A folder with runs/source, a BERT of 6 steps whose next-sentence head was never asked."""
    folder = tmp_path_factory.mktemp("source")
    content = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "weight_decay": 0.1}},
        "gradient_clipping": 1.0,
    }
    (folder / "ds.json").write_text(json.dumps(content))
    finished = rank_runner.train_all([["ds.json", *job(tiny_data, "source"), "steps=6"]], folder, 1)
    assert finished.code == 0, finished.output[-3000:]
    return folder


def job(data: Path, name: str) -> list[str]:
    bert = ["model.family=bert", "model.token_types=2", "model.next_sentence=true", "model.bias=true"]
    return [*TINY, f"data.path={data}", f"run.name={name}", *bert]


def refused(folder: Path, data: Path, *overrides: str) -> str:
    """What a run that begins with runs/source says; exit code 64 or 76."""
    args = ["train", "--deepspeed_config", "ds.json", *job(data, "refused"), "steps=1", *overrides]
    finished = rank_runner.run(args, folder)
    assert finished.code in (64, 76), finished.output
    assert "Traceback" not in finished.output
    return finished.output


def test_every_stage_begins_where_the_other_ended(
    source: Path, tiny_data: Path, deepspeed_json: Callable[..., Path]
) -> None:
    files = [str(deepspeed_json(f"{stage}.json", stage=stage)) for stage in (0, 1, 2, 3)]
    fresh = [*job(tiny_data, "fresh"), "steps=3"]
    begin = ["run.init_from=runs/source", "steps=3"]
    jobs = [[path, *job(tiny_data, f"begun-{Path(path).stem}"), *begin] for path in files]
    finished = rank_runner.train_all([[files[0], *fresh], *jobs], source, world_size=2)
    assert finished.codes == [0, 0], finished.output[-3000:]
    begun = [losses(source / f"runs/begun-{stage}") for stage in range(4)]
    for curve in begun[1:]:
        assert curve == pytest.approx(begun[0], abs=1e-5)
    assert begun[0][0] < losses(source / "runs/fresh")[0] - 0.1, "what was learnt is there"


def test_a_head_without_gradient_stays_as_it_was(source: Path) -> None:
    """Weight decay alone would move it."""
    folder = source / "runs/source/checkpoints/step-00000006"
    trained = load_file(folder / "shard-00000.safetensors")
    index = json.loads((folder / "index.json").read_text())
    saved = json.loads((folder / "state.json").read_text())["progress"]["identity"]
    config, seed = ModelSection.model_validate(saved["model"]), saved["seed"]
    for name in ("next_sentence.pooler.weight", "encoder.layers.0.mlp.down.weight"):
        begun = initial_value(name, tuple(index[name]["shape"]), config, seed)
        moved = not torch.equal(trained[f"{name}|fp32"], begun.flatten())
        assert moved == name.startswith("encoder")


def test_another_model_is_refused(source: Path, tiny_data: Path) -> None:
    said = refused(source, tiny_data, "run.init_from=runs/source", "model.norm=layernorm")
    assert "model.norm was rmsnorm when this run was saved and is layernorm now" in said
    assert "or accept the change with resume.allow=model" in said
    assert "runs/source/run.toml" in said
    said = refused(source, tiny_data, "run.init_from=runs/source", "model.num_layers=3")
    assert "model.num_layers was 2" in said
    assert "resume.allow" not in said
    allowed = ["resume.allow=model", "model.num_layers=3"]
    said = refused(source, tiny_data, "run.init_from=runs/source", *allowed)
    assert "the checkpoint has no encoder.layers.2" in said


def test_another_objective_s_own_tokens_stay_fresh(
    source: Path, tiny_data: Path, deepspeed_json: Callable[..., Path]
) -> None:
    """The source has 513 tokens with <mask>, padded to 576: pieces of the tokenizer keep their rows."""
    rows = [{"text": f"{word} film", "label": label} for word, label in (("fine", "a"), ("dull", "b"))]
    films = prepared(source, tiny_data / "tokenizer", "classification", rows * 20)
    task = ["objective.kind=classification", "data.packing=best_fit", "run.init_from=runs/source", "steps=1",
            "tune.embeddings=false"]  # fmt: skip
    jobs = [
        [str(deepspeed_json(f"{stage}.json", stage=stage)), *job(films, f"films-{stage}"), *task]
        for stage in (0, 3)
    ]
    finished = rank_runner.train_all(jobs, source, world_size=2)
    assert finished.codes == [0, 0], finished.output[-3000:]
    trained = whole(source / "runs/source/checkpoints/step-00000006")
    assert len(trained) == 576 * 32
    for stage in (0, 3):
        begun = whole(source / f"runs/films-{stage}/checkpoints/step-00000001")
        assert len(begun) == 512 * 32
        assert torch.equal(begun, trained[: len(begun)])


def whole(checkpoint: Path) -> torch.Tensor:
    """The token embedding, flat."""
    entry = json.loads((checkpoint / "index.json").read_text())["embed_tokens.weight"]
    parts = sorted(entry["fragments"], key=lambda part: part["start"])
    return torch.cat([load_file(checkpoint / part["file"])["embed_tokens.weight|fp32"] for part in parts])


def test_a_place_without_checkpoint_is_refused(source: Path, tiny_data: Path) -> None:
    assert "run.init_from has no checkpoint" in refused(source, tiny_data, "run.init_from=runs/nowhere")
