"""What an order costs: start-up time and memory of a computed permutation, beside a stored shuffled index.

    python benchmarks/bench_order.py [--json] [--samples 1000000000] [--stored 100000000]

Each is measured in a process of its own, from the size to the first 4096 samples; memory is the growth of the
peak resident set. The stored index (int64, numpy's shuffle) is measured with --stored samples. Where that is
fewer than --samples, its memory and time are scaled up in proportion, which favours it: a larger index misses
caches more often.
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

from bigtfm.data.order import sample_windows

BLOCK = 4096
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
    parser.add_argument("--measure", choices=("computed", "stored"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.samples)))
        return
    computed = in_processes("computed", arguments.samples, arguments.repeats)
    stored = in_processes("stored", arguments.stored, arguments.repeats)
    scale = arguments.samples / arguments.stored
    result = {
        "benchmark": "order", "samples": arguments.samples, "goal": GOAL,
        "computed": computed, "stored": stored, "stored_scaled_by": scale,
        "ratio_seconds": computed["start_seconds"] / (stored["start_seconds"] * scale),
        "ratio_bytes": computed["peak_bytes"] / (stored["peak_bytes"] * scale),
    }  # fmt: skip
    print(json.dumps(result) if arguments.json else table(result))


def table(result: dict[str, Any]) -> str:
    lines = ["             samples     start-up      peak memory   then, a sample"]
    for name in ("computed", "stored"):
        row = result[name]
        lines.append(
            f"{name:>8}  {row['samples']:>12,}  {row['start_seconds'] * 1e3:9.2f} ms"
            f"  {row['peak_bytes'] / 1e6:10.2f} MB  {row['nanoseconds_per_sample']:11.1f} ns"
        )
    scale = result["stored_scaled_by"]
    lines.append(
        f"computed / stored (scaled by {scale:g}): start-up {result['ratio_seconds']:.2g},"
        f" memory {result['ratio_bytes']:.2g}; goal: both at most {GOAL}"
    )
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
    if kind == "computed":
        sample_windows(0, BLOCK, samples, seed=0)
    else:
        order = np.arange(samples)
        np.random.default_rng(0).shuffle(order)
        order[:BLOCK].copy()
    start_seconds = time.perf_counter() - started
    grown = peak_bytes() - before
    blocks = 200
    started = time.perf_counter()
    for block in range(1, blocks + 1):
        if kind == "computed":
            sample_windows(block * BLOCK, BLOCK, samples, seed=0)
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
