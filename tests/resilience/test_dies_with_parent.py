"""A fork server that is still importing when the process that started it is killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = """
import multiprocessing, os, sys, time
os.environ["BIGTFM_PARENT"] = str(os.getpid())  # as bigtfm.data.prefetch does; a test before may have, too
from multiprocessing import forkserver
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload([*sys.argv[1:], "slow_import"])
forkserver.ensure_running()
print(forkserver._forkserver._forkserver_pid, flush=True)
time.sleep(60)
"""


def dies_within(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("protected", [True, False])
def test_it_dies_too(protected: bool, tmp_path: Path) -> None:
    """And without that import it lives on: the control."""
    (tmp_path / "slow_import.py").write_text(
        f"open({str(tmp_path / 'begun')!r}, 'w'); import time; time.sleep(4)"
    )
    preload = ["bigtfm.resilience.dies_with_parent"] if protected else []
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *preload],
        env=os.environ | {"PYTHONPATH": f"{Path(__file__).parents[2]}:{tmp_path}"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert program.stdout is not None
    with program.stdout:
        server = int(program.stdout.readline())
    deadline = time.monotonic() + 30
    while not (tmp_path / "begun").exists():
        assert time.monotonic() < deadline, "it did not begin"
        time.sleep(0.02)
    program.kill()
    program.wait()
    assert dies_within(server, 1.0) == protected
