"""`bigtfm doctor`: this machine, its environment and what is installed."""

from __future__ import annotations

import ctypes
import os
import resource
import socket
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from bigtfm.doctor import gpus
from bigtfm.doctor.findings import Check, Finding, error, examine, ok, warning
from bigtfm.doctor.network import check_interfaces, check_names, check_rendezvous
from bigtfm.doctor.storage import check_extensions, check_folder, check_shared_memory
from bigtfm.model.backends import installed_kernels

SECONDS = 9.0  # for everything together
GIB = 2**30
NO_LIMIT = 2**60  # bytes: cgroup v1 writes a number near 2^63 where there is none
STA_UNSYNC = 0x40  # adjtimex(2)


def examine_machine(environ: Mapping[str, str], runs: Path) -> list[Finding]:
    """All checks of a machine, in the order in which they are shown. runs: the folder of run directories."""
    folders = {"runs": runs, "temporary": Path(tempfile.gettempdir()), "home": Path(environ.get("HOME", "/"))}
    checks: dict[str, Check] = {
        "packages": check_packages,
        "GPU": partial(check_gpus, environ),
        "names": partial(check_names, socket.gethostname()),
        "ports": partial(check_rendezvous, environ),
        "interfaces": partial(check_interfaces, environ),
        **{f"disk: {name}": partial(check_folder, name, folder) for name, folder in folders.items()},
        "/dev/shm": check_shared_memory,
        "memory": check_memory,
        "CPU": partial(check_cores, environ),
        "limits": check_limits,
        "compiler": partial(check_extensions, environ),
        "clock": check_clock,
    }
    return examine(checks, SECONDS)


def check_packages() -> list[Finding]:
    """Python and what bigtfm needs, against the ranges that its own metadata state."""
    python = ".".join(map(str, sys.version_info[:3]))
    found = [ok("Python", python)]
    try:
        needs = [Requirement(text) for text in requires("bigtfm") or ()]
    except PackageNotFoundError:
        return [*found, warning("packages", "bigtfm is not installed, only imported", "pip install -e .")]
    needs = [need for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    for need in needs:
        if (problem := _unmet(need.name, need.specifier)) is not None:
            found.append(error("packages", problem, f"pip install '{need.name}{need.specifier}'"))
    if len(found) == 1:
        found.append(
            ok(
                "packages",
                f"torch {version('torch')}, DeepSpeed {version('deepspeed')}, all {len(needs)} there",
            )
        )
    return found


def _unmet(name: str, wanted: SpecifierSet) -> str | None:
    try:
        there = version(name)
    except PackageNotFoundError:
        return f"{name} is not installed"
    return None if wanted.contains(there, prereleases=True) else f"{name} {there} is not {wanted}"


def check_gpus(environ: Mapping[str, str]) -> list[Finding]:
    """Driver, torch's build, NCCL, peer access and attention kernels."""
    kernels = sorted(installed_kernels())
    facts = gpus.ask_torch(kernels, SECONDS - 1)
    if isinstance(facts, Finding):
        return [facts]
    found = gpus.judge(gpus.ask_driver(), facts, environ)
    if not facts.gloo:
        found.append(error("gloo", "this torch has none", "install a torch with torch.distributed and gloo"))
    return found + gpus.judge_kernels(facts, kernels)


def check_memory(root: Path = Path("/")) -> list[Finding]:
    """What is free, and what the control group allows."""
    lines = (root / "proc/meminfo").read_text().splitlines()
    sizes = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
    total, free = sizes["MemTotal"], sizes["MemAvailable"]
    limit = _group_limit(root)
    said = f"{free / GIB:.1f} GiB free of {total / GIB:.1f}"
    if limit is not None and limit < total:
        said += f"; the control group allows {limit / GIB:.1f}"
    if min(free, limit or free) < 2 * GIB:
        return [warning("memory", said, "end what is not needed, or allow the container more")]
    return [ok("memory", said)]


def _group_limit(root: Path) -> int | None:
    """Bytes, of cgroup v2 or v1; None: no limit."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        path = root / "sys/fs/cgroup" / name
        text = path.read_text().strip() if path.is_file() else "max"
        if text.isdecimal() and int(text) < NO_LIMIT:
            return int(text)
    return None


def check_cores(environ: Mapping[str, str]) -> list[Finding]:
    """Cores that this process may use, and the threads that the environment asks for."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = environ.get("OMP_NUM_THREADS")
    if wanted is None:
        return [ok("CPU", f"{cores} cores; OMP_NUM_THREADS unset: the ranks of a machine share them")]
    if not wanted.isdecimal() or not 0 < int(wanted) <= cores:
        text = f"OMP_NUM_THREADS={wanted}, and {cores} cores may be used"
        return [warning("CPU", text, "unset it: the ranks of a machine then share its cores")]
    return [ok("CPU", f"{cores} cores; OMP_NUM_THREADS={wanted} threads a rank")]


def check_limits() -> list[Finding]:
    """ulimit: open files and processes; locked memory where there is InfiniBand."""
    files, processes = (resource.getrlimit(n)[0] for n in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC))
    said = f"{_limit(files)} open files, {_limit(processes)} processes"
    if 0 <= files < 1024:
        return [warning("limits", said, "ulimit -n 65536 before training")]
    if 0 <= processes < 512:
        return [warning("limits", said, "ulimit -u 4096 before training")]
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if locked >= 0 and Path("/sys/class/infiniband").is_dir():
        text = f"{said}; {locked // 1024} KiB of locked memory, and InfiniBand needs more"
        return [warning("limits", text, "ulimit -l unlimited before training")]
    return [ok("limits", said)]


def _limit(number: int) -> str:
    return "unlimited" if number == resource.RLIM_INFINITY else str(number)


def check_clock() -> list[Finding]:
    """Whether time runs evenly, and whether the kernel counts its clock as synchronised."""
    wall, even = time.time(), time.monotonic()
    time.sleep(0.25)
    drift = abs((time.time() - wall) - (time.monotonic() - even))
    if drift > 0.05:
        text = f"the wall clock moved {drift:.2f} s against time itself in a quarter of a second"
        return [warning("clock", text, "let one program alone set the clock (chrony or ntpd)")]
    if wall < 1.7e9:
        return [warning("clock", f"it is {time.strftime('%Y-%m-%d', time.gmtime(wall))}", "set the clock")]
    said = {
        True: "synchronised, says the kernel",
        False: "not synchronised, says the kernel",
        None: "runs evenly",
    }
    return [
        ok("clock", f"{said[_synchronised()]}; not compared with other machines (training does not need it)")
    ]


def _synchronised() -> bool | None:
    """The kernel's word; None: it has none to say (not Linux)."""
    try:
        call = ctypes.CDLL(None, use_errno=True).adjtimex
    except (OSError, AttributeError):
        return None
    fields = (ctypes.c_long * 64)()  # struct timex, of which modes = 0 sets nothing; status is its sixth word
    if call(ctypes.byref(fields)) < 0:
        return None
    return not ctypes.c_int.from_buffer(fields, 5 * ctypes.sizeof(ctypes.c_long)).value & STA_UNSYNC
