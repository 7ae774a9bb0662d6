"""Head pruning: what goes, and that the smaller model is the larger one without it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import small_models
import torch

from bigtfm.compression import heads
from bigtfm.compression.heads import head_importance, without_heads
from bigtfm.config.problems import ConfigProblem
from bigtfm.model.families import make_model

FAMILIES = [kind for kind in small_models.KINDS if kind != "t5"]


class Samples:
    """As much of a Loader as is asked for: one batch of three documents a sample."""

    num_samples = 4

    def __init__(self, model: Any) -> None:
        self.model = model

    def batch(self, sample: int, count: int) -> Any:
        inputs = small_models.batch(self.model, [3, 7, 5], seed=sample)
        return SimpleNamespace(num_labels=1, model_inputs=lambda: inputs)


@contextmanager
def silenced(model: Any, gates: dict[str, torch.Tensor]) -> Iterator[None]:
    """Heads whose output is multiplied by 0 or 1."""
    hooks = [
        model.get_submodule(path).out.register_forward_pre_hook(
            lambda module, args, gate=gate: (
                (args[0].unflatten(1, (len(gate), -1)) * gate[:, None]).flatten(1),
            )
        )
        for path, gate in gates.items()
    ]
    yield
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_smaller_model_is_the_larger_one_with_those_heads_silenced(kind: str) -> None:
    model = small_models.make(kind).eval()
    made = without_heads(model, 0.5, Samples(model))
    section = made.section
    assert section.num_attention_heads == model.config.num_attention_heads // 2
    assert section.kv_heads == model.config.kv_heads // 2
    smaller = make_model(section, small_models.VOCAB, objective=model.objective).eval()
    with torch.no_grad():
        for name, parameter in smaller.named_parameters():
            assert parameter.shape == made.parameters[name].shape
            parameter.copy_(made.parameters[name])
        of_group = model.config.num_attention_heads // model.config.kv_heads
        gates = {}
        for path, groups in made.settings["groups"].items():
            gates[path] = torch.zeros(model.config.kv_heads, of_group)
            gates[path][groups] = 1
        inputs = small_models.batch(model, [3, 7, 5])
        with silenced(model, {path: gate.flatten() for path, gate in gates.items()}):
            expected, _ = model(**inputs)
        whole, _ = model(**inputs)
        found, _ = smaller(**inputs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert abs(float(whole - expected)) > 1e-3, "the control: the heads did something"


def test_importance_is_the_gradient_of_a_factor_on_the_heads_output() -> None:
    """Against a difference quotient, sample by sample."""
    model = small_models.make("gpt").eval()
    samples, step = Samples(model), 1e-2
    found = head_importance(model, samples)
    path = "decoder.layers.1.attention"
    expected = torch.zeros(4)
    with torch.no_grad():
        for sample in range(samples.num_samples):
            for head in range(4):
                sides = []
                for sign in (1, -1):
                    gate = torch.ones(4)
                    gate[head] += sign * step
                    with silenced(model, {path: gate}):
                        loss, count = model(**samples.batch(sample, 1).model_inputs())
                    sides.append(float(loss) / float(count))
                expected[head] += abs(sides[0] - sides[1]) / (2 * step)
    torch.testing.assert_close(found[path], expected, rtol=1e-2, atol=1e-3)
    assert set(found) == {f"decoder.layers.{n}.attention" for n in range(3)}


def test_the_least_important_heads_go(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_models.make("bart").eval()
    told = torch.tensor([3.0, 1.0, 4.0, 2.0])
    monkeypatch.setattr(heads, "head_importance", lambda *_: {"encoder.layers.0.attention": told})
    assert without_heads(model, 0.5, Samples(model)).settings["groups"] == {
        "encoder.layers.0.attention": [0, 2]
    }
    assert without_heads(model, 0.25, Samples(model)).settings["groups"] == {
        "encoder.layers.0.attention": [0, 2, 3]
    }


@pytest.mark.parametrize(("kind", "share"), [("bart", 0.1), ("bart", 0.9), ("gpt", 0.1), ("t5", 0.5)])
def test_what_can_not_be_pruned_is_said(kind: str, share: float) -> None:
    model = small_models.make(kind).eval()
    with pytest.raises(ConfigProblem, match=r"removes [04]|removes 0|share"):
        without_heads(model, share, Samples(model))
