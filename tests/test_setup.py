"""The Makefile picks the right torch and Python and recovers from a kill; nothing is downloaded."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GPU = 'echo "GPU 0: NVIDIA H200 (UUID: GPU-1)"'
NO_DRIVER = 'echo "NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver."; exit 9'


def fake(folder: Path, name: str, script: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def make(*arguments: str, first_in_path: Path | None = None) -> subprocess.CompletedProcess[str]:
    names = (
        "PYTHON",
        "TORCH_VERSION",
        "TORCH_CPU_INDEX",
        "RUN",
        "STEPS",
        "ARGS",
        "MAKEFLAGS",
        "MAKELEVEL",
        "MFLAGS",
    )
    environment = {name: value for name, value in os.environ.items() if name not in names}
    if first_in_path is not None:
        environment["PATH"] = f"{first_in_path}:{environment['PATH']}"
    return subprocess.run(
        ["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )


def plan(tmp_path: Path, *arguments: str, nvidia_smi: str) -> str:
    """What `make ...` would run in a clone without .venv."""
    fake(tmp_path / "bin", "nvidia-smi", nvidia_smi)
    done = make("-n", *arguments, f"VENV={tmp_path / 'venv'}", first_in_path=tmp_path / "bin")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="macOS has no CUDA build to avoid")
def test_linux_without_a_gpu_only_ever_asks_for_the_cpu_build(tmp_path: Path) -> None:
    commands = plan(tmp_path, "setup", nvidia_smi=NO_DRIVER)
    asked = [word for word in commands.split() if word.strip("'\"").startswith("torch==")]
    assert asked
    assert {word.strip("'\";") for word in asked} == {"torch==2.13.0+cpu"}
    known, published = (
        commands.index("install"),
        commands.index("--extra-index-url https://download.pytorch.org/whl/cpu"),
    )
    assert known < published  # an own mirror is asked first


def test_a_gpu_gets_the_default_build(tmp_path: Path) -> None:
    commands = plan(tmp_path, "setup", "TORCH_VERSION=2.9.1", nvidia_smi=GPU)
    assert "'torch==2.9.1'" in commands
    assert "+cpu" not in commands
    assert "download.pytorch.org" not in commands


def test_later_packages_keep_the_torch_that_is_there(tmp_path: Path) -> None:
    commands = plan(tmp_path, "setup", nvidia_smi=NO_DRIVER)
    constraint = commands.index("constraints.txt")
    assert constraint < commands.index("--constraint") < commands.index("--editable '.[dev,hf,")


@pytest.mark.parametrize(
    ("gpus", "ranks"), [(NO_DRIVER, 2), (GPU, 1), (f"{GPU}; {GPU}", 2), (f"{GPU}; {GPU}; {GPU}", 2)]
)
def test_the_quickstart_uses_two_ranks_or_the_one_gpu(tmp_path: Path, gpus: str, ranks: int) -> None:
    commands = plan(tmp_path, "quickstart", "STEPS=40", nvidia_smi=gpus)
    assert f"--num_gpus {ranks} " in commands
    assert "run.steps=40" in commands
    assert "run.steps" not in plan(tmp_path, "quickstart", nvidia_smi=gpus)


def stamped(venv: Path) -> Path:
    """A .venv that make takes for complete."""
    venv.mkdir()
    for name in (".python", ".torch-2.13.0", ".ready"):
        (venv / name).touch()
    return venv


def test_a_complete_environment_is_left_alone(tmp_path: Path) -> None:
    assert "pip" not in make("-n", "setup", f"VENV={stamped(tmp_path / 'venv')}").stdout


def test_a_killed_set_up_starts_again(tmp_path: Path) -> None:
    venv = stamped(tmp_path / "venv")
    (venv / ".started").write_text("4194305\n")  # above the largest process id
    commands = make("-n", "setup", f"VENV={venv}").stdout
    assert "-m venv --clear" in commands
    assert "--editable" in commands


def test_two_set_ups_at_once_do_not_destroy_each_other(tmp_path: Path) -> None:
    venv = stamped(tmp_path / "venv")
    (venv / ".started").write_text(f"{os.getpid()}\n")
    done = make("setup", f"VENV={venv}")
    assert done.returncode != 0
    assert "another make is setting up" in done.stderr
    assert (venv / ".ready").exists()


@pytest.mark.parametrize(
    ("script", "line"),
    [
        ("exit 1", "is not Python 3.11 or later"),  # what `sys.exit(version < 3.11)` answers
        ('case "$2" in *ensurepip*) exit 1;; esac', "has no venv module. Fix: apt install"),
    ],
)
def test_an_unfit_python_is_told_in_one_line(tmp_path: Path, script: str, line: str) -> None:
    python = fake(tmp_path / "bin", "python3.12", script)
    done = make("setup", f"VENV={tmp_path / 'venv'}", f"PYTHON={python}")
    assert done.returncode != 0
    told = [text for text in done.stderr.splitlines() if not text.startswith("make")]
    assert len(told) == 1
    assert line in told[0]


def test_a_failed_install_leaves_no_stamp_and_says_what_to_do(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / ".python").touch()
    fake(venv / "bin", "python", "echo 'ERROR: no such wheel' >&2; exit 1")
    done = make("setup", f"VENV={venv}")
    assert done.returncode != 0
    assert "ERROR: no such wheel" in done.stderr
    assert "Fix: connect to the network" in done.stderr
    assert sorted(path.name for path in venv.iterdir()) == [".python", "bin", "setup.log"]


def test_help_lists_the_targets() -> None:
    listed = [line.split()[1] for line in make("help").stdout.splitlines()]
    assert {"setup", "quickstart", "test", "check", "ui", "bench", "clean"} <= set(listed)
    assert make().stdout == make("help").stdout


def test_the_package_declares_its_extras_and_its_command() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"bench", "dev", "flash", "hf"} <= set(project["optional-dependencies"])
    assert project["scripts"] == {"bigtfm": "bigtfm.cli:app"}
    assert project["license"] == "Apache-2.0"


def test_ci_is_valid_bash_and_runs_the_documented_commands() -> None:
    subprocess.run(["bash", "-n", ".ci/run"], cwd=ROOT, check=True)
    script = (ROOT / ".ci" / "run").read_text()
    assert script.index("make lint") < script.index("make test") < script.index("timed quickstart")
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
