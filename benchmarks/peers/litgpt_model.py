"""The model of litgpt (github.com/Lightning-AI/litgpt) from its package, in the bare loop."""

from __future__ import annotations

from pathlib import Path

import torch

from peers import bare
from peers.turns import Turns
from peers.workload import Workload


def run(shape: Workload, folder: Path, turns: Turns) -> None:
    """It has no learned positions: `rotary_percentage=0` leaves them out, which spares it the rotation."""
    from litgpt.model import GPT, Config

    config = Config(
        block_size=shape.seq_len, vocab_size=shape.vocab_size, padded_vocab_size=shape.vocab_size,
        n_layer=shape.num_layers, n_head=shape.num_heads, n_embd=shape.hidden_size, rotary_percentage=0.0,
        parallel_residual=False, bias=True, lm_head_bias=False, norm_class_name="LayerNorm",
        mlp_class_name="GptNeoxMLP", gelu_approximate="tanh", intermediate_size=4 * shape.hidden_size,
    )  # fmt: skip
    torch.manual_seed(0)
    model = GPT(config)
    model.apply(bare.initialise)
    model.lm_head.weight = model.transformer.wte.weight
    bare.train(model, shape, folder, turns)
