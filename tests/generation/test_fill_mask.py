from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import VOCAB, make
from writing import LIMIT, STD, inputs

from bigtfm.config.problems import ConfigProblem
from bigtfm.generation.fill_mask import fill_mask

MASK = 36
tokens = st.integers(0, MASK)
texts = st.lists(tokens, max_size=LIMIT // 2)
masked = st.builds(lambda before, after: [*before, MASK, *after][:LIMIT], texts, texts)


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(["bert", "modern-bert"]),
    prompts=st.lists(masked, min_size=1, max_size=4),
    top_k=st.integers(1, VOCAB + 3),
)
def test_finds_what_a_forward_of_each_prompt_finds(kind, prompts, top_k):
    model = make(kind, **STD)
    found = fill_mask(model, prompts, MASK, top_k)
    for prompt, masks in zip(prompts, found, strict=True):
        with torch.no_grad():
            probabilities = model.logits(*inputs(prompt)).double().softmax(-1)
        places = [place for place, token in enumerate(prompt) if token == MASK]
        for place, alternatives in zip(places, masks, strict=True):
            ids, values = zip(*alternatives, strict=True)
            assert len(ids) == len(set(ids)) == min(top_k, VOCAB)
            expected = probabilities[place]
            assert values == pytest.approx(expected.topk(len(ids)).values.tolist(), abs=1e-5)
            assert values == pytest.approx(expected[list(ids)].tolist(), abs=1e-5)


def test_probabilities_are_of_the_whole_vocabulary():
    (alternatives,) = fill_mask(make("bert", **STD), [[1, MASK, 2]], MASK, VOCAB)[0]
    assert sum(probability for _, probability in alternatives) == pytest.approx(1)


def test_leaves_the_model_as_it_was():
    model = make("bert", dropout=0.5).train()
    assert fill_mask(model, [[MASK]], MASK) == fill_mask(model, [[MASK]], MASK)
    assert model.training
    assert fill_mask(model, [], MASK) == []


@pytest.mark.parametrize(
    ("prompts", "top_k", "word"),
    [
        ([[1, MASK], [1]], 5, "prompt 2: nothing in it is masked"),
        ([[MASK], []], 5, "prompt 2: it has no tokens"),
        ([[MASK] * (LIMIT + 1)], 5, "max_seq_len"),
        ([[MASK, VOCAB]], 5, "unknown"),
        ([[MASK]], 0, "top_k is 0"),
    ],
)
def test_refuses_in_one_line(prompts, top_k, word):
    with pytest.raises(ConfigProblem, match=word) as problem:
        fill_mask(make("bert"), prompts, MASK, top_k)
    assert "\n" not in problem.value.line
