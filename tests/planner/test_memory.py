"""Memory by arithmetic: against tensors of real models, and against numbers computed by hand."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import small_models
import torch
from gpt2 import GPT2, ON_H100

from bigtfm.bench.memory import LiveBytes
from bigtfm.config.sections import TuneSection
from bigtfm.model.lora import add_adapters
from bigtfm.model.transformer import init_weights
from bigtfm.planner.activations import Batch, Shapes, loss_bytes, segments
from bigtfm.planner.memory import plan_memory
from bigtfm.planner.parameters import checkpoint_bytes, parameters_of


@pytest.mark.parametrize("kind", small_models.KINDS)
def test_parameters_are_the_built_model_s(kind: str) -> None:
    model = small_models.make(kind)
    built = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    assert [tuple(parameter) for parameter in parameters_of(model.config, small_models.VOCAB)] == built


def kept_in_a_forward(
    kind: str, dtype: torch.dtype, loss: str, recompute: str | int, tune: TuneSection
) -> tuple[float, int]:
    """Bytes that a forward of 4 x 128 tokens keeps, planned and measured."""
    shape = {"hidden_size": 96, "num_attention_heads": 4, "num_layers": 4, "max_seq_len": 128}
    model = small_models.make(kind, recompute=recompute, loss=loss, **shape)
    if tune.lora_rank:
        add_adapters(model, tune)
        init_weights(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(tune.learns(name))
    model.train().to(dtype)
    config, tokens = model.config, 4 * 128
    inputs = small_models.batch(model, [128] * 4, written=[128] * 4)
    sorted_out = config.family == "bert" or loss == "chunked"
    labelled = int((inputs["labels"] != -100).sum()) if sorted_out else tokens
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    counter = LiveBytes((small_models.VOCAB,))
    with counter:
        kept = model(**inputs)
    measured = sum(born.nbytes for key, born in counter.live.items() if key not in weights)
    del kept
    shapes = Shapes(config, small_models.VOCAB, dtype.itemsize, True, True, recompute, loss=loss, tune=tune)
    batch = Batch(tokens, tokens if config.family == "encoder_decoder" else 0, labelled, 128, runs=1)
    return sum(segment.kept for segment in segments(shapes, batch)) + loss_bytes(shapes, batch)[0], measured


@pytest.mark.parametrize(
    ("dtype", "loss"), [(torch.float32, "chunked"), (torch.bfloat16, "whole"), (torch.bfloat16, "chunked")]
)
@pytest.mark.parametrize("recompute", ["none", "full", "selective", 2])
@pytest.mark.parametrize("kind", small_models.KINDS)
def test_what_a_forward_keeps(kind: str, recompute: str | int, dtype: torch.dtype, loss: str) -> None:
    planned, measured = kept_in_a_forward(kind, dtype, loss, recompute, TuneSection())
    assert planned == pytest.approx(measured, rel=0.025)


@pytest.mark.parametrize("recompute", ["none", "full", "selective", 2])
@pytest.mark.parametrize(
    ("dtype", "loss", "on"), [(torch.float32, "chunked", "attention"), (torch.bfloat16, "whole", "all")]
)
@pytest.mark.parametrize("kind", small_models.KINDS)
def test_what_a_forward_keeps_for_adapters(
    kind: str, dtype: torch.dtype, loss: str, on: str, recompute: str | int
) -> None:
    tune = TuneSection(lora_rank=8, lora_on=on)
    planned, measured = kept_in_a_forward(kind, dtype, loss, recompute, tune)
    assert planned == pytest.approx(measured, rel=0.03)


def test_a_block_is_the_paper_s_34_bytes() -> None:
    """Korthikanti et al. 2022, table 2, without the attention scores, which flash attention does not keep.

    11 sbh of attention, 19 of the feed-forward layer and 4 of two norms, dropout's masks among them.
    """
    shapes = Shapes(
        GPT2.model_copy(update={"dropout": 0.1}),
        50257,
        2,
        on_cpu=False,
        groups_by_length=False,
        recompute="none",
    )
    batch = Batch(tokens=1024, read=0, labelled=1024, longest=1024, runs=2)
    block = segments(shapes, batch)[1]
    statistics = 2 * 8 * 1024 + 4 * 12 * 1024  # of two norms; log-sum-exp of 12 heads
    assert block.whole == 34 * 1024 * 768 + statistics


def test_model_states_by_hand() -> None:
    """Rajbhandari et al. 2020, figure 1: 2 + 2 + 12 bytes, of which the stages divide more and more by 8."""
    count = 124_439_808
    plans = [
        plan_memory(replace(ON_H100, zero={"stage": stage, "reduce_bucket_size": 1})) for stage in range(4)
    ]
    assert [round(plan.weights / count, 2) for plan in plans] == [2, 2, 2, 0.25]
    assert [round(plan.optimizer / count, 2) for plan in plans] == [12, 1.5, 1.5, 1.5]
    assert plans[0].states == 16 * count


@pytest.mark.parametrize("on", ["attention", "all"])
def test_states_of_adapters_by_hand(on: str) -> None:
    """Rank 8 on 12 blocks: 2 bytes of a frozen weight, whole below stage 3; 2 + 2 + 12 of a trained one."""
    count, blocks, hidden = 124_439_808, 12, 768
    attention = 8 * (hidden + 3 * hidden) + 8 * (hidden + hidden)
    mlp = 2 * 8 * (hidden + 4 * hidden)
    trained = blocks * (attention + (mlp if on == "all" else 0))
    assert trained == (1_179_648 if on == "all" else 442_368)
    tune = TuneSection(lora_rank=8, lora_on=on)
    plans = [
        plan_memory(replace(ON_H100, tune=tune, zero={"stage": stage, "reduce_bucket_size": 1}))
        for stage in range(4)
    ]
    assert plans[0].states == 2 * count + 16 * trained
    assert [plan.weights for plan in plans] == [2 * (count + trained)] * 3 + [(count + trained) // 4]
    assert [plan.optimizer for plan in plans] == [12 * trained] + [12 * trained // 8] * 3
    whole = plan_memory(replace(ON_H100, zero={"stage": 0, "reduce_bucket_size": 1}))
    assert plans[0].states < whole.states / 6


def test_loss_by_hand() -> None:
    """GPT-2's logits of 8 x 1024 tokens: three fp32 tensors of 8192 x 50257, the most of all."""
    plan = plan_memory(replace(ON_H100, loss="whole"))
    assert plan.logits == 3 * 4 * 8192 * 50257
    assert plan.moment == "loss"
    assert plan.peak == plan.weights + plan.optimizer + plan.activations + plan.logits
    compiled = plan_memory(ON_H100)  # what auto chooses on a GPU: bf16 logits, and their gradient
    assert compiled.peak < plan.peak - 7 * 8192 * 50257
    kept, most = loss_bytes(ON_H100.shapes, ON_H100.batch)
    assert (kept, most) == (2 * 8192 * 50257 + 8 * 8192, 4 * 8192 * 50257 + 8 * 8192)


def test_categories_sum_to_the_peak() -> None:
    stages, recomputed = range(4), ("none", "full", "selective", 3)
    for stage, recompute, accumulation in itertools.product(stages, recomputed, (1, 4)):
        changes = {"zero": {"stage": stage}, "recompute": recompute, "accumulation": accumulation}
        plan = plan_memory(replace(ON_H100, **changes))
        names = ("weights", "gradients", "optimizer", "buckets", "activations", "logits", "working")
        assert sum(getattr(plan, name) for name in names) == plan.peak, changes


def test_a_checkpoint() -> None:
    assert checkpoint_bytes(1000, "AdamW") == 12_000
    assert checkpoint_bytes(1000, "SGD") == 8_000
    assert checkpoint_bytes(1000, "AdamW", trained=10) == 4 * (1000 + 2 * 10)
