"""What the watch over a training costs: the time that a step of the real loop spends in it.

    python benchmarks/bench_guard.py [--json] [--data data/quickstart] [--steps 200] [--stage 2] [--ranks 2]

A small GPT trains on every rank, as `bigtfm train` starts it. Every note of a phase or a collective
(bigtfm/resilience/pulse.py, collectives.py) is timed, the timer included; the supervisor beside each rank has
its own processor time, which is told as a share of one core.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import Any

WARM_UP = 20  # steps
GOAL = 0.01
TICKS = os.sysconf("SC_CLK_TCK")  # a second
SMALL = (
    *("model.hidden_size=128", "model.num_layers=4", "model.num_attention_heads=4", "model.max_seq_len=128"),
    *("track.mlflow=false", "eval.every=0", "eval.tokens=512", "save.every=0", "guard.replicas_every=0"),
)
RECIPE = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 1,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "weight_decay": 0.1}},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a sentence")
    parser.add_argument("--data", type=Path, default=Path("data/quickstart"), help="what `prepare` wrote")
    parser.add_argument("--steps", type=int, default=200, help="default 200")
    parser.add_argument("--stage", type=int, default=2, choices=range(4), help="ZeRO stage (default 2)")
    parser.add_argument("--ranks", type=int, default=2, help="default 2")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        supervisors = train(arguments, folder)
        rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
        shares = [share for rank in range(arguments.ranks) for share in shares_of(folder, rank, rows)]
    low, middle, high = quantiles(shares, n=4)
    result = {
        **{"benchmark": "guard", "stage": arguments.stage, "ranks": arguments.ranks},
        "step_seconds": median(row["seconds"] for row in rows[WARM_UP:]),
        **{"cost": middle, "quartiles": [low, high], "supervisor": median(supervisors)},
    }
    print(json.dumps(result) if arguments.json else sentence(result))


def sentence(result: dict[str, Any]) -> str:
    low, high = result["quartiles"]
    return (
        f"ZeRO {result['stage']}, {result['ranks']} ranks, step {1000 * result['step_seconds']:.1f} ms: "
        f"the watch costs {100 * result['cost']:.2f} % (quartiles {100 * low:.2f} to {100 * high:.2f} %), "
        f"its supervisor {100 * result['supervisor']:.2f} % of a core; goal: < {100 * GOAL:g} %"
    )


def train(arguments: argparse.Namespace, folder: Path) -> list[float]:
    """Trains on every rank; returns the share of a core that each rank's supervisor took."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    config = folder / "deepspeed.json"
    config.write_text(json.dumps(RECIPE | {"zero_optimization": {"stage": arguments.stage}}))
    data = f"data.path={arguments.data.resolve()}"
    args = ["train", f"--deepspeed_config={config}", *SMALL, data, f"run.dir={folder}", "run.name=run"]
    meeting = {"WORLD_SIZE": str(arguments.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with (folder / "output").open("wb") as output:
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", "import bench_guard; bench_guard.rank()", *args],
                env=os.environ
                | meeting
                | {"RANK": str(rank), "LOCAL_RANK": str(rank), "SPENT": f"{folder}/spent-{rank}.json"}
                | {"STEPS": str(arguments.steps), "PYTHONPATH": os.pathsep.join(sys.path)},
                stdout=output,
                stderr=output,
            )
            for rank in range(arguments.ranks)
        ]
        # From the start of the trainer on: before it, the supervisor imports what training needs.
        seen: dict[int, list[tuple[float, float]]] = {rank.pid: [] for rank in ranks}
        while any(rank.poll() is None for rank in ranks):
            for rank in ranks:
                if rank.poll() is None and (folder / "run/metrics.jsonl").exists():
                    seen[rank.pid].append((time.monotonic(), processor_seconds(rank.pid)))
            time.sleep(0.2)
    if any(rank.returncode for rank in ranks):
        raise SystemExit((folder / "output").read_text())
    return [(last[1] - first[1]) / (last[0] - first[0]) for first, *_, last in seen.values()]


def processor_seconds(pid: int) -> float:
    """Of the process itself, without its children (proc(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def rank() -> None:
    """What a rank runs instead of `bigtfm`: the same, with a clock around each note of the watch."""
    from bigtfm.cli import app
    from bigtfm.resilience import collectives
    from bigtfm.resilience.pulse import Pulse

    spent = [0.0]
    steps: list[float] = []  # spent before each

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[0] += time.perf_counter() - began

        return run

    enter = timed(Pulse.enter)

    def marked_enter(pulse: Pulse, phase: str, *, step: int | None = None) -> None:
        if step is not None:
            steps.append(spent[0])
        enter(pulse, phase, step=step)
        if phase == "end":
            Path(os.environ["SPENT"]).write_text(json.dumps([*steps, spent[0]]))

    Pulse.enter = marked_enter
    for name in ("begin_collective", "wait", "go_on"):
        setattr(Pulse, name, timed(getattr(Pulse, name)))
    collectives._sites = timed(collectives._sites)
    sys.argv.append(f"steps={os.environ['STEPS']}")
    app()


def shares_of(folder: Path, rank: int, rows: list[dict[str, Any]]) -> list[float]:
    """Of each step behind the warm-up, the part that the rank spent in the watch."""
    spent = json.loads((folder / f"spent-{rank}.json").read_text())
    assert len(spent) == len(rows) + 1
    costs = [after - before for before, after in pairwise(spent)]
    return [cost / row["seconds"] for cost, row in zip(costs, rows, strict=True)][WARM_UP:]


if __name__ == "__main__":
    main()
