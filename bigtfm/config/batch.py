"""The global batch as a function of the step: the run config's ramp-up, then the DeepSpeed JSON's."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from math import gcd

from bigtfm.config.problems import ConfigProblem
from bigtfm.config.sections import BatchSection


@dataclass(frozen=True)
class GlobalBatch:
    """Sequences of each optimizer step. No rank, layout or history decides them."""

    final: int  # sequences, behind the ramp-up
    sizes: tuple[int, ...] = ()  # sequences, in each stage of the ramp-up
    steps: tuple[int, ...] = ()  # optimizer steps of each

    def at(self, step: int) -> int:
        """Sequences of optimizer step `step`, counted from 1."""
        stage = bisect_right(list(accumulate(self.steps)), step - 1)
        return (*self.sizes, self.final)[stage]

    def samples(self, steps: int) -> int:
        """Sequences of the first `steps` steps together."""
        return sum(size * count for size, count in self.parts(steps))

    def parts(self, steps: int) -> list[tuple[int, int]]:
        """(sequences of a step, number of such steps) of a run of `steps`, in their order."""
        found, left = [], steps
        for size, count in zip((*self.sizes, self.final), (*self.steps, steps), strict=True):
            if part := min(count, left):
                found.append((size, part))
                left -= part
        return found

    def steps_left(self, step: int, steps: int) -> float:
        """What is left of a run of `steps`, counted in steps as large as step `step`, the last one."""
        return (self.samples(steps) - self.samples(step)) / self.at(step)

    def steps_within(self, samples: int) -> int:
        """How many steps so many sequences suffice for."""
        done = 0
        for size, count in zip(self.sizes, self.steps, strict=True):
            part = min(count, samples // size)
            done, samples = done + part, samples - part * size
            if part < count:
                return done
        return done + samples // self.final


def global_batch(batch: BatchSection, final: int, micro_batch: int, world_size: int) -> GlobalBatch:
    """The run's batch on a layout that makes every size of it exactly.

    final: sequences, as the DeepSpeed JSON states them.

    Raises:
        ConfigProblem: a size is none that the layout can make, or not below the final one.
    """
    once = micro_batch * world_size
    for size in batch.rampup_sizes:
        if size % once:
            near = [n for n in (size // once * once, -(-size // once) * once) if 0 < n < final]
            fixes = [f"write {' or '.join(map(str, near))}"] if near else []
            if size % world_size == 0:
                fitting = gcd(size // world_size, micro_batch)
                fixes.append(f"set train_micro_batch_size_per_gpu to {fitting} in the DeepSpeed JSON")
            raise ConfigProblem(
                f"batch.rampup_sizes has {size}, which is not a multiple of {once} = {micro_batch} micro "
                f"batch x {world_size} ranks",
                where="run config",
                fix=", or ".join(fixes) or "run on fewer ranks",
            )
    if batch.rampup_sizes and batch.rampup_sizes[-1] >= final:
        raise ConfigProblem(
            f"batch.rampup_sizes ends with {batch.rampup_sizes[-1]}, and train_batch_size, that it leads up "
            f"to, is {final}",
            where="run config",
            fix="leave out the sizes that are not below train_batch_size",
        )
    return GlobalBatch(final, batch.rampup_sizes, batch.rampup_steps)
