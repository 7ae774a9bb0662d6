"""Rollout, logit lens, losses and gradients against what the models themselves and the definitions say."""

from __future__ import annotations

import math

import pytest
import torch
from small_models import KINDS, VOCAB, make
from torch.nn.functional import cross_entropy

from bigtfm.generation.decoding import pack
from bigtfm.inspection.capture import capture, forward, stacks, watch
from bigtfm.inspection.judgement import judge
from bigtfm.inspection.measures import lens_logits, logit_lens, norms, rollout
from bigtfm.inspection.reading import Reading

TEXT, WRITTEN, MASK = (3, 14, 15, 9, 26, 5, 35, 8), (3, 2, 31, 8, 4), 36


def reading_for(model):
    return {
        "gpt": Reading(decoder=TEXT, labels=(*TEXT[1:], None)),
        "bert": Reading(TEXT, hidden=(1, 2, 3, 4, 6)),
        "encoder_decoder": Reading(TEXT, WRITTEN, (*WRITTEN[1:], 1)),
    }[model.config.family]


def inputs_for(reading, kind):
    """What the model's own forward takes of the same reading; of a bert hiding each token alone."""
    ids, places, _, documents = pack([reading.encoder or reading.decoder], torch.device("cpu"))
    inputs = {"input_ids": ids, "position_ids": places, "cu_seqlens": documents.cu_seqlens}
    inputs["seq_lens"] = documents.seq_lens
    if kind == "bert":
        for place in reading.hidden:
            labels = torch.full_like(ids, -100)
            labels[place] = ids[place]
            yield inputs | {"input_ids": ids.index_fill(0, torch.tensor([place]), MASK), "labels": labels}
        return
    labels = torch.tensor([-100 if label is None else label for label in reading.labels])
    if kind == "encoder_decoder":
        written, places, _, documents = pack([reading.decoder], torch.device("cpu"))
        inputs |= {
            "decoder_input_ids": written,
            "decoder_position_ids": places,
            "decoder_cu_seqlens": documents.cu_seqlens,
            "decoder_seq_lens": documents.seq_lens,
        }
    yield inputs | {"labels": labels}


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_training(kind, monkeypatch):
    """The sum of the losses and the blocks' gradients, from the forward that a training calls."""
    monkeypatch.setattr("bigtfm.inspection.judgement.MOST_TOKENS", 3 * len(TEXT))  # several passes of a bert
    model = make(kind).eval()
    reading = reading_for(model)
    said, gradients = judge(model, reading, MASK, 3)
    assert all(p.grad is None for p in model.parameters())
    losses = [model(**inputs)[0] for inputs in inputs_for(reading, model.config.family)]
    assert sum(one.loss for one in said.values()) == pytest.approx(sum(losses).item(), abs=1e-4)
    if model.config.family == "bert":
        assert list(said) == list(reading.hidden)
        assert [one.loss for one in said.values()] == pytest.approx(
            [loss.item() for loss in losses], abs=1e-5
        )
    else:
        assert list(said) == [n + 1 for n, label in enumerate(reading.labels) if label is not None]
    (sum(losses) / len(said)).backward()
    for side, stack in stacks(model).items():
        for block, norm in zip(stack.layers, gradients[side].parameters, strict=True):
            flat = torch.cat([p.grad.flatten() for p in block.parameters()])
            assert norm == pytest.approx(flat.norm().item(), rel=1e-4)
        tokens = len(reading.encoder if side == "encoder" else reading.decoder)
        assert gradients[side].features.shape == (len(stack.layers) + 1, tokens)


def test_the_gradient_by_features_is_a_slope():
    """At one token of each layer: the change of the mean loss where one feature after the other is moved."""
    model = make("gpt", positions="learned").double().eval()
    reading = reading_for(model)
    labels = torch.tensor(reading.labels[:-1])
    place, step = 2, 1e-5
    _, gradients = judge(model, reading, None, 1)

    def loss(layer, feature, by):
        def moved(module, inputs):
            x = inputs[0].clone()
            x[place, feature] += by
            return (x, *inputs[1:])

        handle = model.decoder.layers[layer].register_forward_pre_hook(moved)
        with torch.no_grad():
            logits = model.project(forward(model, reading))[:-1]
        handle.remove()
        return cross_entropy(logits, labels).item()

    for layer in range(3):
        slopes = [
            (loss(layer, feature, step) - loss(layer, feature, -step)) / (2 * step)
            for feature in range(model.config.hidden_size)
        ]
        assert gradients["decoder"].features[layer, place] == pytest.approx(math.hypot(*slopes), rel=1e-3)


def test_what_was_expected_is_what_the_logits_say():
    model = make("gpt").eval()
    reading = reading_for(model)
    with torch.no_grad():
        p = model.project(forward(model, reading)).softmax(-1)
    said, _ = judge(model, reading, None, 4)
    for place, one in said.items():
        row = p[place - 1]
        assert math.exp(-one.loss) == pytest.approx(row[TEXT[place]].item(), rel=1e-4)
        assert one.rank == 1 + sum(row > row[TEXT[place]])
        assert [token for token, _ in one.expected] == row.argsort(descending=True)[:4].tolist()
        assert [share for _, share in one.expected] == pytest.approx(
            row.sort().values[-4:].flip(0).tolist(), rel=1e-4
        )


def test_nothing_to_judge():
    assert judge(make("bert").eval(), Reading(TEXT), MASK, 3) == ({}, {})


@pytest.mark.parametrize("kind", KINDS)
def test_the_lens_ends_with_what_the_model_says(kind):
    model = make(kind).eval()
    reading = reading_for(model)
    *_, insides = capture(model, reading).values()
    layers = model.config.decoder_layers if model.config.family == "encoder_decoder" else 3
    assert len(insides.features) == layers + 1
    rows = lens_logits(model, insides.features)
    with torch.no_grad():
        x = forward(model, reading)
        logits = model.project(model.mlm_head(x) if model.config.family == "bert" else x)
    assert rows[-1].shape == (x.shape[0], VOCAB)
    torch.testing.assert_close(rows[-1], logits, atol=1e-5, rtol=1e-5)
    assert (rows[-2] - logits).abs().max() > 1e-2, "the layer before says something else"
    best = logit_lens(model, insides.features, 2)[-1]
    assert [expected[0][0] for expected in best] == logits.argmax(-1).tolist()


def test_the_lens_goes_through_the_final_norm():
    """The control: without it the last row is another."""
    model = make("gpt").eval()
    with torch.no_grad():
        model.decoder.norm.weight.mul_(torch.linspace(0.2, 3.0, model.config.hidden_size))
    features = capture(model, reading_for(model))["decoder"].features
    with torch.no_grad():
        without = model.project(features[-1])
    assert (lens_logits(model, features)[-1] - without).abs().max() > 0.1


def test_rollout_follows_the_tokens():
    generator = torch.Generator().manual_seed(0)
    maps = [torch.rand(3, 5, 5, generator=generator).tril().softmax(-1) for _ in range(4)]
    found = rollout(maps)
    reached = [[float(i == j) for j in range(5)] for i in range(5)]
    for layer, weights in enumerate(maps):
        mixed = [[(weights[:, i, j].mean().item() + (i == j)) / 2 for j in range(5)] for i in range(5)]
        reached = [[sum(mixed[i][m] * reached[m][j] for m in range(5)) for j in range(5)] for i in range(5)]
        torch.testing.assert_close(
            found[layer], torch.tensor(reached, dtype=torch.float64), atol=1e-6, rtol=0
        )
    assert (found.sum(-1) - 1).abs().max() < 1e-6
    assert torch.equal(rollout([torch.eye(5)[None]] * 2)[-1], torch.eye(5, dtype=torch.float64)), (
        "who sees itself"
    )


def test_norms_are_of_the_stream_and_of_the_neurons():
    model = make("gpt").eval()
    reading = reading_for(model)
    insides = capture(model, reading)["decoder"]
    with torch.no_grad():
        x = model.embed_tokens(torch.tensor(TEXT))
    assert norms(insides.features)[0].tolist() == pytest.approx(x.square().sum(-1).sqrt().tolist(), rel=1e-5)
    block = model.decoder.layers[1]
    with torch.no_grad(), watch(model) as seen:
        forward(model, reading)
        y = block.mlp.down(seen["decoder"].neurons[1])
        attended = insides.features[2] - y  # the residual sum before the feed-forward layer
        gate, up = block.mlp.gate_up(block.mlp_norm(attended)).chunk(2, dim=-1)
        expected = torch.nn.functional.silu(gate) * up
    assert norms(insides.neurons)[1].tolist() == pytest.approx(expected.norm(dim=-1).tolist(), rel=1e-4)
