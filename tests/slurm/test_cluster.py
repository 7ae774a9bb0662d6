"""The cluster that the other tests stand on does what theirs do: preempt, lose nodes and daemons, end."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from slurm.cluster import Cluster, cluster, missing
from slurm.conftest import require_slurm
from slurm.settings import Settings

pytestmark = pytest.mark.slurm


def script(folder: Path, text: str, name: str = "job.sh") -> str:
    """A batch job; its output goes to folder/out."""
    head = f"#!/bin/bash\n#SBATCH --output={folder}/out --open-mode=append\n"
    (folder / name).write_text(head + textwrap.dedent(text))
    return str(folder / name)


def wait_for_line(path: Path, text: str) -> None:
    _wait_until(lambda: path.exists() and text in path.read_text())


def _wait_until(there: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_two_nodes_with_two_gpus_each_are_up_within_two_seconds() -> None:
    require_slurm()
    began = time.monotonic()
    with cluster() as slurm:
        assert time.monotonic() - began < 2
        said = slurm.run(
            "srun", "-N2", "--ntasks-per-node=2", "--gpus-per-node=2", "sh", "-c",
            "echo $(hostname) $SLURM_PROCID $CUDA_VISIBLE_DEVICES", cwd=Path("/"),
        )  # fmt: skip
    assert sorted(said.splitlines()) == ["n1 0 0,1", "n1 1 0,1", "n2 2 0,1", "n2 3 0,1"]


def test_nothing_is_left_of_a_cluster_whose_process_is_killed(tmp_path: Path) -> None:
    require_slurm()
    program = """
        import sys, time
        from pathlib import Path
        from slurm.cluster import cluster
        with cluster() as slurm:
            slurm.run("sbatch", "--wrap", "sleep 4711", cwd=Path("/"))
            slurm.wait_for("1", "RUNNING", seconds=10)
            print(flush=True)
            time.sleep(60)
    """
    environ = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, env=environ
    )
    assert process.stdout is not None
    with process.stdout:
        process.stdout.readline()
    try:
        _wait_until(lambda: _commands("sleep\x004711") == 1)
    finally:
        process.kill()
        process.wait()
    _wait_until(lambda: _commands("sleep\x004711", "/mnt/munge/socket") == 0)
    assert "cluster /mnt" not in Path("/proc/mounts").read_text()


def _commands(*parts: str) -> int:
    """Processes whose command line holds one of `parts`."""
    found = 0
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += any(part in path.read_text() for part in parts)
        except OSError:
            pass
    return found


@pytest.mark.slow
@pytest.mark.long
def test_a_higher_partition_preempts_with_a_warning_and_the_job_comes_back(
    slurm: Cluster, tmp_path: Path
) -> None:
    task = "trap 'echo USR1 in the task' USR1; echo started $SLURM_RESTART_COUNT; while :; do sleep 0.1; done"
    work = f'srun bash -c "{task}" & wait'.replace("$", "\\$")
    low = slurm.sbatch("-N2", "--exclusive", "--signal=USR1@5", script(tmp_path, work), cwd=tmp_path)
    wait_for_line(tmp_path / "out", "started")
    high = slurm.sbatch("-N2", "--exclusive", "-p", "high", "--wrap", "sleep 1", cwd=tmp_path)
    slurm.wait_for(high, "COMPLETED", seconds=30)
    slurm.wait_for(low, "RUNNING", seconds=30, restarts=1)
    wait_for_line(tmp_path / "out", "started 1")
    assert "USR1 in the task" in (tmp_path / "out").read_text()
    slurm.scancel(low)
    slurm.wait_for(low, "CANCELLED", seconds=15)


@pytest.mark.slow
@pytest.mark.long
def test_a_job_outlives_the_daemons(slurm: Cluster, tmp_path: Path) -> None:
    job = slurm.sbatch("-N2", "--exclusive", "--wrap", "echo started; sleep 4; echo ended",
                       f"--output={tmp_path}/out", cwd=tmp_path)  # fmt: skip
    wait_for_line(tmp_path / "out", "started")
    slurm.stop_controller()
    slurm.kill_slurmd("n1")
    assert slurm.job(job) == {}
    slurm.nodes["n1"].power_on()
    slurm.start_controller()
    found = slurm.wait_for(job, "COMPLETED", seconds=20)
    assert found.get("Restarts") == "0"
    assert "ended" in (tmp_path / "out").read_text()


@pytest.mark.slow
@pytest.mark.long
def test_a_power_loss_takes_everything_and_the_job_runs_elsewhere(slurm: Cluster, tmp_path: Path) -> None:
    work = 'echo started on $SLURM_JOB_NODELIST; [ "$SLURM_RESTART_COUNT" ] || sleep 4712'
    job = slurm.sbatch("-N1", "-w", "n1", script(tmp_path, work), cwd=tmp_path)
    wait_for_line(tmp_path / "out", "started on n1")
    _wait_until(lambda: _commands("sleep\x004712") == 1)
    slurm.kill_node("n1")
    assert _commands("sleep\x004712") == 0
    slurm.scontrol("update", "NodeName=n1", "State=DOWN", "Reason=power")
    slurm.start_node("n1")
    slurm.wait_for(job, "COMPLETED", seconds=30, restarts=1)
    slurm.wait_for_nodes("idle")


def test_a_cut_cable_cuts(wired: Cluster) -> None:
    port = next(
        line.split("=")[1]
        for line in (wired.files / "slurm.conf").read_text().splitlines()
        if line.startswith("SlurmctldPort=")
    )

    def reaches() -> bool:
        connect = f"timeout 1 bash -c '</dev/tcp/{wired.settings.head_address}/{port}' 2>/dev/null"
        inside = ["nsenter", "-t", str(wired.nodes["n2"].first), "-n", "sh", "-c", connect]
        return subprocess.run(inside).returncode == 0

    def reaches_soon() -> bool:
        return any(
            reaches() for _ in range(15)
        )  # a busy machine, or neighbours that look for each other anew

    assert reaches_soon()
    wired.cable("n2", plugged=False)
    assert not reaches()
    wired.cable("n2", plugged=True)
    assert reaches_soon()


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slurm.cluster.PROGRAMS", ("sh", "slurmctld-of-nowhere"))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert missing() == "slurmctld-of-nowhere not installed: make slurm-packages"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert missing() == "a Slurm cluster for tests needs root (namespaces)"


def test_in_ci_a_missing_cluster_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="in CI these tests must run: a Slurm cluster"):
        require_slurm()
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception):
        require_slurm()


def test_the_settings_know_their_nodes() -> None:
    files = Settings(nodes=3, gpus=4, own_network=True).files("here", [1, 2, 3, 4])
    assert "NodeName=n3 NodeHostname=n3 NodeAddr=10.213.0.3 Port=4" in files["slurm.conf"]
    assert "10.213.0.254 here" in files["hosts"]
