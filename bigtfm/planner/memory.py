"""How much a model holds, by arithmetic alone: no module is built, torch is not imported."""

from __future__ import annotations

from typing import NamedTuple

from bigtfm.config.sections import ModelSection


class Matrix(NamedTuple):
    """A linear layer: features in, features out, whether it has a bias."""

    in_: int
    out: int
    bias: bool

    @property
    def parameters(self) -> int:
        return self.out * (self.in_ + self.bias)


def count_parameters(model: ModelSection, vocab_size: int) -> int:
    """All parameters: embeddings with their padding rows, matrices, biases, norms; a tied matrix once."""
    hidden, rows = model.hidden_size, model.padded_vocab_size(vocab_size)
    total = rows * hidden * (1 if model.tied_embeddings else 2) + rows * model.head_bias
    if model.family == "bert":
        total += Matrix(hidden, hidden, model.bias).parameters + _norm(model)
        if model.next_sentence:
            total += Matrix(hidden, hidden, True).parameters + Matrix(hidden, 2, True).parameters
    total += _stack(model, model.num_layers, cross=False)
    if model.family == "encoder_decoder":
        total += _stack(model, model.decoder_layers, cross=True)
    return total


def _stack(model: ModelSection, layers: int, cross: bool) -> int:
    pre, hidden, norm = model.norm_order == "pre", model.hidden_size, _norm(model)
    matrices = block_matrices(model) + (cross_matrices(model) if cross else [])
    block = sum(matrix.parameters for matrix in matrices) + (3 if cross else 2) * norm
    total = layers * block + norm * pre
    if model.embedding_norm and not pre:  # with pre, it replaces the first block's attention norm
        total += norm
    if model.positions == "learned":
        total += model.max_seq_len * hidden
    if model.positions == "relative":
        total += model.relative_buckets * model.num_attention_heads
    return total + model.token_types * hidden


def _norm(model: ModelSection) -> int:
    return model.hidden_size * (1 + (model.bias and model.norm == "layernorm"))


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


def _qkv_bias(model: ModelSection) -> bool:
    return model.bias if model.qkv_bias is None else model.qkv_bias
