"""What each token of a text costs the model, and the gradients of that.

A gpt and a decoder say each token from those before it. A bert is asked for each token by hiding it alone:
its pseudo-log-likelihood (Salazar et al. 2020, "Masked Language Model Scoring"), one reading of the text a
token.

L blocks of a stack, T tokens of a side, M judged tokens, C features, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bigtfm.generation.decoding import pack
from bigtfm.inspection.capture import Watched, forward, stacks, watch
from bigtfm.inspection.reading import Reading
from bigtfm.model.bert import BERT
from bigtfm.model.heads import LanguageModel
from bigtfm.model.transformer import Side

MOST_TOKENS = 2048  # read at a time by a bert; what its backward pass needs is kept of each
Expected = list[tuple[int, float]]  # the likeliest tokens and their probabilities, best first


@dataclass(frozen=True)
class Said:
    """What the model thought of a token that stands in the text."""

    loss: float  # -log p, in nats
    rank: int  # 1: it was the likeliest
    expected: Expected


@dataclass(frozen=True)
class Gradients:
    """L2 norms of the gradient of the mean loss, in a stack."""

    features: Tensor  # [L + 1, T], fp64: by the residual stream at a token; of a bert over all its readings
    parameters: list[float]  # L: by all weights of a block


def judge(
    model: LanguageModel, reading: Reading, mask_id: int | None, top_k: int
) -> tuple[dict[int, Said], dict[Side, Gradients]]:
    """What is thought of each token that can be judged, by its place; and the gradients. {}, {}: of none.

    Places are those of the last stack's text: of a decoder, what it reads and then says. The model is in
    evaluation mode, and has no gradients afterwards.
    """
    assert not model.training
    places = reading.hidden if isinstance(model, BERT) else _said_places(reading)
    if not places or model.task_head is not None:  # a task's head says no tokens
        return {}, {}
    said: dict[int, Said] = {}
    squares: dict[Side, Tensor] = {}
    model.zero_grad(set_to_none=True)
    with watch(model) as seen:
        for answers, labels, readings in _passes(model, reading, mask_id, places):
            losses = F.cross_entropy(answers, labels, reduction="none")  # [M]
            (losses.sum() / len(places)).backward()
            found = _opinions(answers.detach(), labels, losses.tolist(), top_k)
            said |= dict(zip(places[len(said) :], found, strict=False))
            for side, watched in seen.items():
                squares[side] = squares.get(side, 0) + _squares(watched, readings)
    gradients = {
        side: Gradients(squares[side].sqrt(), [_norm(block) for block in stack.layers])
        for side, stack in stacks(model).items()
    }
    model.zero_grad(set_to_none=True)
    shift = 0 if isinstance(model, BERT) else 1
    return {place + shift: one for place, one in said.items()}, gradients


def _said_places(reading: Reading) -> tuple[int, ...]:
    """The places that have a label, which is the token at the next one."""
    return tuple(place for place, label in enumerate(reading.labels) if label is not None)


def _passes(
    model: LanguageModel, reading: Reading, mask_id: int | None, places: tuple[int, ...]
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """For some of the places at a time: logits [M, V], labels [M], and how often the text was read."""
    device = model.embed_tokens.weight.device
    if not isinstance(model, BERT):
        labels = torch.tensor([reading.labels[place] for place in places], device=device)
        yield model.project(forward(model, reading)[list(places)]).float(), labels, 1
        return
    assert mask_id is not None
    length, count = len(reading.encoder), max(1, MOST_TOKENS // len(reading.encoder))
    text = torch.tensor(reading.encoder, device=device)
    for start in range(0, len(places), count):
        chosen = torch.tensor(places[start : start + count], device=device)
        ids, within, _, documents = pack([reading.encoder] * len(chosen), device)
        asked = torch.arange(len(chosen), device=device) * length + chosen
        ids[asked] = mask_id
        x = model.hidden(ids, within, documents)[asked]
        yield model.vocabulary(x).float(), text[chosen], len(chosen)


def _opinions(logits: Tensor, labels: Tensor, losses: list[float], top_k: int) -> list[Said]:
    own = logits.gather(1, labels[:, None])
    ranks = (logits > own).sum(-1) + 1
    return [
        Said(loss, rank, expected)
        for loss, rank, expected in zip(losses, ranks.tolist(), likeliest(logits, top_k), strict=True)
    ]


def likeliest(logits: Tensor, top_k: int) -> list[Expected]:
    """The top_k likeliest tokens of each row of logits [M, V]."""
    top = logits.double().softmax(-1).topk(min(top_k, logits.shape[-1]))
    rows = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [list(zip(*row, strict=True)) for row in rows]


def _squares(watched: Watched, readings: int) -> Tensor:
    """Squared gradients by the features, summed over C and the readings: [L + 1, T]. Empties `watched`."""
    rows = []
    for features in watched.features:
        assert features.grad is not None
        rows.append(features.grad.double().unflatten(0, (readings, -1)).square().sum((0, -1)))
    watched.features.clear()
    watched.neurons.clear()
    return torch.stack(rows)


def _norm(block: torch.nn.Module) -> float:
    squares = [p.grad.double().square().sum() for p in block.parameters() if p.grad is not None]
    return float(torch.stack(squares).sum().sqrt())
