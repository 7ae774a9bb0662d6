"""What is asked before a training, and looked at while it goes on: room, the same data everywhere, memory."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bigtfm.config.problems import ConfigProblem, DataProblem, Problem, first_change
from bigtfm.data.indexed import HEADER_NAME
from bigtfm.data.verification import Verification, large_files, share
from bigtfm.engine import checkpoint, storage
from bigtfm.engine.checkpoint import Progress
from bigtfm.engine.distributed import Ranks
from bigtfm.job import Job
from bigtfm.planner.memory import plan_memory, size_text
from bigtfm.planner.parameters import checkpoint_bytes
from bigtfm.planner.setting import Setting, setting_of
from bigtfm.resilience import events, out_of_memory
from bigtfm.resilience.lifeline import Lifeline, Restart
from bigtfm.run_directory import brief, identity


def require_same_on_all(job: Job, ranks: Ranks) -> None:
    """Compares what the ranks make of their files: each reads its own machine's.

    Raises:
        DataProblem: a rank has another data set or tokenizer than rank 0.
        ConfigProblem: anything else that decides the curve is another there.
    """
    run, resolved = job.run, job.resolved
    mine = identity(job) | {name: getattr(resolved, name) for name in ("steps", "micro_batch", "precision")}
    mine |= {"ZeRO stage": resolved.zero_stage}
    mine |= run.model_dump(mode="json", include={"eval", "save", "guard", "compute"})
    (_, first), *others = ranks.gather((socket.gethostname(), mine))
    for rank, (host, other) in enumerate(others, 1):
        for part in first:
            if other[part] != first[part]:
                name, here, there = first_change(part, first[part], other[part])
                kind = DataProblem if part in ("data", "tokenizer") else ConfigProblem
                raise kind(
                    f"rank {rank} ({host}) has another {part} than rank 0: {name} is {brief(there)} there, "
                    f"{brief(here)} here",
                    where=", ".join(job.run.data.paths) if kind is DataProblem else "the ranks' files",
                    fix="give all machines the same files (a streamed data set by its commit, "
                    "hf:NAME#COMMIT) and all ranks the same command",
                )


def require_room(job: Job) -> None:
    """Compares the disk's free bytes with what checkpoints take, before anything is built.

    Raises:
        StorageProblem: there is not even room for one.
    """
    root, options = job.checkpoints, job.run.save
    for path in checkpoint.leftovers(root):
        storage.remove(path)
    there = checkpoint.steps_in(root)
    free, resolved = storage.free_bytes(root), job.resolved
    needed = checkpoint_bytes(resolved.parameters, resolved.optimizer, resolved.trained)
    if free is None or job.resolved.steps in there:
        return
    retention = checkpoint.Retention(max(1, options.keep - 1), options.keep_every)
    spare = checkpoint.surplus(root, retention, max(there, default=0), None)
    freed = sum(file.stat().st_size for path in spare for file in path.iterdir())
    if free + freed < needed:
        raise storage.full(storage.FULL[errno.ENOSPC], root, needed)
    lacking = max(1, options.keep + 1 - len(there))
    if free < lacking * needed:
        events.tell(
            job.run.run_dir,
            "little room",
            f"{root}: {free:,} bytes are free, and save.keep={options.keep} wants {lacking * needed:,} for "
            f"{lacking} more of {needed:,}: where a save finds no room, checkpoints before the newest are "
            "deleted before it, not after it",
            free=free,
            needed=needed,
        )


def verification_of(job: Job, ranks: Ranks) -> Verification:
    """Reads the large files of the data, in turns with the other ranks: data.verify says when.

    Raises:
        DataProblem: one is not what it was.
    """
    data = job.run.data
    files = large_files(job.datasets, job.run.seq_len, data.packing) if data.verify != "never" else []
    seen = [(path / HEADER_NAME).stat() for path in map(Path, data.paths)]
    places = ranks.gather([(status.st_ino, status.st_mtime_ns) for status in seen])
    verification = Verification(files[share(places, ranks.rank)])
    if data.verify == "start":
        with ranks.together("reading the data"):
            verification.wait()
            verification.require_sound()
    return verification


@contextmanager
def told_when_out_of_memory(job: Job, ranks: Ranks, progress: Progress, lifeline: Lifeline) -> Iterator[None]:
    """Says which numbers to lower when the block runs out of memory, or has them lowered.

    Raises:
        ConfigProblem: memory ran out.
        Restart: it did, and all ranks start again with a smaller micro batch (guard.halve_micro_batch).
        RequeueRequested: the same where there is no supervisor to start them.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, Problem) or not out_of_memory.is_out_of_memory(error):
            raise
        run, resolved = job.run, job.resolved
        setting = _setting(job, ranks.device_name)
        plan = plan_memory(setting)
        lasting = plan.states > plan.peak / 2
        told = out_of_memory.problem(
            error,
            where=f"rank {ranks.rank}, step {progress.step + 1}",
            micro_batch=resolved.micro_batch,
            accumulation=resolved.accumulation,
            seq_len=resolved.seq_len,
            planned=plan.line,
            halve=run.guard.halve_micro_batch,
            others=_other_means(setting, None if lasting else setting.recompute),
            lasting=lasting,
        )
        smaller = out_of_memory.smaller(resolved.micro_batch)
        if run.guard.halve_micro_batch and smaller is not None:
            out_of_memory.remember(run.run_dir, job.stated_micro_batch, smaller)
            if lifeline.supervised:
                line = f"{told.where}: {told.what}; all ranks start again with micro batch {smaller}"
                events.tell(run.run_dir, "out of memory", line, rank=ranks.rank, micro_batch=smaller)
                raise Restart(micro_batch=smaller) from None
        raise told from None


@contextmanager
def told_when_too_large(job: Job, ranks: Ranks) -> Iterator[None]:
    """Says what takes less memory when the model and its optimizer run out of it in the block.

    Raises:
        ConfigProblem: they did.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, Problem) or not out_of_memory.is_out_of_memory(error):
            raise
        setting = _setting(job, ranks.device_name)
        raise out_of_memory.while_building(
            error,
            where=f"rank {ranks.rank}",
            planned=f"{size_text(plan_memory(setting).states)} of weights, gradients and optimizer",
            others=_other_means(setting, None),
        ) from None


def _other_means(setting: Setting, recompute: str | int | None) -> list[str]:
    offloads = setting.offload("optimizer") != "none"
    return out_of_memory.other_means(
        stage=setting.stage, world_size=setting.world_size, recompute=recompute, offloads=offloads,
        on_cpu=setting.on_cpu,
    )  # fmt: skip


def _setting(job: Job, device: str) -> Setting:
    """This job on this device, as the planner takes it."""
    return setting_of(
        job.run,
        job.deepspeed,
        vocab_size=job.resolved.vocab_size,
        world_size=job.resolved.world_size,
        device=device,
        attention=job.attention.name,
    )
