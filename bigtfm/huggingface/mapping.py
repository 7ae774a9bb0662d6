"""Between our parameters and a Hugging Face checkpoint's tensors: one table per architecture, used both ways.

The tables stand in architectures.py, the files are read in files.py. transformers is not imported.

K key/value heads, D head size, V tokens of the checkpoint, Vp rows of our padded vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bigtfm.config.sections import ModelSection, Objective, ObjectiveSection
from bigtfm.model.families import make_model

Shape = tuple[int, ...]
Config = dict[str, Any]  # of a config.json
VOCABULARY = ("embed_tokens.weight", "lm_head.weight", "lm_head.bias")  # ours, padded from V to Vp rows
_ROW = "final_logits_bias"  # BART's and Marian's: [1, V] where ours is [Vp]


@dataclass(frozen=True)
class Key:
    """A key of config.json that says what one of our fields does."""

    name: str
    default: Any = ...  # where config.json leaves it out; ...: it must be there
    names: Mapping[str, str] | None = None  # their value -> ours, where these differ


@dataclass(frozen=True)
class Head:
    """A class of `transformers` whose head computes what a task's head of ours does.

    folded: our parameter that takes the bias of our classes, where theirs have none. W (x + d) = W x + b for
    d = pinv(W) b, and a norm's bias is added to what the classes read.
    """

    name: str
    tensors: Mapping[str, str]  # our module -> theirs
    folded: str = ""


@dataclass(frozen=True)
class Architecture:
    """One model type of `transformers`: its tensors by our names, and its config by our fields."""

    model_type: str
    classes: tuple[str, ...]  # imported; the first has the output layer (and is exported), the second has not
    prefix: str  # what the names in a checkpoint of the bare model lack
    tensors: Mapping[str, tuple[str, ...]]  # our module or parameter -> theirs; several are its rows
    keys: Mapping[str, Key]  # our field -> their key
    fixed: Mapping[str, Any]  # our fields that no key decides
    objective: Objective | None = None  # what it was trained on, where that is not its family's first
    heads: Mapping[str, Head | str] = field(default_factory=dict)  # of an objective; or why there is none
    required: Mapping[str, Any] = field(default_factory=dict)  # their key -> the only value that we can do
    read: Callable[[Config, Collection[str]], Config] = lambda config, tensors: {}  # what no table can say
    write: Callable[[ModelSection, Config], Config] = lambda section, config: {}
    zeros: Callable[[Config], str] = lambda config: ""  # pattern: biases of ours that the config leaves out
    position_offset: Callable[[Config], int] = lambda config: 0  # rows of theirs before position 0
    transposed: bool = False  # the blocks' matrices are [in, out]
    aliases: Mapping[str, str] = field(default_factory=dict)  # their tensor -> the one that it repeats
    ignored: str = r"position_ids$|rotary_emb\.inv_freq$"  # buffers that follow from the config
    sinusoids: str = ""  # buffers that must be our position encodings
    dropped: str = ""  # tensors that we may have no place for, and that no logit depends on

    def their_names(self, name: str) -> list[str]:
        """The tensors that our parameter `name` consists of."""
        number = re.search(r"\.layers\.(\d+)\.", name)
        pattern = name.replace(number[0], ".layers.{i}.", 1) if number else name
        module, _, kind = pattern.rpartition(".")
        names = self.tensors.get(pattern) or [f"{theirs}.{kind}" for theirs in self.tensors[module]]
        return [theirs.replace("{i}", number[1]) if number else theirs for theirs in names]


@dataclass(frozen=True)
class Conversion:
    """Between the parameters of one model and the tensors of its Hugging Face checkpoint, both ways."""

    architecture: Architecture
    section: ModelSection
    vocab_size: int  # V
    our_vocab_size: int
    position_offset: int = 0

    def stored(self, name: str, shape: Shape) -> dict[str, Shape]:
        """Names and shapes of the tensors that our parameter `name` of `shape` consists of."""
        theirs = self.architecture.their_names(name)
        rows = self._their_rows(name, shape[0])
        shapes: list[Shape] = [(part, *shape[1:]) for part in self._parts(rows, len(theirs))]
        if self._transposed(name, shape):
            shapes = [shape[::-1] for shape in shapes]
        return dict(zip(theirs, [(1, rows)] if theirs == [_ROW] else shapes, strict=True))

    def to_ours(self, name: str, shape: Shape, theirs: Sequence[Tensor]) -> Tensor:
        """Our parameter, fp32, from its tensors. A vocabulary is cut, or extended by the mean of its rows."""
        turned = self._transposed(name, shape)
        ours = torch.cat([part.t() if turned else part for part in theirs]).float()
        if name in VOCABULARY:
            ours = ours.view(self.vocab_size, *shape[1:])
            return _resized(ours, self.our_vocab_size, shape[0])
        return ours[self.position_offset :] if name.endswith("embed_positions.weight") else ours

    def to_theirs(self, name: str, ours: Tensor) -> dict[str, Tensor]:
        """Their tensors of our parameter; rows before position 0 are zero."""
        shape = tuple(ours.shape)
        shapes, rows = self.stored(name, shape), self._their_rows(name, shape[0])
        if name.endswith("embed_positions.weight"):
            ours = torch.cat([ours.new_zeros(self.position_offset, *shape[1:]), ours])
        parts = ours[:rows].split(self._parts(rows, len(shapes)))
        turned = self._transposed(name, shape)
        return {
            theirs: (part.t() if turned else part).reshape(shapes[theirs])
            for theirs, part in zip(shapes, parts, strict=True)
        }

    def _their_rows(self, name: str, rows: int) -> int:
        if name in VOCABULARY:
            return self.vocab_size
        return rows + self.position_offset if name.endswith("embed_positions.weight") else rows

    def _parts(self, rows: int, count: int) -> list[int]:
        """Rows of each of `count` tensors: queries, keys and values; or equal ones."""
        if count == 3:
            keys = self.section.kv_heads * self.section.head_size
            return [rows - 2 * keys, keys, keys]
        return [rows // count] * count

    def _transposed(self, name: str, shape: Shape) -> bool:
        return self.architecture.transposed and len(shape) == 2 and ".layers." in name


def _resized(ours: Tensor, tokens: int, rows: int) -> Tensor:
    """[V, ...] -> [rows, ...]: the first `tokens`, new ones the mean of all, zeros behind."""
    out = ours.new_zeros(rows, *ours.shape[1:])
    known = min(len(ours), tokens)
    out[:known] = ours[:known]
    if tokens > known:
        out[known:tokens] = ours.mean(0)
    return out


def parameter_shapes(
    section: ModelSection, vocab_size: int, objective: ObjectiveSection | None = None
) -> dict[str, Shape]:
    """Our parameters' names and shapes, in order; nothing is allocated. objective: which head."""
    with torch.device("meta"):
        model = make_model(section, vocab_size, objective=objective)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
