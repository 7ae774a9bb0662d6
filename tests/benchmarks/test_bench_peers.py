"""The sides of benchmarks/bench_peers.py train the same shape."""

from __future__ import annotations

import io
import json
from pathlib import Path

import bench_peers
import pytest
import torch
from peers import bare
from peers.turns import Enough, Turns
from peers.workload import WORKLOADS

from bigtfm.config.run import load_run_config
from bigtfm.model.families import make_model

SHAPE = WORKLOADS["gpt-1m"]


def test_the_bare_model_has_as_many_parameters_as_ours(tmp_path: Path) -> None:
    run = load_run_config(None, SHAPE.run_config(tmp_path))
    ours = make_model(run.model, SHAPE.vocab_size)
    assert sum(p.numel() for p in bare.GPT(SHAPE).parameters()) == sum(p.numel() for p in ours.parameters())


def test_the_bare_loop_learns_and_tells_its_steps(tmp_path: Path) -> None:
    asked, answers = io.StringIO("1\n12\n"), io.StringIO()
    torch.manual_seed(0)
    with pytest.raises(Enough):
        bare.train(bare.GPT(SHAPE), SHAPE, tmp_path, Turns(asked, answers))
    ready, first, last = map(json.loads, answers.getvalue().splitlines())
    assert [len(each["seconds"]) for each in (first, last)] == [1, 12]
    assert "loss" not in ready
    assert first["loss"] == pytest.approx(4.56, abs=0.1)  # ln 96
    assert last["loss"] < first["loss"] - 0.3


def test_ratios_are_those_of_each_turn() -> None:
    """Where both sides are slow in one turn, their ratio is what it was."""
    seconds = {"bigtfm-0": [1.0, 4.0, 1.0], "bare": [2.0, 8.0, 2.0]}
    peaks = {"bigtfm-0": 30, "bare": 40}
    row = bench_peers.row_of(SHAPE, bench_peers.Against("bare"), seconds, peaks)
    assert row["ratio"] == {"low": 2.0, "median": 2.0, "high": 2.0}
    assert row["tokens_per_second"]["median"] == SHAPE.tokens_per_step
    assert row["peak_ratio"] == 0.75
