"""The script that `bigtfm submit` writes, and that Slurm and shellcheck take the shipped ones."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT
from slurm.cluster import Cluster

from bigtfm.config.problems import ConfigProblem
from bigtfm.slurm.submit import Request, submit, write_script

SCRIPTS = sorted((ROOT / "slurm").glob("*.sbatch"))


def written(*, overrides: tuple[str, ...] = ("run.steps=7",), **changes: tuple[str, ...]) -> str:
    request = Request(4, 2, "12:00:00", "gpu", **changes)
    return request.script(Path("runs/mine"), Path("run.toml"), Path("ds.json"), overrides)


def test_the_script_holds_what_was_asked() -> None:
    lines = written(options=("--account=x", "--exclusive"), knobs=("CONTAINER=a b.sif",)).splitlines()
    for line in (
        "#SBATCH --job-name=mine", "#SBATCH --nodes=4", "#SBATCH --ntasks-per-node=2",
        "#SBATCH --time=12:00:00", "#SBATCH --partition=gpu", "#SBATCH --account=x",
        "#SBATCH --exclusive", "#SBATCH --signal=USR1@120",
        "export CONFIG=run.toml", "export RUN_DIR=runs/mine", "export OVERRIDES=run.steps=7",
        "export CONTAINER='a b.sif'",
    ):  # fmt: skip
        assert lines.count(line) == 1, line
    assert sum(line.startswith("#SBATCH --nodes") for line in lines) == 1
    assert max(n for n, line in enumerate(lines) if line.startswith("#SBATCH")) < lines.index(
        "export CONFIG=run.toml"
    )


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"knobs": ("CONTANER=x",)},
            "error: command line: --set CONTANER=x: no such variable. Fix: did you mean 'CONTAINER'?",
        ),
        (
            {"options": ("account=x",)},
            "error: command line: --sbatch account=x: not an option. Fix: write --sbatch=--name=value",
        ),
        (
            {"knobs": ("RUN_DIR=runs/other",)},
            "error: command line: --set RUN_DIR=runs/other: no such variable. Fix: use one of: AGAIN, "
            "CHAIN_OPTIONS, CONTAINER, CONTAINER_OPTIONS, LAUNCHER, RETRIES, SETUP, SRUN_OPTIONS",
        ),
        (
            {"overrides": ("run.name=a b",)},
            "error: command line: 'run.name=a b' holds a space. Fix: write it into the run config",
        ),
    ],
)
def test_what_is_no_option_is_refused(changes: dict[str, tuple[str, ...]], line: str) -> None:
    with pytest.raises(ConfigProblem) as caught:
        written(**changes)
    assert caught.value.line == line


@pytest.mark.parametrize(
    ("time", "line"),
    [
        ("4", None), ("3:01", None), ("0:4:00", None), ("1-0", None), ("1-0:30", None), ("UNLIMITED", None),
        ("12h", "--time=12h: no time limit"), ("-5", "--time=-5: no time limit"),
        ("3", "--time=3: no time to train"), ("3:00", "--time=3:00: no time"),
        ("0:03:00", "--time=0:03:00: no time"), ("0-0:3", "--time=0-0:3: no time"),
    ],
)  # fmt: skip
def test_a_time_limit_that_leaves_no_time_is_refused(time: str, line: str | None) -> None:
    def ask(*options: str) -> str:
        return Request(1, 1, time, None, options).script(Path("runs/x"), Path("a"), Path("b"), ())

    if line is None:
        assert f"#SBATCH --time={time}\n" in ask()
        return
    with pytest.raises(ConfigProblem) as caught:
        ask()
    assert line in caught.value.line
    if "no time to" in line:
        assert "--signal=USR1@30\n" in ask("--signal=USR1@30")


def test_without_slurm_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_script(tmp_path, written())
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigProblem, match="there is no sbatch here"):
        submit(path)


def test_there_are_scripts() -> None:
    assert len(SCRIPTS) == 8


@pytest.mark.slurm
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_slurm_takes_every_script(path: Path, slurm: Cluster) -> None:
    options = (
        ["--gpus-per-node=2", "--ntasks-per-node=1", "--cpus-per-task=2"]
        if "--gpus" in path.read_text()
        else []
    )
    slurm.run("sbatch", "--test-only", *options, "--cpus-per-task=2", str(path), cwd=ROOT)
    with pytest.raises(RuntimeError):
        slurm.run("sbatch", "--test-only", "--nodes=99", str(path), cwd=ROOT)


@pytest.mark.slurm
def test_slurm_takes_what_is_written(slurm: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "my runs" / "first"
    text = Request(2, 2, "10", "high", ("--cpus-per-task=1", "--hold")).script(
        run, Path("run.toml"), Path("ds.json"), []
    )
    job = slurm.sbatch(str(write_script(run, text)), cwd=tmp_path)
    assert f"StdOut={run}/logs/slurm-{job}.log" in slurm.scontrol("show", "job", job)
    slurm.scancel(job)


def test_shellcheck_finds_nothing(tmp_path: Path) -> None:
    if shutil.which("shellcheck") is None:
        assert os.environ.get("CI") != "true", "in CI shellcheck must be there"
        pytest.skip("shellcheck is not installed: make slurm-packages")
    (tmp_path / "written.sbatch").write_text(written())
    done = subprocess.run(
        ["shellcheck", "-x", *map(str, SCRIPTS), str(tmp_path / "written.sbatch")],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    (tmp_path / "wrong.sh").write_text("#!/bin/bash\nrm $1\n")
    assert subprocess.run(["shellcheck", tmp_path / "wrong.sh"], capture_output=True).returncode != 0
