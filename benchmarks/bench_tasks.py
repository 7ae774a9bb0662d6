"""Each task on real data, test-sized: what two CPU cores learn in under three minutes, beside its baseline.

    python benchmarks/bench_tasks.py [TASK]... [--out FOLDER] [--seeds 1] [--json]
    python benchmarks/bench_tasks.py pretraining --seeds 3

Data: benchmarks/task_data.py. A task is prepared, trained by `bigtfm train` and evaluated on held-out rows by
`bigtfm evaluate`. pretraining: classification from scratch, and after masked-LM pretraining on the same texts
without their labels, both fine-tuned alike; the mean over seeds and its spread.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from task_data import write

from bigtfm.bench.runner import environment_row

BERT = ("model.family=bert", "model.dropout=0.1", "model.hidden_size=128", "model.num_layers=2")
GPT = ("model.family=gpt", "model.hidden_size=128", "model.num_layers=3")
PAIRS = ("model.family=encoder_decoder", "model.hidden_size=128", "model.num_layers=2", "model.dropout=0.1")
HEADS = "model.num_attention_heads=4"


@dataclass(frozen=True)
class Recipe:
    """A task, test-sized."""

    task: str
    objective: str
    max_tokens: int
    vocab_size: int
    steps: int
    batch: int  # sequences of max_tokens
    lr: float
    model: tuple[str, ...]
    evaluate: tuple[str, ...] = ()


RECIPES = {
    recipe.task: recipe
    for recipe in (
        Recipe("classification", "classification", 64, 4096, 250, 32, 1e-3, BERT),
        Recipe("tagging", "tagging", 128, 1024, 150, 8, 1e-3, BERT),
        Recipe("question_answering", "question_answering", 128, 1024, 200, 8, 1e-3, BERT),
        Recipe("translation", "sequence_to_sequence", 128, 2048, 400, 32, 2e-3,
               (*PAIRS, "objective.label_smoothing=0.1"), ("--max-new-tokens", "60")),
        Recipe("summarisation", "completion", 256, 4096, 200, 8, 2e-3, GPT, ("--max-new-tokens", "40")),
        Recipe("chat", "completion", 64, 2048, 250, 16, 2e-3, GPT, ("--max-new-tokens", "40")),
    )
}  # fmt: skip


def bigtfm(*arguments: str, folder: Path) -> str:
    """The command's output; its last line where it fails."""
    command = [sys.executable, "-c", "from bigtfm.cli import app; app()", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=os.environ)
    if done.returncode:
        raise SystemExit(f"bigtfm {' '.join(arguments)}: {done.stderr.strip()[-500:]}")
    return done.stdout


def deepspeed_json(folder: Path, recipe: Recipe) -> str:
    path = folder / f"{recipe.task}.json"
    schedule = {"warmup_num_steps": 30, "warmup_max_lr": recipe.lr, "total_num_steps": recipe.steps}
    path.write_text(json.dumps({
        "train_batch_size": recipe.batch, "train_micro_batch_size_per_gpu": recipe.batch,
        "optimizer": {"type": "AdamW", "params": {"lr": recipe.lr, "weight_decay": 0.05}},
        "scheduler": {"type": "WarmupDecayLR", "params": schedule},
        "gradient_clipping": 1.0, "zero_optimization": {"stage": 2},
    }))  # fmt: skip
    return str(path)


def prepare(folder: Path, recipe: Recipe) -> Path:
    write(recipe.task, folder / "rows")
    rows = folder / "rows" / recipe.task
    bigtfm(
        "prepare", "--task", recipe.task, "--input", str(rows / "train.jsonl"),
        "--out", f"data/{recipe.task}",
        "--max-tokens", str(recipe.max_tokens), "--vocab-size", str(recipe.vocab_size), folder=folder,
    )  # fmt: skip
    return rows / "test.jsonl"


def train(folder: Path, recipe: Recipe, name: str, *overrides: str) -> float:
    """Trains a run; returns its seconds."""
    began = time.monotonic()
    bigtfm(
        "train", "--deepspeed_config", deepspeed_json(folder, recipe), *recipe.model, HEADS,
        f"model.max_seq_len={recipe.max_tokens}", f"objective.kind={recipe.objective}",
        f"data.path=data/{recipe.task}", "data.packing=best_fit", f"run.name={name}", "track.mlflow=false",
        "save.every=0", f"eval.every={recipe.steps}", *overrides, folder=folder,
    )  # fmt: skip
    return time.monotonic() - began


def evaluate(folder: Path, recipe: Recipe, name: str, held_out: Path) -> dict[str, Any]:
    found = bigtfm(
        "evaluate",
        "--run",
        f"runs/{name}",
        "--data",
        str(held_out),
        "--json",
        *recipe.evaluate,
        folder=folder,
    )
    return dict(json.loads(found))


def measure(folder: Path, recipe: Recipe, seeds: int) -> dict[str, Any]:
    """One task: its metrics, of the last seed with interval; the main one's mean and spread over seeds."""
    held_out, values, seconds = prepare(folder, recipe), [], []
    for seed in range(seeds):
        name = f"{recipe.task}-{seed}"
        seconds.append(train(folder, recipe, name, f"run.seed={seed}"))
        found = evaluate(folder, recipe, name, held_out)
        values.append(next(iter(found["metrics"].values())))
    return {
        "benchmark": "tasks", **found, "seconds": mean(seconds), "seeds": values,
        "mean": mean(values), "spread": stdev(values) if seeds > 1 else None,
    }  # fmt: skip


def pretraining(folder: Path, seeds: int) -> dict[str, Any]:
    """Accuracy of few labels, from scratch and after masked-LM pretraining on the texts of all."""
    recipe = RECIPES["classification"]
    held_out = prepare(folder, recipe)
    masked = Recipe("classification", "masked_lm", 64, 4096, 600, 32, 2e-3, BERT)
    train(folder, masked, "pretrained", "data.packing=best_fit")
    found: dict[str, list[float]] = {"scratch": [], "pretrained": []}
    for seed in range(seeds):
        for start, more in (("scratch", ()), ("pretrained", ("run.init_from=runs/pretrained",))):
            train(folder, recipe, f"{start}-{seed}", f"run.seed={seed}", *more)
            score = evaluate(folder, recipe, f"{start}-{seed}", held_out)
            found[start].append(score["metrics"]["accuracy"])
    return {"benchmark": "tasks", "task": "pretraining", **found}


def show(rows: Sequence[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="tasks, held out")
    for name in ("task", "metric", "value", "95 % interval", "baseline", "seconds"):
        table.add_column(name, justify="left" if name in ("task", "metric") else "right")
    for row in rows:
        if row["task"] == "pretraining":
            for start in ("scratch", "pretrained"):
                spread = f" +- {stdev(row[start]):.4f}" if len(row[start]) > 1 else ""
                table.add_row(f"classification, {start}", "accuracy", f"{mean(row[start]):.4f}{spread}")
            continue
        for name, value in row["metrics"].items():
            low, high = row["intervals"][name]
            cells = [f"{value:.4g}", f"{low:.4g} to {high:.4g}", f"{row['baseline'][name]:.4g}"]
            table.add_row(row["task"], name, *cells, f"{row['seconds']:.0f}")
    Console(width=None if Console().is_terminal else 110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tasks", nargs="*", default=[])
    parser.add_argument("--out", type=Path, help="folder for data and runs (default: a temporary one)")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of a task (default 1)")
    parser.add_argument("--json", action="store_true", help="print JSON lines instead of a table")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = (given.out or Path(scratch)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        rows = []
        for name in given.tasks or [*RECIPES, "pretraining"]:
            row = pretraining(folder, given.seeds) if name == "pretraining" else None
            row = row or measure(folder, RECIPES[name], given.seeds)
            rows.append(row | environment_row())
            if given.json:
                print(json.dumps(rows[-1]), flush=True)
    if not given.json:
        show(rows)


if __name__ == "__main__":
    main()
