"""Where a run ran: versions, machine, GPUs and the code's git commit."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from bigtfm.resilience.processes import process

PACKAGES = ("bigtfm", "torch", "deepspeed", "numpy", "datasets", "sentencepiece", "transformers", "mlflow")


def environment() -> dict[str, str]:
    """Name -> value: Python, package versions, host, CPU cores, GPUs, git commit, and whether it is dirty.

    What is not there (no GPU, no git clone, a package not installed) is left out. Imports none of the
    packages; asking nvidia-smi may take a second.
    """
    found = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cpu_cores": str(os.cpu_count()),
    }
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    gpus = _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    if gpus:
        found["gpus"] = ", ".join(gpus.splitlines())
    code = str(Path(__file__).resolve().parent)
    git = ("git", "-c", "safe.directory=*", "-C", code)
    commit = _output(*git, "rev-parse", "HEAD")
    if commit and _output(
        *git, "ls-files", code
    ):  # not a repository that merely contains the .venv we stand in
        found["git_commit"] = commit
        found["git_dirty"] = "yes" if _output(*git, "status", "--porcelain") else "no"
    return found


def started_at() -> float:
    """When this process was started, in Unix seconds; without /proc: now."""
    own = process(os.getpid())
    try:
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError):
        return time.time()
    return time.time() - uptime + own.started / os.sysconf("SC_CLK_TCK") if own is not None else time.time()


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
