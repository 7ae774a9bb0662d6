"""Floating-point operations of a token, and how many the hardware could do: together they give the MFU."""

from __future__ import annotations

import time
from typing import NamedTuple

from bigtfm.config.sections import HEADED, ModelSection, ObjectiveSection, TuneSection
from bigtfm.planner.hardware import device_of
from bigtfm.planner.parameters import Matrix, block_matrices, cross_matrices


def passes(tune: TuneSection) -> int:
    """How many products of a frozen or trained matrix's size a step has: with its input; for the gradient of
    that, unless no adapter lies before; for its own gradient, where the matrix itself is trained.
    """
    if tune.train == "head":
        return 1
    return 2 if tune.lora_rank else 3


def flops_per_token(
    model: ModelSection,
    vocab_size: int,
    seq_len: int,
    objective: ObjectiveSection | None = None,
    tune: TuneSection | None = None,
) -> int:
    """FLOPs of one trained token, forward and backward: 6 N + 12 L d T (Chowdhery et al. 2022, appendix B).

    N: weights of the matrix products, that is of the L blocks and of the output layer over the real
    vocabulary (tied or not); embeddings look up and count nothing, as do biases, norms and activations. Each
    takes 2 operations forward and 4 backward. d: query heads x head size; T: seq_len. The attention term
    counts every pair of positions, as is the convention (nanoGPT, Megatron, PaLM), although a causal kernel
    computes about half of them, a window and packed documents fewer. Recomputation of activations is work,
    not progress: it is left out, so the MFU falls when it is on.

    A token is one of the text. A bert asks its output layer about the hidden ones alone; an encoder_decoder
    reads and writes as many as the objective makes of it. What `tune` leaves as it is takes 4 operations, in
    front of a head that alone is trained 2; adapters count as weights.
    """
    objective, tune = objective or ObjectiveSection(), tune or TuneSection()
    hidden, width = model.hidden_size, model.num_attention_heads * model.head_size
    share = passes(tune) / 3

    def weights_of(matrix: Matrix, adapted: bool = True) -> float:
        return share * matrix.in_ * matrix.out + adapted * tune.lora_rank * (matrix.in_ + matrix.out)

    attention, mlp = block_matrices(model)[:2], block_matrices(model)[2:]
    block = sum(map(weights_of, attention)) + sum(weights_of(m, tune.lora_on == "all") for m in mlp)
    output, scores = share * vocab_size * hidden, 4 * width * seq_len * (1 if passes(tune) == 1 else 3)
    if objective.kind in HEADED:  # labels instead of a vocabulary: next to nothing
        return round(6 * model.num_layers * block) + model.num_layers * scores
    if model.family == "gpt":
        return round(6 * (model.num_layers * block + output)) + model.num_layers * scores
    if model.family == "bert":
        dense = share * hidden * hidden
        weights = model.num_layers * block + objective.mask_fraction * (dense + output)
        return round(6 * weights) + model.num_layers * scores
    hidden_share, spans = objective.mask_fraction, objective.mask_fraction / objective.span_length
    read = 1 - hidden_share + spans
    written = 1.0 if objective.kind == "infilling" else hidden_share + spans
    if objective.kind == "sequence_to_sequence":  # as long as each other: a guess
        read = written = 0.5
    queries, keys_values, out = map(weights_of, cross_matrices(model))
    decoder = written * (block + queries + out) + read * keys_values
    weights = model.num_layers * read * block + model.decoder_layers * decoder + written * output
    pairs = model.num_layers * read * read + model.decoder_layers * written * (written + read)
    return round(6 * weights + scores * pairs)


class Peak(NamedTuple):
    """What a device could do at most, and how that is known."""

    flops: float  # per second
    source: str  # "data sheet: ..." or "measured: ..."


def peak_flops(device: str, precision: str) -> Peak | None:
    """The peak of one device in `precision` (fp32, bf16, fp16); None where it is not known.

    device: "cpu", or the GPU's name as torch.cuda.get_device_name() gives it. A GPU's peak is its data
    sheet's; a CPU has none, so a matrix product is measured on this process's threads (under 0.2 s).
    """
    if device == "cpu":
        return _measure_cpu(precision)
    found = device_of(device)
    peak = found.peak(precision) if found else None
    return Peak(peak, f"data sheet: {device}, {precision}, dense") if peak else None


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
