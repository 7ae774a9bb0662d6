"""A short campaign of kills by its own command, and broken resumes that it must find."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from chaos.reference import differing_rows, evaluation_is_due
from conftest import ROOT

pytestmark = [pytest.mark.launcher, pytest.mark.slow]


def chaos(*args: str) -> subprocess.CompletedProcess[str]:
    """`python -m chaos ARGS`: in a process of its own, since it adopts the orphans of what it starts."""
    return subprocess.run(
        [sys.executable, "-m", "chaos", *args],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "kills.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a campaign of three kills that has found nothing."""
    out = tmp_path_factory.mktemp("chaos")
    done = chaos("kills", str(out), "-n", "3", "--seed", "2865")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 kills, " in done.stdout
    return out


def test_a_campaign_finds_nothing_and_goes_on(campaign: Path) -> None:
    before = rows_of(campaign)
    assert [row["kind"] for row in before].count("Kill") == 3
    assert before[-1]["kind"] == "End"
    assert before[-1]["rows"] == 100
    assert before[-1]["files"] >= 4
    assert any(row["attempt"]["resumed"] for row in before), "none went on from a checkpoint"
    again = chaos("kills", str(campaign), "-n", "3", "--seed", "2865")
    assert again.returncode == 0
    assert rows_of(campaign) == before, "all kills were spent: nothing is done again"
    report = json.loads((campaign / "chaos-report.json").read_text())
    assert (report["kills"], report["orphans"], report["wrong"]) == (3, 0, [])
    assert (campaign / "chaos-report.png").read_bytes().startswith(b"\x89PNG")
    assert "| all |" in (campaign / "chaos-report.md").read_text()


def test_what_is_broken_is_found(campaign: Path, tmp_path: Path) -> None:
    """A resume that leaves out one sample, and a process that outlives its job."""
    for name in ("data", "runs"):
        shutil.copytree(campaign / name, tmp_path / name)
    broken = ("--broken", "position-by-one,orphan", "--gone", "2")
    done = chaos("kills", str(tmp_path), "-n", "1", "--seed", "2865", *broken)
    assert done.returncode == 1, done.stdout + done.stderr
    wrong = [text for row in rows_of(tmp_path) for text in row["wrong"]]
    assert any("sample_digest" in text and " instead of " in text for text in wrong)
    assert "shard-00000.safetensors differs" in wrong
    assert any(text.startswith("outlived its job: ") and text.endswith("sleep 60") for text in wrong)


def test_only_the_evaluation_that_is_made_up_for_may_be_missing(tmp_path: Path) -> None:
    expected = {step: {"loss": 1.0, "val_loss": 2.0} for step in (10, 20)}
    found = {10: {"loss": 1.0, "val_loss": 2.0}, 20: {"loss": 1.0}}
    assert evaluation_is_due(tmp_path) is None
    assert len(differing_rows(found, expected)) == 1
    for step, unevaluated in ((10, False), (20, True)):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(
            json.dumps({"progress": {"step": step, "unevaluated": unevaluated}})
        )
    due = evaluation_is_due(tmp_path)
    assert due == 20
    assert differing_rows(found, expected, due) == []
    assert len(differing_rows({10: {"loss": 1.0}}, expected, due)) == 1
    assert len(differing_rows({20: {"loss": 1.0, "val_loss": 2.5}}, expected, due)) == 1
