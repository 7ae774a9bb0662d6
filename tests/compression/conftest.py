"""A small model that has been trained, for all tests of compression."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import rank_runner
from compression_runs import QUIET, SHAPE, Compress, ds_json

from bigtfm.cli import app


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """The run directory of a GPT after 200 steps. Not to be written to."""
    folder = tmp_path_factory.mktemp("trained")
    job = [str(ds_json(folder)), *SHAPE, *QUIET, f"data.path={tiny_data}", "run.name=gpt", "run.steps=200"]
    finished = rank_runner.train_all([job], folder, 1)
    assert finished.code == 0, finished.output
    return folder / "runs/gpt"


@pytest.fixture
def compress(capfd: pytest.CaptureFixture[str]) -> Compress:
    """Runs `bigtfm compress --json`; returns its exit code, its report and what it said on stderr."""

    def command(*args: object) -> tuple[int, dict[str, Any], str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            app(["compress", *map(str, args), "--json"])
        said = capfd.readouterr()
        return int(ended.value.code or 0), json.loads(said.out) if said.out else {}, said.err

    return command
