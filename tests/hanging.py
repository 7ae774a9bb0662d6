"""Jobs that hang: one rank is broken at step 7, in its own process, in one of several ways.

`python tests/hanging.py OUT -n 20` is the campaign: each fault on each rank, and what the job said of it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any

import rank_runner

from bigtfm.data.loader import Loader
from bigtfm.resilience.processes import Process, descendants

STEP = 7
SAMPLES = 8  # a step
HERE = Path(__file__).name


def struck() -> None:
    """Notes when the fault begins."""
    Path(f"struck-{os.environ['RANK']}").write_text(str(time.time()))


class SleepyLoader(Loader):
    """Sleeps before the first batch of step 7, wherever batches are made."""

    def batch(self, first_sample: int, count: int) -> Any:
        if first_sample >= (STEP - 1) * SAMPLES:
            struck()
            time.sleep(3600)  # LINE sleeping_reader sleeping_worker
        return super().batch(first_sample, count)


def sleeping_reader() -> None:
    from bigtfm import train

    batches_of = train.batches_of

    def sleepy(job: Any, split: str) -> Any:
        loader = batches_of(job, split)
        if split == "train":
            loader.__class__ = SleepyLoader
        return loader

    train.batches_of = sleepy


def _in_forward(fault: Callable[[], object]) -> None:
    """Calls the fault in the forward of step 7."""
    from bigtfm.model.gpt import GPT

    forward, calls = GPT.forward, [0]

    def broken_forward(model: Any, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1  # one a step
        if calls[0] == STEP:
            struck()
            fault()
        return forward(model, *args, **kwargs)

    GPT.forward = broken_forward


def held_gil() -> None:
    def hold() -> None:
        ctypes.PyDLL(None).sleep(3600)  # LINE held_gil

    _in_forward(hold)


def stopped() -> None:
    def stop() -> None:
        os.kill(os.getpid(), signal.SIGSTOP)  # LINE stopped

    _in_forward(stop)


def exited() -> None:
    _in_forward(lambda: os._exit(0))


def left_out_sum() -> None:
    """The loop's sum of labels is left out."""
    from bigtfm.engine.distributed import Ranks

    total, done = Ranks.sum, []

    def forgetful(ranks: Any, values: Any) -> Any:
        now = ranks.pulse.read()
        if (now.step, now.phase) == (STEP, "data") and not done:
            struck()
            done.append(STEP)
            return list(values)
        return total(ranks, values)

    Ranks.sum = forgetful


def left_out_reduction() -> None:
    """DeepSpeed's reduction of gradients is left out."""
    from deepspeed.comm.torch import TorchBackend

    all_reduce, seen = TorchBackend.all_reduce, [0]

    def forgetful(backend: Any, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        seen[0] += tensor.numel() > 1000
        if seen[0] == STEP and tensor.numel() > 1000:
            struck()
            return None
        return all_reduce(backend, tensor, *args, **kwargs)

    TorchBackend.all_reduce = forgetful


def slow() -> None:
    """No hang: each forward takes 0.2 s more."""
    from bigtfm.model.gpt import GPT

    forward = GPT.forward

    def slow_forward(model: Any, *args: Any, **kwargs: Any) -> Any:
        time.sleep(0.2)
        return forward(model, *args, **kwargs)

    GPT.forward = slow_forward


FAULTS: dict[str, Callable[[], None]] = {
    "stopped": stopped,
    "sleeping_reader": sleeping_reader,
    "sleeping_worker": sleeping_reader,
    "held_gil": held_gil,
    "left_out_sum": left_out_sum,
    "left_out_reduction": left_out_reduction,
    "exited": exited,
    "slow": slow,
    "none": lambda: None,
}


def line_of(fault: str) -> str:
    """Where the fault stands: file:line in this file; "": it is the line of what was left out."""
    lines = Path(__file__).read_text().splitlines()
    found = [n for n, line in enumerate(lines, 1) if fault in line.partition("# LINE")[2].split()]
    return f"{HERE}:{found[0]}" if found else ""


def broken_rank() -> None:
    """The program of a rank."""
    multiprocessing.current_process()._config["daemon"] = False  # else it may have no data workers
    if os.environ["RANK"] == os.environ["VICTIM"]:
        FAULTS[os.environ["FAULT"]]()
    from bigtfm.cli import app

    app()


@dataclass
class Hung:
    """A job that was broken, and what came of it."""

    fault: str
    victim: int
    stage: int
    folder: Path
    codes: list[int] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)  # "bigtfm: ..." of all ranks
    named: float = -1.0  # seconds from the fault to the first line that says something; -1: none came
    gone: float = -1.0  # seconds from the fault until all ranks had ended
    left: list[int] = field(default_factory=list)  # processes that stayed

    @property
    def wrong(self) -> list[str]:
        """What is not as it should be."""
        errors = [line for line in self.lines if line.startswith("bigtfm: error: ")]
        line = errors[0] if errors else ""
        what = {
            "left_out_sum": "has left out all_reduce (bigtfm/train.py:",
            "left_out_reduction": "has left out all_reduce (bigtfm/train.py:",
            "exited": "left with exit code 0 in forward at step 7 (bigtfm/train.py:",
        }.get(self.fault, line_of(self.fault))
        checks = {
            f"exit codes {self.codes}": self.codes == [79, 79],
            f"{len(errors)} lines": len(errors) == 1,
            f"not rank {self.victim}: {line}": re.match(f"bigtfm: error: rank {self.victim}[ :]", line),
            f"no {what}: {line}": what in line,
            f"not step {STEP}: {line}": f"at step {STEP}" in line,
            f"named after {self.named:.1f} s": 0 <= self.named < 30,
            f"processes {self.left} stayed": not self.left,
        }
        return [text for text, right in checks.items() if not right]


def hang(fault: str, victim: int, stage: int, folder: Path, data: Path, *overrides: str) -> Iterator[Hung]:
    """Starts such a job of two ranks; yields until it is over, so that several can run at once."""
    from conftest import TINY

    folder.mkdir(parents=True)
    settings = {
        "train_batch_size": SAMPLES,
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "weight_decay": 0.1}},
        "zero_optimization": {"stage": stage},
    }
    (folder / "deepspeed.json").write_text(json.dumps(settings))
    args = ["train", "--deepspeed_config", "deepspeed.json", *TINY, f"data.path={data}", "run.steps=40"]
    args += [f"data.workers={int(fault == 'sleeping_worker')}", *overrides]
    environ = {"FAULT": fault, "VICTIM": str(victim)}
    started = rank_runner.start(args, folder, 2, environ, program=broken_rank)
    try:
        yield from _follow(Hung(fault, victim, stage, folder), started)
    finally:  # who has seen enough closes the generator
        for process in started:
            process.kill()


def _follow(result: Hung, started: Sequence[Any]) -> Iterator[Hung]:
    folder, seen = result.folder, set[Process]()
    while any(process.is_alive() for process in started):
        began = _struck(folder)
        if began:
            seen |= {child for p in started for child in descendants(p.pid or 0)}
            if result.named < 0 and any(
                re.search(r"bigtfm: (error|note: rank)", o) for o in _outputs(folder)
            ):
                result.named = time.time() - began
        yield result
    result.gone = time.time() - (_struck(folder) or 0)
    result.codes = [int(process.exitcode or 0) for process in started]
    result.lines = said(folder)
    if result.named < 0 and result.lines:
        result.named = result.gone
    while True:
        result.left = [child.pid for child in seen if child.lives]
        if not result.left or time.time() - (_struck(folder) or 0) > result.gone + 10:
            break
        time.sleep(0.1)
    yield result


def _struck(folder: Path) -> float:
    found = [path.read_text() for path in folder.glob("struck-*")]
    return float(found[0] or 0) if found else 0.0


def said(folder: Path) -> list[str]:
    """The lines that a job has said beside its progress."""
    return [line for o in _outputs(folder) for line in o.splitlines() if line.startswith("bigtfm: ")]


def _outputs(folder: Path) -> list[str]:
    return [path.read_text(errors="replace") for path in sorted(folder.glob("rank-*.out"))]


def all_of(jobs: Sequence[Iterator[Hung]], at_once: int = 2) -> Iterator[Hung]:
    """Runs jobs, some at a time; yields each when it is over."""
    waiting, running = list(jobs), list[tuple[Iterator[Hung], Hung]]()
    while waiting or running:
        while waiting and len(running) < at_once:
            job = waiting.pop(0)
            running.append((job, next(job)))
        time.sleep(0.1)
        for job, result in list(running):
            if next(job, None) is None:
                running.remove((job, result))
                yield result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--data", type=Path, required=True, help="a prepared data set")
    parser.add_argument("-n", type=int, default=20, help="jobs")
    parser.add_argument("--faults", default="", help="some of them, with commas")
    parser.add_argument("overrides", nargs="*", help="of the run config")
    options = parser.parse_intermixed_args()
    names = options.faults.split(",") if options.faults else [n for n in FAULTS if n not in ("slow", "none")]
    cells = islice(cycle(product((0, 1), (0, 2), names)), options.n)
    jobs = [
        hang(name, victim, stage, options.out / f"{n:03}-{name}", options.data, *options.overrides)
        for n, (victim, stage, name) in enumerate(cells)
    ]
    wrong = 0
    for done in all_of(jobs):
        wrong += bool(done.wrong)
        verdict = "WRONG " + "; ".join(done.wrong) if done.wrong else "right"
        times = f"named after {done.named:4.1f} s, all gone after {done.gone:4.1f} s"
        print(f"{done.fault:20} rank {done.victim} stage {done.stage}: {times}: {verdict}")
        print(f"    {done.lines[-1] if done.lines else ''}", flush=True)
    print(f"{options.n - wrong} of {options.n} right")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
