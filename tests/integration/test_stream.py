"""Training on a stream from `datasets`: interrupted, on other ranks, the same samples and losses."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import many_runs
import pytest
import rank_runner
import signing
from plain_torch import relative
from typer.testing import CliRunner

from bigtfm.cli import app
from bigtfm.config.problems import DataProblem, Problem
from bigtfm.data.stream_source import BLOCK
from bigtfm.engine.checkpoint import flush_and_hash
from bigtfm.job import check_job
from bigtfm.preflight import require_same_on_all

SEQ_LEN, GLOBAL_BATCH = 16, 256
BATCH = {"train_batch_size": GLOBAL_BATCH, "train_micro_batch_size_per_gpu": 64}
EDGE = 6 * BLOCK // GLOBAL_BATCH  # the step after which a block ends
PARTS = ((9, 1, 0), (EDGE, 2, 2), (EDGE + 2, 1, 1))  # until which step, on how many ranks, at which stage


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, corpus_lines: list[str]) -> Path:
    """A folder of four parquet files, of which an epoch is between three and four blocks."""
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path_factory.mktemp("stream") / "rows"
    folder.mkdir()
    text = "\n".join(corpus_lines)
    pieces = [text[n * 600 : n * 600 + 300 + n * 37 % 340] for n in range(320)]
    for n in range(4):
        table = pyarrow.table({"number": range(80), "body": pieces[n * 80 : n * 80 + 80]})
        pyarrow.parquet.write_table(table, folder / f"part-{n}.parquet", row_group_size=30)
    return folder


def job(folder: Path, data: Path, rows: Path, name: str, *overrides: str, stage: int = 0) -> list[str]:
    stream = (f"data.stream=hf:{rows}", "data.text_column=body", f"data.seq_len={SEQ_LEN}")
    return many_runs.job(folder, data, name, *stream, *overrides, stage=stage, **BATCH)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, rows: Path) -> Path:
    """A run without interruption, and one that moves on twice."""
    folder = tmp_path_factory.mktemp("streamed")
    for part, (steps, ranks, stage) in enumerate(PARTS):
        jobs = [job(folder, tiny_data, rows, "moved", "model.dropout=0.1", f"steps={steps}", stage=stage)]
        if part == 0:
            jobs.append(job(folder, tiny_data, rows, "whole", "model.dropout=0.1", f"steps={PARTS[-1][0]}"))
        many_runs.train_all(jobs, folder, ranks)
        output = (folder / f"ranks-{ranks}" / "rank-0.out").read_text()
        assert "reading from the beginning" not in output
    return folder


def stream_state(run_dir: Path, step: int) -> dict[str, object]:
    return json.loads((run_dir / f"checkpoints/step-{step:08d}/state.json").read_text())["progress"]["stream"]


@pytest.mark.launcher
@pytest.mark.slow
def test_samples_and_losses_are_those_of_the_uninterrupted_run(folder: Path) -> None:
    whole, moved = (many_runs.rows_of(folder / name) for name in ("whole", "moved"))
    digests = [row["sample_digest"] for row in whole]
    assert len(set(digests)) == PARTS[-1][0]
    assert [row["sample_digest"] for row in moved] == digests
    assert (
        relative(many_runs.losses_after(folder / "moved", 0), many_runs.losses_after(folder / "whole", 0))
        <= 1e-5
    )
    assert [row["tokens"] for row in moved] == [
        n * GLOBAL_BATCH * SEQ_LEN for n in range(1, PARTS[-1][0] + 1)
    ]


@pytest.mark.launcher
@pytest.mark.slow
def test_a_checkpoint_says_where_its_block_begins(folder: Path) -> None:
    """However far was read ahead; this one is inside the second epoch."""
    assert stream_state(folder / "whole", PARTS[-1][0]) == stream_state(folder / "moved", PARTS[-1][0])
    state = stream_state(folder / "moved", EDGE)
    block = EDGE * GLOBAL_BATCH * SEQ_LEN
    assert block - 40_000 < state["position"] <= block
    assert state["epoch"] == 1
    assert state["rows"] is not None
    assert json.loads((folder / "moved/resolved.json").read_text())["epochs"] is None


@pytest.mark.launcher
@pytest.mark.slow
@pytest.mark.parametrize("saved", ["none", "a window too far"])
def test_the_saved_position_is_what_decides(
    saved: str, folder: Path, tiny_data: Path, rows: Path, tmp_path: Path
) -> None:
    """Without one the stream is read from its beginning: the same losses. Another is refused."""
    many_runs.fork_run(folder / "moved", tmp_path / "forked", EDGE)
    found = tmp_path / f"forked/checkpoints/step-{EDGE:08d}"
    state = json.loads((found / "state.json").read_text())
    state["progress"]["stream"] = None if saved == "none" else stream_state(folder / "whole", PARTS[-1][0])
    if saved != "none":
        state["progress"]["stream"]["position"] += SEQ_LEN
    (found / "state.json").write_text(json.dumps(state))
    manifest = signing.read(found / "manifest.json")
    manifest["files"]["state.json"] = flush_and_hash(found / "state.json")
    signing.write(found / "manifest.json", manifest)
    path, *overrides = job(tmp_path, tiny_data, rows, "forked", "model.dropout=0.1", f"steps={PARTS[-1][0]}")
    done = rank_runner.run(["train", "--deepspeed_config", path, *overrides], tmp_path / "ranks")
    assert "reading from the beginning to sample 6,144" in done.outputs[0]
    if saved == "none":
        assert done.code == 0, done.outputs[0]
        after = [many_runs.losses_after(run, EDGE) for run in (tmp_path / "forked", folder / "whole")]
        assert relative(*after) <= 1e-5
    else:
        assert done.code == 65
        assert "the text before the saved position is not what it was" in done.outputs[0]


@pytest.mark.launcher
@pytest.mark.slow
def test_a_source_that_changed_is_refused_until_it_is_accepted(
    folder: Path, tiny_data: Path, rows: Path, tmp_path: Path
) -> None:
    """A file more: what was read so far is the same, so the run needn't read it again to go on."""
    more = tmp_path / "rows"
    shutil.copytree(rows, more)
    shutil.copytree(folder / "moved", tmp_path / "moved")
    shutil.copyfile(more / "part-0.parquet", more / "part-9.parquet")
    path, *overrides = job(
        tmp_path, tiny_data, more, "moved", "model.dropout=0.1", f"steps={PARTS[-1][0] + 1}"
    )
    args = ["train", "--deepspeed_config", path, *overrides]
    refused = rank_runner.run(args, tmp_path / "refused")
    assert refused.code == 64
    assert "data.stream.files was 4 when this run was saved and is 5 now" in refused.outputs[0]
    accepted = rank_runner.run([*args, "resume.allow=data"], tmp_path / "accepted")
    assert accepted.code == 0, accepted.outputs[0]
    assert len(many_runs.rows_of(tmp_path / "moved")) == PARTS[-1][0] + 1


def test_check_shows_what_is_not_known(
    tmp_path: Path, tiny_data: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, *overrides = job(tmp_path, tiny_data, rows, "checked")
    args = ["check", "--deepspeed_config", path, *overrides]
    shown = CliRunner().invoke(app, args)
    assert shown.exit_code == 0, shown.output
    assert shown.output.count("not known: streamed") == 3
    as_json = CliRunner().invoke(app, [*args, "--json"])
    resolved = json.loads(as_json.stdout)
    assert (resolved["train_tokens"], resolved["steps_per_epoch"], resolved["epochs"]) == (None, None, None)
    assert resolved["tokens_per_step"] == GLOBAL_BATCH * SEQ_LEN


@pytest.mark.parametrize(
    ("override", "code", "said"),
    [
        ("data.text_column=bodi", 65, "set data.text_column: did you mean 'body'?"),
        ("data.text_column=number", 65, "column 'number' holds int64, not text"),
        ("data.stream=hf:{rows}:tain", 65, "did you mean 'train'?"),
        ("data.workers=2", 64, "set data.workers to 0"),
    ],
)
def test_what_can_not_be_streamed_is_one_line(
    override: str, code: int, said: str, tmp_path: Path, tiny_data: Path, rows: Path
) -> None:
    path, *overrides = job(tmp_path, tiny_data, rows, "refused")
    key = override.partition("=")[0]
    overrides = [other for other in overrides if other.partition("=")[0] != key]
    with pytest.raises(Problem) as raised:
        check_job(None, Path(path), [*overrides, override.format(rows=rows)], world_size=1)
    assert raised.value.exit_code == code
    assert said in raised.value.line


def test_ranks_that_find_other_files_are_refused(tmp_path: Path, tiny_data: Path, rows: Path) -> None:
    path, *overrides = job(tmp_path, tiny_data, rows, "apart")
    checked = check_job(None, Path(path), overrides, world_size=2)
    for files in (4, 5):

        def gather(mine: tuple[str, dict[str, Any]], files: int = files) -> list[Any]:
            other = json.loads(json.dumps(mine))
            other[1]["data"]["stream"]["files"] = files
            return [mine, other]

        said = "rank 1 .* has another data than rank 0: data.stream.files is 5 there, 4 here"
        with pytest.raises(DataProblem, match=said) if files == 5 else nullcontext():
            require_same_on_all(checked, SimpleNamespace(rank=0, gather=gather))
