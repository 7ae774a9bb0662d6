"""Each task on real data, test-sized: what two CPU cores learn in under three minutes, beside its baseline.

    python benchmarks/bench_tasks.py [TASK]... [--out FOLDER] [--seeds 1] [--results FILE.jsonl]
    python benchmarks/bench_tasks.py pretraining --seeds 3
    python benchmarks/bench_tasks.py --table FILE.jsonl

Data: benchmarks/task_data.py. A task is prepared, trained by `bigtfm train` and evaluated on held-out rows by
`bigtfm evaluate`. pretraining: classification by LABELLED reviews of films, from scratch, and from a run that
has learnt to classify other reviews, both fine-tuned alike; what they differ by over seeds.

What --out holds is not done again, so a benchmark that was stopped goes on. --results: the rows, a task's
new one instead of its old. --table: them as docs/tasks.md has them. seconds: of the clock, while training;
cpu_seconds: of all its processes, on all cores together.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from task_data import number_of, write

from bigtfm.bench.runner import environment_row

WITHOUT_DROPOUT = ("model.family=bert", "model.hidden_size=128", "model.num_layers=2")
BERT = (*WITHOUT_DROPOUT, "model.dropout=0.1")
GPT = ("model.family=gpt", "model.hidden_size=128", "model.num_layers=3")
PAIRS = ("model.family=encoder_decoder", "model.hidden_size=128", "model.num_layers=2", "model.dropout=0.1")
HEADS = "model.num_attention_heads=4"
LABELLED = 500  # rows that pretraining is fine-tuned on
TEXT = ("language_modelling", "masked_lm")  # learnt from text, not from rows


@dataclass(frozen=True)
class Recipe:
    """A task, test-sized."""

    task: str
    data: str  # for readers
    metrics: tuple[str, ...]  # that the table shows, the main one first
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
        Recipe("classification", "movie reviews", ("accuracy",), "classification", 64, 4096, 250, 32, 1e-3,
               BERT),
        Recipe("tagging", "sentences of CoNLL-2003's format", ("f1",), "tagging", 128, 1024, 150, 8, 1e-3,
               BERT),
        Recipe("relation_extraction", "WordNet's links in its glosses", ("f1",), "classification", 64, 4096,
               250, 32, 1e-3, BERT),
        Recipe("question_answering", "questions on entities", ("exact_match", "f1"), "question_answering",
               128, 1024, 200, 8, 1e-3, BERT),
        Recipe("translation", "LibreOffice's texts, English to Vietnamese",
               ("bits_per_byte", "chrf", "bleu"), "sequence_to_sequence", 64, 2048, 1000, 12, 2e-3, PAIRS,
               ("--max-new-tokens", "40", "--num-beams", "1")),
        Recipe("summarisation", "descriptions of Debian's packages", ("bits_per_byte", "rougeLsum"),
               "completion", 64, 4096, 700, 16, 2e-3, GPT, ("--max-new-tokens", "24", "--num-beams", "1")),
        Recipe("chat", "alpaca, identity, glaive", ("bits_per_byte", "chrf"), "completion", 256, 2048, 200, 8,
               2e-3, (*GPT, "model.dropout=0.1"), ("--max-new-tokens", "80", "--num-beams", "1")),
        Recipe("language_modelling", "addresses", ("bits_per_byte",), "causal_lm", 128, 2048, 150, 16, 2e-3,
               GPT),
        Recipe("masked_lm", "addresses", ("accuracy", "perplexity"), "masked_lm", 64, 512, 500, 32, 3e-3,
               WITHOUT_DROPOUT),
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


def prepare(folder: Path, recipe: Recipe, rows: Path | None = None, *more: str) -> Path:
    """Its data set, of the rows or else of all; returns the rows that are held out."""
    write(recipe.task, folder / "rows")
    found = folder / "rows" / recipe.task
    out = f"data/{recipe.task}{'' if rows is None else '-' + rows.stem}"
    if not (folder / out / "dataset.json").is_file():
        task = () if recipe.task in TEXT else ("--task", recipe.task, "--max-tokens", str(recipe.max_tokens))
        vocabulary = more or ("--vocab-size", str(recipe.vocab_size))
        rows = rows or found / "train.jsonl"
        bigtfm("prepare", *task, "--input", str(rows), "--out", out, *vocabulary, folder=folder)
    return found / "test.jsonl"


def train(folder: Path, recipe: Recipe, name: str, *overrides: str) -> dict[str, float]:
    """Trains a run; returns its seconds, those of the clock and of all cores."""
    began, used = time.monotonic(), _used()
    packing = () if recipe.task in TEXT else ("data.packing=best_fit",)
    bigtfm(
        "train", "--deepspeed_config", deepspeed_json(folder, recipe), *recipe.model, HEADS,
        f"model.max_seq_len={recipe.max_tokens}", f"objective.kind={recipe.objective}",
        f"data.path=data/{recipe.task}", *packing, f"run.name={name}", "track.mlflow=false",
        "save.every=0", f"eval.every={recipe.steps}", *overrides, folder=folder,
    )  # fmt: skip
    return {"seconds": time.monotonic() - began, "cpu_seconds": _used() - used}


def _used() -> float:
    """User and system seconds of the processes that have been waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def learn(folder: Path, recipe: Recipe, name: str, held_out: Path, *overrides: str) -> dict[str, Any]:
    """Trains and evaluates, unless that has been done."""
    kept = folder / "found" / f"{name}.json"
    if not kept.is_file():
        times = train(folder, recipe, name, *overrides)
        arguments = ("evaluate", "--run", f"runs/{name}", "--data", str(held_out), "--json")
        found = json.loads(bigtfm(*arguments, *recipe.evaluate, folder=folder))
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(json.dumps(found | times | environment_row()))
    return dict(json.loads(kept.read_text()))


def measure(folder: Path, recipe: Recipe, seeds: int) -> dict[str, Any]:
    """One task: its metrics, of the first seed with interval; the main one's mean and spread over seeds."""
    held_out = prepare(folder, recipe)
    found = [
        learn(folder, recipe, f"{recipe.task}-{seed}", held_out, f"run.seed={seed}") for seed in range(seeds)
    ]
    values = [one["metrics"][recipe.metrics[0]] for one in found]
    rows = (folder / "rows" / recipe.task / "train.jsonl").read_text().count("\n")
    return {
        "benchmark": "tasks", "data": recipe.data, "rows": rows, **found[0], "seeds": values,
        "shown": recipe.metrics, "mean": mean(values), "spread": stdev(values) if seeds > 1 else None,
    }  # fmt: skip


def pretraining(folder: Path, seeds: int) -> dict[str, Any]:
    """Accuracy of few labels, from scratch and after other reviews' (Phang et al. 2018)."""
    whole = RECIPES["classification"]
    held_out = prepare(folder, whole)
    few = folder / "rows/classification/few.jsonl"
    labelled = sorted((few.parent / "train.jsonl").read_text().splitlines(True), key=number_of)
    few.write_text("".join(labelled[:LABELLED]))
    write("other_reviews", folder / "rows")
    other = folder / "rows/other_reviews/train.jsonl"
    for rows in (few, other):
        prepare(folder, whole, rows, "--tokenizer", "data/classification/tokenizer")
    kept = folder / "found/pretrained.json"
    if not kept.is_file():
        first = replace(whole, steps=150)
        times = train(folder, first, "pretrained", "data.path=data/classification-train")
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(json.dumps(times))
    tuned = replace(whole, steps=100, batch=16, lr=1e-3)
    row: dict[str, Any] = {"benchmark": "tasks", "task": "pretraining", "labelled": LABELLED}
    row["other"] = other.read_text().count("\n")
    for start, more in (("scratch", ()), ("pretrained", ("run.init_from=runs/pretrained",))):
        found = [
            learn(folder, tuned, f"{start}-{seed}", held_out, "data.path=data/classification-few",
                  f"run.seed={seed}", *more)
            for seed in range(seeds)
        ]  # fmt: skip
        row |= {start: [one["metrics"]["accuracy"] for one in found], **environment_row()}
        row[f"{start}_cpu_seconds"] = mean(one["cpu_seconds"] for one in found)
        row["baseline"] = found[0]["baseline"]["accuracy"]
    row["pretraining_cpu_seconds"] = json.loads(kept.read_text())["cpu_seconds"]
    differences = [b - a for a, b in zip(row["scratch"], row["pretrained"], strict=True)]
    return row | {"gain": mean(differences), "spread": stdev(differences) if seeds > 1 else None}


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The rows as docs/tasks.md has them, in Markdown."""
    order = {task: number for number, task in enumerate(RECIPES)}
    lines = [
        "| task, data | metric | value | 95 % interval | without a model | CPU seconds of training |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted((row for row in rows if row["task"] in RECIPES), key=lambda row: order[row["task"]]):
        first = (
            f"{row['task'].replace('_', ' ')}: {row['rows']:,} {row['data']}",
            f"{row['cpu_seconds']:.0f}",
        )
        for name in row["shown"]:
            value, without = _figure(row["metrics"][name]), _figure(row["baseline"][name])
            cells = [first[0], name.replace("_", " "), value, _interval(row["intervals"][name])]
            cells += [f"{without} ({_interval(row['baseline_intervals'][name])})", first[1]]
            lines.append(f"| {' | '.join(cells)} |")
            first = ("", "")
    return lines + [line for row in rows if row["task"] == "pretraining" for line in _pretraining(row)]


def _pretraining(row: dict[str, Any]) -> list[str]:
    lines = [
        "",
        f"| classification by {row['labelled']} labelled reviews | accuracy of each seed | mean | spread |",
        "|---|---|---|---|",
    ]
    gains = [after - before for before, after in zip(row["scratch"], row["pretrained"], strict=True)]
    kinds = (
        ("from scratch", row["scratch"]),
        (f"pretrained on {row['other']:,} other reviews", row["pretrained"]),
        ("gain", gains),
    )
    for name, values in kinds:
        each = ", ".join(map(_figure, values))
        lines.append(f"| {name} | {each} | {_figure(mean(values))} | {_figure(stdev(values))} |")
    return lines


def _interval(ends: Sequence[float]) -> str:
    return f"{_figure(ends[0])} to {_figure(ends[1])}"


def _figure(value: float) -> str:
    return f"{value:.3f}" if value < 9.95 else f"{value:.1f}"


def keep(path: Path, row: dict[str, Any]) -> None:
    """The row in the file, instead of the one of its task."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    by_task = {one["task"]: one for one in rows} | {row["task"]: row}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in by_task.values()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tasks", nargs="*", default=[], choices=[[], *RECIPES, "pretraining"])
    parser.add_argument("--out", type=Path, help="folder for data and runs (default: a temporary one)")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of a task (default 1)")
    parser.add_argument("--results", type=Path, help="file for the rows (default: printed alone)")
    parser.add_argument("--table", type=Path, help="print a file's rows as a table, and train nothing")
    given = parser.parse_args()
    if given.table:
        print("\n".join(table([json.loads(line) for line in given.table.read_text().splitlines()])))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = (given.out or Path(scratch)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        for name in given.tasks or [*RECIPES, "pretraining"]:
            if name == "pretraining":
                row = pretraining(folder, given.seeds)
            else:
                row = measure(folder, RECIPES[name], given.seeds)
            print(json.dumps(row), flush=True)
            if given.results:
                keep(given.results, row)


if __name__ == "__main__":
    main()
