"""The file of a benchmark: a product of axes, read strictly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bigtfm.bench.matrix import Cell, load_matrix
from bigtfm.config.deepspeed import load_deepspeed_json
from bigtfm.config.problems import ConfigProblem
from bigtfm.config.run import load_run_config

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def write(folder: Path, text: str) -> Path:
    path = folder / "matrix.toml"
    path.write_text(text)
    return path


def test_a_grid_is_the_product_of_its_axes(tmp_path: Path) -> None:
    text = """
    [[grid]]
    name = "a"
    zero_stage = [0, 2]
    micro_batch = [1, 2, 4]
    [[grid]]
    overrides = [["model.num_layers=1"], ["model.num_layers=2"]]
    [[grid]]
    overrides = ["model.num_layers=1", "model.hidden_size=96"]
    """
    cells = load_matrix(write(tmp_path, text)).cells
    assert [(grid, cell.zero_stage, cell.micro_batch) for grid, cell in cells[:6]] == [
        ("a", stage, micro) for stage in (0, 2) for micro in (1, 2, 4)
    ]
    assert [(grid, len(cell.overrides)) for grid, cell in cells[6:]] == [
        ("grid 2", 1), ("grid 2", 1), ("grid 3", 2),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "[[grid]]\nmicro_bach = 1",
            r"\[\[grid\]\] 1: unknown key 'micro_bach'. Fix: did you mean 'micro_batch'",
        ),
        ("[[gird]]\nmicro_batch = 1", "unknown key 'gird'. Fix: did you mean 'grid'"),
        ("[measure]\nstep = 3\n[[grid]]", r"\[measure\]: unknown key 'step'. Fix: did you mean 'steps'"),
        ("[[grid]]\nzero_stage = [0, 4]", "zero_stage can't be 4"),
        ("[[grid]]\nmicro_batch = []", "micro_batch is an empty list"),
        (
            "[[grid]]\nglobal_batch = 12\nranks = 5",
            "global_batch 12 is not a multiple of 4 micro batch x 5 ranks",
        ),
        ("[[grid]]\nglobal_batch = 8\naccumulation = 2", "both say how large a step is"),
        ("name = 3\n[[grid]]", "name must be a string, not 3"),
        ("steps = 3", "unknown key 'steps'"),
        ("grid = 3", r"it has no \[\[grid\]\]"),
        ("[[grid]\n", "can't be read"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigProblem, match=said) as caught:
        load_matrix(write(tmp_path, text))
    assert "\n" not in caught.value.line


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigProblem, match="no such file"):
        load_matrix(tmp_path / "none.toml")


def test_the_deepspeed_json_of_a_cell_says_what_its_axes_say(tmp_path: Path) -> None:
    cell = Cell(
        zero_stage=3, precision="bf16", ranks=2, micro_batch=3, global_batch=12,
        deepspeed={"zero_optimization": {"reduce_bucket_size": 1000}, "gradient_clipping": 0.5},
    )  # fmt: skip
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps(cell.deepspeed_values))
    written = load_deepspeed_json(path)
    assert written.solve_batch(2) == (3, 2, 12)
    assert (written.zero_stage, written.precision, written.clipping) == (3, "bf16", 0.5)
    assert written.zero["reduce_bucket_size"] == 1000
    assert written.lr == load_deepspeed_json(ROOT / "ds_configs/zero2_fp32.json").lr


def test_the_key_is_another_where_something_else_would_be_measured(tmp_path: Path) -> None:
    def key(text: str) -> str:
        ((key, _, _),) = load_matrix(write(tmp_path, text)).keys()
        return key

    same = key("[[grid]]\nzero_stage = 2\nmicro_batch = 4")
    assert same == key(
        "name = 'x'\n[measure]\nsteps = 30\n[[grid]]\nname = 'y'\nzero_stage = 2\naccumulation = 1"
    )
    others = [
        key(f"[[grid]]\nzero_stage = 2\n{more}")
        for more in (
            "micro_batch = 5", "attention = 'reference'", "overrides = ['model.dropout=0.1']", "threads = 1",
            "deepspeed = { gradient_clipping = 2.0 }", "deepspeed_config = 'ds_configs/zero1_bf16.json'",
        )
    ]  # fmt: skip
    assert len({same, *others}) == 7
    assert same.startswith("quickstart-z2-fp32-r1-m4x1-")


@pytest.mark.parametrize(
    "path", sorted((ROOT / "benchmarks/matrices").glob("*.toml")), ids=lambda path: path.name
)
def test_shipped_matrices_name_configurations_that_are_valid(path: Path, tmp_path: Path) -> None:
    for key, _, cell in load_matrix(path).keys():
        config = load_run_config(Path(cell.model), cell.run_overrides)
        json_path = tmp_path / f"{key}.json"
        json_path.write_text(json.dumps(cell.deepspeed_values))
        load_deepspeed_json(json_path).solve_batch(cell.ranks)
        assert config.seq_len >= 1
