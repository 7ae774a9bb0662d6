from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import parity
import pytest
from rich.console import Console

BENCHMARK = Path(parity.__file__)


@pytest.fixture(scope="module")
def result():
    """Every seventh cell."""
    command = [sys.executable, str(BENCHMARK), "--quick", "--json"]
    finished = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(finished.stdout)


@pytest.mark.launcher
@pytest.mark.slow
def test_bigtfm_is_plain_torch_and_raw_deepspeed_is_not(result):
    """In raw DeepSpeed a step is plain torch's only where it is one micro-batch on one rank."""
    assert result["worst"]["bigtfm"]["worst"] <= result["goal"]
    assert max(floor["weights"] for floor in result["torch_itself"].values()) <= result["goal"]
    for row in result["cells"]:
        split = row["ranks"] * row["accumulation"] > 1
        assert (row["deepspeed"]["worst"] > 1e-3) == split, row
    assert {row["ranks"] for row in result["cells"]} == {1, 2}


@pytest.mark.launcher
@pytest.mark.slow
@pytest.mark.parametrize("markdown", [True, False])
def test_tables(result, markdown):
    console = Console(width=200, record=True, file=sys.stderr)
    parity.show(result, console, markdown)
    text = console.export_text()
    for shown in ("span_corruption", "gradient norm", "Lamb, stage 1", "deepspeed / bigtfm"):
        assert shown in text


def test_the_matrix_is_whole():
    cells = parity.cells()
    assert len(cells) == len(set(cells))
    gpt = {cell[1:] for cell in cells if cell.task == "causal_lm"}
    assert len(gpt) == 4 * 2 * 3 * 2
    assert all(parity.GLOBAL_BATCH % (cell.ranks * cell.accumulation) == 0 for cell in cells)
