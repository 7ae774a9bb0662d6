"""What many tests need: a small data set of real text, small configurations, and real ranks."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tensors are tiny: two threads take ten times as long as one

ROOT = Path(__file__).parent.parent
TINY = (
    "model.hidden_size=32",
    "model.num_layers=2",
    "model.num_attention_heads=2",
    "model.max_seq_len=32",
    "track.mlflow=false",
    "eval.every=0",
    "eval.tokens=512",
    "save.every=0",
)


@pytest.fixture(scope="session")
def corpus_lines() -> list[str]:
    """Speeches of the embedded corpus."""
    path = ROOT / "bigtfm" / "data" / "corpus" / "state_of_the_union.jsonl"
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory, corpus_lines: list[str]) -> Path:
    """A prepared data set of some 60,000 tokens with a vocabulary of 512."""
    from bigtfm.data.prepare import prepare

    folder = tmp_path_factory.mktemp("tiny-data")
    text = folder / "speeches.txt"
    text.write_text("\n\n".join(corpus_lines)[:160_000], encoding="utf-8")
    prepare(
        [str(text)], folder / "tokens", vocab_size=512, validation_fraction=0.1, workers=1, progress=False
    )
    return folder / "tokens"


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of one of hf_models' by its name, made when first asked for. Not to be written to."""
    import hf_models

    folder = tmp_path_factory.mktemp("hf")
    return lambda name: folder / name if (folder / name).exists() else hf_models.make(name, folder)


@pytest.fixture
def deepspeed_json(tmp_path: Path) -> Callable[..., Path]:
    """Writes a DeepSpeed JSON: AdamW, 8 sequences a step, 2 a micro batch; keyword arguments replace keys."""

    def write(name: str = "deepspeed.json", *, stage: int = 0, **changes: Any) -> Path:
        content = {
            "train_batch_size": 8,
            "train_micro_batch_size_per_gpu": 2,
            "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "weight_decay": 0.1}},
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": stage},
        } | changes
        path = tmp_path / name
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
        return path

    return write


def losses(run_dir: Path) -> list[float]:
    """Training losses of a run, in the order of the steps, as the very numbers that were computed.

    Also of one that trains: without the line that is being written.
    """
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    return [json.loads(line)["loss"] for line in lines if line.endswith("\n")]
