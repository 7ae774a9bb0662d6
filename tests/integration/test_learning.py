"""BERT learns real text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from loaders import windows_loader

from bigtfm.config.marks import IGNORE
from bigtfm.config.run import load_run_config
from bigtfm.data.indexed import TokenDataset
from bigtfm.data.objectives import make_objective
from bigtfm.data.prepare import prepare
from bigtfm.data.special import special_ids
from bigtfm.data.tokenizer import load_tokenizer
from bigtfm.model.attention import Documents
from bigtfm.model.families import make_model
from bigtfm.model.transformer import init_weights


@pytest.mark.slow
def test_masked_accuracy_is_three_times_the_unigrams(tmp_path: Path) -> None:
    """On the embedded corpus' held-out speeches, beside always guessing the most frequent token."""
    prepare(["embedded"], tmp_path / "data", vocab_size=512, workers=1, progress=False)
    overrides = ["family=bert", "hidden_size=96", "num_layers=2", "num_attention_heads=4", "max_seq_len=64"]
    run = load_run_config(None, [f"data.path={tmp_path / 'data'}", *overrides])
    dataset = TokenDataset.open(run.data.path)
    special = special_ids(load_tokenizer(dataset.tokenizer_path), run)
    objective = make_objective(run.objective, run.objective_kind, special, run.run.seed)
    train, validation = (
        windows_loader(dataset.split(name), run.seq_len, 1, dataset.vocab_size, objective, shuffle)
        for name, shuffle in (("train", True), ("validation", False))
    )
    model = make_model(run.model, special.vocab_size, seed=run.run.seed)
    init_weights(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.1)
    steps = 400
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 60, 3 * (steps - step) / steps)
        loss_sum, count = model(**train.batch(16 * step, 16).model_inputs())
        optimizer.zero_grad()
        (loss_sum / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    tokens = dataset.split("train").read(0, dataset.split("train").num_tokens)
    counts = np.bincount(tokens, minlength=special.vocab_size)
    counts[special.is_special] = 0  # never hidden
    guessed, frequent, labelled = 0, 0, 0
    model.eval()
    with torch.no_grad():
        for first in range(0, 512, 16):
            batch = validation.batch(first, 16)
            documents = Documents(batch.cu_seqlens, batch.seq_lens)
            hidden = batch.labels != IGNORE
            answers = model.logits(batch.input_ids, batch.position_ids, documents)[hidden].argmax(-1)
            guessed += int((answers == batch.labels[hidden]).sum())
            frequent += int((batch.labels[hidden] == int(counts.argmax())).sum())
            labelled += int(hidden.sum())
    assert labelled > 4000
    assert frequent > 50
    assert guessed > 3 * frequent, (guessed, frequent, labelled)
