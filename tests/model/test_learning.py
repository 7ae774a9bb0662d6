"""The encoder-decoder learns to copy and to reverse."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bigtfm.config.sections import ModelSection
from bigtfm.generation.sampling import generate
from bigtfm.model.families import make_model
from bigtfm.model.transformer import init_weights

COPY, REVERSE, START, END, SYMBOLS = 0, 1, 2, 3, 12  # ids 4 .. 15 are what is copied
LONGEST = 8


def sequences(count: int, generator: torch.Generator) -> list[tuple[list[int], list[int]]]:
    """(task, symbols) and what is to be written."""
    pairs = []
    for _ in range(count):
        length = int(torch.randint(2, LONGEST + 1, (1,), generator=generator))
        symbols = (torch.randint(SYMBOLS, (length,), generator=generator) + 4).tolist()
        task = int(torch.randint(2, (1,), generator=generator))
        pairs.append(([task, *symbols], symbols if task == COPY else symbols[::-1]))
    return pairs


def packed(side: str, documents: list[list[int]]) -> dict[str, object]:
    lengths = [len(document) for document in documents]
    return {
        f"{side}input_ids": torch.tensor([token for document in documents for token in document]),
        f"{side}position_ids": torch.cat([torch.arange(length) for length in lengths]),
        f"{side}cu_seqlens": F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(torch.int32),
        f"{side}seq_lens": tuple(lengths),
    }


@pytest.mark.slow
def test_copies_and_reverses() -> None:
    """99 % of new sequences come out whole, written greedily; the original post-norm Transformer."""
    config = ModelSection(
        family="encoder_decoder",
        hidden_size=64,
        num_layers=2,
        num_attention_heads=4,
        ffn_hidden_size=128,
        max_seq_len=16,
        positions="sinusoidal",
        norm="layernorm",
        activation="relu",
        bias=True,
        init_std=0.1,
        vocab_multiple=1,
        decoder_start_id=START,
    )
    model = make_model(config, SYMBOLS + 4)
    init_weights(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0, betas=(0.9, 0.98))
    steps, generator = 300, torch.Generator().manual_seed(0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 50, 4 * (steps - step) / steps)
        pairs = sequences(64, generator)
        inputs = packed("", [source for source, _ in pairs])
        inputs |= packed("decoder_", [[START, *target] for _, target in pairs])
        labels = torch.tensor([token for _, target in pairs for token in [*target, END]])
        loss_sum, count = model(labels=labels, **inputs)
        optimizer.zero_grad()
        (loss_sum / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    pairs = sequences(400, torch.Generator().manual_seed(1))
    answers = generate(
        model, [source for source, _ in pairs], max_new_tokens=LONGEST + 1, temperature=0, eos_id=END
    )
    right = sum(answer == target for answer, (_, target) in zip(answers, pairs, strict=True))
    assert right >= 0.99 * len(pairs), (right, loss_sum.item() / int(count))
