"""Cells in processes of their own: what runs, what does not, and a benchmark that goes on after both."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import faulty_cells
import pytest

from bigtfm.bench import command
from bigtfm.bench.clock import SPLIT
from bigtfm.bench.matrix import Matrix, load_matrix
from bigtfm.bench.report import make_report
from bigtfm.bench.results import RESULTS, Row, read_rows
from bigtfm.bench.runner import missing, run_matrix
from bigtfm.config.problems import Interrupted, StorageProblem
from bigtfm.planner.memory import CATEGORIES
from bigtfm.resilience.processes import process

SHAPE = '"model.hidden_size=32", "model.num_layers=2", "model.num_attention_heads=2", "model.max_seq_len=32"'


@pytest.fixture
def matrix(tmp_path: Path, tiny_data: Path) -> Callable[..., Matrix]:
    """Writes a matrix of these grids and reads it."""

    def write(*grids: str, more: str = "", measure: str = "") -> Matrix:
        text = f'data = "{tiny_data}"\n[measure]\nwarm_up = 1\nsteps = 4\ntimeout_seconds = 100\n{measure}\n'
        for grid in grids:
            text += f"[[grid]]\noverrides = [{SHAPE}{more}]\n{grid}\n"
        path = tmp_path / "matrix.toml"
        path.write_text(text)
        return load_matrix(path)

    return write


@pytest.mark.launcher
@pytest.mark.slow
def test_out_of_memory_a_crash_and_a_hang_are_rows_of_a_finished_report(
    matrix: Callable[..., Matrix], tmp_path: Path
) -> None:
    faults = matrix(
        'name = "faults"\nmicro_batch = [2, 3, 5, 6]',
        'name = "memory"\nmicro_batch = 256\nprecision = "bf16"',  # in fp32 a CPU holds few logits at a time
        'name = "nonsense"\nattention = "flash_attn_3"',
        more=', "model.vocab_size=200000"',
        measure="hang_seconds = 3\nmemory_gib = 6\nmemory = false",
    )
    found = list(run_matrix(faults, tmp_path / "out", start=faulty_cells.start))
    assert [row["status"] for row in found] == ["ok", "crash", "hang", "crash", "oom", "refused"], found
    whole, crash, hang, raises, oom, refused = found
    assert "signal 11 (SIGSEGV)" in crash["why"]
    assert "in forward at step 2" in hang["why"]
    assert "IndexError: pop from empty list" in raises["why"]
    assert "out of memory with micro batch 256" in oom["why"]
    assert "flash_attn_3" in refused["why"]
    assert len(whole["seconds"]) == 4
    make_report(tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    failed = text.partition("## Failed")[2]
    assert [failed.count(f"| {how} |") for how in ("crash", "hang", "oom", "refused")] == [2, 1, 1, 1]
    assert "| micro batch 2 |" in text
    assert missing(faults, tmp_path / "out") == 0


@pytest.mark.launcher
@pytest.mark.slow
def test_ranks_and_stages_are_measured_once_and_train_the_same(
    matrix: Callable[..., Matrix], tmp_path: Path
) -> None:
    cells, out = matrix("zero_stage = [0, 3]\nranks = 2\nmicro_batch = 2"), tmp_path / "out"
    first, second = run_matrix(cells, out, start=faulty_cells.start)
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-6), "another stage, the same training"
    for row in (first, second):
        assert row["status"] == "ok"
        assert row["tokens_per_step"] == 2 * 2 * 32
        assert set(row["split"]) == set(SPLIT)
        assert row["split"]["backward"] > row["split"]["record"] > 0
        assert sum(row["split"].values()) == pytest.approx(row["step_seconds"]["median"], rel=0.5)
        rate = row["tokens_per_second"]
        assert 0 < rate["low"] <= rate["median"] <= rate["high"]
        assert row["matmul_share"] == pytest.approx(
            rate["median"] / 2 * row["flops_per_token"] / row["ceiling"]
        )
        memory, planned = row["memory"], row["predicted"]["memory"]
        assert sum(memory[name] for name in CATEGORIES) == memory["peak"]
        assert planned["peak"] == pytest.approx(memory["peak"], rel=0.1)
        assert row["versions"]["torch"]
        assert row["hardware"]["cores"] > 0
        assert not list((out / "cells" / row["key"]).rglob("step-*")), "it saves nothing"
    assert list(run_matrix(cells, out, start=no_start)) == []


@pytest.mark.launcher
@pytest.mark.slow
def test_a_cell_that_does_not_end_is_ended(matrix: Callable[..., Matrix], tmp_path: Path) -> None:
    endless = matrix("micro_batch = 5", measure="hang_seconds = 0\nmemory = false")
    endless = endless.with_timeout(8)
    (row,) = run_matrix(endless, tmp_path / "out", start=faulty_cells.start)
    assert (row["status"], row["why"]) == ("hang", "no end after 8 s: after step 1")


def no_start(*_: object) -> faulty_cells.ForkedRank:
    raise AssertionError("this cell has been run")


def test_a_cell_that_can_not_end_in_time_is_left_for_later(
    matrix: Callable[..., Matrix], tmp_path: Path
) -> None:
    cells = matrix("micro_batch = [1, 2]")
    assert list(run_matrix(cells, tmp_path / "out", start=no_start, seconds=99)) == []
    assert missing(cells, tmp_path / "out") == 2
    with pytest.raises(AssertionError, match="has been run"):
        list(run_matrix(cells, tmp_path / "out", start=no_start, seconds=101))


def test_a_folder_goes_on_with_the_data_set_that_it_has(
    matrix: Callable[..., Matrix], tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the embedded text has another place or date by now, as after an upgrade."""
    for name in ("configs", "ds_configs"):
        (tmp_path / name).symlink_to(Path(name).resolve())
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_data, tmp_path / "out/data")
    cells = replace(matrix("micro_batch = 1"), data="data/quickstart")
    assert list(run_matrix(cells, tmp_path / "out", start=no_start, seconds=99)) == []


def test_a_torn_row_is_run_again(matrix: Callable[..., Matrix], tmp_path: Path) -> None:
    cells, out = matrix("micro_batch = [1, 2]"), tmp_path / "out"
    keys = [key for key, _, _ in cells.keys()]
    out.mkdir()
    rows = [{"key": key, "repeat": 0, "grid": "g", "status": "oom", "model": "tiny"} for key in keys]
    (out / RESULTS).write_text("".join(json.dumps(row) + "\n" for row in rows)[:-9])
    assert [row["key"] for row in read_rows(out / RESULTS)] == keys[:1]
    assert missing(cells, out) == 1


class FakeRank:
    """A rank that ends at once, with this exit code."""

    def __init__(self, code: int) -> None:
        self.poll, self.kill = (lambda: code), (lambda: None)


def test_a_full_disk_is_no_result_of_a_cell(matrix: Callable[..., Matrix], tmp_path: Path) -> None:
    cells, out = matrix("micro_batch = [1, 2]"), tmp_path / "out"
    with pytest.raises(StorageProblem, match="could not write: it left no word"):
        list(run_matrix(cells, out, start=lambda *_: FakeRank(74)))
    assert missing(cells, out) == 2
    assert [row["status"] for row in run_matrix(cells, out, start=lambda *_: FakeRank(70))] == ["crash"] * 2
    assert missing(cells, out) == 0


def test_a_ctrl_c_says_that_it_goes_on(
    matrix: Callable[..., Matrix], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> Iterator[Row]:
        raise KeyboardInterrupt
        yield {}

    monkeypatch.setattr(command, "run_matrix", interrupted)
    with pytest.raises(Interrupted, match="repeat the command: it goes on"):
        command.bench([matrix("micro_batch = 1").path], tmp_path / "out")


@pytest.mark.launcher
def test_no_rank_outlives_its_benchmark(tmp_path: Path) -> None:
    """Killed with -9, which leaves it no time to end its ranks."""
    os.mkfifo(tmp_path / "trial.json")  # a rank waits for what it is to do
    script = (
        "import sys, time; from pathlib import Path; from bigtfm.bench.runner import start_rank; "
        "folder = Path(sys.argv[1]); rank = start_rank(folder / 'trial.json', {}, folder / 'log'); "
        "print(rank.process.pid, flush=True); time.sleep(100)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE, text=True
    ) as runner:
        assert runner.stdout is not None
        rank = process(int(runner.stdout.readline()))
        assert rank is not None
        with (tmp_path / "trial.json").open("wb"):  # it reads: all before is done
            assert rank.lives
            runner.kill()
            until = time.monotonic() + 10
            while rank.lives and time.monotonic() < until:
                time.sleep(0.02)
            assert not rank.lives


@pytest.mark.launcher
@pytest.mark.slow
def test_the_command(
    matrix: Callable[..., Matrix], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In real processes, with a report and an MLflow run."""
    cells = matrix("micro_batch = 2")
    store = f"sqlite:///{tmp_path}/mlflow.db"
    out = tmp_path / "out"
    assert not command.bench([cells.path], out, mlflow=store, as_json=True)
    (row,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert row["status"] == "ok"
    names = {"report.html", "report.md", "results.csv", "results.jsonl", "throughput.png", "split.png"}
    assert names <= {path.name for path in out.iterdir()}
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        sent = database.execute("select value from metrics where key = 'tokens_per_second'").fetchall()
        (place,) = database.execute("select artifact_uri from runs").fetchone()
    assert sent == [(row["tokens_per_second"]["median"],)]
    assert names <= {path.name for path in Path(place.removeprefix("file://")).iterdir()}
