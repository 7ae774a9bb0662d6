"""`bigtfm doctor` on broken machines: real files, sockets and processes; of GPUs, what their tools print."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bigtfm.doctor import findings, gpus, machine, network, storage
from bigtfm.doctor.findings import Finding
from bigtfm.doctor.gpus import Driver, TorchFacts

DOCTOR = [str(Path(sys.executable).with_name("bigtfm")), "doctor", "--json"]


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as owner:
        owner.bind(("127.0.0.1", 0))
        owner.listen()
        yield owner.getsockname()[1]


def only(found: list[Finding]) -> Finding:
    assert len(found) == 1, found
    return found[0]


def test_the_command_on_a_broken_machine(tmp_path: Path, taken_port: int) -> None:
    """All that is broken is an error with a fix; the rest is checked none the less, and soon."""
    lock = tmp_path / "extensions/py311_cpu/cpu_adam/lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    (tmp_path / "runs").write_text("a file where a folder should be")
    broken = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(taken_port),
        "OMP_NUM_THREADS": "640",
        "GLOO_SOCKET_IFNAME": "nosuch0",
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
    }
    began = time.monotonic()
    done = subprocess.run(
        DOCTOR, cwd=tmp_path, env=os.environ | broken, capture_output=True, text=True, check=False
    )
    seconds = time.monotonic() - began
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr == ""
    assert seconds < 15, "10, and what a loaded machine takes to start Python"
    report = json.loads(done.stdout)
    assert not report["ok"]
    by_check = {finding["check"]: finding for finding in report["findings"]}
    wrong = {name: f["status"] for name, f in by_check.items() if f["status"] != "ok"}
    for name in ("rendezvous", "interfaces", "disk: runs", "compiler"):
        assert wrong[name] == "error"
    assert wrong["CPU"] == "warning"
    assert by_check["compiler"]["fix"] == f"remove them: rm {lock}"
    assert by_check["interfaces"]["found"] == "GLOO_SOCKET_IFNAME=nosuch0: no interface nosuch0"
    assert all(by_check[name]["fix"] for name in wrong)
    assert {"Python", "packages", "loopback", "memory", "limits", "clock"} <= by_check.keys()


def test_a_check_that_fails_or_hangs_is_a_finding_like_others() -> None:
    def broken() -> list[Finding]:
        raise ZeroDivisionError("division by zero")

    def hanging() -> list[Finding]:
        threading.Event().wait()
        return []

    checks = {"a": lambda: [findings.ok("a", "fine")], "b": broken, "c": hanging}
    began = time.monotonic()
    found = findings.examine(checks, 0.3)
    assert time.monotonic() - began < 1
    assert [(f.check, f.status) for f in found] == [("a", "ok"), ("b", "warning"), ("c", "error")]
    assert found[1].found == "could not be checked: ZeroDivisionError: division by zero"
    assert found[2].found == "no answer within 0 s"
    assert not findings.is_well(found)


# --- packages


@pytest.mark.parametrize(
    ("need", "found", "fix"),
    [
        ("rich>=99", "is not >=99", "pip install 'rich>=99'"),
        ("no-such-thing>=1", "no-such-thing is not installed", "pip install 'no-such-thing>=1'"),
    ],
)
def test_packages_outside_their_ranges(
    need: str, found: str, fix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "requires", lambda _: ["numpy>=1", need, "nobody>=1; extra == 'dev'"])
    wrong = [finding for finding in machine.check_packages() if finding.status != "ok"]
    assert only(wrong).status == "error"
    assert only(wrong).found.endswith(found)
    assert only(wrong).fix == fix


# --- network


def test_names_and_addresses() -> None:
    assert [f.status for f in network.check_names("localhost")] == ["ok", "ok"]
    loopback, name = network.check_names("no-such-host.invalid")
    assert loopback.status == "ok"
    assert name.status == "error"
    assert name.found.startswith("no-such-host.invalid has no address (")
    assert name.fix.startswith("add a line '127.0.1.1 no-such-host.invalid' to /etc/hosts")
    _, elsewhere = network.check_names("192.0.2.1")  # RFC 5737: nobody's
    assert elsewhere.status == "warning"
    assert "where no socket can listen" in elsewhere.found


def test_where_ranks_are_to_meet(taken_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def at(**environ: str) -> Finding:
        return only(network.check_rendezvous(environ))

    here = {"MASTER_ADDR": "127.0.0.1"}
    assert at(**here, MASTER_PORT=str(taken_port)).found.endswith(": the port is in use")
    assert at(**here, MASTER_PORT="http").found == "MASTER_PORT=http is no port"
    assert at(MASTER_ADDR="nowhere.invalid").status == "error"
    assert at(MASTER_ADDR="192.0.2.1").found.endswith("another machine, not asked")
    assert "MASTER_PORT not set" in at(**here, RANK="0", WORLD_SIZE="2", LOCAL_RANK="0").found
    monkeypatch.setattr(network, "DEEPSPEED_PORT", taken_port)
    monkeypatch.setattr(network, "_taken", lambda _, port, real=network._taken: real("127.0.0.1", port))
    assert at().fix == "pass another one: deepspeed --master_port N"


# --- storage


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def at(folder: Path) -> Finding:
        return only(storage.check_folder("runs", folder))

    assert at(tmp_path).status == "ok"
    assert "to be made in" in at(tmp_path / "not/yet").found
    assert at(Path("/proc/runs")).status == "error"
    monkeypatch.setattr(storage, "LITTLE", 2**60)  # of any disk, less is free
    assert at(tmp_path).status == "warning"
    monkeypatch.setattr(storage, "NOTHING", 2**60)
    assert at(tmp_path).fix == "make room: what can't be saved ends a run with code 74"
    monkeypatch.undo()
    monkeypatch.setattr(storage, "_locks", lambda _: False)
    assert "it has no locks (flock)" in at(tmp_path).found
    monkeypatch.setattr(storage, "_locks", lambda _: True)
    monkeypatch.setattr(storage, "_flush", lambda _: 0.7)
    assert at(tmp_path).fix == "save less often (save.every), or choose a faster disk"


def test_what_is_left_in_shared_memory(tmp_path: Path) -> None:
    """A file that is open or mapped is somebody's; one of a dead process is named."""
    size = 2**27 + 4096
    with (tmp_path / "in-use").open("wb") as used:
        os.posix_fallocate(used.fileno(), 0, size)
        assert only(storage.check_shared_memory(tmp_path)).status == "ok"
        left = tmp_path / "deepspeed_allreduce_buffer_0"
        with left.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
        found = only(storage.check_shared_memory(tmp_path))
    assert found.status == "warning"
    assert "1 files that no process uses, 128.0 MiB" in found.found
    assert found.fix.endswith(str(left))
    assert only(storage.check_shared_memory(tmp_path / "none")).status == "warning"


# --- memory, cores


@pytest.mark.parametrize(
    ("available", "group", "status", "said"),
    [
        (64, None, "ok", "64.0 GiB free of 128.0"),
        (1, None, "warning", "1.0 GiB free of 128.0"),
        (64, ("memory.max", "1073741824"), "warning", "the control group allows 1.0"),
        (64, ("memory/memory.limit_in_bytes", "17179869184"), "ok", "the control group allows 16.0"),
        (64, ("memory/memory.limit_in_bytes", "9223372036854771712"), "ok", "64.0 GiB free of 128.0"),
    ],
)
def test_memory(
    available: int, group: tuple[str, str] | None, status: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / "proc").mkdir()
    text = f"MemTotal: {128 * 2**20} kB\nMemAvailable: {available * 2**20} kB\n"
    (tmp_path / "proc/meminfo").write_text(text)
    if group is not None:
        path = tmp_path / "sys/fs/cgroup" / group[0]
        path.parent.mkdir(parents=True)
        path.write_text(group[1] + "\n")
    found = only(machine.check_memory(tmp_path))
    assert found.status == status
    assert found.found.endswith(said)


def test_threads() -> None:
    assert only(machine.check_cores({})).status == "ok"
    assert only(machine.check_cores({"OMP_NUM_THREADS": "1"})).status == "ok"
    assert only(machine.check_cores({"OMP_NUM_THREADS": "many"})).status == "warning"


# --- GPUs: what nvidia-smi and torch say

OVERVIEW = """
| NVIDIA-SMI 535.104.05   Driver Version: 535.104.05   CUDA Version: 12.2     |
"""
LISTED = "535.104.05, NVIDIA H100 80GB HBM3\n535.104.05, NVIDIA H100 80GB HBM3\n"
H100 = {"name": "NVIDIA H100 80GB HBM3", "capability": [9, 0], "free": 79 * 2**30, "total": 80 * 2**30}
FACTS: dict[str, Any] = {
    "torch": "2.13.0+cu126", "cuda": "12.6", "gloo": True, "nccl": "2.27.3", "gpus": [H100, H100],
    "archs": ["sm_80", "sm_90", "compute_90"],
}  # fmt: skip


def judged(driver: Driver | str | None, environ: dict[str, str] | None = None, **changes: Any) -> Finding:
    """The first finding that is not ok; else the first."""
    found = gpus.judge(driver, TorchFacts(**(FACTS | changes)), environ or {})
    return next((finding for finding in found if finding.status != "ok"), found[0])


def test_what_nvidia_smi_says() -> None:
    driver = gpus.parse_driver(LISTED, OVERVIEW)
    assert driver == Driver("535.104.05", (12, 2), ("NVIDIA H100 80GB HBM3",) * 2)
    assert gpus.parse_driver("", "No devices were found") == Driver("unknown", None, ())


def test_gpus_and_torch_that_fit_or_not() -> None:
    driver = gpus.parse_driver(LISTED, OVERVIEW)
    none = {"gpus": [], "nccl": None}
    assert judged(driver).status == "ok"
    assert judged(None, cuda=None, **none).status == "ok"
    cpu = judged(driver, torch="2.13.0+cpu", cuda=None, **none)
    assert cpu.found == "2 x NVIDIA H100 80GB HBM3, driver 535.104.05, but torch 2.13.0+cpu, built for CPU"
    assert cpu.status == "error"
    newer = judged(driver, torch="2.13.0", cuda="13.0", problem="driver too old", **none)
    assert "which serves CUDA up to 12.2, but torch 2.13.0, built for CUDA 13.0" in newer.found
    assert newer.fix == "update the driver, or install a torch for CUDA 12"
    assert "CUDA does not start: unknown error" in judged(driver, problem="unknown error", **none).found
    hidden = judged(driver, {"CUDA_VISIBLE_DEVICES": ""}, **none)
    assert hidden.found.endswith("but CUDA_VISIBLE_DEVICES='' shows none")
    assert judged(driver, {"CUDA_VISIBLE_DEVICES": "1"}, gpus=[H100]).status == "warning"
    assert judged("Failed to initialize NVML: Driver/library version mismatch").status == "error"
    assert judged(driver, {"DS_ACCELERATOR": "cpu"}).fix == "unset DS_ACCELERATOR"
    assert judged(driver, nccl=None).check == "NCCL"
    assert judged(driver, no_peer=[[0, 1]]).found == "none between GPUs 0-1"
    assert judged(driver, gpus=[H100, H100 | {"free": 2**30}]).found == "GPU 1 has 1.0 GiB of 80.0 GiB free"


@pytest.mark.parametrize(
    ("capability", "archs", "serves"),
    [
        ((9, 0), ["sm_90"], True),
        ((8, 9), ["sm_80", "sm_90"], True),
        ((10, 0), ["sm_90"], False),
        ((10, 0), ["sm_80", "compute_90"], True),
        ((7, 0), ["sm_75", "sm_80"], False),
        ((12, 0), ["sm_90a", "sm_120"], True),
    ],
)
def test_chips_that_a_build_serves(capability: tuple[int, int], archs: list[str], serves: bool) -> None:
    driver = Driver("1", None, ("chip",))
    found = judged(driver, gpus=[H100 | {"name": "chip", "capability": list(capability)}], archs=archs)
    assert (found.status == "ok") == serves


def test_kernels_that_can_not_be_imported() -> None:
    facts = TorchFacts(**FACTS, kernels={"flash_attn": "ImportError: undefined symbol: _ZN3c10"})
    broken, usable = gpus.judge_kernels(facts, ["flash_attn_2", "varlen"])
    assert broken.found == "flash_attn_2 can't be imported: ImportError: undefined symbol: _ZN3c10"
    assert usable.found == "varlen, SDPA"


def test_the_probe_answers_with_what_the_class_holds() -> None:
    facts = gpus.ask_torch([], 60)
    assert isinstance(facts, TorchFacts)
    import torch

    assert facts.torch == torch.__version__
    late = gpus.ask_torch([], 0.01)
    assert isinstance(late, Finding)
    assert late.status == "warning"
