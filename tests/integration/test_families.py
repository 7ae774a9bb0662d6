"""The three families through the loop: ZeRO stage and recomputation change nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import rank_runner
from conftest import TINY, losses

pytestmark = pytest.mark.launcher

FAMILIES = {
    "gpt": ["model.positions=learned", "model.norm=layernorm", "model.bias=true", "model.num_kv_heads=1"],
    "bert": [
        "model.family=bert",
        "model.norm_order=post",
        "model.norm=layernorm",
        "model.bias=true",
        "model.embedding_norm=true",
        "model.head_bias=true",
        "model.token_types=2",
        "model.next_sentence=true",
        "objective.next_sentence=4",
    ],
    "encoder_decoder": [
        "model.family=encoder_decoder",
        "model.positions=relative",
        "model.activation=geglu_tanh",
        "model.tied_embeddings=true",
        "model.logit_scale=0.2",
        "model.bias=true",
    ],
}
RECOMPUTE = ("none", "full", "selective", "2")
STAGES = (0, 1, 2, 3)


Cell = tuple[str, int, str]  # family, stage, recomputation


def train_cells(folder: Path, data: Path, cells: list[Cell], *more: str) -> dict[Cell, list[float]]:
    """Five losses of each cell: two ranks, dropout, two micro batches a step."""
    jobs = []
    for family, stage, recompute in cells:
        content = {
            "train_batch_size": 8,
            "train_micro_batch_size_per_gpu": 2,
            "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "weight_decay": 0.1}},
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": stage},
        }
        (folder / f"zero{stage}.json").write_text(json.dumps(content))
        named = [f"run.name={family}-{stage}-{recompute}", f"data.path={data}", f"recompute={recompute}"]
        jobs.append(
            [f"zero{stage}.json", *TINY, *named, "steps=5", "model.dropout=0.1", *FAMILIES[family], *more]
        )
    finished = rank_runner.train_all(jobs, folder, world_size=2)
    assert finished.codes == [0, 0], finished.output[-3000:]
    return {cell: losses(folder / "runs" / "-".join(map(str, cell))) for cell in cells}


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> dict[Cell, list[float]]:
    """Every family, stage and recomputation, one after the other in the same two processes."""
    cells = [(family, stage, recompute) for stage in STAGES for family in FAMILIES for recompute in RECOMPUTE]
    return train_cells(tmp_path_factory.mktemp("families"), tiny_data, cells)


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_stage_and_recomputation_gives_the_same_losses(
    family: str, stage: int, recompute: str, curves: dict[Cell, list[float]]
) -> None:
    reference = curves[family, 0, "none"]
    assert len(reference) == 5
    assert min(reference[1:]) < reference[0] - 0.05, "it learns, so equal curves mean something"
    assert curves[family, stage, recompute] == pytest.approx(reference, abs=1e-5)


@pytest.mark.slow
def test_compiled_blocks_give_the_same_losses(
    tmp_path: Path, tiny_data: Path, curves: dict[Cell, list[float]]
) -> None:
    cells = [("gpt", 0, "none"), ("encoder_decoder", 3, "full"), ("bert", 3, "none")]
    for cell, curve in train_cells(tmp_path, tiny_data, cells, "compile_blocks=true").items():
        assert curve == pytest.approx(curves[cell], abs=1e-5), cell


@pytest.mark.slow
def test_a_compiled_loss_gives_the_same_losses(
    tmp_path: Path, tiny_data: Path, curves: dict[Cell, list[float]]
) -> None:
    cells = [("gpt", 0, "none"), ("bert", 1, "none"), ("encoder_decoder", 2, "full"), ("gpt", 3, "selective")]
    for cell, curve in train_cells(tmp_path, tiny_data, cells, "compute.loss=compiled").items():
        assert curve == pytest.approx(curves[cell], abs=1e-5), cell


def test_a_step_without_labels_has_no_loss_and_moves_nothing(tmp_path: Path, tiny_data: Path) -> None:
    """One token in 250 is hidden, so some steps have none; the curve still does not depend on the split."""
    content = {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}, "train_batch_size": 8}
    jobs = []
    for micro_batch in (1, 4):
        path = tmp_path / f"{micro_batch}.json"
        path.write_text(json.dumps(content | {"train_micro_batch_size_per_gpu": micro_batch}))
        few = ["model.family=bert", "mask_fraction=0.004", "eval.tokens=4096", f"run.name={micro_batch}"]
        jobs.append([str(path), *TINY, f"data.path={tiny_data}", "steps=12", *few])
    finished = rank_runner.train_all(jobs, tmp_path, world_size=2)
    assert finished.codes == [0, 0], finished.output[-3000:]
    one, other = (losses(tmp_path / f"runs/{micro_batch}") for micro_batch in (1, 4))
    without = [loss == "NaN" for loss in one]
    assert 0 < sum(without) < len(without)
    assert [loss == "NaN" for loss in other] == without
    real = [[loss for loss in curve if loss != "NaN"] for curve in (one, other)]
    assert real[0] == pytest.approx(real[1], abs=1e-5)
