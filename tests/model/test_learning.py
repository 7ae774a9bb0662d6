"""The encoder-decoder learns to copy and to reverse; adapters learn as well as all weights do."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bigtfm.config.sections import ModelSection, ObjectiveSection, TuneSection
from bigtfm.generation.sampling import generate
from bigtfm.model.families import make_model
from bigtfm.model.heads import LanguageModel
from bigtfm.model.lora import add_adapters
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


CLASSES = ModelSection(
    family="bert", hidden_size=32, num_layers=2, num_attention_heads=2, max_seq_len=8, dropout=0, num_labels=2
)
TOKENS, TEXTS = 24, 32


def ordered(pair: tuple[int, int], generator: torch.Generator) -> tuple[dict[str, object], torch.Tensor]:
    """Texts of 8 tokens, of class 1 where the first of the pair stands before the second; the classes [N]."""
    ids = torch.randint(8, TOKENS, (TEXTS, 8), generator=generator)
    classes = torch.randint(2, (TEXTS,), generator=generator)
    places = torch.rand(TEXTS, 6, generator=generator).argsort(1)[:, :2].sort(1).values + 1
    ids.scatter_(1, places, torch.where(classes[:, None] == 1, torch.tensor(pair), torch.tensor(pair[::-1])))
    ids[:, 0], ids[:, -1] = 0, 1  # BOS, EOS
    labels = torch.full_like(ids, -100)
    labels[:, 0] = classes
    return packed("", ids.tolist()) | {"labels": labels.flatten()}, classes


def tuned(tune: TuneSection, pair: tuple[int, int], lr: float, steps: int, start: LanguageModel | None):
    model = make_model(CLASSES, TOKENS, objective=ObjectiveSection(kind="classification"))
    add_adapters(model, tune)
    init_weights(model)
    if start is not None:
        model.load_state_dict(start.state_dict(), strict=False)
    trained = [p.requires_grad_(tune.learns(name)) for name, p in model.named_parameters()]
    optimizer = torch.optim.AdamW([p for p in trained if p.requires_grad], lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1, (n + 1) / 50) * (1 - n / steps))
    generator = torch.Generator().manual_seed(steps)
    for _ in range(steps):
        loss, count = model(**ordered(pair, generator)[0])
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model


@torch.no_grad()
def loss_of(model: LanguageModel, pair: tuple[int, int]) -> float:
    """Mean over texts, in nats: ln 2 = 0.69 for who knows nothing."""
    generator = torch.Generator().manual_seed(99)
    return sum(float(model(**ordered(pair, generator)[0])[0]) for _ in range(4)) / 4 / TEXTS


@pytest.mark.slow
def test_adapters_learn_what_the_head_alone_can_not() -> None:
    """The order of two tokens, from a model that knows the order of two others: attention has to change."""
    base = tuned(TuneSection(), (5, 6), 3e-3, 300, None)
    assert loss_of(base, (5, 6)) < 0.1
    assert loss_of(base, (3, 4)) > 0.5
    found = {
        name: loss_of(tuned(tune, (3, 4), lr, 200, base), (3, 4))
        for name, tune, lr in (
            ("all", TuneSection(), 3e-3),
            ("adapters", TuneSection(lora_rank=4), 1e-2),
            ("head", TuneSection(train="head"), 1e-2),
        )
    }
    assert found["all"] < 0.1
    assert found["adapters"] < 0.1
    assert found["head"] > 0.5, "the control"
