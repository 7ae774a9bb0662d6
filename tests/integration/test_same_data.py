"""All ranks train on the same data, and on what was prepared: compared at the start, and beside training."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import rank_runner
from conftest import TINY

from bigtfm.config.problems import DataProblem
from bigtfm.data import indexed
from bigtfm.data.indexed import TokenDataset
from bigtfm.data.prepare import prepare
from bigtfm.data.verification import Verification, large_files, share

Json = Callable[..., Path]


def each_has_its_own_data() -> None:
    """`bigtfm` where data/ is data-RANK/, as on machines with copies of their own."""
    Path(f"at-{os.environ['RANK']}").mkdir()
    os.chdir(f"at-{os.environ['RANK']}")
    Path("data").symlink_to(f"../data-{os.environ['RANK']}")
    rank_runner._bigtfm()


@pytest.mark.launcher
def test_a_rank_with_less_data_is_named(
    tmp_path: Path, tiny_data: Path, deepspeed_json: Json, corpus_lines: list[str]
) -> None:
    shutil.copytree(tiny_data, tmp_path / "data-0")
    (tmp_path / "less.txt").write_text("\n\n".join(corpus_lines)[:120_000])
    tokenizer = str(tiny_data / "tokenizer" / "tokenizer.model")
    prepare([str(tmp_path / "less.txt")], tmp_path / "data-1", tokenizer=tokenizer, workers=1, progress=False)
    args = ["train", "--deepspeed_config", str(deepspeed_json()), "data.path=data", *TINY, "steps=2",
            f"run.dir={tmp_path}", "run.name=run"]  # fmt: skip
    finished = rank_runner.finish(
        rank_runner.start(args, tmp_path, 2, program=each_has_its_own_data), tmp_path
    )
    assert finished.codes == [65, 65], finished.output
    ids = [TokenDataset.open(tmp_path / f"data-{rank}").identity[:12] for rank in range(2)]
    line = next(line for line in finished.output.splitlines() if line.startswith("bigtfm: error"))
    assert line == (
        f"bigtfm: error: data: rank 1 ({socket.gethostname()}) has another data than rank 0: data.sha256 is "
        f"{ids[1]}... there, {ids[0]}... here. Fix: give all machines the same files (a streamed data set by "
        "its commit, hf:NAME#COMMIT) and all ranks the same command"
    )
    assert not (tmp_path / "run/metrics.jsonl").exists()


def tiny_is_large() -> None:
    """`bigtfm` for which 1000 bytes are too many to compare at every start."""
    indexed.VERIFIED_BYTES = 1000
    rank_runner._bigtfm()


@pytest.mark.launcher
@pytest.mark.slow
@pytest.mark.parametrize(("verify", "code"), [("beside", 65), ("start", 65), ("never", 0)])
def test_large_data_that_have_changed_end_the_run(
    verify: str, code: int, tmp_path: Path, tiny_data: Path, deepspeed_json: Json
) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    content = bytearray((data / "train-00000.bin").read_bytes())
    content[-1000] ^= 1
    (data / "train-00000.bin").write_bytes(content)
    steps = "steps=2000" if verify == "beside" else "steps=2"
    args = ["train", "--deepspeed_config", str(deepspeed_json()), f"data.path={data}", *TINY, steps,
            f"run.dir={tmp_path}", "run.name=run", f"data.verify={verify}"]  # fmt: skip
    ranks = 2 if verify == "beside" else 1
    finished = rank_runner.finish(rank_runner.start(args, tmp_path, ranks, program=tiny_is_large), tmp_path)
    assert finished.codes == [code] * ranks, finished.output
    if code:
        line = next(line for line in finished.output.splitlines() if line.startswith("bigtfm: error"))
        assert line.startswith(f"bigtfm: error: {data}/train-00000.bin: its SHA-256 is ")
        assert line.endswith(
            "the file was changed. Fix: write it again with `bigtfm prepare --out "
            f"{data} --force` and the same inputs"
        )
        assert json.loads((tmp_path / "run/failure.json").read_text())["exit_code"] == 65


def test_small_data_are_not_read_again(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = TokenDataset.open(tiny_data)
    assert large_files([dataset], 32, "windows") == []
    monkeypatch.setattr(indexed, "VERIFIED_BYTES", 1000)
    files = large_files([dataset], 32, "windows")
    assert {file.path.suffix for file in files} == {".bin", ".idx"}
    with Verification(files) as verification:
        verification.wait()
        verification.require_sound()
    with Verification([*files, files[0]._replace(sha256="0" * 64)]) as verification:
        verification.wait()
        assert verification.failed
        with pytest.raises(DataProblem, match="the file was changed"):
            verification.require_sound()


def test_ranks_that_see_one_folder_take_turns_and_others_read_all() -> None:
    places = ["shared", "own", "shared", "shared"]
    files = list(range(7))
    assert [files[share(places, rank)] for rank in range(4)] == [[0, 3, 6], files, [1, 4], [2, 5]]
