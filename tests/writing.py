"""What tests of generation, beam search and fill-mask share: prompts, and forwards without a cache."""

from __future__ import annotations

import torch
from small_models import KINDS, SMALL

from bigtfm.model.attention import Documents

LIMIT = SMALL["max_seq_len"]
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [12, 13]]
WRITERS = [kind for kind, shape in KINDS.items() if shape["family"] != "bert"]
STD = {"init_std": 0.5}  # far from uniform


def start_of(model):
    """What the decoder of an encoder-decoder starts with in these tests."""
    return [0] if model.config.family == "encoder_decoder" else []


def inputs(tokens):
    documents = Documents(torch.tensor([0, len(tokens)], dtype=torch.int32), (len(tokens),))
    return torch.tensor(tokens), torch.arange(len(tokens)), documents


def from_scratch(model, prompt, written):
    """Logits [len(written) + 1, V] before and after each written token, by one forward without a cache."""
    with torch.no_grad():
        if model.config.family == "encoder_decoder":
            memory = model.eval().encode(*inputs(prompt))
            return model.logits(*inputs([0, *written]), memory)
        return model.eval().logits(*inputs(prompt + written))[len(prompt) - 1 :]
