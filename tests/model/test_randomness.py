from __future__ import annotations

import math

import pytest
import torch

from bigtfm.model.randomness import dropout, mix32, mix64, normal, stream_key, token_words, uniform

TOKENS, FEATURES = 4096, 385  # an odd width: one hash serves two features


def kept(p: float, site: int = 3, seed: int = 0) -> torch.Tensor:
    """Standardised keep decisions [TOKENS, FEATURES]."""
    words = token_words(torch.arange(TOKENS), stream_key(seed, "dropout"))
    keep = (dropout(torch.ones(TOKENS, FEATURES), p, words, site) != 0).double()
    return (keep - (1 - p)) / math.sqrt(p * (1 - p))


def test_mixers_equal_their_published_definitions():
    def splitmix64(z):
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        return z ^ (z >> 31)

    def fmix32(h):
        h = ((h ^ (h >> 16)) * 0x85EBCA6B) % 2**32
        h = ((h ^ (h >> 13)) * 0xC2B2AE35) % 2**32
        return h ^ (h >> 16)

    numbers = [0, 1, -1, 12345678901234567, -(2**63), 2**63 - 1]
    assert [x % 2**64 for x in mix64(torch.tensor(numbers)).tolist()] == [
        splitmix64(x % 2**64) for x in numbers
    ]
    small = [0, 1, -1, 123456789, -(2**31), 2**31 - 1]
    mixed = mix32(torch.tensor(small, dtype=torch.int32)).tolist()
    assert [x % 2**32 for x in mixed] == [fmix32(x % 2**32) for x in small]


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5])
def test_dropout_has_its_rate_and_no_correlations(p):
    keep = kept(p)

    def z(product):  # standard deviations from 0
        return abs(product.mean().item()) * math.sqrt(product.numel())

    assert z(keep) < 4
    assert z(keep[1:] * keep[:-1]) < 4  # neighbouring tokens
    assert z(keep[:, 1:] * keep[:, :-1]) < 4  # neighbouring features: halves of one hash and of two
    assert z(keep[:, 2:] * keep[:, :-2]) < 4
    assert z(keep * kept(p, site=4)) < 4
    assert z(keep * kept(p, seed=1)) < 4
    assert keep.mean(1).var().item() * FEATURES == pytest.approx(
        1, abs=0.12
    )  # tokens differ as chance has it
    assert keep.mean(0).var().item() * TOKENS == pytest.approx(1, abs=0.35)  # and so do features


def test_statistics_would_notice_a_weak_hash():
    words = torch.arange(
        TOKENS, dtype=torch.int32
    )  # negative control: unmixed token numbers, unmixed features
    bits = ((words[:, None] + torch.arange(FEATURES, dtype=torch.int32)) % 10 != 0).double()
    keep = (bits - 0.9) / 0.3
    assert abs((keep[1:] * keep[:-1]).mean().item()) * math.sqrt(keep.numel()) > 4


def test_dropout_scales_what_it_keeps_and_its_gradient():
    x = torch.ones(64, 32, requires_grad=True)
    out = dropout(x, 0.25, token_words(torch.arange(64), 7), 0)
    torch.testing.assert_close(out.detach().unique(), torch.tensor([0.0, 1 / 0.75]))
    out.sum().backward()
    assert torch.equal(x.grad, out)


def test_dropout_of_a_token_depends_on_its_key_alone():
    keys = torch.tensor([5, 900, 77, 5])
    x = torch.ones(4, 16)
    whole = dropout(x, 0.5, token_words(keys, 1), 2)
    assert torch.equal(whole[0], whole[3])
    assert torch.equal(whole[[2, 0]], dropout(x[:2], 0.5, token_words(keys[[2, 0]], 1), 2))
    state = torch.get_rng_state()
    dropout(x, 0.5, token_words(keys, 1), 2)
    assert torch.equal(state, torch.get_rng_state())


def test_dropout_keeps_the_dtype_and_p_zero_is_the_identity():
    words = token_words(torch.arange(4), 1)
    x = torch.ones(4, 6, dtype=torch.bfloat16)
    assert dropout(x, 0.5, words, 0).dtype == torch.bfloat16
    assert dropout(x, 0.0, words, 0) is x


def test_normal_is_standard_normal_and_prefix_stable():
    z = normal(stream_key(1, "weights"), 1 << 20).double()
    n = math.sqrt(z.numel())
    assert abs(z.mean().item()) * n < 4
    assert abs(z.var().item() - 1) * n / math.sqrt(2) < 4
    assert abs((z**4).mean().item() - 3) * n / math.sqrt(96) < 4
    assert abs((z[1:] * z[:-1]).mean().item()) * n < 4
    assert 4.5 < z.abs().max().item() < 6.8
    assert torch.equal(normal(5, 1000), normal(5, 300_001)[:1000])
    assert not torch.equal(normal(5, 1000), normal(6, 1000))


def test_uniform_is_uniform_inside_the_open_interval():
    u = uniform(torch.arange(100_000))
    assert 0 < u.min() < 1e-3
    assert 1 - 1e-3 < u.max() < 1
    counts = torch.histc(u, 20, 0, 1)
    assert ((counts - 5000) ** 2 / 5000).sum().item() < 45  # chi squared, 19 degrees of freedom: p = 7e-4
