"""GPUs: what the driver says, what torch says, and whether the two fit. Asked in processes of their own.

A driver that hangs or a library that crashes so costs an answer, not the doctor.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bigtfm.doctor.findings import Finding, error, ok, warning

# Imports torch and each attention kernel; prints one JSON object as its last line.
PROBE = """
import importlib, json, sys
said = {"kernels": {}}
import torch
said["torch"], said["cuda"], said["hip"] = torch.__version__, torch.version.cuda, torch.version.hip
said["archs"] = torch.cuda.get_arch_list() if torch.version.cuda else []
said["gloo"] = torch.distributed.is_available() and torch.distributed.is_gloo_available()
said["nccl"] = None
said["gpus"], said["problem"] = [], None
try:
    if torch.version.cuda and torch.distributed.is_nccl_available():
        said["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    if torch.version.cuda:
        torch.cuda.init()
    for n in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(n)
        free, total = torch.cuda.mem_get_info(n)
        said["gpus"].append({"name": p.name, "capability": [p.major, p.minor], "free": free, "total": total})
    count = len(said["gpus"])
    said["no_peer"] = [[a, b] for a in range(count) for b in range(a + 1, count)
                       if not torch.cuda.can_device_access_peer(a, b)]
except Exception as error:
    said["problem"] = str(error).strip().split("\\n")[0]
for module in sys.argv[1:]:
    try:
        importlib.import_module(module)
        said["kernels"][module] = None
    except Exception as error:
        said["kernels"][module] = f"{type(error).__name__}: {error}".split("\\n")[0]
print(json.dumps(said))
"""
MODULES = {
    "flash_attn_2": "flash_attn",
    "flash_attn_3": "flash_attn_interface",
    "flash_attn_4": "flash_attn.cute",
    "varlen": "torch.nn.attention.varlen",
}


@dataclass(frozen=True)
class Driver:
    """nvidia-smi. cuda: the newest version that this driver serves."""

    version: str
    cuda: tuple[int, int] | None
    gpus: tuple[str, ...]


@dataclass(frozen=True)
class TorchFacts:
    """What PROBE says; problem: why CUDA could not be started."""

    torch: str = ""
    cuda: str | None = None
    hip: str | None = None
    archs: list[str] = field(default_factory=list)
    gloo: bool = False
    nccl: str | None = None
    gpus: list[dict[str, Any]] = field(default_factory=list)
    no_peer: list[list[int]] = field(default_factory=list)
    problem: str | None = None
    kernels: dict[str, str | None] = field(default_factory=dict)


def ask_driver() -> Driver | str | None:
    """nvidia-smi; None: there is none. A text: why it gives no answer."""
    try:
        listed = _run("nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader")
        return parse_driver(listed, _run("nvidia-smi"))
    except FileNotFoundError:
        return None
    except subprocess.TimeoutExpired:
        return "nvidia-smi gives no answer"
    except subprocess.CalledProcessError as failure:
        return (failure.stdout or failure.stderr).strip().partition("\n")[0] or "nvidia-smi fails"


def parse_driver(listed: str, overview: str) -> Driver:
    """`listed`: driver_version, name as CSV, a line each GPU; `overview`: nvidia-smi without arguments."""
    rows = [[part.strip() for part in line.split(",", 1)] for line in listed.splitlines() if "," in line]
    newest = re.search(r"CUDA Version:\s*(\d+)\.(\d+)", overview)
    return Driver(
        version=rows[0][0] if rows else "unknown",
        cuda=(int(newest[1]), int(newest[2])) if newest else None,
        gpus=tuple(row[1] for row in rows),
    )


def ask_torch(kernels: Sequence[str], seconds: float) -> TorchFacts | Finding:
    """PROBE in a process of its own; a finding: why there is no answer."""
    command = [sys.executable, "-c", PROBE, *(MODULES[kernel] for kernel in kernels)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, stdin=subprocess.DEVNULL, check=False
        )
    except subprocess.TimeoutExpired:
        text = f"importing it and starting CUDA takes longer than {seconds:.0f} s: GPUs not checked"
        return warning(
            "torch", text, "try again when the machine is idle; if nvidia-smi hangs too, restart it"
        )
    try:
        return TorchFacts(**json.loads(done.stdout.strip().rpartition("\n")[2]))
    except (ValueError, TypeError):
        last = done.stderr.strip().rpartition("\n")[2]
        said = last or f"importing it ended its process with code {done.returncode}"
        return error("torch", said, "install torch anew, or mend the driver (nvidia-smi)")


def judge(driver: Driver | str | None, facts: TorchFacts, environ: Mapping[str, str]) -> list[Finding]:
    """What the two answers together mean."""
    if isinstance(driver, str):
        return [error("GPU", driver, "mend the driver (nvidia-smi must work), or restart the machine")]
    found = [_visible(driver, facts, environ)]
    chosen = environ.get("DS_ACCELERATOR")
    if driver is not None and driver.gpus and chosen not in (None, "cuda"):
        found.append(
            warning("accelerator", f"DS_ACCELERATOR={chosen}, and there are GPUs", "unset DS_ACCELERATOR")
        )
    if not facts.gpus:
        return found
    for number, gpu in enumerate(facts.gpus):
        if (missing := _missing_kernels(gpu, facts.archs)) is not None:
            found.append(missing)
        if gpu["free"] < 0.9 * gpu["total"]:
            used = f"GPU {number} has {_gib(gpu['free'])} of {_gib(gpu['total'])} free"
            found.append(warning("GPU memory", used, "see who uses it: nvidia-smi"))
    if facts.nccl is None:
        found.append(error("NCCL", "this torch has none", "install a torch for CUDA with NCCL"))
    else:
        found.append(ok("NCCL", facts.nccl))
    if len(facts.gpus) > 1:
        found.append(_peers(facts))
    return found


def _visible(driver: Driver | None, facts: TorchFacts, environ: Mapping[str, str]) -> Finding:
    """Whether torch sees the GPUs that the driver has."""
    build = f"torch {facts.torch}" + (f", built for CUDA {facts.cuda}" if facts.cuda else ", built for CPU")
    if driver is None or not driver.gpus:
        said = f"; {facts.problem}" if facts.problem and facts.cuda else ""
        return ok("GPU", f"none: training runs on the CPU (no nvidia-smi; {build}{said})")
    there = f"{len(driver.gpus)} x {driver.gpus[0]}, driver {driver.version}"
    if facts.hip is None and facts.cuda is None:
        return error(
            "GPU",
            f"{there}, but {build}",
            "install a torch for CUDA (pytorch.org), or training runs on the CPU",
        )
    if facts.cuda and driver.cuda and _major(facts.cuda) > driver.cuda[0]:
        newest = ".".join(map(str, driver.cuda))
        fix = f"update the driver, or install a torch for CUDA {driver.cuda[0]}"
        return error("GPU", f"{there}, which serves CUDA up to {newest}, but {build}", fix)
    hidden = environ.get("CUDA_VISIBLE_DEVICES")
    if not facts.gpus and hidden is not None:
        return error(
            "GPU", f"{there}, but CUDA_VISIBLE_DEVICES={hidden!r} shows none", "unset it, or list GPUs"
        )
    if not facts.gpus:
        why = facts.problem or "torch sees none"
        return error(
            "GPU", f"{there}, but CUDA does not start: {why}", "see nvidia-smi, then restart the machine"
        )
    if len(facts.gpus) < len(driver.gpus):
        text = f"{there}, of which CUDA_VISIBLE_DEVICES={hidden!r} shows {len(facts.gpus)}"
        return warning("GPU", text, "unset it to use them all")
    return ok("GPU", f"{there}, {build}")


def _missing_kernels(gpu: Mapping[str, Any], archs: Sequence[str]) -> Finding | None:
    """A build runs on chips of the same major version as its code (sm_), and on all later ones as PTX."""
    major, minor = gpu["capability"]
    numbers = [(kind, *_capability(number)) for kind, _, number in (arch.partition("_") for arch in archs)]
    serves = any(
        (a == major and b <= minor) if kind == "sm" else (a, b) <= (major, minor) for kind, a, b in numbers
    )
    if serves or not numbers:
        return None
    text = f"{gpu['name']} (SM{major}{minor}) is not among those of this torch: {', '.join(archs)}"
    return error("GPU", text, "install a torch that is built for this GPU")


def _capability(number: str) -> tuple[int, int]:
    digits = re.match(r"\d+", number)
    whole = digits[0] if digits else "00"
    return int(whole[:-1]), int(whole[-1])


def _peers(facts: TorchFacts) -> Finding:
    if not facts.no_peer:
        return ok("peer access", f"between all {len(facts.gpus)} GPUs")
    pairs = ", ".join(f"{a}-{b}" for a, b in facts.no_peer[:6])
    fix = "nothing need be done: NCCL goes through host memory there, which is slower (nvidia-smi topo -m)"
    return warning("peer access", f"none between GPUs {pairs}", fix)


def judge_kernels(facts: TorchFacts, installed: Sequence[str]) -> list[Finding]:
    """Attention kernels that are installed, and whether they can be imported."""
    if not facts.gpus:
        return [ok("attention", "SDPA: the other kernels need an NVIDIA GPU")]
    broken = {
        kernel: said for kernel in installed if (said := facts.kernels.get(MODULES[kernel])) is not None
    }
    found = [
        error(
            "attention", f"{kernel} can't be imported: {said}", "install it anew for this torch, or remove it"
        )
        for kernel, said in broken.items()
    ]
    usable = [kernel for kernel in installed if kernel not in broken]
    return [*found, ok("attention", ", ".join([*usable, "SDPA"]))]


def _run(*command: str) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=6, stdin=subprocess.DEVNULL, check=True,
        env=os.environ | {"LC_ALL": "C"},
    )  # fmt: skip
    return done.stdout


def _major(version: str) -> int:
    return int(version.partition(".")[0])


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
