"""The launcher's variables."""

from __future__ import annotations

import pickle

import pytest

from bigtfm.config.launch import Launch
from bigtfm.config.problems import ConfigProblem, NoCheckpoint

TWO = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_no_variable_is_a_single_process() -> None:
    assert Launch.from_environment({}) == Launch(0, 1, 0, 1)


def test_a_rank_is_read() -> None:
    assert Launch.from_environment(TWO) == Launch(1, 2, 1, 2)
    assert Launch.from_environment(TWO | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}) == Launch(1, 2, 0, 1)


def test_the_flag_of_the_deepspeed_launcher_stands_in_for_the_variable() -> None:
    without = {name: value for name, value in TWO.items() if name != "LOCAL_RANK"}
    assert Launch.from_environment(without, local_rank=1) == Launch(1, 2, 1, 2)


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"MASTER_PORT": None}, "MASTER_PORT not set"),
        ({"WORLD_SIZE": None}, "WORLD_SIZE not set"),
        ({"RANK": "2"}, "RANK 2 of WORLD_SIZE 2"),
        ({"RANK": "-1"}, "RANK -1"),
        ({"RANK": "one"}, "RANK='one' is not a whole number"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK 2 of 2"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, str | None], fragment: str) -> None:
    environ = {name: value for name, value in (TWO | changes).items() if value is not None}
    with pytest.raises(ConfigProblem) as caught:
        Launch.from_environment(environ)
    assert fragment in caught.value.line
    assert "\n" not in caught.value.line


def test_a_problem_crosses_from_rank_to_rank_whole() -> None:
    problem = NoCheckpoint("none verifies", where="runs/x", fix="restore one")
    copy = pickle.loads(pickle.dumps(problem))
    assert (copy.line, copy.exit_code) == (problem.line, 76)
