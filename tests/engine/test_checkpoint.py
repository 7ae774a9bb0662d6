"""Checkpoints as files: what verifies, what is chosen, what is kept. What they hold is tested by training."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import signing
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from bigtfm.config.problems import NoCheckpoint
from bigtfm.engine import checkpoint, checksums, loading, storage


def write(root: Path, step: int, *, value: float = 1.0) -> Path:
    """A checkpoint of one 2 x 3 parameter whose elements lie in two shards, as two ranks would write it."""
    folder = root / f"step-{step:08d}"
    folder.mkdir(parents=True)
    whole = torch.arange(6.0) * value
    save_file({"weight|fp32": whole[:4].clone()}, folder / "shard-00000.safetensors")
    save_file({"weight|fp32": whole[4:].clone()}, folder / "shard-00001.safetensors")
    places = (("shard-00000.safetensors", 0, 4), ("shard-00001.safetensors", 4, 2))
    fragments = [{"file": file, "start": start, "numel": numel} for file, start, numel in places]
    index = {"weight": {"shape": [2, 3], "keys": ["fp32"], "updates": step, "fragments": fragments}}
    (folder / "index.json").write_text(json.dumps(index))
    state = {"progress": {"step": step}, "groups": [], "scheduler": None, "loss_scaler": None}
    state["counters"] = dict.fromkeys(checkpoint.COUNTERS, step)
    (folder / "state.json").write_text(json.dumps(state))
    sign(folder)
    return folder


def sign(folder: Path) -> None:
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in folder.iterdir()
        if path.name != "manifest.json"
    }
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))


class Model(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(*shape))


def test_weights_are_put_together_from_all_shards(tmp_path: Path) -> None:
    model = Model(2, 3)
    loading.load_weights(write(tmp_path, 1), model)
    assert model.weight.tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]


def test_another_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NoCheckpoint, match=r"weight as \[2, 3\], the model needs \[3, 2\]"):
        loading.load_weights(write(tmp_path, 1), Model(3, 2))


def test_a_parameter_that_the_model_lacks_is_no_detail(tmp_path: Path) -> None:
    with pytest.raises(NoCheckpoint, match="has weight, which the model lacks"):
        loading.load_weights(write(tmp_path, 1), nn.Module())


def test_the_newest_that_verifies_is_chosen(tmp_path: Path) -> None:
    older, newer = write(tmp_path, 9), write(tmp_path, 10)
    assert checkpoint.newest(tmp_path) == newer
    (newer / "shard-00001.safetensors").unlink()
    assert checkpoint.newest(tmp_path) == older


def test_none_at_all_is_no_problem_and_only_damaged_ones_are(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "nowhere") is None
    assert checkpoint.newest(tmp_path) is None
    (write(tmp_path, 3) / "manifest.json").unlink()
    with pytest.raises(NoCheckpoint, match=r"manifest\.json"):
        checkpoint.newest(tmp_path)


@pytest.mark.parametrize("name", ["shard-00000.safetensors", "index.json", "state.json"])
def test_every_flipped_byte_is_seen(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path, 1)
    sound = (folder / name).read_bytes()
    assert checkpoint.defect(folder) is None
    for place in range(len(sound)):
        (folder / name).write_bytes(sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1 :])
        assert checkpoint.defect(folder) == f"{name} differs from its SHA-256"


def test_truncation_is_seen(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    shard = folder / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert "bytes instead of" in (checkpoint.defect(folder) or "")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": 1}', '{"format": 1, "files": {"a": 3}}'])
def test_a_damaged_manifest_is_seen(tmp_path: Path, text: str) -> None:
    folder = write(tmp_path, 1)
    (folder / "manifest.json").write_text(text)
    assert checkpoint.defect(folder)


def test_a_manifest_cannot_reach_out_of_its_folder(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    outside = tmp_path / "outside"
    outside.write_bytes(b"x")
    files = {"../outside": {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}}
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))
    assert "not a plain file name" in (checkpoint.defect(folder) or "")


def test_pruning_keeps_the_newest_and_the_best_and_clears_killed_saves(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 6, 9):
        write(tmp_path, step)
    for name in (".building-step-00000005", ".replaced-step-00000004", "step-00000003.bak", "step-best"):
        shutil.copytree(tmp_path / "step-00000004", tmp_path / name)
    os.utime(tmp_path / "step-00000001", (2e9, 2e9))  # a clock that went back
    checkpoint.prune(tmp_path, checkpoint.Retention(keep=2, keep_every=3), step=4, best_step=1)
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == ["step-00000001", "step-00000003", "step-00000003.bak", "step-00000004", "step-best"]


def test_a_checkpoint_that_is_being_deleted_is_gone_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else whoever reads meanwhile, or after a kill, would take it for a damaged one."""
    older, newer = write(tmp_path, 9), write(tmp_path, 10)
    seen: list[Path | None] = []
    rmtree = shutil.rmtree

    def slow(path: Path, **_: object) -> None:
        if path.exists():
            (path / "index.json").unlink()
            seen.append(checkpoint.newest(tmp_path))
        rmtree(path, ignore_errors=True)

    monkeypatch.setattr(shutil, "rmtree", slow)
    storage.remove(newer)
    assert seen == [older]
    assert [path.name for path in tmp_path.iterdir()] == [older.name]


def test_a_link_is_removed_and_not_what_it_leads_to(tmp_path: Path) -> None:
    folder = write(tmp_path, 9)
    (tmp_path / ".building-step-00000010").symlink_to(folder)
    checkpoint.prune(tmp_path, checkpoint.Retention(keep=1), step=9, best_step=None)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert checkpoint.defect(folder) is None


def test_a_sealed_manifest_says_of_every_byte_that_it_has_changed(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    manifest = folder / "manifest.json"
    signing.write(manifest, json.loads(manifest.read_bytes()))
    assert checkpoint.defect(folder) is None
    sound = manifest.read_bytes()
    for place in range(len(sound)):
        manifest.write_bytes(sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1 :])
        assert checkpoint.defect(folder) == "manifest.json is damaged", place
        manifest.write_bytes(sound[:place])
        assert checkpoint.defect(folder) == "manifest.json is damaged", place


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0, []), (0.3, [0.3]), (2, [0.5, 1.0, 0.5]), (30, [0.5, 1, 2, 4, 8, 14.5])]
)
def test_pauses_double_and_add_up(seconds: float, expected: list[float]) -> None:
    assert list(storage.pauses(seconds)) == expected


def test_only_steps_count_and_by_their_number(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000):
        newest = write(tmp_path, step)
    shutil.copytree(newest, tmp_path / "step-best")
    assert checkpoint.newest(tmp_path) == newest


def test_what_is_passed_over_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    older, newer = write(tmp_path, 9), write(tmp_path, 10)
    (newer / "index.json").unlink()
    assert checkpoint.newest(tmp_path) == older
    assert "passed over step-00000010: index.json" in capsys.readouterr().err


def test_a_newer_format_is_not_passed_over(tmp_path: Path) -> None:
    write(tmp_path, 9)
    manifest = write(tmp_path, 10) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(NoCheckpoint, match="another version: format 2 is not 1"):
        checkpoint.newest(tmp_path)


def test_a_disk_that_fails_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path, 10)

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error", "shard")

    monkeypatch.setattr(checkpoint, "_file_defect", fail)
    with pytest.raises(OSError, match="Input/output"):
        checkpoint.defect(folder)


STATE_DAMAGE: dict[str, Callable[[dict[str, Any]], object]] = {
    "no counters": lambda state: state.pop("counters"),
    "a counter of NaN": lambda state: state["counters"].update(global_steps=math.nan),
    "another step": lambda state: state["progress"].update(step=3),
    "a step as text": lambda state: state["progress"].update(step="1"),
    "samples of 2^70 in words": lambda state: state["progress"].update(samples="2^70"),
    "no groups": lambda state: state.pop("groups"),
    "a probe without inputs": lambda state: state.update(probe={"loss": 1.0, "setting": {}}),
    "a probe of NaN": lambda state: state.update(probe={"loss": math.nan, "setting": {}, "inputs": {}}),
    "a probe of floats": lambda state: state.update(
        probe={"loss": 1.0, "setting": {}, "inputs": {"ids": {"dtype": "float32", "values": [1.5]}}}
    ),
}
INDEX_DAMAGE: dict[str, Callable[[dict[str, Any]], object]] = {
    "no keys": lambda entry: entry.pop("keys"),
    "updates of NaN": lambda entry: entry.update(updates=math.nan),
    "updates below 0": lambda entry: entry.update(updates=-3),
    "an offset as text": lambda entry: entry["fragments"][0].update(start="0"),
    "an offset below 0": lambda entry: entry["fragments"][0].update(start=-1),
    "a fraction of an element": lambda entry: entry["fragments"][0].update(numel=3.5),
}


@pytest.mark.parametrize("what", [*STATE_DAMAGE, *INDEX_DAMAGE])
def test_what_is_signed_and_makes_no_sense_is_damaged(what: str, tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    name = "state.json" if what in STATE_DAMAGE else "index.json"
    content = json.loads((folder / name).read_text())
    STATE_DAMAGE[what](content) if what in STATE_DAMAGE else INDEX_DAMAGE[what](content["weight"])
    (folder / name).write_text(json.dumps(content))
    sign(folder)
    assert name in (checkpoint.defect(folder) or "")


@given(st.lists(st.integers(0, 40), max_size=6), st.integers(0, 2**32 - 1))
def test_a_checksum_does_not_depend_on_where_it_is_cut(cuts: list[int], seed: int) -> None:
    values = torch.randn(40, generator=torch.Generator().manual_seed(seed))
    edges = sorted({0, 40, *cuts})
    parts = [checksums.checksum(values[a:b], a) for a, b in pairwise(edges)]
    assert sum(parts) % 2**64 == checksums.checksum(values, 0)


def test_a_checksum_sees_a_flipped_bit_and_a_swap() -> None:
    values = torch.randn(2**20 + 3, generator=torch.Generator().manual_seed(0))  # over a piece's end
    sound = checksums.checksum(values, 0)
    values[[5, 2**20 + 1]] = values[[2**20 + 1, 5]]
    swapped = checksums.checksum(values, 0)
    values[2**20 + 2] = torch.nextafter(values[2**20 + 2], torch.tensor(9.0))
    assert len({sound, swapped, checksums.checksum(values, 0)}) == 3


def test_ranks_verify_their_share_of_the_files(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    shard = folder / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    found = [checkpoint.defect(folder, (rank, 3)) for rank in range(3)]
    assert sorted(map(bool, found)) == [False, False, True]
