"""What the planner expects of a cell, to stand beside what is measured."""

from __future__ import annotations

from dataclasses import dataclass

from bigtfm.bench.results import Row
from bigtfm.config.problems import ConfigProblem
from bigtfm.job import Job
from bigtfm.planner.hardware import device_of
from bigtfm.planner.memory import CATEGORIES, plan_memory
from bigtfm.planner.setting import setting_of
from bigtfm.planner.step_time import Rates, plan_step, table_rates


@dataclass(frozen=True)
class Expectation:
    """device: "cpu", or a GPU's name. rates: measured on it; None: a GPU's data sheet, and none for a CPU.

    Raises:
        ConfigProblem: the rates are another device's.
    """

    device: str
    rates: Rates | None = None

    def __post_init__(self) -> None:
        if self.rates is not None:
            self.rates.suit(self.device)

    def of(self, job: Job) -> Row:
        """Bytes of a rank by category and at the peak; where there are rates, seconds of a step."""
        try:
            attention = job.attention.name
        except ConfigProblem:  # it will be refused
            return {}
        setting = setting_of(
            job.run,
            job.deepspeed,
            vocab_size=job.resolved.vocab_size,
            world_size=job.resolved.world_size,
            device=self.device,
            attention=attention,
        )
        memory, gpu, rates = plan_memory(setting), device_of(self.device), self.rates
        if gpu is not None and (estimated := table_rates(gpu, setting.precision)) is not None:
            rates = estimated if rates is None else rates.completed(estimated)
        found: Row = {"memory": {name: getattr(memory, name) for name in (*CATEGORIES, "peak")}}
        if rates is None or rates.precision != setting.precision:
            return found
        if gpu is None and rates.ranks != setting.world_size:  # a CPU's ranks share its cores and memory
            return found
        return found | {"step_seconds": plan_step(setting, rates).seconds}
