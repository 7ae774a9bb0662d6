"""Folders that a run writes to: room, permissions, locks, the time to flush; and what lies in /dev/shm."""

from __future__ import annotations

import fcntl
import os
import shutil
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter

from bigtfm.doctor.findings import Finding, error, ok, warning

LITTLE, NOTHING = 5 * 2**30, 256 * 2**20  # bytes free
SLOW_FLUSH = 0.2  # seconds
FLUSHES = 5
SMALL_SHM = 64 * 2**20  # Docker's default, in which loaders and NCCL run out of memory


def check_folder(name: str, folder: Path) -> list[Finding]:
    """Room, and whether files can be made, locked and flushed there, or in the nearest parent there is."""
    check = f"disk: {name}"
    there = folder.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    where = f"{folder}" if there == folder.absolute() else f"{folder} (to be made in {there})"
    try:
        usage, inodes = shutil.disk_usage(there), os.statvfs(there)
        with tempfile.TemporaryFile(dir=there) as file:
            flushes = [_flush(file.fileno()) for _ in range(FLUSHES)]
            locks = _locks(file.fileno())
    except OSError as failure:
        fix = "mend the disk or its permissions, or choose another folder"
        return [error(check, f"{where}: {failure.strerror}", fix)]
    flush = statistics.median(flushes)
    said = f"{where}: {_size(usage.free)} free of {_size(usage.total)}, a flush takes {flush * 1e3:.1f} ms"
    if usage.free < NOTHING:
        return [error(check, said, "make room: what can't be saved ends a run with code 74")]
    if usage.free < LITTLE:
        return [warning(check, said, "make room, or keep fewer checkpoints (save.keep)")]
    if inodes.f_files and inodes.f_favail < 1000:
        return [error(check, f"{where}: {inodes.f_favail} files can still be made", "remove files")]
    if not locks:
        text = f"{said}; it has no locks (flock)"
        return [
            warning(check, text, "never start two trainings in one run directory: nothing would stop them")
        ]
    if flush > SLOW_FLUSH:
        return [warning(check, said, "save less often (save.every), or choose a faster disk")]
    return [ok(check, said)]


def _flush(file: int) -> float:
    """Seconds to bring 4 KiB to the disk."""
    began = perf_counter()
    os.write(file, b"\0" * 4096)
    os.fsync(file)
    return perf_counter() - began


def _locks(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def check_shared_memory(folder: Path = Path("/dev/shm")) -> list[Finding]:
    """Its size, and files there that no process has open or mapped."""
    if not folder.is_dir():
        return [warning("/dev/shm", "there is none", "mount it: NCCL and data loaders need it")]
    usage = shutil.disk_usage(folder)
    size = f"{_size(usage.free)} free of {_size(usage.total)}"
    left = _leftovers(folder)
    said = f"{size}; {len(left)} files that no process uses, {_size(sum(left.values()))}" if left else size
    if usage.total <= SMALL_SHM or usage.free < SMALL_SHM:
        fix = (
            "docker run --shm-size=8g"
            if usage.total <= SMALL_SHM
            else f"remove what is left over in {folder}"
        )
        return [error("/dev/shm", said, fix)]
    if sum(left.values()) > 2**27:
        names = " ".join(sorted(left, key=left.__getitem__, reverse=True)[:3])
        return [warning("/dev/shm", said, f"if nothing of yours runs, remove them; the largest: {names}")]
    return [ok("/dev/shm", said)]


def _leftovers(folder: Path) -> dict[str, int]:
    """Bytes by file of this user's that is neither open nor mapped in any process that can be looked into."""
    sizes: dict[str, int] = {}
    for path in folder.iterdir():
        try:
            status = path.lstat()
        except OSError:
            continue
        if path.is_file() and status.st_uid == os.getuid():
            sizes[str(path)] = status.st_blocks * 512
    for process in Path("/proc").glob("[0-9]*"):
        if not sizes:
            break
        for name in _files_of(process, f"{folder}/"):
            sizes.pop(name, None)
    return sizes


def _files_of(process: Path, prefix: str) -> set[str]:
    names: set[str] = set()
    try:
        with (process / "maps").open(errors="replace") as maps:
            names |= {line[line.index(prefix) :].strip() for line in maps if prefix in line}
        for handle in os.scandir(process / "fd"):
            target = os.readlink(handle.path)
            if target.startswith(prefix):
                names.add(target)
    except OSError:
        pass  # another user's, or it has gone
    return names


def check_extensions(environ: Mapping[str, str]) -> list[Finding]:
    """What DeepSpeed compiles its operations with, and locks that a killed compilation has left."""
    found = []
    missing = [name for name in ("g++", "ninja") if shutil.which(name) is None]
    need = "for DeepSpeed's own operations (offload, fused optimizers)"
    if missing:
        found.append(
            warning(
                "compiler", f"{' and '.join(missing)} missing {need}", f"apt install {_packages(missing)}"
            )
        )
    else:
        found.append(ok("compiler", "g++ and ninja are there"))
    default = Path(environ.get("HOME", "/")) / ".cache/torch_extensions"
    root = Path(environ.get("TORCH_EXTENSIONS_DIR", default))
    locks = sorted(root.glob("**/lock"))[:5] if root.is_dir() else []
    if locks and not _compiles():
        fix = f"remove them: rm {' '.join(map(str, locks))}"
        text = f"a compilation was killed and left {len(locks)} lock(s), on which the next one waits for ever"
        found.append(error("compiler", text, fix))
    return found


def _packages(missing: list[str]) -> str:
    return " ".join({"g++": "g++", "ninja": "ninja-build"}[name] for name in missing)


def _compiles() -> bool:
    """Whether a compilation is under way on this machine."""
    for process in Path("/proc").glob("[0-9]*/comm"):
        try:
            if process.read_text().strip() in ("ninja", "nvcc", "cc1plus", "c++", "g++"):
                return True
        except OSError:
            continue
    return False


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
