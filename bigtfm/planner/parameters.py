"""The parameters of a model by arithmetic alone: names and shapes, in the order of the built modules."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from bigtfm.config.sections import LABELLED, ModelSection, TuneSection


class Matrix(NamedTuple):
    """A linear layer: features in, features out, whether it has a bias."""

    in_: int
    out: int
    bias: bool


class Parameter(NamedTuple):
    """A weight: its name as `named_parameters` gives it, and its shape."""

    name: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def parameters_of(
    model: ModelSection, vocab_size: int, kind: str | None = None, tune: TuneSection | None = None
) -> list[Parameter]:
    """All parameters in the order of `named_parameters`; embeddings with their padding, a tied one once.

    kind: of the objective; None: one of the family's that predict tokens. tune: with its adapters.
    """
    found = _parameters(model, vocab_size, kind)
    return found if tune is None or not tune.lora_rank else list(with_adapters(found, tune))


def with_adapters(parameters: list[Parameter], tune: TuneSection) -> Iterator[Parameter]:
    """Behind a matrix of a block and its bias, those of its adapter."""
    for parameter, following in zip(parameters, [*parameters, None][1:], strict=True):
        path, _, kind = parameter.name.rpartition(".")
        if kind == "weight":
            shape = parameter.shape
        yield parameter
        matrix = ".layers." in path and len(shape) == 2 and tune.adapts(path)
        if matrix and not (following is not None and following.name == f"{path}.bias"):
            yield Parameter(f"{path}.lora_a", (tune.lora_rank, shape[1]))
            yield Parameter(f"{path}.lora_b", (shape[0], tune.lora_rank))


def _parameters(model: ModelSection, vocab_size: int, kind: str | None) -> list[Parameter]:
    hidden, rows = model.hidden_size, model.padded_vocab_size(vocab_size)
    found = [Parameter("embed_tokens.weight", (rows, hidden))]
    head = _task_head(model, kind)
    found += head
    if model.family != "gpt":
        found += _stack(model, "encoder", model.num_layers)
    if model.family != "bert":
        crossed = model.family == "encoder_decoder"
        found += _stack(model, "decoder", model.decoder_layers if crossed else model.num_layers)
    if head:
        return found
    if model.family == "bert":
        found += _linear("mlm_head.dense", Matrix(hidden, hidden, model.bias)) + _norm(model, "mlm_head.norm")
        if model.next_sentence:
            found += _linear("next_sentence.pooler", Matrix(hidden, hidden, True))
            found += _linear("next_sentence.classifier", Matrix(hidden, 2, True))
    if not model.tied_embeddings:
        found += _linear("lm_head", Matrix(hidden, rows, model.head_bias))
    elif model.head_bias:
        found.append(Parameter("lm_head.bias", (rows,)))
    return found


def _task_head(model: ModelSection, kind: str | None) -> list[Parameter]:
    """What classification, tagging and question answering have in the output layer's place."""
    hidden = model.hidden_size
    if kind == "question_answering":
        return _linear("task_head.borders", Matrix(hidden, 2, True))
    if kind not in LABELLED:
        return []
    pooled = kind == "classification" and model.family == "bert"
    pooler = _linear("task_head.pooler", Matrix(hidden, hidden, True)) if pooled else []
    return pooler + _linear("task_head.classifier", Matrix(hidden, model.num_labels or 1, True))


def count_parameters(model: ModelSection, vocab_size: int, kind: str | None = None) -> int:
    """All parameters: embeddings with their padding rows, matrices, biases, norms; a tied matrix once."""
    return sum(parameter.numel for parameter in parameters_of(model, vocab_size, kind))


def block_matrices(model: ModelSection) -> list[Matrix]:
    """The matrices of a block: qkv, attention output, up (and gate), down."""
    hidden, width, bias = model.hidden_size, model.num_attention_heads * model.head_size, model.bias
    up = model.ffn_size * (2 if model.gated else 1)
    qkv = Matrix(hidden, width + 2 * model.kv_heads * model.head_size, _qkv_bias(model))
    return [qkv, Matrix(width, hidden, bias), Matrix(hidden, up, bias), Matrix(model.ffn_size, hidden, bias)]


def cross_matrices(model: ModelSection) -> list[Matrix]:
    """What a decoder's block has besides: queries, keys and values of the memory, attention output."""
    hidden, width, bias = model.hidden_size, model.num_attention_heads * model.head_size, _qkv_bias(model)
    kv = Matrix(hidden, 2 * model.kv_heads * model.head_size, bias)
    return [Matrix(hidden, width, bias), kv, Matrix(width, hidden, model.bias)]


def adapted_matrices(model: ModelSection, tune: TuneSection) -> list[Matrix]:
    """The shapes of the matrices that have an adapter."""
    if not tune.lora_rank:
        return []
    attention, mlp = block_matrices(model)[:2], block_matrices(model)[2:]
    crossed = cross_matrices(model) if model.family == "encoder_decoder" else []
    return attention + crossed + (mlp if tune.lora_on == "all" else [])


def block_parameters(model: ModelSection, side: str, index: int) -> list[Parameter]:
    """Those of block `index` of a stack."""
    prefix, crossed = f"{side}.layers.{index}", model.family == "encoder_decoder" and side == "decoder"
    qkv, out, up, down = block_matrices(model)
    found: list[Parameter] = []
    if not (index == 0 and model.norm_order == "pre" and model.embedding_norm):  # see transformer.Block
        found += _norm(model, f"{prefix}.attention_norm")
    found += _linear(f"{prefix}.attention.qkv", qkv) + _linear(f"{prefix}.attention.out", out)
    if crossed:
        found += _norm(model, f"{prefix}.cross_norm")
        for name, matrix in zip(("q", "kv", "out"), cross_matrices(model), strict=True):
            found += _linear(f"{prefix}.cross_attention.{name}", matrix)
    found += _norm(model, f"{prefix}.mlp_norm")
    found += _linear(f"{prefix}.mlp.{'gate_up' if model.gated else 'up'}", up)
    return found + _linear(f"{prefix}.mlp.down", down)


def _stack(model: ModelSection, side: str, layers: int) -> Iterator[Parameter]:
    hidden = model.hidden_size
    if model.positions == "learned":
        yield Parameter(f"{side}.embed_positions.weight", (model.max_seq_len, hidden))
    if model.token_types:
        yield Parameter(f"{side}.embed_token_types.weight", (model.token_types, hidden))
    if model.embedding_norm:
        yield from _norm(model, f"{side}.embed_norm")
    if model.positions == "relative":
        shape = (model.relative_buckets, model.num_attention_heads)
        yield Parameter(f"{side}.relative_bias.weight", shape)
    for index in range(layers):
        yield from block_parameters(model, side, index)
    if model.norm_order == "pre":
        yield from _norm(model, f"{side}.norm")


def _linear(name: str, matrix: Matrix) -> list[Parameter]:
    weight = Parameter(f"{name}.weight", (matrix.out, matrix.in_))
    return [weight, Parameter(f"{name}.bias", (matrix.out,))] if matrix.bias else [weight]


def _norm(model: ModelSection, name: str) -> list[Parameter]:
    weight = Parameter(f"{name}.weight", (model.hidden_size,))
    biased = model.bias and model.norm == "layernorm"
    return [weight, Parameter(f"{name}.bias", (model.hidden_size,))] if biased else [weight]


def _qkv_bias(model: ModelSection) -> bool:
    return model.bias if model.qkv_bias is None else model.qkv_bias


MOMENTS = {
    "SGD": 1,
    "Lars": 1,
    "Lion": 1,
    "Adagrad": 1,
}  # fp32 values a parameter that an optimizer keeps; others: 2


def checkpoint_bytes(parameters: int, optimizer: str, trained: int | None = None) -> int:
    """At most what the tensors of a checkpoint take: fp32 weights, and moments of the trained; None: all."""
    return 4 * (parameters + MOMENTS.get(optimizer, 2) * (parameters if trained is None else trained))
