"""Which command lines are a launcher's, and which launchers are gone."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from bigtfm.resilience.launchers import launcher_in


@pytest.mark.parametrize(
    ("line", "launcher"),
    [
        ("/venv/bin/python /venv/bin/deepspeed --num_gpus 2 launch/train.py", "deepspeed"),
        ("/bin/sh /usr/bin/ds --num_gpus 2", "ds"),
        ("python3.11 -u -m deepspeed.launcher.launch --world_info=e30=", "deepspeed.launcher.launch"),
        ("python -m torch.distributed.run --nproc-per-node 2 x.py", "torch.distributed.run"),
        ("torchrun --nproc-per-node 2 x.py", "torchrun"),
        ("bash start.sh ds", None),
        ("bash -c deepspeed_and_more", None),
        ("make deepspeed", None),
        ("sudo -u deepspeed bash", None),
        ("tmux new -s ds", None),
        ("python train.py deepspeed", None),
        ("-bash", None),
        ("bash", None),
        ("", None),
    ],
)
def test_a_launcher_is_the_program_or_its_script(line: str, launcher: str | None) -> None:
    assert launcher_in(line.split(" ")) == launcher


RANK = "from bigtfm.resilience.launchers import launchers; print([(x.name, x.lives) for x in launchers()])"
LAUNCH = f"""
import pathlib, subprocess, sys, time
while not pathlib.Path("go").exists():
    time.sleep(0.02)
subprocess.run([sys.executable, "-c", {RANK!r}], stdout=open("seen", "w"))
pathlib.Path("done").touch()
"""
RUNNER = "import subprocess, sys; subprocess.run([sys.executable, '-m', 'deepspeed.launcher.launch'])"


@pytest.mark.parametrize(
    ("runner", "killed", "found"),
    [
        ("deepspeed", False, [("deepspeed.launcher.launch", True), ("deepspeed", True)]),
        ("deepspeed", True, [("deepspeed.launcher.launch", True), ("deepspeed", False)]),
        ("slurmstepd", False, [("deepspeed.launcher.launch", True)]),
    ],
)
def test_a_runner_that_is_gone_before_anybody_looks_is_missed(
    runner: str, killed: bool, found: list[tuple[str, bool]], tmp_path: Path
) -> None:
    """ssh, srun and their like start the launcher of ranks on other machines: there no runner is missed."""
    package = tmp_path / "deepspeed/launcher"
    package.mkdir(parents=True)
    (package / "launch.py").write_text(LAUNCH)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()  # else the real one is found
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / runner).write_text(RUNNER)
    environ = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    program = [sys.executable, f"bin/{runner}"]
    started = subprocess.Popen(program, cwd=tmp_path, env=environ, start_new_session=True)
    time.sleep(0.5)
    if killed:
        started.kill()
        started.wait()
    (tmp_path / "go").touch()
    started.wait()
    deadline = time.monotonic() + 20
    while not (tmp_path / "done").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert (tmp_path / "seen").read_text() == f"{found}\n"
