"""The GPU suite on a CPU, with tiny models: every row is run, once, and each call ends in time."""

from __future__ import annotations

import json
import re
from pathlib import Path

import faulty_cells
import gpu_suite
import pytest

from bigtfm.bench.matrix import load_matrix
from bigtfm.config.problems import ConfigProblem

ROOT = Path(gpu_suite.__file__).parents[1]


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_every_goal_has_its_cells_and_no_other() -> None:
    assert list(dict.fromkeys(grid for grid, _ in load_matrix(gpu_suite.MATRIX).cells)) == list(
        gpu_suite.GOALS
    )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--only", "GPT-9"], "no row holds 'GPT-9'.*GPT-2 124M"),
        (["--minutes", "4"], "no cell is sure to end in 4 minutes.*more than 4,"),
        (["--minutes", "nan"], "no cell is sure to end in nan minutes"),
        ([], "no NVIDIA GPU is here.*--dry-run"),
    ],
)
def test_what_would_measure_nothing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], said: str
) -> None:
    monkeypatch.setattr(gpu_suite, "devices_of", lambda _: ["cpu"])
    with pytest.raises(ConfigProblem) as caught:
        gpu_suite.main(["--out", str(tmp_path), *flags])
    assert re.search(said, caught.value.line), caught.value.line


@pytest.mark.launcher
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_dry_run(tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(gpu_suite, "MATRIX", with_data(tmp_path, tiny_data))
    flags = ["--out", str(tmp_path / "out"), "--dry-run", "--json"]
    assert gpu_suite.main([*flags, "--minutes", "4.01"], start=faulty_cells.start) == gpu_suite.AGAIN
    assert re.search(r"\d+ cells are left: repeat the command", capsys.readouterr().out)
    assert gpu_suite.main([*flags, "--minutes", "99"], start=faulty_cells.start) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [json.loads(line) for line in lines if not line.startswith("#")]
    assert [row["row"] for row in rows] == list(gpu_suite.GOALS)
    for row in rows:
        assert row["cell"] is not None, row["why"]
        assert row["tokens_per_second"] > 0
        assert (row["of_goal"] is None) == (row["goal"] is None)
    assert gpu_suite.main(flags, start=faulty_cells.start) == 0
    assert not [line for line in capsys.readouterr().out.splitlines() if line.startswith("#")], (
        "nothing again"
    )


def with_data(folder: Path, data: Path) -> Path:
    path = folder / "h200.toml"
    path.write_text(f'name = "h200"\ndata = "{data}"\n' + gpu_suite.MATRIX.read_text())
    return path
