"""The planner against what happens: memory and time of a step, planned beside measured, on this CPU.

    python benchmarks/bench_planner.py [--json] [--out FOLDER] [--what memory,time,search] [--repeats 2]

Memory: the bytes of live tensors in the real training loop (bigtfm/bench/memory.py), the largest over two
ranks, of configurations that differ in stage, batch, sequence, recomputation, family, precision and in what
the peak is made of. A "fits" is false where the planned peak and the reserve for fragmentation are less than
what was measured. Time: the rates are fitted to the calibration's trainings (bigtfm/bench/calibrate.py), then
other configurations are planned with them; both are measured in turns, and of each the fastest run counts.
Search: the fastest configuration of a grid, all of it measured in the same manner, against the best of the
few that the planner would try.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from goals import PLANNER, of_planner

from bigtfm.bench.calibrate import MEASURE, fit_rows, setting_of_job, setting_of_row, sweep
from bigtfm.bench.matrix import Cell, Matrix
from bigtfm.bench.results import RESULTS, read_results, read_rows, rewrite, together
from bigtfm.bench.runner import environment_row, run_matrix
from bigtfm.job import check_job
from bigtfm.plan.job import FRAGMENTATION, runs_of
from bigtfm.planner.memory import plan_memory
from bigtfm.planner.step_time import Rates, plan_step

RANKS = 2
ADAMW = {"type": "AdamW", "params": {"lr": 1e-3}}
FIXED = (
    "steps=6", "track.mlflow=false", "eval.every=0", "eval.tokens=128", "save.every=0",
    "guard.replicas_every=0",
)  # fmt: skip

Row = dict[str, Any]


def configurations() -> Iterator[tuple[str, dict[str, Any], list[str]]]:
    """(name, changes of the DeepSpeed JSON, overrides)."""

    def of(
        name: str, stage: int, *overrides: str, micro: int = 4, accumulation: int = 1, hidden: int = 192,
        layers: int = 4, seq_len: int = 128, zero: dict[str, Any] | None = None, **changes: Any,
    ) -> tuple[str, dict[str, Any], list[str]]:  # fmt: skip
        bucket = {"stage": stage, "reduce_bucket_size": 1_000_000} | (zero or {})
        batch = {"train_batch_size": micro * accumulation * RANKS, "train_micro_batch_size_per_gpu": micro}
        shape = [f"model.hidden_size={hidden}", f"model.num_layers={layers}", f"model.max_seq_len={seq_len}"]
        return (
            name,
            {"optimizer": ADAMW, "zero_optimization": bucket, **batch, **changes},
            [*shape, *overrides],
        )

    bf16: dict[str, Any] = {"bf16": {"enabled": True}}
    small: dict[str, Any] = {"hidden": 96, "layers": 3, "seq_len": 64, "micro": 2}
    yield from (of(f"stage {stage}", stage) for stage in range(4))
    yield of("stage 1, accumulation 2", 1, accumulation=2)
    yield of("stage 2, accumulation 2", 2, accumulation=2)
    for recompute in ("full", "selective", "2"):
        yield of(f"stage 2, recompute {recompute}", 2, f"compute.recompute={recompute}")
    yield of("stage 3, recompute full", 3, "compute.recompute=full", micro=8)
    yield of("large logits", 1, "model.vocab_size=16384", layers=2)
    yield of("large model, few tokens, stage 0", 0, hidden=384, seq_len=32)
    yield of("large model, few tokens, stage 3", 3, hidden=384, seq_len=32)
    yield of("long sequence", 2, seq_len=512, micro=2)
    yield of("grouped queries, untied, stage 3", 3, "model.num_kv_heads=2", "model.tied_embeddings=false")
    gpt2 = ("norm=layernorm", "positions=learned", "activation=gelu", "bias=true", "dropout=0.1")
    yield of("gpt-2 with dropout", 2, *(f"model.{each}" for each in gpt2))
    yield of("bert", 2, "model.family=bert", micro=8)
    yield of("encoder_decoder", 1, "model.family=encoder_decoder", layers=3)
    yield of("t5's positions", 2, "model.family=encoder_decoder", "model.positions=relative", layers=2)
    yield of("short documents", 2, "documents=short", micro=8)
    yield of("whole bucket by default", 2, zero={"reduce_bucket_size": 500_000_000})
    adapted = "tune.lora_rank=8"
    for stage in (0, 2, 3):
        yield of(f"adapters, stage {stage}", stage, adapted, hidden=384, seq_len=32)
    yield of(
        "adapters of attention, recompute full",
        2,
        adapted,
        "tune.lora_on=attention",
        "compute.recompute=full",
    )
    yield of("bf16, adapters", 2, adapted, **small, **bf16)
    yield of("bf16, stage 0", 0, **small, **bf16)
    yield of("bf16, stage 2, fp32 sums", 2, **small, **bf16, data_types={"grad_accum_dtype": "fp32"})
    yield of("bf16, stage 3", 3, **small, **bf16)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print JSON lines instead of tables")
    parser.add_argument("--out", type=Path, help=f"folder for {PLANNER}; what it has is not measured again")
    parser.add_argument("--what", default="memory,time,search", help="comma-separated (default: all)")
    parser.add_argument("--repeats", type=int, default=2, help="runs of a timed configuration (default 2)")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        measure_memory(arguments.rank)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.out or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        about, path = environment_row(), folder / PLANNER
        for what in arguments.what.split(","):
            kept = read_rows(path)
            rows = [row for row in kept if row["what"] == what]
            if not rows:
                made = {"memory": memory_rows, "time": time_rows, "search": search_rows}[what]
                rows = [row | about for row in made(folder, arguments.repeats)]
                rewrite(path, [*kept, *rows])
            if arguments.json:
                print("\n".join(map(json.dumps, rows)))
            else:
                show(what, rows)


def data_sets(folder: Path) -> dict[str, Path]:
    """The embedded text as documents of some pages, and of a few sentences."""
    from bigtfm.data.prepare import prepare

    corpus = Path(__file__).parent.parent / "bigtfm/data/corpus/state_of_the_union.jsonl"
    texts = [json.loads(line)["text"] for line in corpus.read_text(encoding="utf-8").splitlines()][:4]
    found = {}
    for name, size in (("long", 10**7), ("short", 300)):
        text, out = folder / f"{name}.txt", folder / name
        if not out.exists():
            text.write_text("\n\n".join(texts), encoding="utf-8")
            prepare(
                [str(text)], str(out), vocab_size=1000, document_bytes=size, workers=1, progress=False,
                validation_fraction=0.1 if name == "short" else 0.0,
            )  # fmt: skip
        found[name] = out
    return found


def memory_rows(folder: Path, _: int) -> list[Row]:
    """A training of each configuration on two ranks, all in the same processes."""
    work = folder / "memory"
    shutil.rmtree(work, ignore_errors=True)  # of a benchmark that was stopped
    work.mkdir()
    data, jobs = data_sets(folder), []
    for number, (name, values, overrides) in enumerate(configurations()):
        path = work / f"{number}.json"
        path.write_text(json.dumps(values), encoding="utf-8")
        documents = "short" if "documents=short" in overrides else "long"
        kept = [each for each in overrides if not each.startswith("documents=")]
        place = [f"data.path={data[documents]}", f"run.dir={work}", f"run.name=run-{number}"]
        jobs.append([name, str(path), *FIXED, *place, *kept])
    (work / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    start_ranks(work / "jobs.json")
    measured = [json.loads(line) for line in (work / "measured.jsonl").read_text().splitlines()]
    return [compared(job, found) for job, found in zip(jobs, measured, strict=True)]


def compared(job: list[str], measured: Row) -> Row:
    """A configuration's row: planned beside measured."""
    name, path, *overrides = job
    checked = check_job(None, Path(path), overrides, RANKS)
    setting = setting_of_job(checked, runs=runs_of(checked.run, checked.resolved.micro_batch))
    plan = plan_memory(setting)
    row: Row = {"benchmark": "planner", "what": "memory", "name": name, "moment": plan.moment}
    pairs = {"states": plan.states, "activations": plan.kept, "peak": plan.peak}
    for key, planned in pairs.items():
        row |= {key: planned, f"{key}_measured": measured[key], f"{key}_error": planned / measured[key] - 1}
    row["planned"] = {each: getattr(plan, each) for each in measured["at_peak"]}
    row["measured"] = measured["at_peak"]
    row["false_fit"] = plan.peak * (1 + FRAGMENTATION) < measured["peak"]
    return row


def start_ranks(jobs: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    place = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, __file__, "--rank", str(jobs)]
    logs = [jobs.parent / f"rank-{rank}.log" for rank in range(RANKS)]
    ranks = []
    for rank, log in enumerate(logs):
        environ = os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with log.open("wb") as output:
            ranks.append(subprocess.Popen(command, env=environ, stdout=output, stderr=subprocess.STDOUT))
    if any([rank.wait() for rank in ranks]):
        raise SystemExit(f"a rank failed: {logs[0].read_text()[-3000:]}")


def measure_memory(jobs: Path) -> None:
    """A rank: trains each job, counting; rank 0 writes the largest over the ranks."""
    from dataclasses import replace

    from bigtfm import recorder
    from bigtfm.bench.memory import LiveBytes
    from bigtfm.config.launch import Launch
    from bigtfm.engine import distributed
    from bigtfm.train import train

    recorder.plot_curve = lambda run_dir: run_dir / "curve.png"
    recorder.peak_flops = lambda *_: None
    launch, ranks = Launch.from_environment(os.environ, None), None
    (jobs.parent / "measured.jsonl").unlink(missing_ok=True)
    for _, path, *overrides in json.loads(jobs.read_text()):
        job = check_job(None, Path(path), overrides, launch.world_size)
        counter = LiveBytes((job.resolved.vocab_size, job.resolved.padded_vocab_size))
        ranks = ranks or distributed.start(launch)
        ranks = replace(ranks, pulse=counter.pulse)
        with counter:
            train(job, launch, ranks)
        result = counter.result
        found = {
            "states": sum(result.states[name] for name in ("weights", "gradients", "optimizer")),
            "activations": result.kept["activations"] + result.kept["logits"],
            "peak": result.peak,
        }
        every = ranks.gather(found | {"at_peak": result.at_peak})
        if launch.rank == 0:
            largest = max(every, key=lambda each: each["peak"])
            line = {key: max(each[key] for each in every) for key in found} | {"at_peak": largest["at_peak"]}
            with (jobs.parent / "measured.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
    if ranks is not None:
        ranks.close()


def held_out() -> Iterator[tuple[str, Cell]]:
    """Configurations that no rate was fitted to."""

    def cell(hidden: int, layers: int, seq_len: int, micro_batch: int, stage: int, **more: Any) -> Cell:
        shape = [f"model.hidden_size={hidden}", f"model.num_layers={layers}"]
        shape += [f"model.num_attention_heads={hidden // 32}", f"model.max_seq_len={seq_len}"]
        overrides = (*shape, *more.pop("overrides", ()))
        bucket = {"zero_optimization": {"reduce_bucket_size": 50_000_000}}
        axes = {"zero_stage": stage, "ranks": RANKS, "micro_batch": micro_batch, **more}
        return Cell.model_validate({"overrides": overrides, "deepspeed": bucket, **axes})

    for each in (
        cell(192, 6, 128, 4, 0), cell(192, 4, 128, 8, 1), cell(256, 4, 128, 4, 2), cell(256, 3, 128, 8, 3),
        cell(128, 4, 256, 4, 0), cell(160, 5, 128, 8, 2), cell(384, 3, 64, 8, 1), cell(96, 6, 128, 8, 3),
        cell(192, 4, 128, 8, 2, recompute="full"), cell(192, 4, 64, 4, 2, accumulation=4),
        cell(192, 3, 128, 8, 1, overrides=("model.vocab_size=8192",)), cell(320, 2, 128, 8, 0),
    ):  # fmt: skip
        yield "held out", each


def calibrated(folder: Path, cells: Iterable[tuple[str, Cell]], repeats: int) -> Rates:
    """Measures the cells that are not measured yet, in turns; rates by those of the calibration."""
    measure = MEASURE.model_copy(update={"repeats": repeats})
    matrix = Matrix(Path("planner"), "planner", "data/quickstart", measure, tuple(cells))
    for row in run_matrix(matrix, folder / "time"):
        if row["status"] != "ok":
            raise SystemExit(f"{row['key']}: {row['status']}: {row['why']}")
    rows = fastest(read_results(folder / "time" / RESULTS))
    return fit_rows([row for row in rows if row["grid"] == "calibration"], folder / "time")


def time_rows(folder: Path, repeats: int) -> list[Row]:
    """The calibration's trainings and others in turns; a row for each of the others."""
    rates = calibrated(folder, (*sweep(RANKS, "fp32"), *held_out()), repeats)
    rows = fastest(read_results(folder / "time" / RESULTS))
    found = []
    for result in together([row for row in rows if row["grid"] == "held out"]):
        step = plan_step(setting_of_row(result.first, folder / "time"), rates)
        measured = result.seconds.median
        found.append(
            {
                "benchmark": "planner", "what": "time", "name": result.label, "seconds": step.seconds,
                "seconds_measured": measured, "noise": result.noise,
                "seconds_error": step.seconds / measured - 1, "split": step.split,
            }
        )  # fmt: skip
    return found


def fastest(rows: list[Row]) -> list[Row]:
    """Of each configuration the fastest run: others may use the cores, too."""
    found: dict[str, Row] = {}
    for row in rows:
        best = found.setdefault(row["key"], row)
        if median(row["seconds"]) < median(best["seconds"]):
            found[row["key"]] = row
    return list(found.values())


def search_rows(folder: Path, repeats: int) -> list[Row]:
    """The whole grid, measured; the best of the third that the planner ranks first, against its best."""
    sizes, recomputes = (2, 4, 8), ("none", "full")
    cells = [
        Cell(zero_stage=stage, ranks=RANKS, micro_batch=size, accumulation=16 // size, recompute=recompute,
             deepspeed={"zero_optimization": {"reduce_bucket_size": 5_000_000}})
        for stage in (0, 1, 2, 3) for size in sizes for recompute in recomputes
    ]  # fmt: skip
    measure = MEASURE.model_copy(update={"steps": 3, "warm_up": 2, "repeats": repeats})
    matrix = Matrix(
        Path("search"), "search", "data/quickstart", measure, tuple(("search", each) for each in cells)
    )
    for _ in run_matrix(matrix, folder / "search"):
        pass
    rows = fastest([row for row in read_results(folder / "search" / RESULTS) if row["status"] == "ok"])
    rates = calibrated(folder, sweep(RANKS, "fp32"), repeats)
    planned = {row["key"]: plan_step(setting_of_row(row, folder / "search"), rates).seconds for row in rows}
    ranked = sorted(rows, key=lambda row: planned[row["key"]])
    tried = ranked[: len(ranked) // 3]
    speeds = [row["tokens_per_second"]["median"] for row in rows]
    best = max(row["tokens_per_second"]["median"] for row in tried)
    return [
        {
            "benchmark": "planner", "what": "search", "name": f"best of {len(tried)} of {len(rows)} trials",
            "share": best / max(speeds),
            "first_choice": ranked[0]["tokens_per_second"]["median"] / max(speeds),
            "chosen": together(tried)[0].label,
        }
    ]  # fmt: skip


def show(what: str, rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=what, caption="\n".join(map(str, of_planner(rows))), caption_justify="left")
    if what == "memory":
        for name in (
            "configuration",
            "states",
            "activations",
            "peak, planned MB",
            "measured",
            "error",
            "in the",
        ):
            table.add_column(name, justify="left" if name in ("configuration", "in the") else "right")
        for row in rows:
            errors = (f"{row[f'{key}_error']:+.2%}" for key in ("states", "activations"))
            peaks = (f"{row[key] / 1e6:,.2f}" for key in ("peak", "peak_measured"))
            table.add_row(
                row["name"], *errors, *peaks, f"{row['peak_error']:+.2%}", row["moment"].split(" of")[0]
            )
    elif what == "time":
        for name in ("configuration", "planned s", "measured", "error", "noise"):
            table.add_column(name, justify="left" if name == "configuration" else "right")
        for row in rows:
            seconds = (f"{row[key]:.3f}" for key in ("seconds", "seconds_measured"))
            table.add_row(row["name"], *seconds, f"{row['seconds_error']:+.1%}", f"{row['noise']:.1%}")
    else:
        for name in ("trials", "of the grid's best", "the first choice alone"):
            table.add_column(name)
        for row in rows:
            table.add_row(row["name"], f"{row['share']:.1%}", f"{row['first_choice']:.1%}")
    Console(width=None if Console().is_terminal else 130).print(table)


if __name__ == "__main__":
    main()
