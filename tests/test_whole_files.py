"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from bigtfm.whole_files import whole_file, write_whole


def half_written(out: Path, error: BaseException) -> None:
    with whole_file(out) as building:
        building.write_text("half of")
        raise error


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_what_was_there_and_nothing_else(error: BaseException, tmp_path: Path) -> None:
    out = tmp_path / "new" / "found.json"
    write_whole(out, "before")
    with pytest.raises(type(error)) as caught:
        half_written(out, error)
    assert getattr(caught.value, "filename", str(out)) == str(out), "a write that finds no room names no file"
    assert [path.name for path in out.parent.iterdir()] == ["found.json"]
    assert out.read_text() == "before"


def test_a_place_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file") as caught:
        write_whole(tmp_path / "file" / "x", "")
    assert caught.value.filename is not None


def test_it_has_the_users_permissions(tmp_path: Path) -> None:
    write_whole(tmp_path / "a", "")
    (tmp_path / "b").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode
