"""Who this process is among the ranks of a job: read from the launcher's environment, here and nowhere else.

Ranks may be started by `deepspeed`, `torchrun`, or by hand with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
MASTER_PORT; with none of these set, the process is the only rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bigtfm.config.problems import ConfigProblem

RENDEZVOUS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


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
