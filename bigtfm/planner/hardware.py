"""What devices can do, from their makers' data sheets, and how much memory they have."""

from __future__ import annotations

import re
from dataclasses import dataclass

from bigtfm.config.problems import did_you_mean

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """A GPU as its data sheet has it. Rates per second; of links, in one direction."""

    name: str  # as --gpu takes it
    pattern: str  # of the name that torch.cuda.get_device_name() gives
    memory: int  # bytes, of all programs and the driver's context
    bf16: float | None  # FLOPs of matrix products, dense, accumulated in fp32; None: no such unit
    fp16: float | None
    fp32: float  # without TF32, torch's default
    bandwidth: float  # bytes of its own memory
    link: float  # bytes to the other GPUs of its node: NVLink, else PCIe
    network: float  # bytes to other nodes, for each GPU
    power: float  # watts, the most
    source: str

    def peak(self, precision: str) -> float | None:
        """FLOPs a second in fp32, bf16 or fp16."""
        return {"bf16": self.bf16, "fp16": self.fp16, "fp32": self.fp32}[precision]


def _gpu(
    name: str, pattern: str, gib: float, peaks: tuple[float | None, float | None, float],
    tb_per_second: float, gb_link: float, gbit_network: float, watts: int, source: str,
) -> Device:  # fmt: skip
    """peaks: bf16, fp16, fp32 in TFLOP/s. gb_link: both directions together, as data sheets state it."""
    bf16, fp16, fp32 = (peak * 1e12 if peak else None for peak in peaks)
    assert fp32 is not None
    return Device(
        name, pattern, int(gib * GIB), bf16, fp16, fp32, tb_per_second * 1e12, gb_link / 2 * 1e9,
        gbit_network / 8 * 1e9, watts, f"NVIDIA {source}",
    )  # fmt: skip


# Memory: GiB as torch reports them in its messages of such a GPU, not the data sheet's: ECC takes a sixteenth
# of GDDR6 (44.4 GiB of an L40S's 48), the driver some of any.
# The network is that of NVIDIA's own systems where there is one (DGX H100, H200 and B200: 400 Gbit/s a GPU;
# DGX A100: 200), else 100 Gbit/s a node of 8, which is an assumption. The first pattern that matches counts.
_NO_DGX = 12.5
# fmt: off
DEVICES: tuple[Device, ...] = (
    _gpu("gb200", r"GB200", 184, (2500, 2500, 80), 8.0, 1800, 400, 1200, "GB200 NVL72 data sheet"),
    _gpu("b200", r"B200", 178.3, (2250, 2250, 75), 8.0, 1800, 400, 1000, "DGX B200 data sheet"),
    _gpu("h200-nvl", r"H200 NVL", 139.7, (835.5, 835.5, 60), 4.8, 900, _NO_DGX, 600, "H200 data sheet"),
    _gpu("gh200", r"GH200", 94.5, (989.4, 989.4, 66.9), 4.0, 900, 400, 1000, "GH200 data sheet"),
    _gpu("h200", r"H200", 139.7, (989.4, 989.4, 66.9), 4.8, 900, 400, 700, "H200 data sheet"),
    _gpu("h100-nvl", r"H100 NVL", 93, (835.5, 835.5, 60), 3.9, 600, _NO_DGX, 400, "H100 data sheet"),
    _gpu("h100-pcie", r"H100 PCIe", 79.1, (756, 756, 51.2), 2.0, 128, _NO_DGX, 350, "H100 PCIe brief"),
    _gpu("h100-80g", r"H100", 79.1, (989.4, 989.4, 66.9), 3.35, 900, 400, 700, "H100 data sheet"),
    _gpu("h800-80g", r"H800", 79.1, (989.4, 989.4, 66.9), 3.35, 400, 400, 700, "H800 data sheet"),
    _gpu("h20-96g", r"H20", 95, (148, 148, 44), 4.0, 900, _NO_DGX, 400, "H20 data sheet"),
    _gpu("a100-pcie-40g", r"A100-PCIE-40GB", 39.4, (312, 312, 19.5), 1.555, 64, _NO_DGX, 250, "A100 sheet"),
    _gpu("a100-pcie-80g", r"A100 80GB PCIe", 79.1, (312, 312, 19.5), 1.935, 64, _NO_DGX, 300, "A100 sheet"),
    _gpu("a100-40g", r"A100.*40GB", 39.4, (312, 312, 19.5), 1.555, 600, 200, 400, "A100 data sheet"),
    _gpu("a100-80g", r"A100", 79.1, (312, 312, 19.5), 2.039, 600, 200, 400, "A100 data sheet"),
    _gpu("a800-80g", r"A800", 79.1, (312, 312, 19.5), 2.039, 400, 200, 400, "A800 data sheet"),
    _gpu("l40s", r"L40S", 44.3, (362.05, 362.05, 91.6), 0.864, 64, _NO_DGX, 350, "L40S data sheet"),
    _gpu("l40", r"L40", 44.3, (181.05, 181.05, 90.5), 0.864, 64, _NO_DGX, 300, "L40 data sheet"),
    _gpu("l4", r"L4", 22, (121, 121, 30.3), 0.3, 64, _NO_DGX, 72, "L4 data sheet"),
    _gpu("rtx-6000-ada", r"RTX 6000 Ada", 47.4, (364.2, 364.2, 91.1), 0.96, 64, _NO_DGX, 300, "its sheet"),
    _gpu("a6000", r"A6000", 47.4, (154.8, 154.8, 38.7), 0.768, 112.5, _NO_DGX, 300, "RTX A6000 data sheet"),
    _gpu("a40", r"A40", 44.3, (149.7, 149.7, 37.4), 0.696, 112.5, _NO_DGX, 300, "A40 data sheet"),
    _gpu("a30", r"A30", 23.5, (165, 165, 10.3), 0.933, 200, _NO_DGX, 165, "A30 data sheet"),
    _gpu("a10", r"A10", 22, (125, 125, 31.2), 0.6, 64, _NO_DGX, 150, "A10 data sheet"),
    _gpu("rtx-5090", r"RTX 5090", 31.3, (209.5, 209.5, 104.8), 1.792, 128, _NO_DGX, 575, "RTX 5090 paper"),
    _gpu("rtx-4090", r"RTX 4090", 23.6, (165.2, 165.2, 82.6), 1.008, 64, _NO_DGX, 450, "Ada white paper"),
    _gpu("rtx-3090", r"RTX 3090", 23.5, (71, 71, 35.6), 0.936, 112.5, _NO_DGX, 350, "Ampere white paper"),
    _gpu("v100-pcie-16g", r"V100.*PCIE", 15.7, (None, 112, 14), 0.9, 32, _NO_DGX, 250, "V100 data sheet"),
    _gpu("v100-32g", r"V100.*32GB", 31.7, (None, 125, 15.7), 0.9, 300, 50, 300, "V100 data sheet"),
    _gpu("v100-16g", r"V100", 15.7, (None, 125, 15.7), 0.9, 300, 50, 300, "V100 data sheet"),
    _gpu("t4", r"T4", 14.5, (None, 65, 8.1), 0.32, 32, _NO_DGX, 70, "T4 data sheet"),
)
# fmt: on
NAMES = (*(device.name for device in DEVICES), "cpu")


def names_like(name: str) -> str:
    """The fix for a --gpu that is not in the table: those that it is the beginning of, else the closest."""
    close = [each for each in NAMES if name and each.startswith(name.lower())]
    if not close:
        return did_you_mean(name.lower(), NAMES)
    return f"did you mean {' or '.join(close)}?"


def device_of(name: str) -> Device | None:
    """By --gpu's name, or by the one that torch gives; None: not in the table (a laptop's part is slower)."""
    if "Laptop" in name:
        return None
    for device in DEVICES:
        if name == device.name or re.search(rf"(?<![A-Za-z0-9])(?:{device.pattern})(?![A-Za-z0-9])", name):
            return device
    return None
