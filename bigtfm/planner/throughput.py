"""Floating-point operations of a token, and how many the hardware could do: together they give the MFU."""

from __future__ import annotations

import re
import time
from typing import NamedTuple

from bigtfm.config.sections import ModelSection, ObjectiveSection
from bigtfm.planner.parameters import block_matrices, cross_matrices


def flops_per_token(
    model: ModelSection, vocab_size: int, seq_len: int, objective: ObjectiveSection | None = None
) -> int:
    """FLOPs of one trained token, forward and backward: 6 N + 12 L d T (Chowdhery et al. 2022, appendix B).

    N: weights of the matrix products, that is of the L blocks and of the output layer over the real
    vocabulary (tied or not); embeddings look up and count nothing, as do biases, norms and activations. Each
    takes 2 operations forward and 4 backward. d: query heads x head size; T: seq_len. The attention term
    counts every pair of positions, as is the convention (nanoGPT, Megatron, PaLM), although a causal kernel
    computes about half of them, a window and packed documents fewer. Recomputation of activations is work,
    not progress: it is left out, so the MFU falls when it is on.

    A token is one of the text. A bert asks its output layer about the hidden ones alone; an encoder_decoder
    reads and writes as many as the objective makes of it.
    """
    objective = objective or ObjectiveSection()
    hidden, width = model.hidden_size, model.num_attention_heads * model.head_size
    block = sum(in_ * out for in_, out, _ in block_matrices(model))
    output = vocab_size * hidden
    if model.family == "gpt":
        return 6 * (model.num_layers * block + output) + 12 * model.num_layers * width * seq_len
    if model.family == "bert":
        weights = model.num_layers * block + objective.mask_fraction * (hidden * hidden + output)
        return round(6 * weights) + 12 * model.num_layers * width * seq_len
    hidden_share, spans = objective.mask_fraction, objective.mask_fraction / objective.span_length
    read = 1 - hidden_share + spans
    written = 1.0 if objective.kind == "infilling" else hidden_share + spans
    queries, keys_values, out = (in_ * out for in_, out, _ in cross_matrices(model))
    decoder = written * (block + queries + out) + read * keys_values
    weights = model.num_layers * read * block + model.decoder_layers * decoder + written * output
    pairs = model.num_layers * read * read + model.decoder_layers * written * (written + read)
    return round(6 * weights + 12 * width * seq_len * pairs)


class Peak(NamedTuple):
    """What a device could do at most, and how that is known."""

    flops: float  # per second
    source: str  # "data sheet: ..." or "measured: ..."


# Dense peaks of matrix products from NVIDIA's data sheets and white papers, in TFLOP/s: pattern of the
# device's name, (bf16, fp16, fp32). Accumulated in fp32; no sparsity; fp32 without TF32, torch's default;
# None: no such unit. The first match counts.
_DATA_SHEETS: tuple[tuple[str, tuple[float | None, float | None, float]], ...] = (
    (r"GB200", (2500, 2500, 80)),
    (r"B200", (2250, 2250, 75)),
    (r"H200 NVL", (835.5, 835.5, 60)),
    (r"GH200|H200", (989.4, 989.4, 66.9)),
    (r"H100 NVL", (835.5, 835.5, 60)),
    (r"H100 PCIe", (756, 756, 51.2)),
    (r"H100|H800", (989.4, 989.4, 66.9)),
    (r"H20", (148, 148, 44)),
    (r"A100|A800", (312, 312, 19.5)),
    (r"L40S", (362.05, 362.05, 91.6)),
    (r"L40", (181.05, 181.05, 90.5)),
    (r"L4", (121, 121, 30.3)),
    (r"RTX 6000 Ada", (364.2, 364.2, 91.1)),
    (r"A6000", (154.8, 154.8, 38.7)),
    (r"A40", (149.7, 149.7, 37.4)),
    (r"A30", (165, 165, 10.3)),
    (r"A10", (125, 125, 31.2)),
    (r"RTX 5090", (209.5, 209.5, 104.8)),
    (r"RTX 4090", (165.2, 165.2, 82.6)),
    (r"RTX 3090", (71, 71, 35.6)),
    (r"V100.*PCIE", (None, 112, 14)),
    (r"V100", (None, 125, 15.7)),
    (r"T4", (None, 65, 8.1)),
)
_COLUMN = {"bf16": 0, "fp16": 1, "fp32": 2}


def peak_flops(device: str, precision: str) -> Peak | None:
    """The peak of one device in `precision` (fp32, bf16, fp16); None where it is not known.

    device: "cpu", or the GPU's name as torch.cuda.get_device_name() gives it. A GPU's peak is its data
    sheet's; a CPU has none, so a matrix product is measured on this process's threads (under 0.2 s).
    """
    if device == "cpu":
        return _measure_cpu(precision)
    if "Laptop" in device:  # the desktop part's name, not its speed
        return None
    for pattern, peaks in _DATA_SHEETS:
        if re.search(rf"(?<![A-Za-z0-9])(?:{pattern})(?![A-Za-z0-9])", device):
            teraflops = peaks[_COLUMN[precision]]
            return Peak(teraflops * 1e12, f"data sheet: {device}, {precision}, dense") if teraflops else None
    return None


def _measure_cpu(precision: str) -> Peak:
    import torch

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    size, best, deadline = 256, 0.0, time.perf_counter() + 0.1
    a = torch.ones(size, size, dtype=dtype)
    while time.perf_counter() < deadline:
        start = time.perf_counter()
        a @ a
        seconds = time.perf_counter() - start
        best = max(best, 2 * size**3 / seconds)
        if seconds < 0.005:  # too short to be the peak; eight times as much still ends soon
            size *= 2
            a = torch.ones(size, size, dtype=dtype)
    threads = torch.get_num_threads()
    return Peak(best, f"measured: {size} x {size} {precision} product on this CPU, {threads} threads")
