"""The files of DeepSpeed's own `engine.save_checkpoint`: found, told apart, and unpickled with care.

latest                                              the newest folder's name
global_stepN/
    mp_rank_00_model_states.pt                      module, counters, schedule; stage 0: the optimizer too
    zero_pp_rank_R_mp_rank_00_model_states.pt       the same at stage 3
    [bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt     rank R's fp32 weights and moments, stages 1 to 3
"""

from __future__ import annotations

import argparse
import pickle
import re
import stat
import zipfile
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from bigtfm.config.problems import NoCheckpoint

# Classes of which DeepSpeed's files hold instances. Each is a record: making one runs no code of the file's.
HARMLESS = [argparse.Namespace, DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
_NAME = re.compile(r"(?:bf16_)?(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_(model|optim)_states\.pt")


def bad(
    what: str, where: Path, fix: str = "save the checkpoint again, or pass an earlier global_stepN folder"
) -> NoCheckpoint:
    """The problem that a checkpoint is."""
    return NoCheckpoint(what, where=str(where), fix=fix)


def newest(path: Path) -> Path:
    """The folder itself if it holds states, else the one that `latest` names."""
    if not path.is_dir():
        raise bad("no such folder", path, "pass what save_checkpoint was given, or a global_stepN folder")
    if any(_NAME.fullmatch(file.name) for file in path.iterdir()):
        return path
    latest = path / "latest"
    if not latest.is_file():
        raise bad("neither `latest` nor model_states here", path, "pass a folder such as global_step1000")
    with latest.open("rb") as file:
        tag = file.read(4096).decode(errors="replace").strip()
    if tag in ("", ".", "..") or Path(tag).name != tag:
        raise bad(f"{tag!r} is not the name of a folder beside it", latest, "write global_stepN there")
    if not (path / tag).is_dir():
        raise bad(f"it names {tag}, which is not there", latest, "pass one of the folders that are")
    return path / tag


def state_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Model states and optimizer states, each in the order of the ranks."""
    found: dict[str, dict[int, Path]] = {"model": {}, "optim": {}}
    for path in sorted(folder.glob("*.pt")):
        match = _NAME.fullmatch(path.name)
        if match is None or int(match[2]) > 0:
            fix = "bigtfm has none of these: merge it with the tools that trained it, then `bigtfm import-hf`"
            what = f"{path.name} is of pipeline, tensor or expert parallelism"
            raise bad(what, folder, fix)
        rank, kind = int(match[1] or 0), match[3]
        if rank in found[kind]:
            both = f"{found[kind][rank].name} and {path.name} are both there: two trainings' files"
            raise bad(both, folder)
        found[kind][rank] = path
    for kind, files in found.items():
        missing = sorted(set(range(max(files, default=-1) + 1)) - set(files))
        if missing or (kind == "model" and not files):
            raise bad(f"rank {missing[0] if missing else 0}'s {kind}_states are missing", folder)
    return tuple([files[rank] for rank in sorted(files)] for files in found.values())  # type: ignore[return-value]


def unpickled(path: Path, trust: bool) -> dict[str, Any]:
    """A file's content, its tensors mapped. torch reads damaged tensors without a word; the zip's CRC-32 of
    each shows it.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise bad("not a plain file", path)
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise bad(f"{damaged} differs from its CRC-32", path)
        with safe_globals(HARMLESS):
            unknown = [] if trust else get_unsafe_globals_in_checkpoint(path)
            if not unknown:
                content = torch.load(path, map_location="cpu", mmap=True, weights_only=not trust)
    except (NoCheckpoint, OSError, MemoryError):
        raise
    except Exception as error:  # what unpickling raises depends on what was pickled
        said = str(error).partition("\n")[0][:200]
        if trust or not isinstance(error, pickle.UnpicklingError):
            raise bad(f"damaged, or not torch.save's: {type(error).__name__}: {said}", path) from None
        unknown = [said]
    if unknown:
        raise bad(
            f"a pickle that would run more than torch's and DeepSpeed's own code: {', '.join(unknown)}",
            path,
            "pass --trust-pickles if you know who made it",
        )
    if not isinstance(content, dict):
        raise bad("not as DeepSpeed writes it", path)
    return content
