"""Heads of tasks: losses against torch, document by document; models with one in the output layer's place."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bigtfm.config.marks import BEGINS, ENDS, IGNORE, SELECTABLE
from bigtfm.config.sections import ModelSection, ObjectiveSection
from bigtfm.model.attention import Documents
from bigtfm.model.families import make_model
from bigtfm.model.task_heads import LabelHead, SpanHead
from bigtfm.model.transformer import init_weights
from bigtfm.planner.parameters import parameters_of

SMALL = {"hidden_size": 16, "num_layers": 2, "num_attention_heads": 2, "max_seq_len": 32}
LENGTHS = (5, 1, 9, 4)


def documents_of(lengths: tuple[int, ...]) -> Documents:
    return Documents(torch.tensor([0, *lengths]).cumsum(0).int(), lengths)


def span_case(seed: int = 0) -> tuple[SpanHead, torch.Tensor, torch.Tensor]:
    """The first document has two answers, the second nothing to select, the fourth no answer."""
    torch.manual_seed(seed)
    head = SpanHead(ModelSection(**SMALL))
    torch.nn.init.normal_(head.borders.weight)
    torch.nn.init.normal_(head.borders.bias)
    x = torch.randn(sum(LENGTHS), 16, requires_grad=True)
    s = SELECTABLE
    first = [0, s | BEGINS, s | ENDS, s | BEGINS | ENDS, 0]
    third = [0, 0, s, s, s | BEGINS, s, s | ENDS, s, 0]
    return head, x, torch.tensor([*first, 0, *third, s, s, s, 0])


def test_an_answers_loss_is_the_mean_of_both_borders() -> None:
    head, x, marks = span_case()
    loss, count = head.loss(x, marks, documents_of(LENGTHS), 0.0)
    expected = []
    for features, bits in zip(x.split(LENGTHS), marks.split(LENGTHS), strict=True):
        if (bits & BEGINS).any():
            scores = F.linear(features, head.borders.weight, head.borders.bias)
            allowed = (bits & SELECTABLE) > 0
            for column, bit in enumerate((BEGINS, ENDS)):
                p = scores[allowed, column].softmax(0)
                expected.append(-p[(bits[allowed] & bit) > 0].sum().log() / 2)
    assert int(count) == 2
    torch.testing.assert_close(loss, torch.stack(expected).sum())
    [got] = torch.autograd.grad(loss, x, retain_graph=True)
    [want] = torch.autograd.grad(torch.stack(expected).sum(), x)
    torch.testing.assert_close(got, want)
    assert torch.isfinite(got).all(), "documents without an answer give no NaN"


def test_without_any_answer_the_loss_is_zero_with_finite_gradients() -> None:
    head, x, marks = span_case()
    loss, count = head.loss(x, marks & SELECTABLE, documents_of(LENGTHS), 0.0)
    assert (loss.item(), int(count)) == (0.0, 0)
    [gradient] = torch.autograd.grad(loss, x)
    assert not gradient.any()


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_labels_loss_is_torchs(pooled: bool, smoothing: float) -> None:
    torch.manual_seed(1)
    head = LabelHead(ModelSection(**SMALL), 3, pooled)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    x, labels = torch.randn(6, 16), torch.tensor([0, IGNORE, 2, IGNORE, IGNORE, 1])
    loss, count = head.loss(x, labels, documents_of((6,)), smoothing)
    every = F.cross_entropy(head(x), labels, reduction="sum", label_smoothing=smoothing)
    torch.testing.assert_close(loss, every)
    assert int(count) == 3


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("bert", "classification"), ("bert", "tagging"), ("bert", "question_answering"),
        ("gpt", "classification"), ("gpt", "tagging"), ("gpt", "completion"),
        ("encoder_decoder", "sequence_to_sequence"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("tied", [True, False])
def test_the_planner_knows_the_parameters_and_every_one_learns(family: str, kind: str, tied: bool) -> None:
    labels = {"num_labels": 3} if kind in ("classification", "tagging") else {}
    config = ModelSection(**SMALL, family=family, tied_embeddings=tied, **labels)  # type: ignore[arg-type]
    model = make_model(config, 40, objective=ObjectiveSection(kind=kind))  # type: ignore[arg-type]
    init_weights(model)
    planned = [(p.name, p.shape) for p in parameters_of(config, 40, kind)]
    assert sorted(planned) == sorted((name, tuple(p.shape)) for name, p in model.named_parameters())
    inputs = {
        "input_ids": torch.arange(6) % 40, "position_ids": torch.arange(6),
        "cu_seqlens": torch.tensor([0, 6], dtype=torch.int32), "seq_lens": (6,),
    }  # fmt: skip
    labels = torch.tensor([0, 1, 2, 1, 0, 2])
    if kind == "question_answering":
        labels = torch.tensor([0, 1, 3, 5, 1, 0])
    if family == "encoder_decoder":
        inputs |= {
            "decoder_input_ids": torch.arange(6) % 40, "decoder_position_ids": torch.arange(6),
            "decoder_cu_seqlens": torch.tensor([0, 6], dtype=torch.int32), "decoder_seq_lens": (6,),
        }  # fmt: skip
    loss, _ = model(**inputs, labels=labels)
    loss.backward()
    idle = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not idle, "an optimizer would decay them"
