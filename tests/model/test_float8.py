"""8-bit products, emulated on a CPU: the factors are rounded as a GPU's are."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
from small_models import KINDS, assert_same, batch, documents, gradients, make

from bigtfm.config.problems import ConfigProblem
from bigtfm.model.float8 import emulated, use_float8
from bigtfm.model.transformer import block_linears, compile_blocks

RECIPES = ["tensorwise", "rowwise", "rowwise_with_gw_hp"]
LENGTHS = [5, 1, 9, 24, 1, 5]
SIZES = {"hidden_size": 32, "ffn_hidden_size": 64, "head_dim": 8}
ON_CPU = {"precision": "fp32", "capability": None}


def in_8_bits(kind: str, recipe: str, **shape):
    if importlib.util.find_spec("torchao") is None:
        pytest.skip("needs torchao")
    model = make(kind, **SIZES, **shape)
    use_float8(model, recipe, **ON_CPU)
    return model


@pytest.mark.parametrize(
    ("recipe", "precision", "capability", "expected"),
    [
        ("tensorwise", "bf16", (8, 9), False),
        ("tensorwise", "bf16", (8, 0), True),
        ("rowwise", "bf16", (8, 9), True),
        ("rowwise", "bf16", (9, 0), False),
        ("rowwise_with_gw_hp", "bf16", (10, 0), False),
        ("rowwise", "fp32", (9, 0), True),
        ("tensorwise", "bf16", None, True),
    ],
)
def test_where_products_are_emulated(recipe, precision, capability, expected):
    assert emulated(recipe, precision, capability) == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_it_moves_the_loss_by_the_rounding_of_8_bits_and_no_name(kind, recipe):
    plain, model = make(kind, **SIZES, init_std=0.05), in_8_bits(kind, recipe, init_std=0.05)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    inputs = batch(plain, LENGTHS)
    (expected, true), (loss, grads) = gradients(plain, inputs), gradients(model, inputs)
    assert 1e-6 < abs(loss / expected - 1) < 0.03
    for name, gradient in true.items():
        cosine = torch.nn.functional.cosine_similarity(grads[name].flatten(), gradient.flatten(), dim=0)
        assert cosine > 0.9, name


def test_only_the_blocks_matrices():
    model = in_8_bits("bart", "rowwise")
    inside = {name for name, _ in block_linears(model)}
    found = {name for name, module in model.named_modules() if getattr(module, "product", None) is not None}
    assert found == inside
    assert not any(name.startswith(("lm_head", "embed")) for name in found)


def test_rowwise_with_exact_weight_gradients_knows_no_batch():
    """One scale a token: documents together or one by one are the same, which one scale a tensor is not."""
    model = in_8_bits("gpt", "rowwise_with_gw_hp")
    inputs = batch(model, LENGTHS)
    assert_same(gradients(model, inputs), gradients(model, *documents(inputs)), atol=1e-5, rtol=1e-4)
    model = in_8_bits("gpt", "tensorwise")
    with pytest.raises(AssertionError):
        assert_same(gradients(model, inputs), gradients(model, *documents(inputs)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("recompute", ["full", "selective", 2])
@pytest.mark.parametrize("recipe", RECIPES)
def test_recomputation_changes_nothing(recipe, recompute):
    model, again = in_8_bits("gpt", recipe), in_8_bits("gpt", recipe, recompute=recompute)
    inputs = batch(model, LENGTHS)
    assert_same(gradients(model, inputs), gradients(again, inputs), atol=0, rtol=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled_blocks():
    model, compiled = (in_8_bits("gpt", "tensorwise", num_layers=1) for _ in range(2))
    compile_blocks(compiled)
    inputs = batch(model, LENGTHS)
    (loss, _), (other, _) = gradients(model, inputs), gradients(compiled, inputs)
    assert other == pytest.approx(
        loss, rel=1e-3
    )  # where a value lies between two of 8 bits, rounding decides


def test_without_torchao(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(ConfigProblem, match="needs torchao") as caught:
        use_float8(make("gpt", **SIZES), "rowwise", **ON_CPU)
    assert caught.value.fix == "pip install 'bigtfm[fp8]'"
