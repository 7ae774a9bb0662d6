"""What is computed from what a model did inside: attention rollout, the logit lens, norms.

L blocks of a stack, H query heads, T tokens, C features, F neurons, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bigtfm.generation.decoding import inference
from bigtfm.inspection.capture import stacks
from bigtfm.inspection.judgement import Expected, likeliest
from bigtfm.model.bert import BERT
from bigtfm.model.heads import LanguageModel


def rollout(attention: Sequence[Tensor]) -> Tensor:
    """How much of each token's input has reached each token behind each block: [L, T, T], rows sum to 1.

    attention: L x [H, T, T]. Block by block R <- (mean over heads / 2 + I / 2) R, the I for the residual
    connection (Abnar and Zuidema 2020, "Quantifying Attention Flow in Transformers", section 3).
    """
    reached = torch.eye(attention[0].shape[-1], dtype=torch.float64)
    rows = []
    for weights in attention:
        mixed = weights.double().cpu().mean(0)
        reached = (mixed + torch.eye(len(mixed), dtype=torch.float64)) / 2 @ reached
        rows.append(reached)
    return torch.stack(rows)


def logit_lens(model: LanguageModel, features: Sequence[Tensor], top_k: int) -> list[list[Expected]]:
    """The likeliest tokens at each place, had the model ended there: L + 1 x T.

    features: L + 1 x [T, C] of its last stack. All go through what the last go through: the final norm, of a
    bert the head, and the output layer (nostalgebraist 2020, "interpreting GPT: the logit lens").
    """
    return [likeliest(logits, top_k) for logits in lens_logits(model, features)]


def lens_logits(model: LanguageModel, features: Sequence[Tensor]) -> list[Tensor]:
    """The same as logits: L + 1 x [T, V]."""
    *_, stack = stacks(model).values()
    with inference(model):
        rows = []
        for x in features:
            x = x if stack.norm is None else stack.norm(x)
            rows.append(model.vocabulary(x) if isinstance(model, BERT) else model.project(x))
    return rows


def norms(vectors: Sequence[Tensor]) -> Tensor:
    """L2 norm of each token's vector: n x [T, C] -> [n, T], fp64."""
    return torch.stack([x.double().norm(dim=-1).cpu() for x in vectors])
