"""All there is to see of one text in one model, as plain values that page, pictures and JSON are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from bigtfm.config.problems import ConfigProblem
from bigtfm.data.special import SpecialIds
from bigtfm.data.tokenizer import Tokenizer
from bigtfm.inspection.capture import Insides, capture
from bigtfm.inspection.judgement import Expected, Gradients, judge
from bigtfm.inspection.measures import logit_lens, norms, rollout
from bigtfm.inspection.reading import Reading
from bigtfm.inspection.words import Words
from bigtfm.model.heads import LanguageModel
from bigtfm.model.transformer import Side

TOP_K = 5  # tokens listed of what was expected
MOST_WEIGHTS = 30_000_000  # in a page


@dataclass(frozen=True)
class Selection:
    """Which blocks and heads are shown, by their numbers from 0; None: all."""

    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Maps:
    """Attention of one kind in one stack; Q queries look at S keys."""

    name: str  # encoder, decoder or cross
    queries: Side
    keys: Side
    layers: tuple[int, ...]  # the n that are shown
    heads: tuple[int, ...]  # the h that are shown
    weights: Tensor  # [n, h, Q, S] fp32
    mean: Tensor  # [n, Q, S]: over all heads of the model
    rollout: Tensor | None  # [n, Q, S]; None of cross-attention


@dataclass(frozen=True)
class Norms:
    """L2 norms in a stack of L blocks over T tokens, as lists."""

    features: list[list[float]]  # L + 1 x T
    neurons: list[list[float]]  # L x T
    gradients: list[list[float]] | None  # L + 1 x T; None: no token could be judged
    parameters: list[float] | None  # L


@dataclass(frozen=True)
class Judged:
    """What the model thought of a token of the text; rank 1: it was the likeliest."""

    loss: float
    rank: int
    expected: list[tuple[str, float]]


@dataclass(frozen=True)
class Report:
    """What `bigtfm inspect` shows."""

    title: str
    facts: dict[str, str]
    family: str
    ids: dict[Side, list[int]]  # what each side reads
    words: dict[Side, list[str]]
    said: list[str]  # words of the judged text: the last side's, and the end that a decoder says
    judged: dict[int, Judged]  # by the place in it
    maps: list[Maps]
    lens: list[
        list[list[tuple[str, float]]]
    ]  # L + 1 x T: (word, probability), best first; [] of a task's head
    norms: dict[Side, Norms]

    @property
    def mean_loss(self) -> float | None:
        """In nats; None: no token could be judged."""
        losses = [one.loss for one in self.judged.values()]
        return sum(losses) / len(losses) if losses else None


def look(
    model: LanguageModel,
    tokenizer: Tokenizer,
    special: SpecialIds,
    reading: Reading,
    selection: Selection,
    title: str,
) -> Report:
    """The report on a model (in evaluation mode) and a text.

    Raises:
        ConfigProblem: a layer or a head that the model does not have, or more weights than a page holds.
        NumericsProblem: a weight is not finite.
    """
    layers, heads = _chosen(model, reading, selection)
    found = capture(model, reading)
    said, gradients = judge(model, reading, special.mask, TOP_K)
    words = Words(tokenizer, special)
    ids: dict[Side, list[int]] = {
        side: list(reading.encoder if side == "encoder" else reading.decoder) for side in found
    }
    last: Side = "decoder" if "decoder" in found else "encoder"
    ending = [reading.labels[-1]] if reading.labels and reading.labels[-1] is not None else []
    named = _Names(words)
    lens = [] if model.task_head is not None else logit_lens(model, found[last].features, TOP_K)
    return Report(
        title=title,
        facts=_facts(model, ids),
        family=model.config.family,
        ids=ids,
        words={side: words.text(tokens) for side, tokens in ids.items()},
        said=words.text([*ids[last], *(token for token in ending if token is not None)]),
        judged={place: Judged(one.loss, one.rank, named(one.expected)) for place, one in said.items()},
        maps=[maps for side, insides in found.items() for maps in _maps(side, insides, layers, heads)],
        lens=[[named(expected) for expected in row] for row in lens],
        norms={side: _norms(insides, gradients.get(side)) for side, insides in found.items()},
    )


class _Names:
    """Words of tokens by themselves, each looked up once."""

    def __init__(self, words: Words) -> None:
        self.words, self.known = words, dict[int, str]()

    def __call__(self, expected: Expected) -> list[tuple[str, float]]:
        return [(self._name(token), probability) for token, probability in expected]

    def _name(self, token: int) -> str:
        if token not in self.known:
            self.known[token] = self.words.alone(token)
        return self.known[token]


def _chosen(
    model: LanguageModel, reading: Reading, selection: Selection
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The layers and heads to show. A stack with fewer layers than the other shows those that it has."""
    config = model.config
    depths = [config.num_layers, *([config.decoder_layers] if config.family == "encoder_decoder" else [])]
    chosen = []
    for name, count, numbers in (
        ("layer", max(depths), selection.layers),
        ("head", config.num_attention_heads, selection.heads),
    ):
        wrong = next((number for number in numbers or () if number >= count), None)
        if wrong is not None:
            fix = f"choose among 0 to {count - 1}"
            raise ConfigProblem(f"the model has no {name} {wrong}", where=f"--{name}s", fix=fix)
        chosen.append(tuple(range(count)) if numbers is None else numbers)
    layers, heads = chosen
    read, written = len(reading.encoder), len(reading.decoder)
    area = read**2 + written**2 + read * written
    weights = area * len(layers) * (len(heads) + 2)
    if weights > MOST_WEIGHTS:
        fix = "choose fewer with --layers and --heads, or a shorter text"
        what = f"{weights:,} attention weights are more than a page can show ({MOST_WEIGHTS:,})"
        raise ConfigProblem(what, where="--text", fix=fix)
    return layers, heads


def _maps(side: Side, insides: Insides, layers: Sequence[int], heads: Sequence[int]) -> list[Maps]:
    """Self-attention and, of a decoder with an encoder, cross-attention; of the chosen layers that it has."""
    kinds: list[tuple[str, Side, list[Tensor], Tensor | None]] = [
        (side, side, insides.self_attention, rollout(insides.self_attention))
    ]
    if insides.cross_attention:
        kinds.append(("cross", "encoder", insides.cross_attention, None))
    made = []
    for name, keys, weights, rolled in kinds:
        shown = [layer for layer in layers if layer < len(weights)]
        if shown:
            maps = torch.stack([weights[layer] for layer in shown]).cpu()
            made.append(
                Maps(
                    name,
                    side,
                    keys,
                    tuple(shown),
                    tuple(heads),
                    maps[:, list(heads)].contiguous(),
                    maps.double().mean(1).float(),
                    None if rolled is None else rolled[shown].float(),
                )
            )
    return made


def _norms(insides: Insides, gradients: Gradients | None) -> Norms:
    return Norms(
        norms(insides.features).tolist(),
        norms(insides.neurons).tolist(),
        None if gradients is None else gradients.features.tolist(),
        None if gradients is None else gradients.parameters,
    )


def _facts(model: LanguageModel, ids: dict[Side, list[int]]) -> dict[str, str]:
    config = model.config
    layers = f"{config.num_layers} layers"
    if config.family == "encoder_decoder":
        layers = f"{config.num_layers} + {config.decoder_layers} layers"
    heads = f"{config.num_attention_heads} heads"
    if config.kv_heads != config.num_attention_heads:
        heads += f" on {config.kv_heads} key/value heads"
    window = f", window {config.window}" if config.window else ""
    head = {} if model.task_head is None else {"head": f"{model.objective.kind}, which says no tokens"}
    return {
        "model": f"{config.family}: {layers}, {config.hidden_size} features, {heads}",
        "positions": f"{config.positions}{window}",
        "text": ", ".join(f"{len(tokens)} tokens of the {side}" for side, tokens in ids.items())
        if len(ids) > 1
        else f"{len(next(iter(ids.values())))} tokens",
        **head,
    }


def to_json(report: Report) -> dict[str, Any]:
    """Everything but the maps, whose place is a file of tensors."""
    return {
        "run": report.title,
        "family": report.family,
        "mean_loss": report.mean_loss,
        "texts": {side: {"ids": tokens, "words": report.words[side]} for side, tokens in report.ids.items()},
        "said": report.said,
        "judged": {str(place): asdict(one) for place, one in report.judged.items()},
        "attention": [
            {
                "name": maps.name,
                "queries": maps.queries,
                "keys": maps.keys,
                "layers": maps.layers,
                "heads": maps.heads,
                "shape": list(maps.weights.shape),
            }
            for maps in report.maps
        ],
        "logit_lens": report.lens,
        "norms": {side: vars(one) for side, one in report.norms.items()},
    }


def tensors(report: Report) -> dict[str, Tensor]:
    """The maps by their names, as they go to maps.safetensors: fp32, exact."""
    found: dict[str, Tensor] = {}
    for maps in report.maps:
        found[f"{maps.name}.weights"] = maps.weights
        found[f"{maps.name}.mean"] = maps.mean
        if maps.rollout is not None:
            found[f"{maps.name}.rollout"] = maps.rollout
    return found
