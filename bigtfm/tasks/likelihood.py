"""How well a model foretells text: -log p of its tokens, and what their frequency alone would give.

N documents, T tokens of all together, C features, P predicted tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from bigtfm.data.examples import Example
from bigtfm.data.tokenizer import Tokenizer, text_of
from bigtfm.generation.decoding import inference, pack
from bigtfm.model.encoder_decoder import EncoderDecoder
from bigtfm.model.gpt import GPT
from bigtfm.model.heads import LanguageModel
from bigtfm.tasks.predictor import Predictor
from bigtfm.tasks.task import Scores, Sums, ratio

CHUNK = 2048  # tokens whose logits are held at a time
FREQUENCY = "tokens by their frequency"


class Foretold(NamedTuple):
    """A document, or what is to be written of it: its predicted tokens [P], -log p of all in nats, how many
    were the likeliest, the bytes of their text.
    """

    ids: NDArray[np.int64]
    loss: float
    hits: int
    size: int


NOTHING = Foretold(np.empty(0, np.int64), 0.0, 0, 0)


def predicted(model: LanguageModel, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """-log p in nats, and whether it is the likeliest, of labels [P] given features x [P, C]: [P] each."""
    found = []
    for features, wanted in zip(x.split(CHUNK), labels.split(CHUNK), strict=True):
        logits = model.project(features).float()
        found.append((F.cross_entropy(logits, wanted, reduction="none"), logits.argmax(-1) == wanted))
    losses, hits = zip(*found, strict=True)
    return torch.cat(losses), torch.cat(hits)


def of_written(predictor: Predictor, examples: Sequence[Example], tokenizer: Tokenizer) -> list[Foretold]:
    """Of each example the tokens that are to be written, each given all that stands before it."""
    model, found = predictor.model, [NOTHING] * len(examples)
    with inference(model):
        for numbers in predictor.batches([len(example.ids) for example in examples]):
            group = [examples[number] for number in numbers]
            written = [[token for token, mark in zip(*one, strict=True) if mark] for one in group]
            labels = torch.tensor([token for ids in written for token in ids])
            labels = labels.to(model.embed_tokens.weight.device)
            losses, hits = predicted(model, _features(predictor, group, written), labels)
            ends = np.cumsum([len(ids) for ids in written])[:-1]
            parts = (np.split(side.cpu().numpy(), ends) for side in (losses.double(), hits))
            for number, ids, loss, right in zip(numbers, written, *parts, strict=True):
                size = len(text_of(ids, tokenizer).encode("utf-8", "surrogatepass"))
                found[number] = Foretold(np.array(ids), float(loss.sum()), int(right.sum()), size)
    return found


def _features(predictor: Predictor, examples: Sequence[Example], written: list[list[int]]) -> Tensor:
    """What the model knows before each written token: [P, C]."""
    model, special = predictor.model, predictor.special
    device = model.embed_tokens.weight.device
    if isinstance(model, EncoderDecoder):
        read = [[token for token, mark in zip(*one, strict=True) if not mark] for one in examples]
        if special.bos == special.eos:  # as data.spans.for_encoder has it
            read = [ids[1:] for ids in read]
        sources, places, _, documents = pack(read, device)
        memory = model.encode(sources, places, documents)
        begun, places, _, documents = pack([[special.start, *ids[:-1]] for ids in written], device)
        return model.hidden(begun, places, documents, memory=memory)
    assert isinstance(model, GPT), "no other family writes"
    input_ids, places, _, documents = pack([example.ids for example in examples], device)
    marks = torch.tensor([mark for example in examples for mark in example.marks], device=device)
    return model.hidden(input_ids, places, documents)[marks.nonzero()[:, 0] - 1]


def by_frequency(found: Sequence[Foretold]) -> list[Foretold]:
    """What a model would say that knows of these very tokens how often each is there, and no more.

    No model that predicts all tokens alike is better; one that has counted others' is worse.
    """
    counts = np.bincount(np.concatenate([one.ids for one in found]), minlength=1)
    nats, likeliest = -np.log(np.maximum(counts, 1) / max(counts.sum(), 1)), counts.argmax()
    return [
        one._replace(loss=float(nats[one.ids].sum()), hits=int((one.ids == likeliest).sum())) for one in found
    ]


def score(found: Sequence[Foretold], *names: str) -> Scores:
    """Of perplexity, bits_per_byte, accuracy and loss (nats a token) those named, weighted by tokens."""
    sums = np.array([[one.loss, len(one.ids), one.hits, one.size] for one in found], float)

    def metrics(sums: Sums) -> Mapping[str, float]:
        loss, tokens, hits, size = sums
        mean = ratio(loss, tokens)
        every = {
            "perplexity": math.exp(min(mean, 700.0)),
            "bits_per_byte": ratio(loss / math.log(2), size),
            "accuracy": ratio(hits, tokens),
            "loss": mean,
        }
        return {name: every[name] for name in names}

    return Scores(metrics(sums.sum(0)), sums, metrics)


def both(found: Sequence[Foretold], *names: str) -> tuple[Scores, Scores]:
    """The model's score, and that of the tokens' frequency."""
    return score(found, *names), score(by_frequency(found), *names)
