"""The same loss, whatever you change: bigtfm and raw DeepSpeed against plain torch.

    python benchmarks/parity.py [--quick] [--json | --markdown]

One recipe (8 sequences a step, AdamW, clipping, 5 steps), split in every way: ZeRO stage, ranks,
accumulation (and so the micro-batch), recomputation. Documents differ much in length, so micro-batches
differ in their labels. Each split is trained by bigtfm, and by DeepSpeed the way its users do it
(raw_deepspeed.py), with the same model, initial weights and batches. Both are compared with the oracle
(plain_torch.py): the largest relative difference of losses, gradient norms and final weights. Goal: 1e-5.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import random
import socket
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tensors are tiny: two threads take ten times as long as one

import numpy as np
from plain_torch import Trained, difference, read_run, train_plainly
from rich import box
from rich.console import Console
from rich.table import Table

from bigtfm.config.launch import Launch
from bigtfm.config.problems import Problem
from bigtfm.data.best_fit import pack
from bigtfm.data.prepare import prepare
from bigtfm.environment import environment
from bigtfm.job import check_job

GOAL = 1e-5
STEPS, GLOBAL_BATCH = 5, 8
STAGES, RANKS, ACCUMULATIONS = (0, 1, 2, 3), (1, 2), (1, 2, 4)
TINY = (
    "model.hidden_size=32", "model.num_layers=2", "model.num_attention_heads=2", "model.max_seq_len=32",
    "model.init_std=0.1", "track.mlflow=false", "eval.every=0", "eval.tokens=512", "save.every=0",
    f"steps={STEPS}",
)  # fmt: skip
TASKS = {
    "causal_lm": (),
    "causal_lm, biases": (  # GPT-2's blocks, but for the bias of keys, whose gradient is 0
        "model.bias=true", "model.qkv_bias=false", "model.norm=layernorm", "model.activation=gelu",
    ),
    "causal_lm, best fit": ("data.packing=best_fit",),
    "masked_lm": ("model.family=bert",),
    "span_corruption": ("model.family=encoder_decoder",),
}  # fmt: skip
RECIPE: dict[str, Any] = {
    "train_batch_size": GLOBAL_BATCH,
    "optimizer": {  # Llama 2's (Touvron et al. 2023). A smaller eps makes updates out of gradients that are
        "type": "AdamW",  # rounding and no more: with 1e-8 plain torch is 4e-5 from itself
        "params": {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-5, "weight_decay": 0.1},
    },
    "gradient_clipping": 1.0,
}
MUON = {"optimizer": {"type": "Muon", "params": {"lr": 1e-2}}}
LAMB = {"optimizer": {"type": "Lamb", "params": {"lr": 1e-2}}}
REFUSED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {  # changes of the recipe, overrides
    "Lamb, stage 1": (LAMB | {"zero_optimization": {"stage": 1}}, ()),
    "Lamb, stage 3": (LAMB | {"zero_optimization": {"stage": 3}}, ()),
    "Muon, stage 1": (MUON | {"zero_optimization": {"stage": 1}, "gradient_clipping": 0}, ()),
    "Muon, stage 2": (MUON | {"zero_optimization": {"stage": 2}, "gradient_clipping": 0}, ()),
    "Muon, stage 3, reduce_scatter": (MUON | {"zero_optimization": {"stage": 3}, "gradient_clipping": 0}, ()),
    "Muon, stage 3, clipping": (MUON | {"zero_optimization": {"stage": 3, "reduce_scatter": False}}, ()),
    "selective recomputation, stage 3, memory_efficient_linear": (
        {"zero_optimization": {"stage": 3, "memory_efficient_linear": True}},
        ("recompute=selective", "model.bias=true"),
    ),
    "selective recomputation, compiled blocks": ({}, ("recompute=selective", "compile_blocks=true")),
    "attention dropout, fused attention": ({}, ("model.attention_dropout=0.1", "compute.attention=sdpa")),
    "gradients summed over ranks in bf16": ({"communication_data_type": "bf16"}, ()),
    "DeepSpeed's own recomputation": ({"activation_checkpointing": {"partition_activations": True}}, ()),
}


class Cell(NamedTuple):
    """One way to split the recipe."""

    task: str
    stage: int
    ranks: int
    accumulation: int
    recompute: str

    @property
    def name(self) -> str:
        return "-".join(map(str, self)).replace(", ", "-").replace(" ", "-")

    @property
    def deepspeed_json(self) -> dict[str, Any]:
        split = {"gradient_accumulation_steps": self.accumulation}
        return RECIPE | split | {"zero_optimization": {"stage": self.stage}}


def cells() -> list[Cell]:
    """The whole cross product for causal_lm, a slice of it for the rest."""
    splits = list(itertools.product(STAGES, RANKS, ACCUMULATIONS))
    return [
        *(Cell("causal_lm", *split, recompute) for split in splits for recompute in ("none", "full")),
        *(Cell("causal_lm, biases", stage, 2, 2, "selective") for stage in STAGES),
        *(
            Cell(task, stage, ranks, 2 * ranks, "none" if ranks == 1 else "full")
            for task in ("causal_lm, best fit", "masked_lm", "span_corruption")
            for stage in STAGES
            for ranks in RANKS
        ),
    ]


def make_data(folder: Path) -> Path:
    """Documents of a few to hundreds of words, and runs of words that are a document each."""
    corpus = Path(sys.modules["bigtfm"].__path__[0]) / "data/corpus/state_of_the_union.jsonl"
    draw = random.Random(0)
    with (folder / "ragged.jsonl").open("w", encoding="utf-8") as file:
        for line in corpus.read_text(encoding="utf-8").splitlines()[:20]:
            words = json.loads(line)["text"].split()[:3000]
            while words:
                count = round(10 ** draw.uniform(0.3, 2.8))
                short = [word for word in words[:count] if len(word) < 3]
                texts = [" ".join(words[:count]), *short[: draw.randrange(40)]]
                words = words[count:]
                file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    prepare([str(folder / "ragged.jsonl")], folder / "tokens", vocab_size=512, workers=1, progress=False)
    pack(folder / "tokens", seq_len=32)
    return folder / "tokens"


def arguments_of(cell: Cell, data: Path, folder: Path) -> list[str]:
    """The DeepSpeed JSON, written to `folder`, and the overrides of the run config."""
    path = folder / f"{cell.name}.json"
    path.write_text(json.dumps(cell.deepspeed_json), encoding="utf-8")
    named = (f"run.name={cell.name}", f"run.dir={folder}", f"data.path={data}", f"recompute={cell.recompute}")
    return [str(path), *TINY, *named, *TASKS[cell.task]]


def oracles(data: Path, folder: Path) -> dict[str, tuple[Trained, Trained]]:
    """What plain torch makes of each task: batches whole, and summed up sequence by sequence."""
    found = {}
    for task in TASKS:
        path, *overrides = arguments_of(Cell(task, 0, 1, 1, "none"), data, folder)
        job = check_job(None, Path(path), overrides, world_size=1)
        found[task] = (train_plainly(job), train_plainly(job, parts=GLOBAL_BATCH))
    return found


def refusals(data: Path, folder: Path) -> dict[str, str]:
    """The line with which each pair is refused that would break the promise.

    Raises:
        AssertionError: one of them is not refused.
    """
    lines = {}
    for number, (pair, (changes, overrides)) in enumerate(REFUSED.items()):
        path = folder / f"refused-{number}.json"
        path.write_text(json.dumps(RECIPE | changes), encoding="utf-8")
        try:
            _ = check_job(None, path, [*TINY, f"data.path={data}", *overrides], world_size=1).attention
        except Problem as problem:
            lines[pair] = str(problem).replace(str(path), "DeepSpeed JSON")
        assert pair in lines, f"{pair} is not refused"
    return lines


def train_all(jobs: list[list[str]], folder: Path, world_size: int) -> list[Trained]:
    """Trains every job twice: by bigtfm into its run directory; what raw DeepSpeed comes to is returned."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with ProcessPoolExecutor(world_size, multiprocessing.get_context("spawn")) as pool:
        ranks = [pool.submit(_rank, rank, world_size, port, jobs, folder) for rank in range(world_size)]
        first, *_ = [rank.result() for rank in ranks]
        return first


def _rank(rank: int, world_size: int, port: int, jobs: list[list[str]], folder: Path) -> list[Trained]:
    """One rank of all jobs; what it prints goes to a file."""
    from raw_deepspeed import train_raw

    from bigtfm.engine import distributed
    from bigtfm.train import train

    output = os.open(folder / f"ranks-{world_size}-{rank}.out", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    launch = Launch.from_environment(os.environ)
    ranks = distributed.start(launch)
    raw = []
    for path, *overrides in jobs:
        job = check_job(None, Path(path), overrides, world_size)
        train(job, launch, ranks)
        raw.append(train_raw(job, ranks))
    ranks.close()
    return raw


def measure(wanted: list[Cell], folder: Path) -> dict[str, Any]:
    """How far bigtfm and raw DeepSpeed are from the oracle in each cell, and how far torch is from itself."""
    data = make_data(folder)
    expected = oracles(data, folder)
    raw: dict[Cell, Trained] = {}
    for ranks in RANKS:
        some = [cell for cell in wanted if cell.ranks == ranks]
        jobs = [arguments_of(cell, data, folder) for cell in some]
        print(f"{len(some)} cells on {ranks} rank(s) ...", file=sys.stderr)
        raw |= zip(some, train_all(jobs, folder, ranks), strict=True)
    rows = []
    for cell in wanted:
        sides = {"bigtfm": read_run(folder / cell.name), "deepspeed": raw[cell]}
        found = {side: difference(trained, expected[cell.task][0]) for side, trained in sides.items()}
        rows.append(cell._asdict() | {side: vars(far) | {"worst": far.worst} for side, far in found.items()})
    floors = {task: vars(difference(split, whole)) for task, (whole, split) in expected.items()}
    return {
        "benchmark": "parity", "goal": GOAL, "steps": STEPS, "cells": rows, "torch_itself": floors,
        "worst": {side: summary(rows, side) for side in ("bigtfm", "deepspeed")},
        "refused": refusals(data, folder),
        "hardware": f"{len(os.sched_getaffinity(0))} CPU cores", **environment(),
    }  # fmt: skip


def summary(rows: list[dict[str, Any]], side: str) -> dict[str, float]:
    """The worst of all cells, NaN if there is one."""
    measures = ("loss", "grad_norm", "weights", "worst")
    return {name: float(np.max([row[side][name] or 0.0 for row in rows])) for name in measures}


def show(result: dict[str, Any], console: Console, markdown: bool) -> None:
    style = box.MARKDOWN if markdown else box.SIMPLE_HEAD
    rows = result["cells"]
    splits = list(itertools.product(ACCUMULATIONS, ("none", "full")))
    table = Table("stage", "ranks", box=style, title="causal_lm: bigtfm / raw DeepSpeed")
    for accumulation, recompute in splits:
        table.add_column(f"accum. {accumulation}" + (", recomputed" if recompute == "full" else ""))
    by_cell = {Cell(*(row[name] for name in Cell._fields)): row for row in rows}
    for stage, ranks in sorted({(row["stage"], row["ranks"]) for row in rows}):
        found = [by_cell.get(Cell("causal_lm", stage, ranks, *split)) for split in splits]
        table.add_row(str(stage), str(ranks), *map(_pair, found))
    console.print(table)
    others = Table("task", "stage", "ranks", "accum.", "recompute", "bigtfm / raw DeepSpeed", box=style)
    for cell, row in by_cell.items():
        if cell.task != "causal_lm":
            others.add_row(*map(str, cell), _pair(row))
    console.print(others)
    worst = Table("worst of all cells", "loss", "gradient norm", "weights", box=style)
    floors = result["torch_itself"].values()
    itself = {name: max(floor[name] for floor in floors) for name in ("loss", "grad_norm", "weights")}
    sides = {**result["worst"], "plain torch, sequence by sequence": itself}
    for side, far in sides.items():
        worst.add_row(side, *(f"{far[name]:.1e}" for name in itself))
    ours, theirs = (result["worst"][side] for side in ("bigtfm", "deepspeed"))
    worst.add_row("deepspeed / bigtfm", *(f"{theirs[name] / ours[name]:,.0f}" for name in itself))
    console.print(worst)
    refused = Table("refused instead", "the line", box=style)
    for pair, line in result["refused"].items():
        refused.add_row(pair, line.removeprefix("error: "))
    console.print(refused)


def _pair(row: dict[str, Any] | None) -> str:
    return f"{row['bigtfm']['worst']:.0e} / {row['deepspeed']['worst']:.0e}" if row else ""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="every seventh cell")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(cells()[:: 7 if arguments.quick else 1], Path(folder))
    if arguments.json:
        print(json.dumps(result))
    else:
        show(result, Console(width=1000 if arguments.markdown else None), arguments.markdown)
    sys.exit(0 if result["worst"]["bigtfm"]["worst"] <= GOAL else 1)


if __name__ == "__main__":
    main()
