"""How fast `bigtfm prepare` tokenises: against the bare tokenizer on one core, and from one worker to two.

    python benchmarks/bench_prepare.py [--json] [--megabytes N] [--repeats N]

The text is the embedded corpus, repeated. On one core three things are timed in turn, in one process, on the
same speeches: bare sentencepiece on whole speeches; bare sentencepiece on parts of 1 KiB cut beforehand, the
fastest way to call it; and a unit of `prepare`: reading JSON, hashing, tokenising, writing, syncing. Goals:
a unit reaches 0.90 of the bare tokenizer; two workers, start-up included, are 1.7 times as fast as one.
Then each filter, on documents of some 3 kB, in turn with tokenising the same.

Each figure is the median of the repeats, with the least and the greatest. Elapsed times suffer from whatever
else runs (see `load`), so CPU seconds stand beside them: `cpu_bound_speedup`, twice the CPU seconds of one
worker by those of two, is what two idle cores would give but for waiting at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from sentencepiece import SentencePieceProcessor

from bigtfm.data.filtering import units as filters_units
from bigtfm.data.filtering.duplicates import compare
from bigtfm.data.filtering.settings import Contamination, Duplicates, Filters, Gopher, Language, Mask
from bigtfm.data.filtering.units import Filtering, judge_unit
from bigtfm.data.prepare import prepare
from bigtfm.data.sources import Reading, find_sources, plan_units
from bigtfm.data.tokenizer import SEGMENT_BYTES, segments
from bigtfm.data.train_tokenizer import train_sentencepiece
from bigtfm.data.units import Job, write_unit

CORPUS = resources.files("bigtfm.data") / "corpus" / "state_of_the_union.jsonl"
READING = Reading(text_column="text", document_bytes=65536, unit_bytes=2**40)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--megabytes", type=float, default=64, help="text for the scaling, in MB (default 64)"
    )
    parser.add_argument("--repeats", type=int, default=7, help="of each measurement (default 7)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-prepare-") as folder:
        figures = measure(Path(folder), options.megabytes, options.repeats)
    if options.json:
        print(json.dumps(figures))
    else:
        for name, figure in figures.items():
            print(f"{name:45} {figure}")


def measure(folder: Path, megabytes: float, repeats: int) -> dict[str, Any]:
    speeches = [json.loads(line)["text"].encode() for line in CORPUS.read_bytes().splitlines()]
    model = folder / "tokenizer.model"
    model.write_bytes(train_sentencepiece(speeches, vocab_size=2048))
    figures: dict[str, Any] = {"cores": len(os.sched_getaffinity(0)), "load": round(os.getloadavg()[0], 2)}
    figures |= per_core(folder, model, speeches, repeats)
    figures |= filtering(folder, model, speeches, repeats)
    figures |= scaling(folder, model, megabytes, repeats)
    return figures


def per_core(folder: Path, model: Path, speeches: list[bytes], repeats: int) -> dict[str, Any]:
    copies = 3
    text = folder / "per_core.jsonl"
    text.write_bytes(CORPUS.read_bytes() * copies)
    bare = SentencePieceProcessor(model_file=str(model))
    whole = speeches * copies
    parts = [part for speech in whole for part in segments(speech, SEGMENT_BYTES)]
    job = Job(folder / "units", model, "uint16", READING, 0.05)
    (unit,) = plan_units(find_sources([str(text)]), READING)
    size = sum(map(len, whole)) / 1e6
    timed: dict[str, Callable[[], Any]] = {
        "bare_whole": lambda: bare.encode(whole, out_type="numpy", num_threads=1),
        "bare_parts": lambda: bare.encode(parts, out_type="numpy", num_threads=1),
        "prepare": lambda: write_unit(job, 0, unit),
    }
    times = interleaved(timed, repeats)
    figures = {f"{name}_mb_per_cpu_second": spread([size / t.cpu for t in times[name]]) for name in timed}
    for name in ("bare_whole", "bare_parts"):
        pairs = list(zip(times[name], times["prepare"], strict=True))
        figures[f"prepare_over_{name}_cpu"] = spread([base.cpu / ours.cpu for base, ours in pairs])
        figures[f"prepare_over_{name}_elapsed"] = spread(
            [base.elapsed / ours.elapsed for base, ours in pairs]
        )
    return figures


def filtering(folder: Path, model: Path, speeches: list[bytes], repeats: int) -> dict[str, Any]:
    """What each filter does of a unit, models and evaluation sets loaded before."""
    words = b" ".join(speeches).decode().split()
    documents = [" ".join(words[start : start + 550]) for start in range(0, len(words), 550)]
    text, evaluation = folder / "filtered.jsonl", folder / "evaluation.jsonl"
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents * 4))
    drawn = random.Random(0)
    items = (" ".join(drawn.choices(words, k=60)) for _ in range(2000))
    evaluation.write_text("".join(json.dumps({"text": item}) + "\n" for item in items))
    sections: dict[str, dict[str, Any]] = {
        "gopher": {"gopher": Gopher()},
        "language": {"language": Language(keep=("en",))},
        "exact_duplicates": {"duplicates": Duplicates(near=0)},
        "near_duplicates": {"duplicates": Duplicates()},
        "mask": {"mask": Mask()},
        "contamination": {"contamination": Contamination(files=(str(evaluation),))},
    }
    sections["all"] = {name: section for each in sections.values() for name, section in each.items()}
    (unit,) = plan_units(find_sources([str(text)]), READING)
    filters_units._judge_of = lru_cache(maxsize=None)(filters_units._judge_of.__wrapped__)

    def run(name: str) -> Callable[[], Any]:
        setting = Filtering(folder / name, Filters(**sections[name]), READING)

        def judge() -> None:
            shutil.rmtree(setting.folder, ignore_errors=True)
            judge_unit(setting, 0, unit)
            compare(setting, 1, lambda *_: None)

        return judge

    job = Job(folder / "tokenised", model, "uint16", READING, 0.05)
    timed = {"tokenise": lambda: write_unit(job, 0, unit)} | {name: run(name) for name in sections}
    size = text.stat().st_size / 1e6
    times = interleaved(timed, repeats)
    return {f"{name}_mb_per_cpu_second": spread([size / t.cpu for t in times[name]]) for name in timed}


def scaling(folder: Path, model: Path, megabytes: float, repeats: int) -> dict[str, Any]:
    """`prepare` from start to end, workers' start-up included."""
    corpus = CORPUS.read_bytes()
    text = folder / "scaling.jsonl"
    text.write_bytes(corpus * max(int(megabytes * 1e6 / len(corpus)), 1))

    def run(workers: int) -> Callable[[], Any]:
        out = folder / f"out-{workers}"
        return lambda: prepare([str(text)], out, tokenizer=model, workers=workers, force=True, progress=False)

    times = interleaved({"1": run(1), "2": run(2)}, max(repeats // 2, 1))
    pairs = list(zip(times["1"], times["2"], strict=True))
    return {
        "seconds_1_worker": spread([t.elapsed for t in times["1"]]),
        "seconds_2_workers": spread([t.elapsed for t in times["2"]]),
        "cpu_seconds_1_worker": spread([t.cpu for t in times["1"]]),
        "cpu_seconds_2_workers": spread([t.cpu for t in times["2"]]),
        "speedup_2_workers": spread([one.elapsed / two.elapsed for one, two in pairs]),
        "cpu_bound_speedup": spread([2 * one.cpu / two.cpu for one, two in pairs]),
    }


class Times(NamedTuple):
    """Seconds; `cpu` is of this process and the children that it has waited for."""

    elapsed: float
    cpu: float


def interleaved(timed: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[Times]]:
    """Times of each, in turn, so that a noisy machine is noisy for all; a first round is not counted."""
    times: dict[str, list[Times]] = {name: [] for name in timed}
    for repeat in range(repeats + 1):
        for name, function in timed.items():
            before, started = os.times(), time.perf_counter()
            function()
            after = os.times()
            if repeat:
                times[name].append(Times(time.perf_counter() - started, sum(after[:4]) - sum(before[:4])))
    return times


def spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 3),
        "least": round(min(values), 3),
        "greatest": round(max(values), 3),
    }


if __name__ == "__main__":
    main()
