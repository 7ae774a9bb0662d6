"""Time and memory of the attention backends on packed documents, beside padding them.

    python benchmarks/bench_attention.py [--json] [--out FOLDER] [--backends sdpa,flex] [--tokens N] [...]

The same tokens as one document ("dense"), as documents of a few to many tokens ("ragged"), and as short ones
("short"); causal self-attention. The peer, "padded", is torch's SDPA on the same documents padded to the
longest: it needs no mask, since causal queries don't look right. Documents stand in the order that a backend
likes best, as in training; ordering and padding are not timed. All are measured in turn, so that a slower
machine for a while slows all. Memory: the most that a forward and backward allocate beyond what was there
(CUDA's caching allocator; on a CPU torch's, by the profiler).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import platform
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from bigtfm.config.sections import Backend
from bigtfm.environment import environment
from bigtfm.model.attention import Documents, attention, by_length, groups_by_length
from bigtfm.model.backends import Device, Needs, installed_kernels, obstacle, this_device

PEER = "padded"
DENSITIES = ("dense", "ragged", "short")


class Shape(NamedTuple):
    tokens: int
    heads: int
    kv_heads: int
    head_size: int

    def __str__(self) -> str:
        return f"T {self.tokens} H {self.heads} K {self.kv_heads} D {self.head_size}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print JSON lines instead of a table")
    parser.add_argument("--out", type=Path, help="folder for attention.jsonl and attention.png")
    parser.add_argument("--backends", help="comma-separated (default: all that are there)")
    parser.add_argument("--tokens", type=int, help="tokens in a batch (default 1024; on a GPU 16384)")
    parser.add_argument("--repeats", type=int, default=7, help="measurements of each cell (default 7)")
    arguments = parser.parse_args()
    device = this_device()
    on_gpu = device.capability is not None
    dtype = "bf16" if on_gpu else "fp32"
    tokens = arguments.tokens or (16384 if on_gpu else 1024)
    wanted = arguments.backends.split(",") if arguments.backends else get_args(Backend)
    rows = []
    for heads, kv_heads, head_size in ((16, 16, 64), (32, 8, 128)) if on_gpu else ((4, 4, 64), (4, 2, 128)):
        shape = Shape(tokens, heads, kv_heads, head_size)
        needs = Needs(dtype, head_size)
        names = [name for name in wanted if not obstacle(name, device, needs, installed_kernels())]
        for density in DENSITIES:
            rows += measure(names, shape, density, device, arguments.repeats)
    about = {"benchmark": "attention", "device": str(device), "dtype": dtype, "processor": processor()}
    about |= {"threads": torch.get_num_threads(), **environment()}
    lines = [json.dumps(row | about) for row in rows]
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "attention.jsonl").write_text("\n".join(lines) + "\n")
        draw(rows, f"{about['device']}, {dtype}, torch {torch.__version__}", arguments.out / "attention.png")
    if arguments.json:
        print("\n".join(lines))
    else:
        show(rows, f"{about['device']}, {dtype}, torch {torch.__version__}")


def lengths_of(density: str, tokens: int) -> tuple[int, ...]:
    """Lengths that sum to `tokens`, at random but the same each time."""
    if density == "dense":
        return (tokens,)
    low, high = {"ragged": (tokens // 64, tokens // 3), "short": (8, 56)}[density]
    rng, lengths = random.Random(0), [0]
    while sum(lengths) < tokens:
        lengths.append(min(rng.randint(max(low, 1), max(high, 1)), tokens - sum(lengths)))
    return tuple(lengths[1:])


def measure(
    backends: list[Backend], shape: Shape, density: str, device: Device, repeats: int
) -> list[dict[str, Any]]:
    """One row for each backend and the peer: seconds of forward and backward, peak bytes."""
    where, dtype = ("cpu", torch.float32) if device.capability is None else ("cuda", torch.bfloat16)
    lengths = lengths_of(density, shape.tokens)
    steps = {name: packed_step(name, shape, lengths, where, dtype) for name in backends}
    steps[PEER] = padded_step(shape, lengths, where, dtype)
    peaks, seconds, failed = {}, {name: [] for name in steps}, {}
    for name, step in steps.items():
        try:
            step()  # compiles, where there is something to
            peaks[name] = peak_bytes(step, where)
        except torch.OutOfMemoryError:
            failed[name] = "out of memory"
    for _, name in itertools.product(range(repeats), [name for name in steps if name not in failed]):
        seconds[name].append(steps[name]())
    row = {
        "density": density, "shape": str(shape), "documents": len(lengths), "longest": max(lengths),
        "padded_tokens": len(lengths) * max(lengths),
    }  # fmt: skip
    rows = []
    for name in steps:
        if name in failed:
            rows.append(row | {"backend": name, "failed": failed[name]})
            continue
        forward, backward, both = zip(*((f, b, f + b) for f, b in seconds[name]), strict=True)
        low, _, high = quantiles(both, n=4) if repeats > 1 else both * 3
        peer = median(sum(pair) for pair in seconds[PEER]) if PEER not in failed else None
        rows.append(row | {
            "backend": name, "forward_seconds": median(forward), "backward_seconds": median(backward),
            "seconds": median(both), "fastest": min(both), "quartiles": [low, high],
            "peak_bytes": peaks[name], "padded_over_this": peer and peer / median(both),
        })  # fmt: skip
    return rows


Step = Callable[[], tuple[float, float]]  # one forward and backward; seconds of each


def packed_step(
    backend: Backend, shape: Shape, lengths: tuple[int, ...], where: str, dtype: torch.dtype
) -> Step:
    documents = Documents(torch.tensor((0, *lengths), device=where).cumsum(0).to(torch.int32), lengths)
    order = by_length(documents) if groups_by_length(backend) else None
    if order:
        documents = order[1][0]
    q, k, v = (
        torch.randn(shape.tokens, heads, shape.head_size, device=where, dtype=dtype, requires_grad=True)
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    )
    return timed(lambda: attention(q, k, v, documents=documents, causal=True, backend=backend), (q, k, v))


def padded_step(shape: Shape, lengths: tuple[int, ...], where: str, dtype: torch.dtype) -> Step:
    q, k, v = (
        torch.randn(
            len(lengths), max(lengths), heads, shape.head_size, device=where, dtype=dtype, requires_grad=True
        )
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    )

    def forward() -> Tensor:
        rows = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True).transpose(1, 2)

    return timed(forward, (q, k, v))


def timed(forward: Callable[[], Tensor], tensors: tuple[Tensor, ...]) -> Step:
    def step() -> tuple[float, float]:
        started = now()
        out = forward()
        middle = now()
        torch.autograd.grad(out, tensors, torch.ones_like(out))
        return middle - started, now() - middle

    return step


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_bytes(step: Step, where: str) -> int:
    """The most bytes allocated at a time beyond those that stand at the start."""
    if where == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with silence(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda e: e.start_ns())))


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Nothing reaches standard error: torch's profiler says there that it starts and stops."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def processor() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(": ")[2] if names else platform.processor()


def show(rows: list[dict[str, Any]], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, caption="median of a forward and a backward, quartiles of their sum")
    for name in ("documents", "backend", "forward ms", "backward ms", "both ms", "peak MB", "padded / this"):
        table.add_column(name, justify="left" if name in ("documents", "backend") else "right")
    for (density, shape), cell in itertools.groupby(rows, lambda row: (row["density"], row["shape"])):
        for number, row in enumerate(cell):
            head = f"{row['documents']} {density}" if number == 1 else shape if number == 0 else ""
            if "failed" in row:
                table.add_row(head, row["backend"], row["failed"])
                continue
            low, high = (1e3 * x for x in row["quartiles"])
            ratio = row["padded_over_this"]
            table.add_row(
                head, row["backend"], f"{1e3 * row['forward_seconds']:.2f}",
                f"{1e3 * row['backward_seconds']:.2f}", f"{1e3 * row['seconds']:.2f} ({low:.2f}-{high:.2f})",
                f"{row['peak_bytes'] / 1e6:.1f}", f"{ratio:.2f}" if ratio else "",
            )  # fmt: skip
        table.add_section()
    Console(width=None if Console().is_terminal else 120).print(table)


def draw(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    figure, axes = plt.subplots(
        len(shapes), len(DENSITIES), figsize=(12, 3 * len(shapes)), squeeze=False, layout="constrained"
    )
    for (i, shape), (j, density) in itertools.product(enumerate(shapes), enumerate(DENSITIES)):
        cell = [r for r in rows if (r["shape"], r["density"]) == (shape, density) and "failed" not in r]
        milliseconds = [1e3 * row["seconds"] for row in cell]
        spread = [
            [abs(1e3 * row["quartiles"][side] - value) for row, value in zip(cell, milliseconds, strict=True)]
            for side in (0, 1)
        ]
        colors = ["tab:gray" if row["backend"] == PEER else "tab:blue" for row in cell]
        axes[i][j].barh([row["backend"] for row in cell], milliseconds, xerr=spread, color=colors)
        axes[i][j].set_title(f"{density}: documents {cell[0]['documents']}\n{shape}", fontsize=9)
        axes[i][j].set_xlabel("forward + backward, ms")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
