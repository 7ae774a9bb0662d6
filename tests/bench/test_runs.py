"""Finished runs in a report: what slurm/bench.sbatch leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bigtfm.bench import command
from bigtfm.bench.results import RESULTS, read_rows
from bigtfm.config.problems import ConfigProblem

RESOLVED: dict[str, Any] = {
    "zero_stage": 2, "precision": "fp32", "micro_batch": 1, "accumulation": 4, "seq_len": 128,
    "recompute": "none", "world_size": 2, "parameters": 1000, "tokens_per_step": 1024,
}  # fmt: skip


def a_run(folder: Path, seconds: float, steps: int = 20, **changes: Any) -> None:
    (folder / "logs").mkdir(parents=True)
    (folder / "resolved.json").write_text(json.dumps(RESOLVED | changes))
    rows = [
        {
            "step": step,
            "loss": 3.0,
            "seconds": 9.0 if step <= 5 else seconds,
            "tokens_per_second": 1024 / seconds,
        }
        for step in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_runs_and_failures_are_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "speed"
    a_run(folder / "zero0", 0.5, zero_stage=0)
    a_run(folder / "zero2", 0.25)
    a_run(folder / "short", 0.25, steps=5)
    (folder / "missing" / "logs").mkdir(parents=True)
    (folder / "broken" / "logs").mkdir(parents=True)
    (folder / "old" / "logs").mkdir(parents=True)
    (folder / "old" / "resolved.json").write_text('{"world_size": 2}')
    (folder / "old" / "metrics.jsonl").write_bytes((folder / "zero2" / "metrics.jsonl").read_bytes())
    failure = {"exit_code": 64, "what": "out of memory", "where": "rank 0", "fix": "use less"}
    (folder / "broken" / "failure.json").write_text(json.dumps(failure))
    for _ in range(2):  # a second report does not hold them twice
        assert not command.bench([], folder, runs=folder)
        assert len(read_rows(folder / RESULTS)) == 6
    text = (folder / "report.md").read_text()
    assert "| zero0, ZeRO 0 | 8 = 1 x 4 x 2 | 2,048 (2,048 to 2,048) | 1,024 | 0.500 |" in text
    assert "| zero2, ZeRO 2 | 8 = 1 x 4 x 2 | 4,096 (4,096 to 4,096) | 2,048 | 0.250 |" in text
    failed = text.partition("## Failed")[2]
    assert "rank 0: out of memory" in failed
    assert "| runs: broken | oom |" in failed
    assert "damaged, or another version's" in failed
    assert failed.count("it has not come far") == 2
    assert "report.html" in capsys.readouterr().out


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigProblem, match="no such folder"):
        command.bench([], tmp_path, runs=tmp_path / "none")
