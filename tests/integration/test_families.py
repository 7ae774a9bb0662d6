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
RECOMPUTE = ("none", "full", "selective")
STAGES = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def curves(
    tmp_path_factory: pytest.TempPathFactory, tiny_data: Path
) -> dict[tuple[str, int, str], list[float]]:
    """Five losses of every family, stage and recomputation: two ranks, dropout, two micro batches a step."""
    folder = tmp_path_factory.mktemp("families")
    cells, jobs = [], []
    for stage in STAGES:
        content = {
            "train_batch_size": 8,
            "train_micro_batch_size_per_gpu": 2,
            "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "weight_decay": 0.1}},
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": stage},
        }
        (folder / f"zero{stage}.json").write_text(json.dumps(content))
        for family, shape in FAMILIES.items():
            for recompute in RECOMPUTE:
                cells.append((family, stage, recompute))
                name = f"run.name={family}-{stage}-{recompute}"
                fixed = [*TINY, f"data.path={tiny_data}", "steps=5", "model.dropout=0.1", name]
                jobs.append([f"zero{stage}.json", *fixed, *shape, f"recompute={recompute}"])
    finished = rank_runner.train_all(jobs, folder, world_size=2)
    assert finished.codes == [0, 0], finished.output[-3000:]
    return {cell: losses(folder / "runs" / "-".join(map(str, cell))) for cell in cells}


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_stage_and_recomputation_gives_the_same_losses(
    family: str, stage: int, recompute: str, curves: dict[tuple[str, int, str], list[float]]
) -> None:
    reference = curves[family, 0, "none"]
    assert len(reference) == 5
    assert min(reference[1:]) < reference[0] - 0.05, "it learns, so equal curves mean something"
    assert curves[family, stage, recompute] == pytest.approx(reference, abs=1e-5)
