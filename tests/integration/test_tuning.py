"""[tune]: parts of the model with an lr of their own, at every stage alike; a stack that stays as it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rank_runner
import torch
from conftest import TINY, losses
from safetensors.torch import load_file

from bigtfm.config.problems import ConfigProblem
from bigtfm.config.run import load_run_config
from bigtfm.config.sections import ModelSection, ObjectiveSection, TuneSection
from bigtfm.data.best_fit import pack
from bigtfm.data.prepare import prepare
from bigtfm.engine.build import parameter_groups
from bigtfm.export import export
from bigtfm.job import check_job
from bigtfm.model.families import make_model
from bigtfm.model.transformer import block_linears, init_weights
from bigtfm.run_directory import open_run
from bigtfm.tasks.known import setting_of

SMALL = ModelSection(hidden_size=8, num_layers=3, num_attention_heads=2, family="bert", num_labels=2)


def scales(tune: TuneSection) -> dict[str, float]:
    model = make_model(SMALL, 40, objective=ObjectiveSection(kind="classification"))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, "AdamW", 0.1, tune)
    found = {names[id(p)]: group.get("lr_scale", 1.0) for group in groups for p in group["params"]}
    assert found.keys() == set(names.values()), "each parameter is in one group"
    assert groups[0].get("lr_scale", 1.0) == 1.0, "whose lr is reported"
    for group in groups:
        assert {p.dim() >= 2 for p in group["params"]} == {group["weight_decay"] > 0}
    return found


def test_each_block_has_a_share_of_the_lr_above_it() -> None:
    found = scales(TuneSection(layer_decay=0.5))
    assert found["task_head.classifier.weight"] == found["encoder.norm.weight"] == 1
    assert [found[f"encoder.layers.{n}.mlp.down.weight"] for n in range(3)] == [0.125, 0.25, 0.5]
    assert found["embed_tokens.weight"] == 0.0625


def test_without_tune_there_are_two_groups_as_ever() -> None:
    model = make_model(SMALL, 40, objective=ObjectiveSection(kind="classification"))
    assert [group.keys() for group in parameter_groups(model, "AdamW", 0.1)] == [
        {"params", "weight_decay"}
    ] * 2


def test_what_can_have_no_lr_of_its_own_is_refused() -> None:
    model = make_model(SMALL, 40, objective=ObjectiveSection(kind="classification"))
    with pytest.raises(ConfigProblem, match="Muon has one lr for all"):
        parameter_groups(model, "Muon", 0.1, TuneSection(layer_decay=0.5))
    for wrong in (["tune.train=head"], ["tune.train=head", "tune.layer_decay=0.5", "model.family=bert",
                  "objective.kind=tagging", "data.packing=best_fit"]):  # fmt: skip
        with pytest.raises(ConfigProblem, match=r"tune\."):
            load_run_config(None, wrong)


@pytest.mark.parametrize(
    ("overrides", "changes", "said"),
    [
        (["tune.lora_rank=-1"], {}, "greater than or equal to 0"),
        (["tune.lora_rank=33"], {}, "tune.lora_rank 33 is more than the 32 rows or columns of a matrix"),
        (["tune.lora_alpha=0", "tune.lora_rank=4"], {}, "tune.lora_alpha must be greater than 0"),
        (["tune.lora_alpha=8"], {}, "tune.lora_alpha does nothing without tune.lora_rank"),
        (["tune.lora_rank=4", "tune.lora_on=mlp"], {}, "tune.lora_on must be 'attention' or 'all'"),
        (["tune.lora_rank=4", "model.keep_zeros=true"], {}, "can't keep the zeros"),
        (["tune.lora_rank=4", "objective.l1=0.1"], {}, "objective.l1 is a penalty on the weights"),
        (["tune.lora_rank=4", "tune.embeddings=false", "model.tied_embeddings=false"], {},
         "tune.embeddings does nothing where adapters are trained"),
        (["tune.lora_rank=4", "tune.train=head", "model.family=bert", "objective.kind=tagging",
          "data.packing=best_fit"], {}, "tune.lora_rank does nothing where the head alone is trained"),
        (["tune.lora_rank=4"],
         {"optimizer": {"type": "Muon", "params": {"lr": 1e-2}}, "gradient_clipping": 0},
         "Muon is for the training of whole matrices"),
        (["tune.lora_rank=4"],
         {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/tmp"}}},
         "can't be read from NVMe"),
    ],
)  # fmt: skip
def test_adapters_that_can_t_be(
    overrides: list[str], changes: dict[str, Any], said: str, tiny_data: Path,
    deepspeed_json: Callable[..., Path],
) -> None:  # fmt: skip
    with pytest.raises(ConfigProblem) as refused:
        check_job(None, deepspeed_json(**changes), [*TINY, f"data.path={tiny_data}", *overrides], 2)
    assert said in refused.value.line
    assert "Fix:" in refused.value.line
    assert refused.value.exit_code == 64


STAGES = (0, 1, 2, 3)
WAYS = {"decay": "tune.layer_decay=0.5", "head": "tune.train=head", "lora": "tune.lora_rank=4",
        "all": "tune.train=all"}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, corpus_lines: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("tuning")
    rows = [
        {"text": line[:80], "label": "even" if n % 2 == 0 else "odd"} for n, line in enumerate(corpus_lines)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:300]))
    prepare([str(folder / "rows.jsonl")], folder / "data", tokenizer=tiny_data / "tokenizer", workers=1,
            task=setting_of("classification", max_tokens=32), progress=False)  # fmt: skip
    pack(folder / "data", 32)
    jobs = []
    for stage in STAGES:
        content = {
            "train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "gradient_clipping": 1.0,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1}},
            "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 2, "warmup_max_lr": 1e-2,
                                                             "total_num_steps": 6}},
            "zero_optimization": {"stage": stage},
        }  # fmt: skip
        (folder / f"{stage}.json").write_text(json.dumps(content))
        jobs += [
            [f"{stage}.json", *TINY, "model.family=bert", "objective.kind=classification", way,
             f"data.path={folder / 'data'}", "data.packing=best_fit", f"run.name={name}-{stage}"]
            for name, way in WAYS.items()
        ]  # fmt: skip
    finished = rank_runner.train_all(jobs, folder, world_size=2)
    assert finished.codes == [0, 0], finished.output[-3000:]
    return folder / "runs"


@pytest.mark.launcher
@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_every_stage_tunes_alike(way: str, runs: Path) -> None:
    reference = losses(runs / f"{way}-0")
    assert reference != losses(runs / f"{'all' if way != 'all' else 'head'}-0")
    for stage in STAGES[1:]:
        assert losses(runs / f"{way}-{stage}") == pytest.approx(reference, abs=1e-5)


@pytest.mark.launcher
@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_the_head_alone_moves(stage: int, runs: Path, tmp_path: Path) -> None:
    """To the bit: no weight decay, no moment, no clipping by a gradient that is not used."""
    export(
        runs / f"head-{stage}",
        tmp_path / "after.safetensors",
        dtype="fp32",
        step=None,
        best=False,
        force=False,
    )
    after = load_file(tmp_path / "after.safetensors")
    config = load_run_config(None, [*TINY, "model.family=bert", "model.num_labels=2", "data.packing=best_fit",
                                    "objective.kind=classification"])  # fmt: skip
    model = make_model(config.model, 512, seed=config.run.seed, objective=config.objective)
    init_weights(model)
    for name, before in model.named_parameters():
        same = torch.equal(after[name][: len(before)], before.detach())
        assert same != name.startswith("task_head."), name


@pytest.mark.launcher
@pytest.mark.slow
def test_lower_blocks_move_less(runs: Path, tmp_path: Path) -> None:
    """Adam's first steps are of the lr's size: the embeddings' is an eighth of the head's."""
    moved = {}
    for way in ("decay", "all"):
        export(runs / f"{way}-2", tmp_path / way, dtype="fp32", step=None, best=False, force=False)
        moved[way] = load_file(tmp_path / way)
    config = load_run_config(None, [*TINY, "model.family=bert", "model.num_labels=2", "data.packing=best_fit",
                                    "objective.kind=classification"])  # fmt: skip
    model = make_model(config.model, 512, seed=config.run.seed, objective=config.objective)
    init_weights(model)
    name = "encoder.layers.0.mlp.down.weight"
    start = dict(model.named_parameters())[name].detach()
    distance = {way: float((weights[name] - start).norm()) for way, weights in moved.items()}
    assert 0.15 < distance["decay"] / distance["all"] < 0.4, "two blocks below the top: a quarter"


@pytest.mark.launcher
@pytest.mark.slow
def test_adapters_learn_beside_the_head(runs: Path) -> None:
    """Read merged: the blocks' matrices and the head have moved, and nothing else."""
    after, _, _ = open_run(runs / "lora-3")
    model = make_model(after.config, after.vocab_size, seed=1234, objective=after.objective)
    init_weights(model)
    matrices = {f"{path}.weight" for path, _ in block_linears(model)}
    for name, before in model.named_parameters():
        moved = not torch.equal(after.get_parameter(name), before)
        assert moved == (name in matrices or name.startswith("task_head.")), name
