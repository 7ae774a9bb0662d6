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


def activation_bytes(model: ModelSection, tokens: int, value_bytes: int, recompute: str | int) -> int:
    """About what a forward pass of so many tokens keeps for the backward pass, without the logits.

    A matrix keeps its input, what follows it its output; attention's scores are not kept (flash attention).
    Korthikanti et al. 2022, "Reducing Activation Recomputation", count the same: 34 bytes x hidden size a
    token and block in 16 bits.
    """
    matrices, hidden = block_matrices(model), model.hidden_size
    outputs = sum(matrix.out for matrix in matrices)
    block = outputs + sum(matrix.in_ for matrix in matrices) + 2 * hidden
    layers = model.num_layers + (model.decoder_layers if model.family == "encoder_decoder" else 0)
    if recompute == "none":
        return tokens * value_bytes * layers * block
    recomputed = layers if isinstance(recompute, str) else -(-layers // recompute)
    each = hidden + (outputs if recompute == "selective" else 0)  # its input; one at a time is whole again
    return tokens * value_bytes * (recomputed * each + (layers - recomputed) * block + block)


def logit_bytes(vocab_size: int, tokens: int, value_bytes: int) -> int:
    """What the loss takes: fp32 logits, their log-probabilities and gradient; in 16 bits, two copies more."""
    return tokens * vocab_size * (12 + (4 if value_bytes == 2 else 0))


MOMENTS = {"SGD": 1, "Lion": 1, "Adagrad": 1}  # fp32 values a parameter that an optimizer keeps; others: 2


def checkpoint_bytes(parameters: int, optimizer: str) -> int:
    """At most what the tensors of a checkpoint take: fp32 weights and moments."""
    return 4 * parameters * (1 + MOMENTS.get(optimizer, 2))
