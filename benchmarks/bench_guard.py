"""What the watch over a training costs: its steps with and without the pulse, in turns, in the real loop.

    python benchmarks/bench_guard.py [--json] [--data data/quickstart] [--steps 400] [--stage 2] [--ranks 2]

A small GPT trains on every rank. Every ten steps the notes of phases and collectives are switched off or on
(bigtfm/resilience/pulse.py, collectives.py); each block of ten is compared with the next one.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median, quantiles
from typing import Any

BLOCK = 10  # steps
GOAL = 0.01
SMALL = (
    *("model.hidden_size=128", "model.num_layers=4", "model.num_attention_heads=4", "model.max_seq_len=128"),
    *("track.mlflow=false", "eval.every=0", "eval.tokens=512", "save.every=0", "guard.replicas_every=0"),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a sentence")
    parser.add_argument("--data", type=Path, default=Path("data/quickstart"), help="what `prepare` wrote")
    parser.add_argument("--steps", type=int, default=400, help="default 400")
    parser.add_argument("--stage", type=int, default=2, choices=range(4), help="ZeRO stage (default 2)")
    parser.add_argument("--ranks", type=int, default=2, help="default 2")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder is not None:
        train(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        start_ranks(arguments, folder)
        rows = [json.loads(line) for line in (Path(folder) / "run/metrics.jsonl").read_text().splitlines()]
    result = {"benchmark": "guard", "stage": arguments.stage, "ranks": arguments.ranks} | compare(rows)
    print(json.dumps(result) if arguments.json else sentence(result))


def sentence(result: dict[str, Any]) -> str:
    low, high = result["quartiles"]
    return (
        f"ZeRO {result['stage']}, {result['ranks']} ranks, step {1000 * result['step_seconds']:.1f} ms: "
        f"the watch costs {100 * result['cost']:.2f} % (quartiles {100 * low:.2f} to {100 * high:.2f} %, "
        f"{result['pairs']} pairs of {BLOCK} steps); goal: < {100 * GOAL:g} %"
    )


def start_ranks(arguments: argparse.Namespace, folder: str) -> None:
    """This script once for each rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    flags = [f"--{name}={getattr(arguments, name)}" for name in ("data", "steps", "stage", "ranks")]
    meeting = {"WORLD_SIZE": str(arguments.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, *flags, f"--folder={folder}"],
            env=os.environ | meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
        )
        for rank in range(arguments.ranks)
    ]
    if any([process.wait() for process in processes]):
        raise SystemExit("a rank has failed")


def train(arguments: argparse.Namespace) -> None:
    """One rank's part."""
    from bigtfm import train as training
    from bigtfm.config.launch import Launch
    from bigtfm.job import check_job
    from bigtfm.resilience import collectives
    from bigtfm.resilience.lifeline import Lifeline
    from bigtfm.resilience.pulse import Pulse

    watching = True
    sites = collectives._sites
    collectives._sites = lambda frame: sites(frame) if watching else ("", "")

    class Switched(Pulse):
        """Does nothing in every other block of steps."""

        def enter(self, phase: str, *, step: int | None = None) -> None:
            nonlocal watching
            if step is not None:
                watching = is_watched(step)
            if watching:
                super().enter(phase, step=step)

        def begin_collective(self, *args: Any, **kwargs: Any) -> None:
            if watching:
                super().begin_collective(*args, **kwargs)

        def wait(self, *, lane: int) -> None:
            if watching:
                super().wait(lane=lane)

        def go_on(self, *, lane: int) -> None:
            if watching:
                super().go_on(lane=lane)

    folder = arguments.folder
    config = folder / f"deepspeed-{os.environ['RANK']}.json"
    config.write_text(
        json.dumps(
            {
                "train_micro_batch_size_per_gpu": 2,
                "gradient_accumulation_steps": 1,
                "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "weight_decay": 0.1}},
                "zero_optimization": {"stage": arguments.stage},
            }
        )
    )
    overrides = [*SMALL, f"data.path={arguments.data}", f"run.dir={folder}", "run.name=run"]
    launch = Launch.from_environment(os.environ, None)
    job = check_job(None, config, [*overrides, f"steps={arguments.steps}"], launch.world_size)
    training.train(job, launch, lifeline=Lifeline(pulse=Switched()))


def is_watched(step: int) -> bool:
    return step // BLOCK % 2 == 0


def compare(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Excess of each watched block over the unwatched one behind it, without each block's first step."""
    blocks: dict[int, list[float]] = {}
    for row in rows:
        if row["step"] % BLOCK:
            blocks.setdefault(row["step"] // BLOCK, []).append(row["seconds"])
    medians = {number: median(seconds) for number, seconds in blocks.items() if number > 1}  # warm
    pairs = [
        medians[number] / medians[number + 1] - 1
        for number in medians
        if is_watched(number * BLOCK) and number + 1 in medians
    ]
    low, _, high = quantiles(pairs, n=4)
    return {
        "step_seconds": median(medians.values()),
        "cost": median(pairs),
        "quartiles": [low, high],
        "pairs": len(pairs),
    }


if __name__ == "__main__":
    main()
