"""Writing a shard: signs of life, piece by piece."""

from __future__ import annotations

import hashlib
import os
from contextlib import nullcontext
from mmap import mmap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bigtfm.engine import saver
from bigtfm.engine.checkpoint import Retention
from bigtfm.resilience.pulse import Pulse


@pytest.mark.parametrize("direct", [True, False])
def test_each_piece_is_a_sign_of_life_once_it_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool
) -> None:
    monkeypatch.setattr(saver, "PIECE", saver.PAGE)
    if not direct:
        monkeypatch.setattr(saver, "_past_cache", lambda *_: False)
    pulse, image = Pulse(), mmap(-1, 4 * saver.PAGE)
    image[:] = os.urandom(len(image))
    pulse.enter("save")
    before, seen = pulse.read().changes, []
    flush = os.fsync

    def fsync(handle: int) -> None:
        flush(handle)
        seen.append(pulse.read().changes - before)

    monkeypatch.setattr(os, "fsync", fsync)
    size = len(image) - 7
    writer: Any = SimpleNamespace(_file_image=image, _bytes=size, _ranks=SimpleNamespace(pulse=pulse))
    row = saver.Saver._write_shard(writer, tmp_path / "shard")
    assert row == {"bytes": size, "sha256": hashlib.sha256(image[:size]).hexdigest()}
    assert (tmp_path / "shard").read_bytes() == image[:size]
    assert pulse.read().changes - before == 4
    if not direct:  # what waits in the page cache would be written in silence at the end
        assert seen == [0, 1, 2, 3, 4]


def test_a_checkpoint_gets_its_name_after_the_log_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    monkeypatch.setattr(saver.checkpoint, "finish", lambda *_: done.append("finish"))
    ranks = SimpleNamespace(rank=0, together=lambda _: nullcontext(), gather=lambda value: [value])
    writer: Any = SimpleNamespace(_root=tmp_path, _aside=ranks, _retention=Retention(1))
    state = {"progress": {"step": 1, "best_step": None}}

    def write() -> None:
        saver.Saver._write_into(writer, tmp_path / ".building-x", tmp_path / "x", 0, state, {})

    writer._flush_log = lambda: done.append("flush")
    write()
    assert done == ["flush", "finish"]
    writer._flush_log = (tmp_path / "metrics.jsonl").read_bytes  # it is gone
    with pytest.raises(OSError, match="No such file"):
        write()
    assert done == ["flush", "finish"]
