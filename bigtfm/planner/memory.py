"""How much a model holds, by arithmetic alone: no module is built, torch is not imported."""

from __future__ import annotations

from bigtfm.config.run import ModelSection


def count_parameters(model: ModelSection, vocab_size: int) -> int:
    """All parameters: embeddings with their padding rows, matrices, biases, norms; a tied matrix once."""
    hidden, bias = model.hidden_size, int(model.bias)
    rows = model.padded_vocab_size(vocab_size)
    norm = hidden * (1 + (bias if model.norm == "layernorm" else 0))
    block = sum(out * (in_ + bias) for in_, out in block_matrices(model)) + 2 * norm
    embeddings = rows * hidden * (1 if model.tied_embeddings else 2)
    positions = model.max_seq_len * hidden if model.positions == "learned" else 0
    return embeddings + positions + model.num_layers * block + norm


def block_matrices(model: ModelSection) -> list[tuple[int, int]]:
    """(in, out) features of each matrix of a block: qkv, attention output, up (and gate), down."""
    hidden, width = model.hidden_size, model.num_attention_heads * model.head_size
    up = model.ffn_size * (2 if model.activation == "swiglu" else 1)
    qkv = width + 2 * model.kv_heads * model.head_size
    return [(hidden, qkv), (width, hidden), (hidden, up), (model.ffn_size, hidden)]
