"""The estimates of memory, against what torch keeps for a backward pass of real models."""

from __future__ import annotations

import pytest
import small_models
import torch

from bigtfm.planner.memory import activation_bytes, checkpoint_bytes, logit_bytes


def kept_bytes(model, inputs) -> int:
    """Bytes of the tensors that a forward keeps, each storage once, without the parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        held.append(tensor)  # else its place would be taken again
        return tensor

    held = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**inputs)
    return sum(kept.values())


@pytest.mark.parametrize("kind", ["gpt", "bert", "transformer"])
@pytest.mark.parametrize("recompute", ["none", 2])  # what the others keep passes by torch's hooks
def test_what_a_forward_keeps(kind: str, recompute: str | int) -> None:
    model = small_models.make(kind, recompute=recompute, hidden_size=64, max_seq_len=128, num_layers=6)
    lengths = [128] * 8
    inputs = small_models.batch(model.train(), lengths, written=lengths)
    tokens = sum(lengths)
    estimate = activation_bytes(model.config, tokens, 4, recompute)
    estimate += logit_bytes(small_models.VOCAB, tokens, 4)
    assert estimate / 2 < kept_bytes(model, inputs) < estimate * 1.5


def test_a_checkpoint() -> None:
    assert checkpoint_bytes(1000, "AdamW") == 12_000
    assert checkpoint_bytes(1000, "SGD") == 8_000
