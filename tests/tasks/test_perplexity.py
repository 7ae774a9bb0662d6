"""Perplexity over sliding windows is that of transformers' own guide, on models that came from there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hf_models
import numpy as np
import pytest
import torch

from bigtfm.tasks.language_modelling import token_losses


def guide(model: Any, ids: list[int], window: int, stride: int) -> float:
    """exp of the mean loss, as https://huggingface.co/docs/transformers/perplexity computes it."""
    encoded = torch.tensor([ids])
    total, count, before = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        input_ids = encoded[:, begin:end]
        labels = input_ids.clone()
        labels[:, : -(end - before)] = -100
        with torch.no_grad():
            loss = model(input_ids, labels=labels).loss
        scored = int((labels[:, 1:] != -100).sum())
        total, count, before = total + float(loss) * scored, count + scored, end
        if end == len(ids):
            break
    return float(np.exp(total / count))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral"])
def test_it_is_transformers(name: str, tmp_path: Path) -> None:
    theirs, ours = hf_models.both(name, tmp_path)
    ids = np.random.default_rng(0).integers(3, 100, 200).tolist()
    for window, stride in ((64, 32), (64, 1), (16, 15), (40, 7)):
        [losses] = token_losses(ours, [ids], window=window, stride=stride, batch_tokens=300)
        assert len(losses) == len(ids) - 1
        assert np.exp(losses.mean()) == pytest.approx(guide(theirs, ids, window, stride), rel=1e-4)
    short = token_losses(ours, [ids[:5], ids[:1], ids[:9]], window=16, stride=8)
    assert list(map(len, short)) == [4, 0, 8]
