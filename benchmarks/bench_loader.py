"""Tokens/s per core of Loader.batch, beside the ceiling: widening the same mapped windows to int64.

Then the time that a training loop waits for the batches of a step (four micro batches of 16 x 1024 tokens),
with and without reading ahead (bigtfm/data/prefetch.py), while each step leaves the host alone as a GPU's
does.

    python benchmarks/bench_loader.py [--json] [--megabytes 200] [--repeats 7]

The data set is in the real on-disk format: uint16, documents of about 1000 tokens; windows are read in
training order, that is at random. It is warm in the page cache, so no disk is measured. One thread
throughout.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy and torch are imported: the figures are per core

import numpy as np

from bigtfm.config.sections import ObjectiveSection
from bigtfm.data.indexed import Header, TokenDataset
from bigtfm.data.loader import Loader
from bigtfm.data.mixture import Mixture
from bigtfm.data.objectives import make_objective
from bigtfm.data.order import Windows
from bigtfm.data.prefetch import Prefetcher
from bigtfm.data.special import SpecialIds

VOCAB_SIZE = 32_000
GOAL = 20e6  # tokens/s per core
OBJECTIVES = ("causal_lm", "masked_lm")
WORKERS = (None, 0, 1, 2)
STEP_SECONDS = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--megabytes", type=int, default=200, help="size of the data set (default 200)")
    parser.add_argument("--repeats", type=int, default=7, help="measurements of each cell (default 7)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(Path(folder), tokens=arguments.megabytes * 10**6 // 2)
        dataset = TokenDataset.open(folder)
        rows = [
            measure(dataset, seq_len, micro_batch, arguments.repeats)
            for seq_len in (128, 1024, 2048)
            for micro_batch in (8, 16)
        ]
        waits = [measure_waiting(dataset, kind, workers) for kind in OBJECTIVES for workers in WORKERS]
    if arguments.json:
        print(
            json.dumps(
                {"benchmark": "loader", "goal_tokens_per_second": GOAL, "rows": rows, "reading_ahead": waits}
            )
        )
        return
    print("seq_len  micro_batch  M tokens/s per core (min-max)  ceiling M tokens/s  ratio  us/batch")
    for row in rows:
        spread = (
            f"{row['tokens_per_second'] / 1e6:8.1f} ({row['slowest'] / 1e6:.1f}-{row['fastest'] / 1e6:.1f})"
        )
        print(
            f"{row['seq_len']:7}  {row['micro_batch']:11}  {spread:>30}  {row['ceiling'] / 1e6:18.1f}"
            f"  {row['ratio']:5.2f}  {row['microseconds_per_batch']:8.1f}"
        )
    print("\nobjective   read ahead by   ms a step waits (p50)  p99")
    for row in waits:
        print(f"{row['objective']:10}  {row['by']:14}  {row['p50']:21.2f}  {row['p99']:.2f}")


def measure(dataset: TokenDataset, seq_len: int, micro_batch: int, repeats: int) -> dict[str, Any]:
    """Both are measured in turn, so that a slower machine for a while slows both."""
    split = dataset.split("train")
    order = Mixture([Windows(split.num_tokens, seq_len)], seed=0)
    loader = Loader(split, order, seq_len, dataset.vocab_size)
    tokens = seq_len * micro_batch
    batches = max(20, 4_000_000 // tokens)
    windows = loader.ids(0, batches * micro_batch).reshape(batches, micro_batch)

    def ours(i: int) -> None:
        loader.batch(i * micro_batch, micro_batch)

    def ceiling(i: int) -> None:
        for window in windows[i].tolist():
            split.read(window * seq_len, (window + 1) * seq_len).astype(np.int64)

    speeds: dict[str, list[float]] = {"ours": [], "ceiling": []}
    for repeat in range(repeats + 1):  # the first warms up the page cache
        for name, run in (("ours", ours), ("ceiling", ceiling)):
            seconds = timed(run, batches)
            if repeat:
                speeds[name].append(batches * tokens / seconds)
    speed, top = float(np.median(speeds["ours"])), float(np.median(speeds["ceiling"]))
    return {
        "seq_len": seq_len, "micro_batch": micro_batch, "microseconds_per_batch": tokens / speed * 1e6,
        "tokens_per_second": speed, "slowest": min(speeds["ours"]), "fastest": max(speeds["ours"]),
        "ceiling": top, "ratio": speed / top,
    }  # fmt: skip


def measure_waiting(dataset: TokenDataset, kind: Any, workers: int | None) -> dict[str, Any]:
    """Milliseconds from asking for a step's batches to having them; workers None: made when asked for."""
    split, micro_batch, turns, steps = dataset.split("train"), 16, 4, 60
    objective = make_objective(ObjectiveSection(), kind, special_of_a_masked_model(), seed=0)
    order = Mixture([Windows(split.num_tokens, 1024)], seed=0)
    loader = Loader(split, order, 1024, dataset.vocab_size, objective)
    waited = []
    with nullcontext() if workers is None else Prefetcher(loader, workers) as ahead:
        for step in range(steps):
            starts = [(step * turns + turn) * micro_batch for turn in range(turns)]
            began = time.perf_counter()
            if ahead is None:
                for start in starts:
                    loader.batch(start, micro_batch)
            else:
                ahead.step(starts, micro_batch, turns * micro_batch)
            waited.append(1000 * (time.perf_counter() - began))
            time.sleep(STEP_SECONDS)
    by = {None: "nothing", 0: "a thread", 1: "1 process"}.get(workers, f"{workers} processes")
    p50, p99 = np.percentile(waited[5:], [50, 99]).tolist()
    return {"objective": kind, "by": by, "workers": workers, "p50": p50, "p99": p99}


def special_of_a_masked_model() -> SpecialIds:
    is_special = np.isin(np.arange(VOCAB_SIZE), (1, 2, 0))
    ordinary = np.flatnonzero(~is_special)
    return SpecialIds(VOCAB_SIZE, 1, 2, 0, (), 1, is_special, ordinary, None)


def timed(run: Callable[[int], None], times: int) -> float:
    started = time.perf_counter()
    for i in range(times):
        run(i)
    return time.perf_counter() - started


def write_dataset(folder: Path, tokens: int) -> None:
    """Random tokens in documents of 500 to 1500, laid out as `bigtfm prepare` does; validation is small."""
    rng = np.random.default_rng(0)
    (folder / "tokenizer").mkdir()
    model = b"a data set needs a tokenizer; reading batches does not"
    (folder / "tokenizer" / "tokenizer.model").write_bytes(model)
    identity = hashlib.sha256(model).hexdigest()
    header = {
        "dtype": "uint16", "vocab_size": VOCAB_SIZE, "source": {}, "options": {},
        "tokenizer": {
            "kind": "sentencepiece", "identity": identity, "bos_id": 1, "eos_id": 2,
            "files": [{"name": "tokenizer.model", "sha256": identity}],
        },
        "splits": {
            "train": write_split(folder, "train", tokens, rng),
            "validation": write_split(folder, "validation", 10_000, rng),
        },
    }  # fmt: skip
    (folder / "dataset.json").write_text(Header.model_validate(header).model_dump_json())


def write_split(folder: Path, name: str, tokens: int, rng: np.random.Generator) -> dict[str, Any]:
    ids = rng.integers(3, VOCAB_SIZE, tokens, dtype="<u2")
    starts = np.concatenate([[0], np.cumsum(rng.integers(500, 1501, tokens // 1000 * 2))])
    starts = starts[starts < tokens]
    ids[starts] = 1
    ids[np.append(starts[1:], tokens) - 1] = 2
    file = {
        "name": f"{name}-00000.bin",
        "tokens": tokens,
        "documents": len(starts),
        "index": f"{name}-00000.idx",
    }
    for key, column, values in (("name", "sha256", ids), ("index", "index_sha256", starts.astype("<u8"))):
        values.tofile(folder / str(file[key]))
        file[column] = hashlib.sha256(values.data).hexdigest()
    return {
        "documents": len(starts),
        "tokens": tokens,
        "bytes": tokens * 4,
        "max_id": int(ids.max()),
        "files": [file],
    }


if __name__ == "__main__":
    main()
