"""A small run that has learnt a task's rows by heart."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rank_runner
from conftest import TINY

from bigtfm.data.best_fit import pack
from bigtfm.data.prepare import prepare
from bigtfm.tasks.known import setting_of


def prepared(folder: Path, tokenizer: Path, task: str, rows: Sequence[Any]) -> Path:
    """folder/data."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    setting = setting_of(task, max_tokens=32)
    prepare([str(folder / "rows.jsonl")], folder / "data", tokenizer=tokenizer, task=setting, workers=1,
            validation_fraction=0, progress=False)  # fmt: skip
    pack(folder / "data", 32)
    return folder / "data"


def learnt(
    folder: Path, tokenizer: Path, task: str, rows: Sequence[Any], *overrides: str, batch: int = 8
) -> Path:
    """The run directory; the data set, folder/data, holds the rows in examples of up to 32 tokens."""
    prepared(folder, tokenizer, task, rows)
    content = {
        "train_batch_size": batch, "train_micro_batch_size_per_gpu": batch,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}}, "zero_optimization": {"stage": 0},
    }  # fmt: skip
    (folder / "ds.json").write_text(json.dumps(content))
    args = ["train", "--deepspeed_config", "ds.json", *TINY, f"data.path={folder / 'data'}"]
    finished = rank_runner.run([*args, "data.packing=best_fit", f"run.name={task}", *overrides], folder)
    assert finished.code == 0, finished.output
    return folder / "runs" / task
