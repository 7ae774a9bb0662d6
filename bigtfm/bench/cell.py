"""What each rank of a cell runs, `python -m bigtfm.bench.cell TRIAL.json RUNNER`: a training of some steps.

Beside it stands a supervisor, as beside any training: memory that runs out, a crash and a hang end in RUN/
failure.json, which the runner reads. What was measured, rank 0 writes to RUN/measured.json.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Self

from bigtfm.config.launch import Launch
from bigtfm.config.sections import GuardSection
from bigtfm.resilience.lifeline import Enough, Lifeline, die_with
from bigtfm.resilience.supervisor import supervise

if TYPE_CHECKING:
    from bigtfm.bench.clock import StepClock
    from bigtfm.engine.distributed import Ranks
    from bigtfm.job import Job

MEASURED = "measured.json"
SPLIT_STEPS = 3  # on a GPU, whose phases are told apart by waiting for it


@dataclass(frozen=True)
class Trial:
    """One run of a cell: what the runner asks its ranks for."""

    config: str
    deepspeed_json: str
    overrides: list[str]
    run_dir: str
    warm_up: int
    steps: int
    memory: bool
    hang_seconds: float
    memory_gib: float | None

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Self:
        return cls(**json.loads(path.read_bytes()))


def main() -> None:
    """A rank of the trial in the file that the command line names, until the process named there ends.

    Left behind, it would train beside the next cell, and in its folder.
    """
    die_with(int(sys.argv[2]))
    trial = Trial.read(Path(sys.argv[1]))
    launch = Launch.from_environment(os.environ)
    guard = GuardSection(hang_seconds=trial.hang_seconds)
    trainer = lambda lifeline, _: run(trial, launch, lifeline)  # noqa: E731
    raise SystemExit(supervise(launch, Path(trial.run_dir), guard, trainer))


def run(trial: Trial, launch: Launch, lifeline: Lifeline) -> None:
    """Trains and writes down what that took; a collective of all ranks.

    Raises:
        Problem: as training does.
    """
    _limit_memory(trial.memory_gib)
    from bigtfm.bench.ceiling import matmul_flops
    from bigtfm.bench.clock import StepClock
    from bigtfm.engine import distributed
    from bigtfm.job import check_job
    from bigtfm.train import train

    job = check_job(Path(trial.config), Path(trial.deepspeed_json), trial.overrides, launch.world_size)
    assert lifeline.pulse is not None
    synchronize = _synchronize()
    measured = trial.warm_up + trial.steps
    clock = StepClock(lifeline.pulse.memory, measured + SPLIT_STEPS, measured + 1, synchronize)
    lifeline.pulse, lifeline.saves = clock, False
    ranks = distributed.start(launch, pulse=clock)
    ceiling = matmul_flops(ranks.device, job.resolved.precision, synchronize)
    _forget_peak()
    try:
        train(job, launch, ranks, lifeline)
    except Enough:
        mine = _of_rank(trial, clock, ranks) | {"ceiling": ceiling}
    else:
        raise AssertionError("the training is shorter than its measurement")
    losses = _losses(job) if launch.rank == 0 else {}
    if trial.memory and not job.run.compute.compile_blocks:  # compiled code is not seen by the counter
        mine["memory"] = _counted(job, ranks, clock) | mine["memory"]
    found = ranks.gather(mine)
    if launch.rank == 0:
        used = {"device": ranks.device_name, "threads_used": _threads(), "attention_used": job.attention.name}
        measured_by_all = json.dumps(together(found) | used | losses)
        (Path(trial.run_dir) / MEASURED).write_text(measured_by_all + "\n", encoding="utf-8")
    ranks.close()


def _counted(job: Job, ranks: Ranks, clock: StepClock) -> dict[str, int]:
    """Bytes of live tensors at their peak, by what they are for: of the same training once more."""
    from bigtfm.bench.memory import STEPS, LiveBytes
    from bigtfm.train import train

    gc.collect()
    counter = LiveBytes((job.resolved.vocab_size, job.resolved.padded_vocab_size))
    clock.anew(STEPS, counter.enter)
    lifeline = Lifeline(pulse=clock)
    lifeline.saves = False
    try:
        with counter:
            train(job, ranks.launch, ranks, lifeline)
    except Enough:
        pass
    return counter.result.at_peak | {"peak": counter.result.peak}


def _of_rank(trial: Trial, clock: StepClock, ranks: Ranks) -> dict[str, Any]:
    timed = clock.steps[trial.warm_up : trial.warm_up + trial.steps]
    split = timed if ranks.device.type == "cpu" else clock.steps[-SPLIT_STEPS:]
    return {
        "seconds": [step.seconds for step in timed],
        "split": {name: median(step.phases[name] for step in split) for name in split[0].phases},
        "memory": _memory(),
    }


def together(found: list[dict[str, Any]]) -> dict[str, Any]:
    """A step lasts as long as on the slowest rank; of memory the largest, of the rest the mean."""
    first = found[0]

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    return {
        "seconds": [max(step) for step in zip(*(rank["seconds"] for rank in found), strict=True)],
        "split": {name: mean([rank["split"][name] for rank in found]) for name in first["split"]},
        "memory": {name: max(rank["memory"][name] for rank in found) for name in first["memory"]},
        "ceiling": mean([rank["ceiling"] for rank in found]),  # of each rank, while all compute
    }


def _losses(job: Job) -> dict[str, Any]:
    from bigtfm.tracking import read_metrics

    rows = read_metrics(job.run.run_dir / "metrics.jsonl")
    return {"loss": rows[-1]["loss"], "loss_step": rows[-1]["step"]}


def _synchronize() -> Any:
    import torch

    return torch.cuda.synchronize if torch.cuda.is_available() else lambda: None


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _memory() -> dict[str, int]:
    """Bytes that torch's allocator has had at most; nothing on a CPU, which has none."""
    import torch

    if not torch.cuda.is_available():
        return {}
    return {"peak": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}


def _forget_peak() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _limit_memory(gib: float | None) -> None:
    if gib is not None:
        import resource

        limit = int(gib * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


if __name__ == "__main__":
    main()
