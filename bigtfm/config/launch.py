"""Who this process is among the ranks of a job: read from the launcher's environment, here and nowhere else.

Ranks may be started by `deepspeed`, `torchrun`, `srun`, or by hand with RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR and MASTER_PORT; with none of these set, the process is the only rank.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from bigtfm.config.problems import ConfigProblem

RENDEZVOUS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
PORTS = range(10_000, 30_000)  # below those that systems give out by themselves (from 32768 on)


@dataclass(frozen=True)
class Launch:
    """This process among the ranks of the job."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @classmethod
    def from_environment(cls, environ: Mapping[str, str], local_rank: int | None = None) -> Launch:
        """The launcher's variables; `local_rank` is the flag that the `deepspeed` launcher adds.

        Raises:
            ConfigProblem: some of the variables are set but not all, or they contradict each other.
        """
        missing = [name for name in RENDEZVOUS if name not in environ]
        if "RANK" in missing and "WORLD_SIZE" in missing:
            return cls(0, 1, 0, 1)
        if "LOCAL_RANK" in missing and local_rank is not None:
            missing.remove("LOCAL_RANK")
        if missing:
            raise ConfigProblem(
                f"{', '.join(missing)} not set, but {', '.join(n for n in RENDEZVOUS if n in environ)} set",
                where="environment",
                fix=f"start every rank with all of {', '.join(RENDEZVOUS)}; a single process with none",
            )
        rank, world_size = _number(environ, "RANK"), _number(environ, "WORLD_SIZE")
        local = _number(environ, "LOCAL_RANK") if "LOCAL_RANK" in environ else int(local_rank or 0)
        local_world = next(
            (_number(environ, n) for n in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if n in environ), world_size
        )
        if not 0 <= rank < world_size or not 0 <= local < local_world:
            raise ConfigProblem(
                f"RANK {rank} of WORLD_SIZE {world_size}, LOCAL_RANK {local} of {local_world} can't be",
                where="environment",
                fix="number ranks from 0 to WORLD_SIZE - 1",
            )
        if not 0 < _number(environ, "MASTER_PORT") < 65536 or not environ["MASTER_ADDR"].strip():
            raise ConfigProblem(
                f"MASTER_ADDR={environ['MASTER_ADDR']!r} with MASTER_PORT={environ['MASTER_PORT']} can't be",
                where="environment",
                fix="set them to the name of rank 0's machine and a free port from 1 to 65535",
            )
        return cls(rank, world_size, local, local_world)


def _number(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise ConfigProblem(
            f"{name}={environ[name]!r} is not a whole number",
            where="environment",
            fix=f"set {name} to a number",
        ) from None


# --- srun


def of_srun(environ: Mapping[str, str]) -> dict[str, str]:
    """What a launcher would have set, for a rank that srun has started; empty for any other process.

    RANK, if set, comes from another launcher (torchrun, say, started by srun), which then has set them all.
    Otherwise MASTER_ADDR and MASTER_PORT are left as they are set. The port follows from job, step and
    restart, so that all ranks agree on it, and jobs that share a node, or a start and the one before, do not
    meet.

    Raises:
        ConfigProblem: the step does not have a task for each GPU, or a variable contradicts it.
    """
    if "RANK" in environ or not {"SLURM_STEP_ID", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"} <= environ.keys():
        return {}
    here = tasks_per_node(environ["SLURM_STEP_TASKS_PER_NODE"])[_number(environ, "SLURM_NODEID")]
    nodes = environ.get("SLURM_STEP_NODELIST") or environ["SLURM_JOB_NODELIST"]
    numbers = [int(environ.get(f"SLURM_{name}", "0")) for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT")]
    step = {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": environ["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(here),
    }
    for name, value in step.items():
        if environ.get(name, value) != value:
            raise ConfigProblem(
                f"{name}={environ[name]} is set, and srun has made it {value}",
                where="environment",
                fix=f"unset {name} in the batch script, or set RANK, too, in every task",
            )
    _one_task_a_gpu(environ, here)
    return step | {
        "MASTER_ADDR": environ.get("MASTER_ADDR") or next(hosts(nodes)),
        "MASTER_PORT": environ.get("MASTER_PORT") or str(_port(*numbers)),
    }


def hosts(nodelist: str) -> Iterator[str]:
    """The names in Slurm's short form, in its order: "n[1-3,07-08],login" is n1 n2 n3 n07 n08 login."""
    for name in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodelist):
        yield from _spelled_out(name)


def _spelled_out(name: str) -> Iterator[str]:
    before, bracket, rest = name.partition("[")
    if not bracket:
        yield name
        return
    numbers, _, after = rest.partition("]")
    for part in numbers.split(","):
        first, _, last = part.partition("-")
        for number in range(int(first), int(last or first) + 1):
            for tail in _spelled_out(after):
                yield f"{before}{number:0{len(first)}d}{tail}"


def tasks_per_node(short: str) -> list[int]:
    """Slurm's short form of a number for each node: "4(x2),3" is 4 4 3."""
    counts: list[int] = []
    for part in short.split(","):
        number, _, times = part.rstrip(")").partition("(x")
        counts += [int(number)] * int(times or 1)
    return counts


def _port(job: int, step: int, restart: int) -> int:
    """Neighbouring jobs, steps and restarts have ports of their own; primes keep their sums apart."""
    return PORTS[(job + 4999 * step + 7919 * restart) % len(PORTS)]


def _one_task_a_gpu(environ: Mapping[str, str], tasks: int) -> None:
    gpus = _number(environ, "SLURM_GPUS_ON_NODE") if "SLURM_GPUS_ON_NODE" in environ else tasks
    if gpus != tasks:
        raise ConfigProblem(
            f"this node has {gpus} of the job's GPUs, and srun has started {tasks} "
            f"task{'s' if tasks > 1 else ''} on it: a rank needs one each",
            where="Slurm",
            fix=f"ask for --gpus-per-node={gpus} with --ntasks-per-node={gpus}",
        )
    visible = environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if visible != [""] and len(visible) < tasks:
        raise ConfigProblem(
            f"{tasks} tasks on this node, and each sees {len(visible)} GPU{'s' if len(visible) > 1 else ''}: "
            "NCCL reaches a neighbour's memory only where it sees its GPU",
            where="Slurm",
            fix=f"ask for --gpus-per-node={tasks} instead of --gpus-per-task, without --gpu-bind",
        )
