"""Which trial goes on, and how far: pure functions of what the trials have come to.

Successive halving: Jamieson and Talwalkar 2016; its budget, Li et al. 2018 (Hyperband); ASHA, its
asynchronous form: Li et al. 2020, "A system for massively parallel hyperparameter tuning", algorithm 2.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from bigtfm.config.problems import ConfigProblem
from bigtfm.sweep.space import SweepSection

Work = tuple[int, int]  # trial, rung
Results = Mapping[Work, float | None]  # None: it has failed


def rungs(settings: SweepSection, steps: int) -> list[int]:
    """Optimizer steps at which trials are compared, the whole training's last.

    Raises:
        ConfigProblem: halving has nothing to halve.
    """
    found = [steps]
    if settings.method == "random":
        return found
    eta = settings.eta
    while settings.trials // eta ** len(found) and -(-found[0] // eta) >= settings.min_steps:
        found.insert(0, -(-found[0] // eta))
    if len(found) == 1 or found[0] == found[1]:
        raise ConfigProblem(
            f"{settings.method} has nothing to halve: {settings.trials} trials, {steps} steps, eta {eta}, "
            f"min_steps {settings.min_steps}",
            where="sweep",
            fix='use more trials or a smaller min_steps, or method = "random"',
        )
    return found


def order(results: Results, rung: int, goal: str) -> list[int]:
    """The trials that have come to the rung, best first; those that failed on the way there are left out."""
    sign = 1 if goal == "min" else -1
    values = {trial: value for (trial, at), value in results.items() if at == rung and value is not None}
    return sorted(values, key=lambda trial: (sign * values[trial], trial))


def due(settings: SweepSection, last: int, results: Results, running: Collection[Work] = ()) -> list[Work]:
    """What may be trained now, the most urgent first. last: number of the last rung."""
    started = {*results, *running}
    if settings.method == "asha":
        return _asynchronous(settings, last, results, running, started)
    members = list(range(settings.trials))
    for rung in range(last + 1):
        if any((trial, rung) not in results for trial in members):
            return [(trial, rung) for trial in members if (trial, rung) not in started]
        best = order(results, rung, settings.goal)
        members = best[: max(1, len(members) // settings.eta)]
    return []


def _asynchronous(
    settings: SweepSection, last: int, results: Results, running: Collection[Work], started: set[Work]
) -> list[Work]:
    found: list[Work] = []
    for rung in reversed(range(last)):
        done = sum(at == rung for _, at in results)
        best = order(results, rung, settings.goal)[: done // settings.eta]
        found += [(trial, rung + 1) for trial in best if (trial, rung + 1) not in started]
    found += [(trial, 0) for trial in range(settings.trials) if (trial, 0) not in started]
    if found or running:
        return found
    for rung in reversed(range(last)):  # too few came to a rung for one in eta to go on: its best does
        if order(results, rung + 1, settings.goal):
            return []
        best = [t for t in order(results, rung, settings.goal) if (t, rung + 1) not in started]
        if best:
            return [(best[0], rung + 1)]
    return []
