from __future__ import annotations

import subprocess
import sys
import time

import pytest
from gpt2 import GPT2

from bigtfm.config.sections import ModelSection, ObjectiveSection, TuneSection
from bigtfm.planner.parameters import count_parameters
from bigtfm.planner.throughput import flops_per_token, peak_flops

LLAMA_8B = ModelSection(
    hidden_size=4096,
    num_layers=32,
    num_attention_heads=32,
    num_kv_heads=8,
    ffn_hidden_size=14336,
    max_seq_len=8192,
    tied_embeddings=False,
)


def test_parameters_are_the_published_ones():
    assert count_parameters(GPT2, 50257) == 124_439_808
    assert count_parameters(LLAMA_8B, 128256) == 8_030_261_248
    padded = GPT2.model_copy(update={"vocab_multiple": 64})
    assert count_parameters(padded, 50257) == 124_439_808 + (50304 - 50257) * 768


def test_flops_by_hand():
    # 12 blocks of (768 x 2304, 768 x 768, 768 x 3072, 3072 x 768) and the output layer 768 x 50257
    weights = 12 * (768 * 2304 + 768 * 768 + 2 * 768 * 3072) + 768 * 50257
    assert weights == 123_532_032
    assert flops_per_token(GPT2, 50257, 1024) == 6 * weights + 12 * 12 * 768 * 1024 == 854_438_400
    # grouped queries shrink the qkv product alone: 4096 x (32 + 2 * 8) * 128; swiglu has three matrices
    block = 4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14336
    expected = 6 * (32 * block + 4096 * 128256) + 12 * 32 * 4096 * 8192
    assert flops_per_token(LLAMA_8B, 128256, 8192) == expected


def test_flops_do_not_count_padding_nor_tying():
    padded = GPT2.model_copy(update={"vocab_multiple": 64, "tied_embeddings": False})
    assert flops_per_token(padded, 50257, 1024) == flops_per_token(GPT2, 50257, 1024)


@pytest.mark.parametrize(
    ("device", "precision", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H200", "fp16", 989.4),
        ("NVIDIA B200", "bf16", 2250),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100-SXM4-80GB", "fp32", 19.5),
        ("NVIDIA L40S", "bf16", 362.05),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("NVIDIA GeForce RTX 3090", "fp16", 71),
        ("Tesla V100-SXM2-16GB", "fp16", 125),
    ],
)
def test_data_sheets(device, precision, teraflops):
    peak = peak_flops(device, precision)
    assert peak is not None
    assert peak.flops == pytest.approx(teraflops * 1e12)
    assert peak.source.startswith("data sheet")


@pytest.mark.parametrize(
    ("device", "precision"),
    [
        ("Tesla V100-SXM2-16GB", "bf16"),
        ("NVIDIA A10G", "bf16"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16"),
        ("Some GPU", "fp32"),
    ],
)
def test_an_unknown_peak_is_not_guessed(device, precision):
    assert peak_flops(device, precision) is None


def test_cpu_is_measured_and_says_so():
    import torch  # noqa: F401  its import is not part of the measurement

    start = time.perf_counter()
    peak = peak_flops("cpu", "fp32")
    seconds = time.perf_counter() - start
    assert peak is not None
    assert peak.source.startswith("measured")
    assert 1e8 < peak.flops < 1e14
    assert seconds < 1  # 0.1 s on an idle machine


def test_planning_does_not_import_torch():
    code = "import sys, bigtfm.planner.memory, bigtfm.planner.throughput; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_bert_asks_its_output_layer_about_hidden_tokens_alone():
    bert = GPT2.model_copy(update={"family": "bert"})
    asked = flops_per_token(bert, 50257, 1024, ObjectiveSection(mask_fraction=0.25))
    outputs = 768 * 768 + 768 * 50257
    blocks = flops_per_token(GPT2, 50257, 1024) - 6 * 768 * 50257
    assert asked == pytest.approx(blocks + 6 * 0.25 * outputs, rel=1e-9)


def test_an_encoder_decoder_reads_and_writes_what_the_objective_makes_of_a_token():
    both = ModelSection(family="encoder_decoder", hidden_size=64, num_layers=2, num_attention_heads=4)
    both = both.model_copy(update={"ffn_hidden_size": 128, "activation": "relu"})
    block, cross = 64 * 192 + 64 * 64 + 2 * 64 * 128, 64 * 64 * 2
    spans = ObjectiveSection(mask_fraction=0.3, span_length=3.0)
    read, written = 0.7 + 0.1, 0.3 + 0.1
    weights = 2 * (read * block + written * (block + cross) + read * 64 * 128) + written * 64 * 100
    pairs = 2 * (read**2 + written**2 + written * read)
    assert flops_per_token(both, 100, 512, spans) == pytest.approx(6 * weights + 12 * 64 * 512 * pairs, abs=1)
    whole = ObjectiveSection(kind="infilling", mask_fraction=0.3, span_length=3.0)
    assert flops_per_token(both, 100, 512, whole) > 1.5 * flops_per_token(both, 100, 512, spans)


def test_frozen_weights_by_hand() -> None:
    """Their own gradient is not computed: 4 operations; in front of a head that alone learns 2."""
    blocks, output, scores = 12 * 12 * 768 * 768, 50257 * 768, 12 * 768 * 1024
    adapters = 12 * 8 * ((768 + 3 * 768) + (768 + 768))
    lora = flops_per_token(GPT2, 50257, 1024, tune=TuneSection(lora_rank=8, lora_on="attention"))
    assert lora == 4 * (blocks + output) + 6 * adapters + 12 * scores
    tagging = ObjectiveSection(kind="tagging")
    head = flops_per_token(GPT2, 50257, 1024, tagging, TuneSection(train="head"))
    assert head == 2 * blocks + 4 * scores
