"""What compression costs and gives: every method of `bigtfm compress`, fine-tuning, and distillation.

    python benchmarks/bench_compress.py --out FOLDER [--data data/quickstart] [--steps 400] [--seeds 3]

Trains the quickstart's GPT, compresses it by every method, trains what was pruned on (and, as a control, the
whole model for as long), and trains a model of half its size with each seed alone and with the first as its
teacher: the same data, order, steps and initial weights. One process. What is in FOLDER is not done again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

HALF = ("model.hidden_size=128", "model.num_attention_heads=4")  # 0.52 of the quickstart's parameters
METHODS = {
    "int8": ("--method", "int8"),
    "int8-dynamic": ("--method", "int8-dynamic"),
    "int4": ("--method", "int4"),
    "int4-g32": ("--method", "int4", "--group-size", "32"),
    "magnitude-50": ("--method", "magnitude", "--share", "0.5"),
    "magnitude-80": ("--method", "magnitude", "--share", "0.8"),
    "2of4": ("--method", "2:4"),
    "heads-33": ("--method", "heads", "--share", "0.34"),
}
TUNED = ("magnitude-50", "magnitude-80", "2of4", "heads-33")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--data", type=Path, default=Path("data/quickstart"), help="what `prepare` wrote")
    parser.add_argument("--steps", type=int, default=400, help="of a training; default 400")
    parser.add_argument("--tune", type=int, default=100, help="steps of fine-tuning; default 100")
    parser.add_argument("--student-steps", type=int, default=400, help="of a student; default 400")
    parser.add_argument("--seeds", type=int, default=3, help="of the distillation; default 3")
    parser.add_argument("--weight", type=float, default=0.9, help="distill.weight; default 0.9")
    parser.add_argument("--temperature", type=float, default=1.0, help="distill.temperature; default 1")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    bench = Bench(parser.parse_args())
    teacher = bench.train("teacher", bench.options.steps, 1.5e-3)
    result = {"compressed": bench.compressed(), "teacher": teacher, "distilled": bench.distilled()}
    print(json.dumps(result) if bench.options.json else tables(result))


class Bench:
    """The runs below one folder."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.folder = options, options.out.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)

    def train(self, name: str, steps: int, lr: float, *overrides: str, config: Path | None = None) -> float:
        """The validation loss, in nats a token, at the end of a run."""
        recipe = self.folder / f"{name}.json"
        warm_up = {"total_num_steps": steps, "warmup_num_steps": max(2, steps // 5), "warmup_type": "linear"}
        content = {
            "train_batch_size": 16,
            "train_micro_batch_size_per_gpu": 16,
            "optimizer": {"type": "AdamW", "params": {"lr": lr, "betas": [0.9, 0.95], "weight_decay": 0.1}},
            "scheduler": {"type": "WarmupCosineLR", "params": warm_up},
            "gradient_clipping": 1.0,
        }
        recipe.write_text(json.dumps(content))
        metrics = self.folder / name / "metrics.jsonl"
        if not (metrics.exists() and len(metrics.read_text().splitlines()) == steps):
            settings = (
                f"run.dir={self.folder}",
                f"run.name={name}",
                f"data.path={self.options.data.resolve()}",
            )
            quiet = ("track.mlflow=false", "eval.every=0", "save.every=0")
            file = ("--config", str(config)) if config else ()
            bigtfm("train", "--deepspeed_config", str(recipe), *file, *settings, *quiet, *overrides)
        return float(json.loads(metrics.read_text().splitlines()[-1])["val_loss"])

    def compressed(self) -> dict[str, dict[str, Any]]:
        """Report of each method, with the loss after training on."""
        found: dict[str, dict[str, Any]] = {}
        for name, args in METHODS.items():
            out = self.folder / name
            if not out.exists():
                bigtfm("compress", "--run", str(self.folder / "teacher"), "--out", str(out), *args, "--json")
            found[name] = json.loads((out / "compression.json").read_text())
            if name in TUNED:
                found[name]["tuned"] = self._tuned(name)
        found["dense"] = {"tuned": self._tuned("teacher")}
        return found

    def _tuned(self, name: str) -> float:
        source = self.folder / name
        # A run that was trained without --config has every value by default.
        config = source / "run.toml" if (source / "compression.json").exists() else None
        return self.train(f"{name}-tuned", self.options.tune, 5e-4, f"run.init_from={source}", config=config)

    def distilled(self) -> dict[str, list[float]]:
        """Validation loss of each seed's model, alone and taught."""
        options = self.options
        taught = (
            f"distill.teacher={self.folder / 'teacher'}",
            f"distill.weight={options.weight}",
            f"distill.temperature={options.temperature}",
        )
        found: dict[str, list[float]] = {"alone": [], "taught": []}
        for seed in range(1, options.seeds + 1):
            for name, more in (("alone", ()), ("taught", taught)):
                label = (
                    f"{name}-{seed}"
                    if name == "alone"
                    else f"{name}-{options.weight}-{options.temperature}-{seed}"
                )
                loss = self.train(label, options.student_steps, 1.5e-3, *HALF, f"run.seed={seed}", *more)
                found[name].append(loss)
        return found


def bigtfm(*args: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from bigtfm.cli import app; app()", *args], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"bigtfm {' '.join(args)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")


def tables(result: dict[str, Any]) -> str:
    lines = [
        "| method | bytes | loss | change | after training on | reading | writing |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, report in result["compressed"].items():
        tuned = f"{report['tuned']:.4f}" if "tuned" in report else ""
        if name == "dense":
            lines.append(f"| none | 1 x | {result['teacher']:.4f} | | {tuned} | 1 x | 1 x |")
            continue
        before, after = report["before"], report["after"]
        speeds = [rate(before[way], after[way]) for way in ("read", "write")]
        change = after["val_loss"] / before["val_loss"] - 1
        lines.append(
            f"| {name} | {after['bytes'] / before['bytes']:.3f} x | {after['val_loss']:.4f} | {change:+.2%} "
            f"| {tuned} | {speeds[0]} | {speeds[1]} |"
        )
    lines += ["", "| half the size | loss of each seed | mean | standard deviation |", "|---|---|---|---|"]
    for name, losses in result["distilled"].items():
        spread = f"{stdev(losses):.4f}" if len(losses) > 1 else ""
        lines.append(f"| {name} | {', '.join(f'{x:.4f}' for x in losses)} | {mean(losses):.4f} | {spread} |")
    return "\n".join(lines)


def rate(before: dict[str, float], after: dict[str, float]) -> str:
    """How many times as fast: median, and what the quartiles of both sides allow."""
    middle = after["median"] / before["median"]
    return f"{middle:.2f} x ({after['low'] / before['high']:.2f} to {after['high'] / before['low']:.2f})"


if __name__ == "__main__":
    main()
