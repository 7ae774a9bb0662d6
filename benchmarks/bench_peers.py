"""bigtfm beside what a user would run instead, and beside the fastest matrix product of the same cores.

    python benchmarks/bench_peers.py [--json] [--out FOLDER] [--turns 9] [--threads 2] [--rows gpt-14m ...]

Every side (benchmarks/peers) is a process of its own with the same shape, tokens, batch, recipe and threads,
in fp32 with AdamW and clipping. One trains while the others wait, a few steps each, in turns; the first turn
is warm-up. A ratio is that of the median steps of a turn; given are its median over the turns and its
quartiles. bigtfm's sides are `bigtfm.train.train` with its supervisor; evaluation, saving and MLflow are off.

gpt-14m   6 layers, 384 wide, 256 tokens x 8, a vocabulary of 8192: 13.8 M parameters
gpt-1m    4 layers, 128 wide, 64 tokens x 12, characters: 0.8 M parameters
gpt-11m   6 layers, 384 wide, 128 tokens x 8, a vocabulary of 512: 10.9 M parameters; against the same model
          and optimizer without an engine, at every ZeRO stage
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from goals import PEERS as FILE
from peers.workload import WORKLOADS, Workload

from bigtfm.bench.results import Spread, read_rows, rewrite
from bigtfm.bench.runner import environment_row
from bigtfm.config.run import load_run_config
from bigtfm.planner.throughput import flops_per_token

WARM_UP = 3  # steps


@dataclass(frozen=True)
class Against:
    """What a side of bigtfm is compared with."""

    other: str
    ours: str = "bigtfm-0"
    speed: float | None = None  # goal: at least so many times the other's tokens per second
    memory: float | None = None  # goal: at most so many times the other's peak


PEERS = [
    Against("bare", speed=1.15),
    Against("hf", speed=1.15),
    Against("litgpt", speed=1.15),
    Against("hf-deepspeed-0", speed=1.25, memory=0.8),
    Against("hf-deepspeed-1", ours="bigtfm-1", speed=1.25, memory=0.8),
]
ENGINE = [
    Against("plain", ours=f"bigtfm-{stage}", speed=goal)
    for stage, goal in enumerate((0.97, 0.97, 0.93, 0.80))
]
ROWS = {"gpt-14m": PEERS, "gpt-1m": PEERS, "gpt-11m": ENGINE}
MATMUL_GOAL = {"gpt-14m": 0.85}
DATA_GOAL = 0.005


class Side:
    """A process that trains when it is its turn."""

    def __init__(self, name: str, shape: Workload, folder: Path, threads: int) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        asked, self._ask = os.pipe()
        self._answers, answers = os.pipe()
        path = os.pathsep.join(
            [str(Path(__file__).resolve().parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "peers.side", name, shape.name, str(folder), str(asked), str(answers)],
                pass_fds=(asked, answers), env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        os.close(asked)
        os.close(answers)
        self._reader, self._writer = os.fdopen(self._answers), os.fdopen(self._ask, "w")

    def ready(self) -> None:
        """Waits until it can train."""
        self._read()

    def turn(self, steps: int) -> dict[str, Any]:
        """So many steps."""
        print(steps, file=self._writer, flush=True)
        return self._read()

    def _read(self) -> dict[str, Any]:
        line = self._reader.readline()
        if not line:
            raise SystemExit(f"{self.name} has ended: {self.log.read_text(errors='replace')[-2000:]}")
        return json.loads(line)

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a row instead of a table")
    parser.add_argument(
        "--out", type=Path, help=f"folder for {FILE}; the rows that it has are not measured again"
    )
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--against", nargs="+", help="only these others")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--steps", type=int, default=3, help="of a turn of gpt-14m; smaller models take more")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    here = environment_row()
    there = {row["row"] for row in read_rows(arguments.out / FILE)} if arguments.out else set()
    for name in arguments.rows:
        if name in there:
            continue
        pairs = [pair for pair in ROWS[name] if not arguments.against or pair.other in arguments.against]
        with tempfile.TemporaryDirectory(prefix="peers-") as folder:
            rows = measure(WORKLOADS[name], pairs, arguments, Path(folder))
        for row in rows:
            row |= {"threads": arguments.threads, **here}
            print(json.dumps(row) if arguments.json else shown(row), flush=True)
        if arguments.out:
            rewrite(arguments.out / FILE, [*read_rows(arguments.out / FILE), *rows])


def measure(
    shape: Workload, pairs: list[Against], arguments: argparse.Namespace, folder: Path
) -> list[dict[str, Any]]:
    """A row for each pair, and one for the ceiling."""
    shape.data(folder)
    names = list(dict.fromkeys(name for pair in pairs for name in (pair.ours, pair.other)))
    steps = arguments.steps * max(1, WORKLOADS["gpt-14m"].tokens_per_step // shape.tokens_per_step)
    with ExitStack() as stack:
        sides = {
            name: stack.enter_context(Side(name, shape, folder, arguments.threads))
            for name in (*names, "matmul")
        }
        for side in sides.values():
            side.ready()
        for name, side in sides.items():
            side.turn(1 if name == "matmul" else WARM_UP)
        turns: list[dict[str, Any]] = []
        while len(turns) < arguments.turns:
            turns.append({name: side.turn(1 if name == "matmul" else steps) for name, side in sides.items()})
            print(f"{shape.name}: turn {len(turns)} of {arguments.turns}", file=sys.stderr)
    seconds = {name: [median(turn[name]["seconds"]) for turn in turns] for name in names}
    peaks = {name: turns[-1][name]["peak_bytes"] for name in names}
    rows = [row_of(shape, pair, seconds, peaks) for pair in pairs]
    first = pairs[0].ours
    run = load_run_config(None, shape.run_config(folder))
    flops = flops_per_token(run.model, shape.vocab_size, shape.seq_len, run.objective) * shape.tokens_per_step
    shares = [
        flops / mine / turn["matmul"]["flops"] for mine, turn in zip(seconds[first], turns, strict=True)
    ]
    waits = [turn[first]["data_seconds"] / mine for mine, turn in zip(seconds[first], turns, strict=True)]
    ceiling = {
        "row": shape.name, "ours": first, "other": "matmul", "goal": MATMUL_GOAL.get(shape.name),
        "ratio": vars(Spread.of(shares)), "flops": vars(Spread.of(turn["matmul"]["flops"] for turn in turns)),
        "data_wait": vars(Spread.of(waits)), "data_wait_goal": DATA_GOAL,
    }  # fmt: skip
    return [
        {"benchmark": "peers", "turns": arguments.turns, "steps": steps, **row} for row in (*rows, ceiling)
    ]


def row_of(
    shape: Workload, pair: Against, seconds: dict[str, list[float]], peaks: dict[str, int]
) -> dict[str, Any]:
    ours, other = seconds[pair.ours], seconds[pair.other]
    return {
        "row": shape.name, "ours": pair.ours, "other": pair.other, "goal": pair.speed,
        "ratio": vars(Spread.of(theirs / mine for mine, theirs in zip(ours, other, strict=True))),
        "tokens_per_second": vars(Spread.of(shape.tokens_per_step / each for each in ours)),
        "tokens_per_second_other": vars(Spread.of(shape.tokens_per_step / each for each in other)),
        "peak_bytes": peaks[pair.ours], "peak_bytes_other": peaks[pair.other],
        "peak_ratio": peaks[pair.ours] / peaks[pair.other], "peak_goal": pair.memory,
    }  # fmt: skip


def shown(row: dict[str, Any]) -> str:
    low, middle, high = (row["ratio"][name] for name in ("low", "median", "high"))
    pair = f"{row['row']:>8}  {row['ours']:<9} / {row['other']:<14}"
    parts = [f"{pair} {middle:.3f} ({low:.3f} to {high:.3f})", f"goal {row['goal'] or 'none'}"]
    if row["other"] == "matmul":
        flops, wait = row["flops"]["median"], row["data_wait"]["median"]
        return ", ".join([*parts, f"ceiling {flops / 1e9:.0f} GFLOP/s, data wait {wait:.2%} of a step"])
    ours, other = row["tokens_per_second"]["median"], row["tokens_per_second_other"]["median"]
    peak, peak_other = (f"{row[key] / 1e6:,.0f}" for key in ("peak_bytes", "peak_bytes_other"))
    memory = f"peak {peak} : {peak_other} MB = {row['peak_ratio']:.2f}"
    goal = f" (goal {row['peak_goal']})" if row["peak_goal"] else ""
    return ", ".join([*parts, f"{ours:,.0f} : {other:,.0f} tokens/s", memory + goal])


if __name__ == "__main__":
    main()
