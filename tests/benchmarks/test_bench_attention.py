from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "bench_attention.py"
DENSITIES = ["dense", "ragged", "short"]


@pytest.mark.slow
def test_smallest_setting(tmp_path, monkeypatch, capsys):
    options = ["--tokens", "64", "--repeats", "1", "--backends", "sdpa,reference", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [str(BENCHMARK), *options])
    runpy.run_path(str(BENCHMARK), run_name="__main__")
    rows = [json.loads(line) for line in (tmp_path / "attention.jsonl").read_text().splitlines()]
    assert [row["density"] for row in rows] == [name for name in DENSITIES for _ in range(3)] * 2
    assert {row["backend"] for row in rows} == {"sdpa", "reference", "padded"}
    for row in rows:
        assert row["seconds"] > 0
        assert row["peak_bytes"] >= 4 * 64 * 4 * 64  # the output, at least
        assert row["padded_tokens"] >= 64
        assert row["padded_over_this"] > 0
        assert row["torch"]
        assert row["device"]
    assert (tmp_path / "attention.png").read_bytes().startswith(b"\x89PNG")
    assert "padded / this" in capsys.readouterr().out


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("tokens", [1, 64, 5000])
def test_lengths_sum_to_the_tokens(density, tokens):
    lengths = runpy.run_path(str(BENCHMARK))["lengths_of"](density, tokens)
    assert sum(lengths) == tokens
    assert min(lengths) > 0
