"""The process group: how ranks meet, and the few collectives that the loop itself needs."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from safetensors import SafetensorError

from bigtfm.config.launch import RENDEZVOUS, Launch
from bigtfm.config.problems import ConfigProblem, Problem, StorageProblem, too_many_files
from bigtfm.resilience import collectives
from bigtfm.resilience.pulse import Pulse

_TRIES = 5  # ports of our own choice


@dataclass(frozen=True)
class Ranks:
    """The running process group. Tensors live on `device`; host numbers travel over gloo, without stalls."""

    launch: Launch
    device: torch.device
    control: torch.distributed.ProcessGroup
    second: torch.distributed.ProcessGroup  # of one other thread
    pulse: Pulse  # what this rank is doing, as its supervisor sees it

    @property
    def aside(self) -> Ranks:
        """The same ranks for a second thread, whose collectives do not mix with the loop's."""
        return replace(self, control=self.second)

    @property
    def rank(self) -> int:
        return self.launch.rank

    @property
    def world_size(self) -> int:
        return self.launch.world_size

    @property
    def device_name(self) -> str:
        """ "cpu", or the GPU's name."""
        return "cpu" if self.device.type == "cpu" else torch.cuda.get_device_name(self.device)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise sum over ranks, in float64 (exact for whole numbers below 2^53)."""
        total = torch.tensor(values, dtype=torch.float64)
        torch.distributed.all_reduce(total, group=self.control)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of the ranks."""
        values: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(values, value, group=self.control)
        return values

    def gather_tensor(self, values: torch.Tensor) -> torch.Tensor:
        """Every rank's values [n], on the host and as long on each: [ranks, n]."""
        rows = [torch.empty_like(values) for _ in range(self.world_size)]
        torch.distributed.all_gather(rows, values, group=self.control)
        return torch.stack(rows)

    def from_first(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        values = [value]
        torch.distributed.broadcast_object_list(values, src=0, group=self.control)
        return values[0]

    @contextmanager
    def together(self, doing: str) -> Iterator[None]:
        """If the block fails on any rank, all ranks raise the same: none waits for one that left.

        Raises:
            StorageProblem: writing failed.
            Problem: what the block raised.
        """
        failure: Problem | None = None
        try:
            yield
        except Problem as problem:
            failure = problem
        except (OSError, SafetensorError) as error:
            failure = too_many_files(error) or StorageProblem(
                f"{doing} failed: rank {self.rank}: {error}",
                where="storage",
                fix="free space or mend the disk, then start the same command again: it resumes where it can",
            )
        for found in self.gather(failure):
            if found is not None:
                raise found

    def close(self) -> None:
        torch.distributed.destroy_process_group()


def start(launch: Launch, timeout: timedelta = timedelta(minutes=30), pulse: Pulse | None = None) -> Ranks:
    """Joins the process group under the accelerator's own backend (nccl on GPUs, gloo on CPUs).

    pulse: where this process tells what it is doing; None: nobody looks.
    """
    pulse = pulse or Pulse()
    pulse.enter("meet")
    collectives.note_in(pulse)  # before DeepSpeed takes them by name
    alone = launch.world_size == 1 and "MASTER_PORT" not in os.environ
    if alone:
        values = ("0", "1", "0", "127.0.0.1", str(_free_port()))
        os.environ.update(zip(RENDEZVOUS, values, strict=True))  # without them DeepSpeed looks for MPI
    try:
        socket.getaddrinfo(os.environ["MASTER_ADDR"], None)
    except (socket.gaierror, UnicodeError) as error:
        why = getattr(error, "strerror", "no host name")
        raise ConfigProblem(
            f"MASTER_ADDR {os.environ['MASTER_ADDR']} can't be resolved ({why})",
            where="environment",
            fix="set MASTER_ADDR to the host name or address of rank 0's machine",
        ) from None
    os.environ.setdefault("LOCAL_RANK", str(launch.local_rank))
    if "OMP_NUM_THREADS" not in os.environ:  # ranks on one machine share its cores, not fight for them
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // launch.local_world_size))
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    deepspeed.utils.logger.setLevel(logging.ERROR)
    # On a CPU this op compiles in silence for minutes at the first start; killed, it blocks the next one.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        _require_device(accelerator.device_count(), launch)
        accelerator.set_device(launch.local_rank)
    for left in reversed(range(_TRIES)):
        try:
            deepspeed.init_distributed(timeout=timeout, verbose=False)
            break
        except torch.distributed.DistNetworkError:
            if not alone or not left:  # a port that we chose may be taken by now
                raise
            os.environ["MASTER_PORT"] = str(_free_port())
    control, second = (torch.distributed.new_group(backend="gloo", timeout=timeout) for _ in range(2))
    return Ranks(launch, torch.device(accelerator.current_device_name()), control, second, pulse)


def _require_device(count: int, launch: Launch) -> None:
    if launch.local_rank >= count:
        raise ConfigProblem(
            f"rank {launch.rank} needs device {launch.local_rank}, this machine has {count}",
            where="launcher",
            fix=f"start at most {count} ranks on this machine",
        )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
