"""The space of a sweep: its points by seed and number, and every mistake in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from bigtfm.config.problems import ConfigProblem
from bigtfm.sweep.space import Sweep, load_sweep

TOP = 'deepspeed_config = "ds.json"\ntrials = 8\n'
LR = '"optimizer.params.lr" = { log_uniform = [1e-4, 1e-1] }\n'


def sweep(tmp_path: Path, space: str, top: str = TOP) -> Sweep:
    path = tmp_path / "sweep.toml"
    path.write_text(f"{top}\n[space]\n{space}")
    return load_sweep(path)


def test_a_point_is_a_function_of_seed_and_number(tmp_path: Path) -> None:
    space = LR + "model.dropout = { uniform = [0.0, 0.3] }\nmodel.num_layers = { uniform = [1, 3] }\n"
    found = sweep(tmp_path, space)
    points = [found.point(trial) for trial in range(8)]
    assert points[5] == sweep(tmp_path, space).point(5)
    assert len({point["optimizer.params.lr"] for point in points}) == 8
    assert all(1e-4 <= point["optimizer.params.lr"] <= 1e-1 for point in points)
    assert {type(point["model.num_layers"]) for point in points} == {int}
    assert {sweep(tmp_path, space).point(n)["model.num_layers"] for n in range(100)} == {1, 2, 3}
    assert sweep(tmp_path, space, TOP + "seed = 1\n").point(5) != points[5]
    assert sweep(tmp_path, LR).point(5)["optimizer.params.lr"] == points[5]["optimizer.params.lr"]


def test_log_uniform_draws_as_many_from_each_decade(tmp_path: Path) -> None:
    found = sweep(tmp_path, LR)
    lrs = [found.point(trial)["optimizer.params.lr"] for trial in range(3000)]
    decades = [sum(low <= lr < 10 * low for lr in lrs) for low in (1e-4, 1e-3, 1e-2)]
    assert all(900 < count < 1100 for count in decades), decades


def test_lists_alone_are_gone_through_without_a_repetition(tmp_path: Path) -> None:
    found = sweep(
        tmp_path, "model.dropout = [0.0, 0.1]\nmodel.bias = [true, false]\nmodel.num_layers = [1, 2]\n"
    )
    points = [tuple(found.point(trial).values()) for trial in range(8)]
    assert len(set(points)) == 8
    assert points != sorted(points)


def test_a_plain_value_is_fixed(tmp_path: Path) -> None:
    found = sweep(tmp_path, LR + "scheduler.params.total_num_steps = 50\n")
    assert found.swept == ["optimizer.params.lr"]
    assert found.point(3)["scheduler.params.total_num_steps"] == 50


@pytest.mark.parametrize(
    ("space", "line"),
    [
        ("", r"\[space\]: the space is empty. Fix: write a key"),
        ("model.dropout = []", "model.dropout is an empty list"),
        ("model.dropout = 0.1", "the space is empty"),
        ("model.droput = [0.0, 0.1]", "unknown key 'model.droput'. Fix: did you mean 'model.dropout'"),
        (
            "optimizer.lr = [1e-3, 1e-2]",
            "unknown key 'optimizer.lr'. Fix: did you mean 'optimizer.params.lr'",
        ),
        ("gradient_cliping = [0.5, 1.0]", "did you mean 'gradient_clipping'"),
        ("dropout = [0.0, 0.1]", "did you mean 'model.dropout'"),
        ("run.steps = [10, 20]", "run.steps is set by the sweep itself"),
        ("scheduler.params.total_num_steps = [10, 20]", "can't be swept"),
        ('"optimizer.params.lr" = { log_uniform = [0, 1] }', "log_uniform begins at 0. Fix: begin above 0"),
        ('"optimizer.params.lr" = { uniform = [2, 1] }', r"uniform can't be \[2, 1\]"),
        ('"optimizer.params.lr" = { uniform = [1, 2], log_uniform = [1, 2] }', "has 2 ranges"),
        ('"optimizer.params.lr" = { normal = [1, 2] }', "unknown key 'optimizer.params.lr.normal'"),
        ("model.bias = [true, false]", "the space has 2 points, and trials is 8. Fix: set trials to 2"),
    ],
)
def test_a_wrong_space_is_one_line(tmp_path: Path, space: str, line: str) -> None:
    with pytest.raises(ConfigProblem, match=line):
        sweep(tmp_path, space)


@pytest.mark.parametrize(
    ("top", "line"),
    [
        ("trials = 8", "deepspeed_config is missing. Fix: deepspeed_config is: DeepSpeed JSON"),
        (TOP + "trails = 3", "unknown key 'trails'. Fix: did you mean 'trials'"),
        (TOP + "eta = 1", "eta can't be 1"),
        (TOP + 'method = "grid"', "method can't be"),
        (TOP + "trials = ", "can't be read"),
    ],
)
def test_a_wrong_top_is_one_line(tmp_path: Path, top: str, line: str) -> None:
    with pytest.raises(ConfigProblem, match=line):
        sweep(tmp_path, LR, top)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigProblem, match="no such file"):
        load_sweep(tmp_path / "nope.toml")
