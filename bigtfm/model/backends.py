"""Which attention backend and which kernels a run takes, and why: rules. No torch: `bigtfm check` reads it.

Sources: csrc/flash_attn/flash_api.cpp of flash-attn 2.8.3, hopper/flash_api.cpp of the same repository (3),
flash_attn/cute/interface.py of flash-attn-4 4.0.0b36, aten/src/ATen/native/transformers/cuda/sdp_utils.cpp of
PyTorch (SDPA), torch/_inductor/kernel/flex/flex_attention.py of torch 2.13 (flex).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bigtfm.config.problems import ConfigProblem
from bigtfm.config.sections import Backend, ComputeSection, ModelSection

FUSED = ("flash_attn_2", "flash_attn_3", "flash_attn_4", "varlen", "sdpa_flash", "sdpa_cudnn")
PACKAGES = {
    "flash_attn_2": "pip install flash-attn",
    "flash_attn_3": "build the folder hopper of github.com/Dao-AILab/flash-attention",
    "flash_attn_4": "pip install flash-attn-4",
    "varlen": "install torch 2.11 or later",
}
# What auto tries, in this order. Kernels made for the chip come first: 3 for Hopper (Shah et al. 2024), 4 for
# Hopper and Blackwell. Then those that take ragged documents in one call; sdpa makes a call for each length.
ORDER: tuple[Backend, ...] = ("flash_attn_3", "flash_attn_4", "flash_attn_2", "varlen", "sdpa", "reference")


@dataclass(frozen=True)
class Device:
    """What computes."""

    name: str
    capability: tuple[int, int] | None  # CUDA compute capability (major, minor); None: a CPU

    def __str__(self) -> str:
        return (
            self.name if self.capability is None else f"{self.name} (SM{''.join(map(str, self.capability))})"
        )


@dataclass(frozen=True)
class Needs:
    """What a model asks of its attention."""

    dtype: Literal["fp32", "bf16", "fp16"]
    head_dim: int  # features
    window: bool = False
    bias: bool = False  # a relative bias, which gets a gradient
    dropout: bool = False  # of attention weights

    def __str__(self) -> str:
        more = {"window": self.window, "relative bias": self.bias, "attention dropout": self.dropout}
        return ", ".join([self.dtype, f"head size {self.head_dim}", *(name for name in more if more[name])])


@dataclass(frozen=True)
class Choice:
    """The backend of a run; `reason` is what a user reads."""

    name: Backend
    reason: str


def choose(
    wanted: Backend | Literal["auto"], *, device: Device, needs: Needs, installed: Collection[str]
) -> Choice:
    """The wanted backend, or with "auto" the first of ORDER that can serve.

    Raises:
        ConfigProblem: the wanted one can't.
    """
    able = next(name for name in ORDER if not obstacle(name, device, needs, installed))
    why_not = None if wanted == "auto" else obstacle(wanted, device, needs, installed)
    if why_not:
        raise ConfigProblem(
            f"attention {wanted} can't serve ({device}, {needs}): {why_not}",
            where="run config: compute.attention",
            fix=f"set compute.attention to {able} or auto"
            + (f", or {PACKAGES[wanted]}" if wanted in PACKAGES and wanted not in installed else ""),
        )
    name = able if wanted == "auto" else wanted
    hint = "; model.attention_dropout 0 allows faster ones" if needs.dropout else ""
    return Choice(name, f"{name}: {device}, {needs}{hint}")


def obstacle(backend: Backend, device: Device, needs: Needs, installed: Collection[str]) -> str | None:
    """Why the backend can't serve; None: it can."""
    if needs.dropout and backend != "reference":
        return "only reference drops attention weights, since kernels draw numbers that depend on the batch"
    if backend in ("sdpa", "sdpa_math", "reference"):
        return None
    if device.capability is None:
        return _obstacle_on_cpu(backend, needs)
    if backend in PACKAGES and backend not in installed:
        return "it is not installed"
    return _obstacle_on_gpu(backend, device.capability, needs) or _obstacle_of_size(
        backend, device.capability, needs
    )


def _obstacle_on_cpu(backend: Backend, needs: Needs) -> str | None:
    if backend == "flex":
        return "FlexAttention has no gradients on a CPU"
    if backend != "sdpa_flash":
        return "it needs an NVIDIA GPU"
    return "it gives a relative bias no gradient" if needs.bias else None


def _obstacle_on_gpu(backend: Backend, capability: tuple[int, int], needs: Needs) -> str | None:
    """Chips, dtypes and masks."""
    if backend == "flash_attn_3" and capability[0] != 9:
        return "it needs a Hopper GPU (SM90)"
    if backend == "flash_attn_4" and capability[0] not in (9, 10, 11):
        return "it needs a Hopper or Blackwell data-centre GPU (SM90, SM100 or SM110)"
    ampere = capability >= (8, 0)
    if not ampere and (backend != "sdpa_efficient" or needs.dtype == "bf16"):
        return "it needs an Ampere GPU or later (SM80)"
    if backend in FUSED and needs.dtype == "fp32":
        return "it computes in bf16 or fp16 alone"
    if backend in FUSED and needs.bias:
        return "it takes no relative bias"
    if backend in ("sdpa_flash", "sdpa_cudnn") and needs.window:
        return "it takes no window (that is a mask to it)"
    return None


def _obstacle_of_size(backend: Backend, capability: tuple[int, int], needs: Needs) -> str | None:
    """Head sizes."""
    size = needs.head_dim
    if backend == "flex":
        return "it needs a head size of 16 or more" if size < 16 else None
    multiple = {"flash_attn_2": 1, "sdpa_flash": 1, "sdpa_efficient": 4 if needs.dtype == "fp32" else 8}
    if size % multiple.get(backend, 8):
        return f"it needs a head size that is a multiple of {multiple.get(backend, 8)}"
    if backend == "flash_attn_4" and capability[0] > 9 and size > 128 and size != 256:
        return "on Blackwell it takes head sizes up to 128, and 256"
    most = {"sdpa_cudnn": 128, "sdpa_efficient": size}.get(backend, 256)
    return f"it takes head sizes up to {most}" if size > most else None


def choose_kernels(
    compute: ComputeSection, *, model: ModelSection, device: Device, installed: bool
) -> Literal["torch", "liger"]:
    """Whose kernels compute norms, SwiGLU and rotary positions. installed: whether Liger Kernel is.

    Raises:
        ConfigProblem: Liger's are asked for where they can't serve.
    """
    why_not = None
    if device.capability is None or device.capability < (8, 0):
        why_not = f"they need an Ampere GPU or later (SM80), and this is {device}"
    elif model.norm != "rmsnorm" and model.activation != "swiglu" and model.positions != "rotary":
        why_not = "the model has no RMSNorm, SwiGLU or rotary positions"
    elif not installed:
        why_not = "Liger Kernel is not installed"
    if compute.kernels == "liger" and why_not:
        raise ConfigProblem(
            f"compute.kernels liger can't serve: {why_not}",
            where="run config",
            fix="set compute.kernels to auto" + ("" if installed else ", or pip install 'bigtfm[liger]'"),
        )
    return "torch" if compute.kernels == "torch" or why_not or compute.compile_blocks else "liger"


def has_liger() -> bool:
    """Whether Liger Kernel, of a version that has what is used of it, is there. It is not imported."""
    return _has_file("liger_kernel", "ops/swiglu.py", holding="LigerFusedGateUpSiLUMulFunction")


def needs_of(model: ModelSection, precision: Literal["fp32", "bf16", "fp16"]) -> Needs:
    """What a model asks of its attention in training."""
    return Needs(
        dtype=precision,
        head_dim=model.head_size,
        window=model.window is not None,
        bias=model.positions == "relative",
        dropout=model.attention_dropout > 0,
    )


def installed_kernels() -> set[str]:
    """Those of PACKAGES that are there. Nothing of them is imported."""
    found = set()
    if _has_file("flash_attn", "flash_attn_interface.py"):
        found.add("flash_attn_2")
    if importlib.util.find_spec("flash_attn_interface"):
        found.add("flash_attn_3")
    if any(
        importlib.metadata.distributions(name="flash-attn-4")
    ):  # flash-attn, too, brings a folder of its name
        found.add("flash_attn_4")
    # torch 2.10 has it without windows and scale
    if _has_file("torch", "nn/attention/varlen.py", holding="window_size"):
        found.add("varlen")
    return found


def _has_file(package: str, path: str, holding: str = "") -> bool:
    spec = importlib.util.find_spec(package)
    files = [Path(folder, path) for folder in (spec and spec.submodule_search_locations) or ()]
    return any(file.is_file() and holding in file.read_text(encoding="utf-8") for file in files)


def this_device() -> Device:
    """The GPU of this process, or the CPU. torch is imported only where there is an NVIDIA driver."""
    if Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi"):
        import torch

        if torch.cuda.is_available():
            name = torch.cuda.get_device_name().removeprefix("NVIDIA ")
            return Device(name, torch.cuda.get_device_capability())
    return Device("CPU", None)
