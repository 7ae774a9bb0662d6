from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from bigtfm.config.sections import ModelSection
from bigtfm.model.layers import (
    Embedding,
    FeedForward,
    LayerNorm,
    Linear,
    RelativeBias,
    RMSNorm,
    l1_penalty,
    rotary_angles,
    rotate,
    sinusoids,
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def fill(module):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


def test_norms_follow_their_formulas():
    x = torch.randn(5, 16, dtype=torch.float64) * 3 + 1
    norm = fill(LayerNorm(16, 1e-5, bias=True)).double()
    expected = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(norm(x), expected * norm.weight + norm.bias)
    norm = fill(RMSNorm(16, 1e-5)).double()
    torch.testing.assert_close(norm(x), x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight)


@pytest.mark.parametrize("norm", [LayerNorm(4096, 1e-5, bias=False), RMSNorm(4096, 1e-5)])
def test_norms_accumulate_in_fp32_when_the_model_is_bf16(norm):
    x = (torch.randn(4, 4096, generator=torch.Generator().manual_seed(0)) + 4).bfloat16()
    torch.nn.init.ones_(norm.weight)
    exact = norm.double()(x.double())
    seen = norm.bfloat16()(x)
    assert seen.dtype == torch.bfloat16
    # no worse than rounding the exact result; bf16 sums of 4096 squares would be off by percents
    assert (seen.double() - exact).abs().max() <= (exact.bfloat16().double() - exact).abs().max() + 2**-8 * 3


def test_rotary_scores_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 16, dtype=torch.float32)

    def score(i, j):
        turned = [rotate(x, *rotary_angles(torch.tensor([n]), 16, 10000.0)) for x, n in ((q, i), (k, j))]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(3, 1), score(103, 101), atol=1e-4, rtol=1e-4)
    assert abs(score(3, 1) - score(3, 2)) > 1e-3
    torch.testing.assert_close(score(7, 7), (q * k).sum())


def test_rotate_turns_pairs_by_position_times_frequency():
    x = torch.tensor([[[1.0, 0.0, 0.0, 2.0]]])  # pairs (0, 2) and (1, 3)
    out = rotate(x, *rotary_angles(torch.tensor([5]), 4, 100.0))
    second = 5 / 100**0.5
    expected = [math.cos(5), -2 * math.sin(second), math.sin(5), 2 * math.cos(second)]
    torch.testing.assert_close(out.flatten(), torch.tensor(expected))


def test_rotary_angles_are_fp32_exact_at_long_positions():
    cos, _ = rotary_angles(torch.tensor([8191]), 64, 10000.0)
    exact = torch.cos(8191 * 10000.0 ** (-torch.arange(0, 64, 2).double() / 64))
    assert (cos.flatten().double() - exact).abs().max() < 2e-3  # bf16 tables are off by 1


def test_sinusoids():
    table = sinusoids(torch.tensor([0, 3]), 5)
    assert table.dtype == torch.float32
    assert table[0].tolist() == [0, 0, 0, 1, 1]  # three sines, two cosines
    w = 10000 ** (-2 / 5)
    torch.testing.assert_close(table[1, :2], torch.tensor([math.sin(3), math.sin(3 * w)]))
    torch.testing.assert_close(table[1, 3:], torch.tensor([math.cos(3), math.cos(3 * w)]))


def test_llama_3_scaling_slows_long_waves_alone():
    """Factor 8 beyond a wavelength of 8192 / 1 tokens, none below 8192 / 4 (Llama 3.1's numbers)."""
    ones = torch.tensor([1])
    plain, scaled = (
        torch.atan2(*reversed(rotary_angles(ones, 128, 500000.0, scaling))).flatten()
        for scaling in (None, (8.0, 1.0, 4.0, 8192.0))
    )
    ratio, wavelength = plain / scaled, 2 * math.pi / plain
    assert torch.allclose(ratio[wavelength < 2048], torch.tensor(1.0))
    assert torch.allclose(ratio[wavelength > 8192], torch.tensor(8.0), rtol=1e-4)
    between = ratio[(wavelength > 2100) & (wavelength < 8000)]
    assert len(between) > 2
    assert ((between > 1) & (between < 8)).all()


def test_relative_bias_tells_near_distances_apart_and_far_ones_by_range():
    config = ModelSection(
        positions="relative",
        num_attention_heads=2,
        hidden_size=4,
        relative_buckets=8,
        relative_max_distance=16,
    )
    distance = torch.arange(-40, 41)[None]  # [Q = 1, K = 81]
    for causal in (True, False):
        bias = RelativeBias(config, causal)
        with torch.no_grad():
            bias.weight.copy_(torch.arange(16.0).view(8, 2))
        buckets = (bias(distance)[0, 0] / 2).int().tolist()  # head 0: the number of the bucket
        at = dict(zip(distance[0].tolist(), buckets, strict=True))
        if causal:
            assert [at[d] for d in (9, 0, -1, -2, -3, -4)] == [0, 0, 1, 2, 3, 4]
            assert at[-16] == at[-40] == 7
        else:
            assert [at[d] for d in (0, -1, 1, 2)] == [0, 1, 5, 6]
            assert (at[-40], at[40]) == (3, 7)
        assert bias(distance).shape == (2, 1, 81)


@pytest.mark.parametrize("bias", [True, False])
def test_feed_forward_formulas(bias):
    x = torch.randn(7, 8)

    def layer(activation):
        shape = {"hidden_size": 8, "num_attention_heads": 2, "ffn_hidden_size": 12, "bias": bias}
        return fill(FeedForward(ModelSection(activation=activation, **shape)))

    def tanh(x):
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    formulas = {
        "relu": lambda x: x.clamp(min=0),
        "silu": lambda x: x * torch.sigmoid(x),
        "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
        "gelu_tanh": tanh,
    }
    for name, formula in formulas.items():
        plain = layer(name)
        torch.testing.assert_close(plain(x), plain.down(formula(plain.up(x))))
    for name, inner in (("swiglu", "silu"), ("geglu", "gelu"), ("geglu_tanh", "gelu_tanh")):
        gated = layer(name)
        gate, up = gated.gate_up(x).split(12, dim=-1)
        torch.testing.assert_close(gated(x), gated.down(formulas[inner](gate) * up))


def test_embedding_reads_rows_and_projects_on_them():
    table = fill(Embedding(9, 4))
    ids, x = torch.tensor([8, 0, 8]), torch.randn(3, 4)
    assert torch.equal(table(ids), table.weight[ids])
    torch.testing.assert_close(table(x, project=True), x @ table.weight.T)


def test_l1_penalty_counts_matrices_alone_and_its_gradient_is_the_sign():
    model = torch.nn.ModuleList(
        [fill(Linear(3, 2, bias=True)), fill(Embedding(4, 3)), fill(RMSNorm(3, 1e-5))]
    )
    penalty = l1_penalty(model)
    torch.testing.assert_close(penalty, model[0].weight.abs().sum() + model[1].weight.abs().sum())
    penalty.backward()
    assert torch.equal(model[0].weight.grad, model[0].weight.sign())
    assert model[0].bias.grad is None
    assert model[2].weight.grad is None


def test_linear_is_torchs():
    linear = fill(Linear(3, 5, bias=True))
    x = torch.randn(4, 3)
    assert torch.equal(linear(x), F.linear(x, linear.weight, linear.bias))
