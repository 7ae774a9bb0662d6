"""Launchers that are killed or asked to stop: the ranks below them save, and nothing is left behind.

Each starts in some 30 seconds: ALL_LAUNCHERS=1 tries the others, too.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import rank_runner
from conftest import ROOT, TINY, losses

Json = Callable[..., Path]
pytestmark = [pytest.mark.launcher, pytest.mark.slow]


def processes_of(mark: str) -> dict[int, str]:
    """Process ids and command lines of what lives with this in its environment."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            if mark.encode() in (entry / "environ").read_bytes() and state != "Z":
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # it has just ended
            continue
    return found


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.1)


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[str]:
    """Something in the environment of all that a test starts, which is gone when the test is."""
    mark = f"BIGTFM_TEST_MARK={tmp_path}"
    yield mark
    for pid in processes_of(mark):
        os.kill(pid, signal.SIGKILL)


VICTIMS = [
    ("deepspeed", "bin/deepspeed", signal.SIGTERM),
    ("deepspeed", "launcher.launch", signal.SIGKILL),
    ("torchrun", "bin/torchrun", signal.SIGKILL),
]


@pytest.mark.parametrize(
    ("program", "victim", "number"), VICTIMS if os.environ.get("ALL_LAUNCHERS") else VICTIMS[:1]
)
def test_the_ranks_save_and_nothing_stays(
    program: str,
    victim: str,
    number: signal.Signals,
    mark: str,
    tmp_path: Path,
    tiny_data: Path,
    deepspeed_json: Json,
) -> None:
    scripts, port = Path(sys.executable).parent, str(rank_runner.free_port())
    start = {
        "deepspeed": [scripts / "deepspeed", "--num_gpus", "2", "--master_port", port],
        "torchrun": [scripts / "torchrun", "--nproc-per-node", "2", "--master-port", port],
    }[program]
    args = ["--deepspeed_config", deepspeed_json(stage=2), f"data.path={tiny_data}", "run.name=run", *TINY]
    environ = {**os.environ, mark.partition("=")[0]: mark.partition("=")[2], "PYTHONPATH": str(ROOT)}
    environ["PATH"] = f"{scripts}:{environ['PATH']}"
    with (tmp_path / "output").open("wb") as output:
        launcher = subprocess.Popen(
            [*start, ROOT / "launch/train.py", *args, "steps=100000"],
            cwd=tmp_path,
            env=environ,
            stdout=output,
            stderr=output,
        )
    metrics = tmp_path / "runs/run/metrics.jsonl"
    wait_for(lambda: metrics.exists() and len(losses(metrics.parent)) > 2, 120)
    os.kill(next(pid for pid, line in processes_of(mark).items() if victim in line), number)
    wait_for(lambda: not processes_of(mark), 40)
    launcher.wait()
    said = (tmp_path / "output").read_text()
    lines = [line for line in said.splitlines() if line.startswith("bigtfm: error:")]
    step = len(losses(metrics.parent))
    assert len(lines) == 1, said
    assert f"saved at step {step} and stopped by the end of its launcher" in lines[0]
    assert (tmp_path / f"runs/run/checkpoints/step-{step:08d}/manifest.json").exists()
