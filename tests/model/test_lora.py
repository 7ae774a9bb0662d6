"""Adapters: what they begin as, what they add, and that nothing else has a gradient."""

from __future__ import annotations

import pytest
import small_models
import torch

from bigtfm.config.sections import TuneSection
from bigtfm.model.lora import LoraLinear, add_adapters, is_adapter, update
from bigtfm.model.transformer import init_weights
from bigtfm.planner.parameters import parameters_of

TUNES = {on: TuneSection(lora_rank=3, lora_alpha=6, lora_on=on) for on in ("attention", "all")}


def adapted(kind: str, tune: TuneSection, trained: bool = False):
    model = small_models.make(kind)
    add_adapters(model, tune)
    init_weights(model)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(tune.learns(name))
        if trained and name.endswith("lora_b"):
            parameter.data.normal_(std=0.2, generator=generator)
    return model


@pytest.mark.parametrize("on", TUNES)
@pytest.mark.parametrize("kind", small_models.KINDS)
def test_names_and_shapes(kind: str, on: str) -> None:
    """As the planner has them; the base model's are all there."""
    model = adapted(kind, TUNES[on])
    built = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    assert [tuple(p) for p in parameters_of(model.config, small_models.VOCAB, tune=TUNES[on])] == built
    base = dict(small_models.make(kind).named_parameters())
    assert [name for name, _ in built if not is_adapter(name)] == list(base)
    assert any(".mlp." in name and is_adapter(name) for name, _ in built) == (on == "all")


@pytest.mark.parametrize("kind", small_models.KINDS)
def test_it_begins_as_the_model_without_adapters(kind: str) -> None:
    plain, model = small_models.make(kind), adapted(kind, TUNES["all"])
    inputs = small_models.batch(plain, [5, 9, 2])
    assert torch.equal(plain(**inputs)[0], model(**inputs)[0])
    for name, parameter in model.named_parameters():
        if name.endswith("lora_a"):
            assert 0.4 < float(parameter.detach().std()) * (3 * parameter.shape[1]) ** 0.5 < 1.6
    again = adapted(kind, TUNES["all"])
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
@pytest.mark.parametrize("kind", small_models.KINDS)
def test_adapters_alone_have_gradients_and_they_are_the_merged_matrix_s(kind: str, recompute: str) -> None:
    """dA = s B^T dW and dB = s dW A^T, where dW is the gradient of the merged matrix."""
    model = adapted(kind, TUNES["all"], trained=True)
    for stack in (getattr(model, "encoder", None), getattr(model, "decoder", None)):
        if stack is not None:
            stack.recompute = recompute
    inputs = small_models.batch(model, [5, 9, 2])
    merged = small_models.make(kind)
    for path, layer in model.named_modules():
        if isinstance(layer, LoraLinear):
            added = update(layer.lora_a, layer.lora_b, layer.scale)
            merged.get_submodule(path).weight.data.add_(added.detach())
    loss, other = model(**inputs)[0], merged(**inputs)[0]
    torch.testing.assert_close(loss, other, rtol=1e-5, atol=1e-5)
    assert abs(float((other - small_models.make(kind)(**inputs)[0]).detach())) > 0.1, (
        "the adapters do something"
    )
    loss.backward()
    other.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == is_adapter(name), name
    for path, layer in model.named_modules():
        if isinstance(layer, LoraLinear):
            dw = merged.get_submodule(path).weight.grad
            a, b = layer.lora_a.detach(), layer.lora_b.detach()
            wanted = layer.scale * b.T @ dw, layer.scale * dw @ a.T
            for found, want in zip((layer.lora_a.grad, layer.lora_b.grad), wanted, strict=True):
                torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))
