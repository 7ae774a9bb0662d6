"""How the tests of compression train."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Compress = Callable[..., tuple[int, dict[str, Any], str]]
SHAPE = ("model.hidden_size=128", "model.num_layers=2", "model.num_attention_heads=4", "model.max_seq_len=64")
QUIET = ("track.mlflow=false", "eval.every=0", "eval.tokens=4096", "save.every=0", "run.dir=runs")


def ds_json(folder: Path, **changes: Any) -> Path:
    """A DeepSpeed JSON of its own."""
    content = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "weight_decay": 0.1}},
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 0},
    } | changes
    path = folder / f"ds-{len(list(folder.glob('ds-*')))}.json"
    path.write_text(json.dumps(content))
    return path
