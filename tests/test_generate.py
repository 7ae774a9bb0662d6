from __future__ import annotations

import pytest
import torch

from bigtfm.config.problems import ConfigProblem
from bigtfm.config.run import ModelSection
from bigtfm.generate import generate, sample
from bigtfm.model.gpt import GPT
from bigtfm.model.transformer import init_weights

VOCAB, LIMIT = 29, 24
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [12, 13]]


def make(recompute="none", **shape):
    shape = {
        "hidden_size": 16,
        "num_layers": 2,
        "num_attention_heads": 4,
        "max_seq_len": LIMIT,
        "init_std": 0.5,
        **shape,
    }
    model = GPT(ModelSection(**shape), VOCAB, seed=1, recompute=recompute)
    init_weights(model)
    return model


def full_logits(model, tokens):
    length = len(tokens)
    cu_seqlens = torch.tensor([0, length], dtype=torch.int32)
    with torch.no_grad():
        return model.eval().logits(torch.tensor(tokens), torch.arange(length), cu_seqlens, (length,))


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rotary"])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_cache_gives_the_logits_of_a_full_forward(positions, kv_heads, monkeypatch):
    model = make(positions=positions, num_kv_heads=kv_heads)
    seen = []

    def spy(logits, u, **settings):
        seen.append(logits.clone())
        return sample(logits, u, **settings)

    monkeypatch.setattr("bigtfm.generate.sample", spy)
    continuations = generate(model, PROMPTS, max_new_tokens=9, temperature=0)
    assert [len(tokens) for tokens in continuations] == [9] * 4
    for row, (prompt, tokens) in enumerate(zip(PROMPTS, continuations, strict=True)):
        expected = full_logits(model, prompt + tokens)[len(prompt) - 1 : -1]
        torch.testing.assert_close(
            torch.stack([logits[row] for logits in seen]), expected, atol=1e-4, rtol=1e-4
        )
        assert tokens == expected.argmax(-1).tolist()


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 0.9, "top_k": 12, "top_p": 0.9}])
def test_a_prompt_does_not_care_for_the_rest_of_the_batch(settings):
    model = make()
    together = generate(model, PROMPTS, max_new_tokens=12, seed=3, **settings)
    alone = [generate(model, [prompt], max_new_tokens=12, seed=3, **settings)[0] for prompt in PROMPTS]
    assert together == alone
    assert generate(model, PROMPTS[::-1], max_new_tokens=12, seed=3, **settings) == alone[::-1]


def test_seed_decides_and_repeated_prompts_differ():
    model = make(init_std=0.02)  # an almost uniform distribution
    one = generate(model, [[1, 2]] * 3, max_new_tokens=12, seed=0)
    assert one == generate(model, [[1, 2]] * 3, max_new_tokens=12, seed=0)
    assert one != generate(model, [[1, 2]] * 3, max_new_tokens=12, seed=1)
    assert len({tuple(tokens) for tokens in one}) == 3
    assert one[0] == generate(model, [[1, 2]], max_new_tokens=12, seed=0)[0]


def test_stops_at_the_end_token_of_each_sequence():
    model = make()
    free = generate(model, PROMPTS, max_new_tokens=10, temperature=0)
    eos = free[0][4]
    stopped = generate(model, PROMPTS, max_new_tokens=10, temperature=0, eos_id=eos)
    assert stopped == [tokens[: tokens.index(eos)] if eos in tokens else tokens for tokens in free]
    assert len(stopped[0]) <= 4


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_stops_when_the_model_has_read_max_seq_len_tokens(positions):
    model = make(positions=positions)
    prompts = [[1] * LIMIT, [2] * (LIMIT - 1), [3]]
    continuations = generate(model, prompts, max_new_tokens=LIMIT + 10, temperature=0)
    assert [len(tokens) for tokens in continuations] == [1, 2, LIMIT]
    assert continuations[2] == full_logits(model, [3, *continuations[2][:-1]]).argmax(-1).tolist()


def test_streams_each_token_once_in_order():
    model, streamed = make(), [[] for _ in PROMPTS]
    result = generate(
        model, PROMPTS, max_new_tokens=5, on_token=lambda row, token: streamed[row].append(token)
    )
    assert streamed == result


def test_leaves_the_model_as_it_was():
    model = make(dropout=0.5).train()
    generate(model, [[1]], max_new_tokens=3)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert generate(model, [], max_new_tokens=3) == []


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputation_does_not_matter(recompute):
    assert generate(make(recompute), PROMPTS, max_new_tokens=3) == generate(make(), PROMPTS, max_new_tokens=3)


def frequencies(**settings):
    probabilities = torch.tensor([0.5, 0.05, 0.25, 0.15, 0.05])
    u = (torch.arange(10_000).double() + 0.5) / 10_000
    tokens = sample(
        probabilities.log().expand(len(u), -1), u, **{"temperature": 1.0, "top_k": 0, "top_p": 1.0} | settings
    )
    return torch.bincount(tokens, minlength=5).double() / len(u)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.5, 0.05, 0.25, 0.15, 0.05]),
        ({"temperature": 0}, [1, 0, 0, 0, 0]),
        ({"temperature": 1e-9}, [1, 0, 0, 0, 0]),
        ({"temperature": 0.5}, [0.25 / 0.34, 0.0025 / 0.34, 0.0625 / 0.34, 0.0225 / 0.34, 0.0025 / 0.34]),
        ({"top_k": 1}, [1, 0, 0, 0, 0]),
        ({"top_k": 2}, [2 / 3, 0, 1 / 3, 0, 0]),
        ({"top_k": 99}, [0.5, 0.05, 0.25, 0.15, 0.05]),
        ({"top_p": 0.4}, [1, 0, 0, 0, 0]),
        ({"top_p": 0.6}, [2 / 3, 0, 1 / 3, 0, 0]),  # the fewest that hold at least 0.6
        ({"top_p": 0.89}, [5 / 9, 0, 2.5 / 9, 1.5 / 9, 0]),
        ({"top_k": 3, "top_p": 0.8}, [2 / 3, 0, 1 / 3, 0, 0]),  # top_p of what top_k left: 0.75 / 0.9
    ],
)
def test_sampling_follows_the_filtered_distribution(settings, expected):
    torch.testing.assert_close(frequencies(**settings), torch.tensor(expected).double(), atol=3e-4, rtol=0)


@pytest.mark.parametrize(
    ("prompts", "settings", "word"),
    [
        ([[]], {}, "no tokens"),
        ([[1], [VOCAB]], {}, "prompt 2"),
        ([[-1]], {}, "unknown"),
        ([[1] * (LIMIT + 1)], {}, "max_seq_len"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens"),
        ([[1]], {"temperature": -1.0}, "temperature"),
        ([[1]], {"temperature": float("nan")}, "temperature"),
        ([[1]], {"top_k": -1}, "top_k"),
        ([[1]], {"top_p": 0.0}, "top_p"),
        ([[1]], {"top_p": 1.5}, "top_p"),
    ],
)
def test_refuses_in_one_line(prompts, settings, word):
    with pytest.raises(ConfigProblem, match=word) as problem:
        generate(make(), prompts, **{"max_new_tokens": 3} | settings)
    assert "\n" not in problem.value.line
