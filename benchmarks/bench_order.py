"""What an order costs: start-up time and memory of computed ones, beside a stored shuffled index.

    python benchmarks/bench_order.py [--json] [--samples 1000000000] [--stored 100000000]

Computed are the order of one data set and of a mixture of three, of weights that need a period of 10
samples ("mixture") or of the longest there is, 65,536 ("fine mixture"). Each is measured in a process of its
own, from the size to the first 4096 samples; memory is the growth of the peak resident set. The stored index
(int64, numpy's shuffle) is measured with --stored samples. Where that is fewer than --samples, its memory and
time are scaled up in proportion, which favours it: a larger index misses caches more often.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from bigtfm.data.mixture import Mixture
from bigtfm.data.order import Windows

BLOCK = 4096
WEIGHTS = {"computed": [1.0], "mixture": [0.5, 0.3, 0.2], "fine mixture": [0.123457, 0.3, 0.2]}
GOAL = 0.25  # of what the stored index costs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--samples", type=int, default=10**9, help="samples to order (default 10^9)")
    parser.add_argument(
        "--stored", type=int, default=10**8, help="samples of the stored index (default 10^8)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="processes for each figure (default 3)")
    parser.add_argument("--measure", choices=(*WEIGHTS, "stored"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.samples)))
        return
    computed = {kind: in_processes(kind, arguments.samples, arguments.repeats) for kind in WEIGHTS}
    stored = in_processes("stored", arguments.stored, arguments.repeats)
    scale = arguments.samples / arguments.stored
    ratios = {
        f"ratio_{what}": {kind: row[key] / (stored[key] * scale) for kind, row in computed.items()}
        for what, key in (("seconds", "start_seconds"), ("bytes", "peak_bytes"))
    }
    result = {
        "benchmark": "order", "samples": arguments.samples, "goal": GOAL, **computed, "stored": stored,
        "stored_scaled_by": scale, **ratios,
    }  # fmt: skip
    print(json.dumps(result) if arguments.json else table(result))


def table(result: dict[str, Any]) -> str:
    lines = ["                    samples     start-up      peak memory   then, a sample"]
    for name in (*WEIGHTS, "stored"):
        row = result[name]
        lines.append(
            f"{name:>12}  {row['samples']:>12,}  {row['start_seconds'] * 1e3:9.2f} ms"
            f"  {row['peak_bytes'] / 1e6:10.2f} MB  {row['nanoseconds_per_sample']:11.1f} ns"
        )
    scale = result["stored_scaled_by"]
    lines += [
        f"{name} / stored (scaled by {scale:g}): start-up {result['ratio_seconds'][name]:.2g},"
        f" memory {result['ratio_bytes'][name]:.2g}; goal: both at most {GOAL}"
        for name in WEIGHTS
    ]
    return "\n".join(lines)


def in_processes(kind: str, samples: int, repeats: int) -> dict[str, Any]:
    """Medians over `repeats` fresh processes."""
    command = [sys.executable, __file__, "--measure", kind, "--samples", str(samples)]
    runs = [
        json.loads(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(repeats)
    ]
    return {key: median(run[key] for run in runs) for key in runs[0]}


def measure(kind: str, samples: int) -> dict[str, Any]:
    before = peak_bytes()
    started = time.perf_counter()
    if kind in WEIGHTS:
        weights = WEIGHTS[kind]
        sources = [Windows(round(samples * weight / sum(weights)) + 1, 1) for weight in weights]
        computed = Mixture(sources, seed=0, weights=weights)
        computed.pieces(0, BLOCK)
    else:
        order = np.arange(samples)
        np.random.default_rng(0).shuffle(order)
        order[:BLOCK].copy()
    start_seconds = time.perf_counter() - started
    grown = peak_bytes() - before
    blocks = 200
    started = time.perf_counter()
    for block in range(1, blocks + 1):
        if kind in WEIGHTS:
            computed.pieces(block * BLOCK, BLOCK)
        else:
            order[block * BLOCK : (block + 1) * BLOCK].copy()
    per_sample = (time.perf_counter() - started) / blocks / BLOCK
    return {
        "samples": samples, "start_seconds": start_seconds, "peak_bytes": grown,
        "nanoseconds_per_sample": per_sample * 1e9,
    }  # fmt: skip


def peak_bytes() -> int:
    """Peak resident set of this process; Linux counts it in KiB, macOS in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
