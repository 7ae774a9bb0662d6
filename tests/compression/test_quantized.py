"""Quantised matrices: the rounding, the packing, and layers that compute with them."""

from __future__ import annotations

import pytest
import small_models
import torch
import torch.nn.functional as F

from bigtfm.model.layers import Embedding, Linear
from bigtfm.model.quantized import KINDS, Kind, put, quantize, rounded_tokens


def matrix(rows: int = 24, columns: int = 64) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("kind", "group", "steps"), [("int8", None, 127), ("int4", None, 7), ("int4", 16, 7)]
)
def test_no_weight_is_further_off_than_rounding_and_the_narrowest_range_allow(
    kind: Kind, group: int | None, steps: int
) -> None:
    weight = matrix()
    groups = weight.unflatten(1, (-1, group or 64))
    error = (quantize(weight, kind, group).dequantized() - weight).view_as(groups)
    largest = groups.abs().amax(-1, keepdim=True)
    within = groups.abs() <= 0.6 * largest  # else a narrower range may cut it
    assert bool((error.abs() <= largest / steps / 2 + 1e-6)[within].all())
    plain = (groups / (largest / steps)).round() * (largest / steps) - groups
    assert error.square().sum() <= plain.square().sum(), "searching a range must not be worse"


def test_int8_is_torchaos_rounding_where_no_range_is_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    """round(w / s), s = max |w| / 127 a row: the formula, written once more."""
    monkeypatch.setattr("bigtfm.model.quantized.CLIPS", [1.0])
    weight = matrix()
    found = quantize(weight, "int8")
    scale = weight.abs().amax(1, keepdim=True) / 127
    assert torch.equal(found.values, (weight / scale).round().to(torch.int8))
    torch.testing.assert_close(found.scales, scale)


@pytest.mark.parametrize("columns", [6, 7])
def test_int4_packs_two_to_a_byte_and_gives_every_integer_back(columns: int) -> None:
    integers = torch.arange(3 * columns).view(3, columns).remainder(15) - 7.0
    integers[:, 0] = 7  # the largest of each row, so that the scale is 1
    found = quantize(integers, "int4")
    assert found.values.dtype == torch.uint8
    assert found.values.shape == (3, -(-columns // 2))
    torch.testing.assert_close(found.dequantized(), integers)


def test_zeros_stay_zeros_and_a_row_of_zeros_is_no_nan() -> None:
    weight = matrix()
    weight[3], weight[:, 5] = 0, 0
    for kind in KINDS:
        found = quantize(weight, kind, 16).dequantized()
        assert not found[3].any()
        assert not found[:, 5].any()


def test_integers_are_multiplied_as_their_values_are() -> None:
    x, layer = matrix(5), Linear(64, 24, bias=False)
    layer.weight.data = matrix(24)
    model = torch.nn.Sequential(layer)
    put(model, "0.weight", quantize(layer.weight, "int8_dynamic"))
    values, scale = rounded_tokens(x)
    torch.testing.assert_close(model(x), F.linear(values * scale, model[0].weight))
    assert (values * scale - x).abs().max() <= x.abs().max() / 127 / 2 + 1e-6


def test_a_token_does_not_depend_on_its_batch() -> None:
    model = torch.nn.Sequential(Linear(64, 24, bias=False))
    put(model, "0.weight", quantize(matrix(24), "int8_dynamic"))
    x = matrix(5)
    with_outlier = torch.cat([x, 1000 * x[:1]])
    assert torch.equal(model(with_outlier)[:5], model(x))


def quantized(kind: str, name: Kind) -> torch.nn.Module:
    model = small_models.make(kind).eval()
    for path, module in list(model.named_modules()):
        if isinstance(module, Linear | Embedding):
            put(model, f"{path}.weight", quantize(module.weight, name, 8))
    return model


@pytest.mark.parametrize("kind", list(small_models.KINDS))
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_every_family_computes_as_with_the_dequantised_weights(kind: str, name: Kind) -> None:
    packed, plain = quantized(kind, name), small_models.make(kind).eval()
    with torch.no_grad():
        for path, module in packed.named_modules():
            if hasattr(module, "scales"):
                plain.get_parameter(f"{path}.weight").copy_(module.weight)
        inputs = small_models.batch(plain, [3, 7, 5])
        loss, count = packed(**inputs)
        expected, _ = plain(**inputs)
    assert count > 0
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert packed.state_dict().keys() != plain.state_dict().keys(), "integers, not weights, are kept"
