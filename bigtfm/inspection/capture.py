"""What happens inside a model while it reads: attention weights, the residual stream, neurons.

L blocks of a stack, H query heads, T tokens (S of the text that cross-attention looks at), C features, F
neurons (the width of the feed-forward layer).

Attention weights come from the model's own code, out of the door that every backend stands behind (see
`bigtfm.model.attention`); the rest from torch's hooks on the blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from bigtfm.generation.decoding import inference, pack
from bigtfm.inspection.reading import Reading
from bigtfm.model.bert import BERT
from bigtfm.model.encoder_decoder import EncoderDecoder
from bigtfm.model.gpt import GPT
from bigtfm.model.heads import LanguageModel
from bigtfm.model.transformer import AttentionMaps, Block, Side, Stack


@dataclass(frozen=True)
class Insides:
    """What happened inside a stack."""

    self_attention: list[Tensor]  # L x [H, T, T]
    cross_attention: list[Tensor]  # L x [H, T, S]; of a decoder that has an encoder
    features: list[Tensor]  # L + 1 x [T, C]: the residual stream before the first block and behind each
    neurons: list[Tensor]  # L x [T, F]: behind the activation, and the gate where there is one


@dataclass(frozen=True)
class Watched:
    """What a stack's blocks get and give, forward by forward; see Insides."""

    features: list[Tensor] = field(default_factory=list)
    neurons: list[Tensor] = field(default_factory=list)


def stacks(model: LanguageModel) -> dict[Side, Stack]:
    """The stacks of a family's module."""
    if isinstance(model, GPT):
        return {"decoder": model.decoder}
    if isinstance(model, BERT):
        return {"encoder": model.encoder}
    assert isinstance(model, EncoderDecoder)
    return {"encoder": model.encoder, "decoder": model.decoder}


@contextmanager
def watch(model: LanguageModel) -> Iterator[dict[Side, Watched]]:
    """Notes what the blocks of its stacks get and give; features keep their gradient where they get one."""
    seen = {side: Watched() for side in stacks(model)}
    handles = []
    for side, stack in stacks(model).items():
        for block in stack.layers:
            assert isinstance(block, Block)
            handles.append(block.register_forward_pre_hook(partial(_note_input, seen[side].features)))
            handles.append(block.mlp.down.register_forward_pre_hook(partial(_note_input, seen[side].neurons)))
        handles.append(stack.layers[-1].register_forward_hook(partial(_note_output, seen[side].features)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _note_input(seen: list[Tensor], module: nn.Module, inputs: tuple[Any, ...]) -> None:
    if inputs[0].requires_grad:
        inputs[0].retain_grad()
    seen.append(inputs[0])


def _note_output(seen: list[Tensor], module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
    _note_input(seen, module, (output,))


def forward(model: LanguageModel, reading: Reading, maps: dict[Side, AttentionMaps] | None = None) -> Tensor:
    """Features [T, C] behind the last block (and norm) of its last stack; maps take in attention weights."""
    device, maps = model.embed_tokens.weight.device, maps or {}
    packed = {"encoder": reading.encoder, "decoder": reading.decoder}
    sides = {side: pack([ids], device) for side, ids in packed.items() if ids}
    if isinstance(model, EncoderDecoder):
        ids, places, _, documents = sides["encoder"]
        memory = model.encode(ids, places, documents, maps=maps.get("encoder"))
        ids, places, _, documents = sides["decoder"]
        return model.hidden(ids, places, documents, memory=memory, maps=maps.get("decoder"))
    ((side, _),) = stacks(model).items()
    ids, places, _, documents = sides[side]
    assert isinstance(model, GPT | BERT)
    return model.hidden(ids, places, documents, maps=maps.get(side))


def capture(model: LanguageModel, reading: Reading) -> dict[Side, Insides]:
    """What happens in each of its stacks, in evaluation mode.

    Raises:
        NumericsProblem: a weight is not finite.
    """
    maps = {side: AttentionMaps() for side in stacks(model)}
    with inference(model), watch(model) as seen:
        forward(model, reading, maps)
    return {
        side: Insides(
            [weights[0] for weights in maps[side].self_attention],
            [weights[0] for weights in maps[side].cross_attention],
            watched.features,
            watched.neurons,
        )
        for side, watched in seen.items()
    }
