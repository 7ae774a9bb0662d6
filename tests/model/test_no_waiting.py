"""A forward and its backward never wait for the device: nothing in them asks it for a value or a size.

Run on the device `meta`, which has neither: to ask is an error there. What a GPU would be waited for in the
middle of a step, the host knows beforehand.
"""

from __future__ import annotations

import pytest
import torch
from small_models import KINDS, assert_same, batch, gradients, make

LENGTHS = [5, 1, 9, 24, 1, 5]


def on_meta(kind: str, **options):
    model = make(kind, **options)
    inputs = batch(model, LENGTHS)
    if model.config.family == "bert":
        inputs["labelled"] = (inputs["labels"] != -100).nonzero()[:, 0]
    inputs = {name: value.to("meta") if torch.is_tensor(value) else value for name, value in inputs.items()}
    return model.to("meta"), inputs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"dropout": 0.1, "recompute": "full"}, {"loss": "chunked"}])
def test_no_family_waits(kind, options):
    model, inputs = on_meta(kind, **options)
    loss, count = model(**inputs)
    loss.backward()
    assert loss.is_meta
    assert count.is_meta
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["bert", "modern-bert"])
def test_labels_are_where_the_loader_says(kind):
    """The documents are put in another order, and their labels with them."""
    model = make(kind)
    inputs = batch(model, LENGTHS)
    places = (inputs["labels"] != -100).nonzero()[:, 0]
    assert_same(
        gradients(model, inputs), gradients(model, inputs | {"labelled": places}), atol=1e-6, rtol=1e-5
    )


def test_the_control_goes_red():
    model, inputs = on_meta("bert")
    del inputs["labelled"]
    with pytest.raises(NotImplementedError, match="nonzero"):
        model(**inputs)
