"""Who goes on: successive halving and ASHA, played with trials whose results are known beforehand."""

from __future__ import annotations

import random

import pytest

from bigtfm.config.problems import ConfigProblem
from bigtfm.sweep.halving import Work, due, rungs
from bigtfm.sweep.space import SweepSection


def settings(method: str = "halving", trials: int = 9, **more: object) -> SweepSection:
    return SweepSection.model_validate(
        {"deepspeed_config": "ds.json", "method": method, "trials": trials, **more}
    )


def play(
    given: SweepSection, last: int, value: dict[int, float | None], jobs: int = 1, seed: int = 0
) -> dict[Work, float | None]:
    """Runs until nothing is due, `jobs` at a time; which of those that run ends first is drawn."""
    results: dict[Work, float | None] = {}
    running: list[Work] = []
    drawn = random.Random(seed)
    while True:
        for work in due(given, last, results, running)[: jobs - len(running)]:
            assert work not in results
            assert work not in running
            running.append(work)
        if not running:
            return results
        ended = running.pop(drawn.randrange(len(running)))
        results[ended] = value[ended[0]]


def test_rungs_end_with_the_whole_training() -> None:
    assert rungs(settings(trials=9), 90) == [10, 30, 90]
    assert rungs(settings(trials=16, eta=4), 400) == [25, 100, 400]
    assert rungs(settings(trials=9, min_steps=30), 90) == [30, 90]
    assert rungs(settings("random"), 90) == [90]
    with pytest.raises(ConfigProblem, match="has nothing to halve: 2 trials"):
        rungs(settings(trials=2), 90)


@pytest.mark.parametrize("jobs", [1, 4])
def test_halving_trains_the_best_to_the_end_whatever_runs_at_a_time(jobs: int) -> None:
    values: dict[int, float | None] = {trial: float(trial) for trial in range(9)}
    results = play(settings(), 2, values, jobs)
    assert {t for t, r in results if r == 1} == {0, 1, 2}
    assert {t for t, r in results if r == 2} == {0}
    most = play(settings(goal="max"), 2, values, jobs)
    assert {t for t, r in most if r == 2} == {8}


def test_a_trial_that_failed_does_not_go_on() -> None:
    values: dict[int, float | None] = {trial: None if trial < 3 else float(trial) for trial in range(9)}
    assert {t for t, r in play(settings(), 2, values) if r == 1} == {3, 4, 5}
    assert play(settings(), 2, dict.fromkeys(range(9))) == {(trial, 0): None for trial in range(9)}


@pytest.mark.parametrize("seed", range(20))
def test_asha_promotes_no_more_than_one_in_eta_and_trains_one_to_the_end(seed: int) -> None:
    values: dict[int, float | None] = {trial: float(trial * 7 % 27) for trial in range(27)}
    results = play(settings("asha", trials=27), 2, values, jobs=4, seed=seed)
    at = [[trial for trial, rung in results if rung == number] for number in range(3)]
    assert len(at[0]) == 27
    assert (
        1 <= len(at[1]) <= 2 * 27 // 3
    )  # a promotion may look hasty later: as many as came before better ones
    assert at[2]
    assert set(at[2]) <= set(at[1]) <= set(at[0])
    best = min(at[1], key=lambda trial: values[trial] or 0.0)
    assert values[best] == 0.0, "the best of all is among those that went on"


def test_asha_with_few_trials_still_ends_with_a_whole_training() -> None:
    values: dict[int, float | None] = {0: 3.0, 1: 1.0, 2: 2.0}
    results = play(settings("asha", trials=3), 2, values)
    assert [t for t, r in results if r == 2] == [1]
    values[1] = None
    assert [t for t, r in play(settings("asha", trials=3), 2, values) if r == 2] == [2]


def test_asha_does_not_wait() -> None:
    given = settings("asha")
    three: dict[Work, float | None] = {(0, 0): 3.0, (1, 0): 1.0, (2, 0): 2.0}
    assert due(given, 2, three, [(3, 0)])[0] == (1, 1)
    assert due(settings("halving"), 2, three, [(3, 0)])[0] == (4, 0)
