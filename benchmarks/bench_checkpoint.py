"""What saving costs a training: beside none at all, and beside DeepSpeed's own save_checkpoint.

    python benchmarks/bench_checkpoint.py [--json] [--ranks 2] [--stage 2] [--saves 20] [...]

A GPT of 50 M parameters trains on every rank. Saves by bigtfm (whose writing goes on beside the steps) and by
DeepSpeed take turns, each followed by four steps. Stall: how long the slowest rank stands still for a save.
Cost: the stall, and what the two steps after it take more than the two after those, as a share of ten steps;
so that a machine that is slower for a while slows both sides. Memory: the most that a rank's anonymous memory
grows by while it saves and loads, beside the bytes of its shard.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

MB = 2**20
GOAL_COST, GOAL_MEMORY = 0.02, 256 * MB
STEPS = 10  # from one save to the next, in the cost


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--ranks", type=int, default=2, help="default 2")
    parser.add_argument("--stage", type=int, default=2, choices=range(4), help="ZeRO stage (default 2)")
    parser.add_argument(
        "--layers", type=int, default=15, help="blocks, 512 wide (default 15: 50 M parameters)"
    )
    parser.add_argument("--sequences", type=int, default=4, help="per rank and step (default 4)")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens in each (default 256)")
    parser.add_argument("--saves", type=int, default=20, help="of each kind (default 20)")
    parser.add_argument("--folder", type=Path, help="where to save (default: a temporary folder)")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        result = measure(arguments)
        if arguments.rank == 0:
            print(json.dumps(result))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        result = in_ranks(arguments, folder)
    print(json.dumps(result) if arguments.json else table(result))


def in_ranks(arguments: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Starts this script once for each rank; returns what rank 0 printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    options = ["ranks", "stage", "layers", "sequences", "seq_len", "saves"]
    flags = [f"--{name.replace('_', '-')}={getattr(arguments, name)}" for name in options]
    processes = []
    for rank in range(arguments.ranks):
        environ = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(arguments.ranks)}
        environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes.append(
            subprocess.Popen(
                [sys.executable, __file__, *flags, f"--folder={folder}", f"--rank={rank}"],
                env=os.environ | environ,
                stdout=subprocess.PIPE,
            )
        )
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit("a rank has failed")
    return json.loads(outputs[0].decode().strip().splitlines()[-1])


def table(result: dict[str, Any]) -> str:
    shard, cost, stall = result["shard_bytes"], result["cost"], result["stall_seconds"]
    lines = [
        f"{result['parameters'] / 1e6:.1f} M parameters, ZeRO {result['stage']}, {result['ranks']} ranks, "
        f"{shard / MB:.0f} MB a shard, step {result['step_seconds']:.2f} s; torch {result['torch']}, "
        f"deepspeed {result['deepspeed']}",
        "",
        "                      cost of a save every 10 steps        stall p50      p99",
    ]
    for kind in ("bigtfm", "deepspeed"):
        low, high = cost[kind]["quartiles"]
        lines.append(
            f"{kind:>10}  {100 * cost[kind]['median']:10.2f} %"
            f" (quartiles {100 * low:.2f} to {100 * high:.2f} %)"
            f"  {stall[kind]['p50']:12.3f} s {stall[kind]['p99']:7.3f} s"
        )
    ratio = stall["bigtfm"]["p50"] / stall["deepspeed"]["p50"]
    lines.append(f"stall, bigtfm / DeepSpeed: {ratio:.2f} (p50); goal for the cost: < {100 * GOAL_COST:g} %")
    for what, grown in result["memory_bytes"].items():
        lines.append(
            f"memory for {what}: {grown / MB:.0f} MB more at the peak "
            f"(goal: < shard + 256 MB = {(shard + GOAL_MEMORY) / MB:.0f} MB)"
        )
    return "\n".join(lines)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One rank's part."""
    import deepspeed
    import torch

    from bigtfm.config.launch import Launch
    from bigtfm.config.sections import ComputeSection, ModelSection
    from bigtfm.engine import checkpoint, distributed, loading
    from bigtfm.engine.build import build_engine
    from bigtfm.engine.checkpoint import Progress, Retention
    from bigtfm.engine.probe import PROBE_TOKENS, Probe
    from bigtfm.engine.saver import Saver
    from bigtfm.model.families import make_model

    ranks = distributed.start(Launch.from_environment(os.environ, None))
    folder, micro_batch = Path(arguments.folder), arguments.sequences
    config = {
        "train_batch_size": micro_batch * ranks.world_size,
        "train_micro_batch_size_per_gpu": micro_batch,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "weight_decay": 0.1}},
        "zero_optimization": {"stage": arguments.stage},
    }
    shape = ModelSection(
        hidden_size=512, num_layers=arguments.layers, num_attention_heads=8, max_seq_len=arguments.seq_len
    )
    engine = build_engine(partial(make_model, shape, 8192), config, ComputeSection())

    def inputs(sequences: int, seq_len: int, seed: int) -> dict[str, Any]:
        ids = torch.randint(8192, (sequences * seq_len,), generator=torch.Generator().manual_seed(seed))
        return {
            "input_ids": ids,
            "labels": ids.roll(-1),
            "position_ids": torch.arange(seq_len).repeat(sequences),
            "cu_seqlens": torch.arange(0, (sequences + 1) * seq_len, seq_len, dtype=torch.int32),
            "seq_lens": (seq_len,) * sequences,
            "token_keys": torch.arange(len(ids)),
        }

    def step() -> None:
        batch = {
            k: v.to(ranks.device) if torch.is_tensor(v) else v
            for k, v in inputs(micro_batch, arguments.seq_len, 0).items()
        }
        loss, count = engine(**batch)
        engine.backward(loss / float(count))
        engine.step()

    step()  # allocates moments
    probe = Probe(inputs(1, PROBE_TOKENS, 1), {"precision": "fp32"})
    saver = Saver(folder / "bigtfm", engine, ranks, probe, Retention(1))
    progress = Progress(step=1)

    def save_bigtfm() -> None:
        progress.step += 1
        saver.save(progress)

    def save_deepspeed() -> None:
        engine.save_checkpoint(str(folder / "deepspeed"), tag="same")

    with grown_memory(ranks) as memory_save:
        save_bigtfm()
        saver.wait()
    with grown_memory(ranks) as memory_load:
        loading.load(checkpoint.folder_of(folder / "bigtfm", progress.step), engine, ranks)
    shard = max(ranks.gather(4 * sum(p.numel for places in saver._layout.values() for p in places)))

    saves: dict[str, Callable[[], None]] = {"bigtfm": save_bigtfm, "deepspeed": save_deepspeed}
    stalls: dict[str, list[float]] = {kind: [] for kind in saves}
    costs: dict[str, list[float]] = {kind: [] for kind in saves}
    steps: list[float] = []

    def timed(action: Callable[[], None]) -> float:
        ranks.gather(None)
        began = time.perf_counter()
        action()
        return max(ranks.gather(time.perf_counter() - began))

    for _ in range(arguments.saves):
        for kind, save in saves.items():
            stall, *after = timed(save), *(timed(step) for _ in range(4))
            stalls[kind].append(stall)
            costs[kind].append((stall + sum(after[:2]) - sum(after[2:])) / (STEPS / 2 * sum(after[2:])))
            steps += after[2:]
            saver.wait()
    saver.close()
    memory = {"saving": max(ranks.gather(memory_save[0])), "loading": max(ranks.gather(memory_load[0]))}
    result = {
        "benchmark": "checkpoint", "parameters": sum(num_elements(p) for p in engine.module.parameters()),
        "stage": arguments.stage, "ranks": ranks.world_size, "device": ranks.device_name,
        "sequences": micro_batch, "seq_len": arguments.seq_len, "step_seconds": median(steps),
        "shard_bytes": shard,
        "memory_bytes": memory,
        "cost": {kind: spread(values) for kind, values in costs.items()},
        "stall_seconds": {kind: percentiles(times) for kind, times in stalls.items()},
        "torch": torch.__version__, "deepspeed": deepspeed.__version__,
    }  # fmt: skip
    ranks.close()
    return result


def num_elements(parameter: Any) -> int:
    """Elements of a parameter, also of a partitioned one."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def spread(values: list[float]) -> dict[str, Any]:
    low, _, high = quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return {"median": median(values), "quartiles": [low, high]}


def percentiles(values: list[float]) -> dict[str, float]:
    cuts = quantiles(values, n=100, method="inclusive") if len(values) > 1 else values * 99
    return {"p50": cuts[49], "p99": cuts[98]}


@contextmanager
def grown_memory(ranks: Any) -> Iterator[list[int]]:
    """Growth of this process's anonymous memory at its peak, in bytes, looked at every 5 ms."""
    ranks.gather(None)
    before, peak, done = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], anonymous_bytes() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        peak[0] = max(peak[0], anonymous_bytes() - before)
        done.set()
        watcher.join()


def anonymous_bytes() -> int:
    """Memory that is this process's own: not pages of files, which the system takes back as it likes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("no RssAnon in /proc/self/status")


if __name__ == "__main__":
    main()
