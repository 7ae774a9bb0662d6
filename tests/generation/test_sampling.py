from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import VOCAB, make
from writing import LIMIT, PROMPTS, STD, WRITERS, from_scratch, inputs, start_of

from bigtfm.config.problems import ConfigProblem, NumericsProblem
from bigtfm.generation.decoding import Decoding
from bigtfm.generation.sampling import generate, sample
from bigtfm.model.transformer import ReadMemory

SAMPLED = {"temperature": 0.9, "top_k": 12, "top_p": 0.9}


def write(model, prompts, **options):
    """`generate`; an encoder-decoder's decoder starts with token 0."""
    options = {"max_new_tokens": 9, "temperature": 0, "start": start_of(model), **options}
    return generate(model, prompts, **options)


@pytest.mark.parametrize("kind", WRITERS)
def test_cache_gives_the_logits_of_a_full_forward(kind, monkeypatch):
    model, seen = make(kind, **STD), [[] for _ in PROMPTS]

    def spy(decoding, rows, tokens):
        logits = advance(decoding, rows, tokens)
        for prompt, row in zip(decoding.owners, logits, strict=True):
            seen[prompt].append(row)
        return logits

    advance = Decoding.advance
    monkeypatch.setattr(Decoding, "advance", spy)
    answers = write(model, PROMPTS)
    assert [len(tokens) for tokens in answers] == [9] * 4
    for prompt, tokens, logits in zip(PROMPTS, answers, seen, strict=True):
        expected = from_scratch(model, prompt, tokens[:-1])
        torch.testing.assert_close(torch.stack(logits), expected[-len(logits) :], atol=1e-4, rtol=1e-4)
        assert tokens == expected.argmax(-1).tolist()


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(WRITERS),
    kv_heads=st.sampled_from([1, 2, 4]),
    positions=st.sampled_from(["learned", "sinusoidal", "rotary", "relative"]),
    prompts=st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=LIMIT), min_size=1, max_size=4),
    new=st.integers(1, 2 * LIMIT),
)
def test_greedy_decoding_is_what_each_forward_finds_likeliest(kind, kv_heads, positions, prompts, new):
    model = make(kind, positions=positions, num_kv_heads=kv_heads, head_dim=4, **STD)
    for prompt, tokens in zip(prompts, write(model, prompts, max_new_tokens=new), strict=True):
        logits = from_scratch(model, prompt, tokens[:-1])
        assert len(tokens) == min(new, LIMIT - len(start_of(model) or prompt) + 1)
        likeliest, chosen = logits.amax(-1), logits.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
        torch.testing.assert_close(chosen, likeliest, atol=1e-4, rtol=1e-4)


def test_padding_of_a_shorter_source_is_not_read(monkeypatch):
    model = make("bart", **STD)
    right = write(model, PROMPTS)
    # the control: every source is taken for as long as the longest
    monkeypatch.setattr(
        "bigtfm.generation.decoding.ReadMemory",
        lambda k, v, lengths: ReadMemory(k, v, 0 * lengths + lengths.amax()),
    )
    wrong = write(model, PROMPTS)
    assert wrong[2] == right[2]
    assert wrong != right


@pytest.mark.parametrize("kind", ["gpt", "t5"])
@pytest.mark.parametrize("sampling", [{}, SAMPLED])
def test_no_prompt_cares_for_the_rest_of_the_batch(kind, sampling):
    model = make(kind, **STD)
    options = {"max_new_tokens": 12, "seed": 3, **sampling}
    free = write(model, PROMPTS, **options)
    for eos in (None, free[0][3], free[2][2]):  # ends that some prompts come to sooner than others
        together = write(model, PROMPTS, eos_id=eos, **options)
        alone = [write(model, [prompt], eos_id=eos, **options)[0] for prompt in PROMPTS]
        assert together == alone
        assert write(model, PROMPTS[::-1], eos_id=eos, **options) == alone[::-1]
    assert len(set(map(len, together))) > 1


def test_rows_may_be_left_out_and_go_on_as_several():
    for kind in WRITERS:
        model = make(kind, **STD)
        with torch.inference_mode():
            decoding = Decoding(model, PROMPTS, start_of(model), 9)
            decoding.begin()
            decoding.advance([0, 1, 2, 3], torch.tensor([7, 8, 9, 10]))
            decoding.advance([2, 2, 0, 2], torch.tensor([3, 4, 5, 6]))
            logits = decoding.advance([3, 1, 2], torch.tensor([1, 2, 3]))
        assert decoding.owners == [2, 2, 0]
        for row, prompt, written in ((0, 2, [9, 6, 1]), (1, 2, [9, 4, 2]), (2, 0, [7, 5, 3])):
            expected = from_scratch(model, PROMPTS[prompt], written)[-1]
            torch.testing.assert_close(logits[row], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["gpt", "t5"])
def test_seed_decides_and_repeated_prompts_differ(kind):
    model = make(kind, init_std=0.02)  # an almost uniform distribution
    options = {"max_new_tokens": 12, "temperature": 1}
    one = write(model, [[1, 2]] * 3, seed=0, **options)
    assert one == write(model, [[1, 2]] * 3, seed=0, **options)
    assert one != write(model, [[1, 2]] * 3, seed=1, **options)
    assert len({tuple(tokens) for tokens in one}) == 3
    assert one[0] == write(model, [[1, 2]], seed=0, **options)[0]


def test_each_token_is_drawn_with_a_number_of_its_own():
    uniform = make("gpt", init_std=1e-30)
    (tokens,) = write(uniform, [[1]], temperature=1, max_new_tokens=LIMIT)
    assert len(set(tokens)) > LIMIT // 3


@pytest.mark.parametrize("kind", ["gpt", "gpt-window", "t5", "transformer"])
def test_stops_at_the_end_token_of_each_sequence(kind):
    model = make(kind, **STD)
    free = write(model, PROMPTS, max_new_tokens=10)
    eos = free[0][4]
    stopped = write(model, PROMPTS, max_new_tokens=10, eos_id=eos)
    assert stopped == [tokens[: tokens.index(eos)] if eos in tokens else tokens for tokens in free]
    assert len(stopped[0]) <= 4


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_stops_when_the_model_has_read_max_seq_len_tokens(positions):
    model = make("gpt", positions=positions, **STD)
    prompts = [[1] * LIMIT, [2] * (LIMIT - 1), [3]]
    answers = write(model, prompts, max_new_tokens=LIMIT + 10)
    assert [len(tokens) for tokens in answers] == [1, 2, LIMIT]


def test_a_decoder_starts_with_what_it_is_given_or_configured_to():
    model = make("t5", decoder_start_id=5, **STD)
    assert write(model, PROMPTS, start=[]) == write(model, PROMPTS, start=[5])
    assert write(model, PROMPTS, start=[0]) != write(model, PROMPTS, start=[5])
    with_prefix = write(model, PROMPTS[:1], start=[5, 7])[0]
    expected = model.logits(*inputs([5, 7, *with_prefix]), model.encode(*inputs(PROMPTS[0])))
    assert with_prefix == expected.argmax(-1)[1:-1].tolist()
    with pytest.raises(ConfigProblem, match="reads first"):
        write(make("t5"), PROMPTS, start=[])


@pytest.mark.parametrize("kind", ["gpt", "t5"])
def test_streams_each_token_once_in_order(kind):
    model, streamed = make(kind), [[] for _ in PROMPTS]
    assert write(model, PROMPTS, on_token=lambda row, token: streamed[row].append(token)) == streamed


def test_leaves_the_model_as_it_was():
    model = make("gpt", dropout=0.5).train()
    write(model, [[1]])
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert write(model, []) == []


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputation_does_not_matter(recompute):
    assert write(make("gpt", recompute=recompute), PROMPTS) == write(make("gpt"), PROMPTS)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_model_of_half_precision_writes(kind):
    answers = write(make(kind).bfloat16(), PROMPTS, max_new_tokens=3)
    assert [len(tokens) for tokens in answers] == [3] * 4


@pytest.mark.gpu
@pytest.mark.parametrize("kind", WRITERS)
def test_a_gpu_writes_the_same(kind):
    expected = write(make(kind, **STD), PROMPTS, **SAMPLED)
    assert write(make(kind, **STD).cuda(), PROMPTS, **SAMPLED) == expected


def frequencies(**options):
    probabilities = torch.tensor([0.5, 0.05, 0.25, 0.15, 0.05])
    u = (torch.arange(10_000).double() + 0.5) / 10_000
    tokens = sample(
        probabilities.log().expand(len(u), -1), u, **{"temperature": 1.0, "top_k": 0, "top_p": 1.0} | options
    )
    return torch.bincount(tokens, minlength=5).double() / len(u)


@pytest.mark.parametrize(
    ("options", "expected"),
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
def test_sampling_follows_the_filtered_distribution(options, expected):
    torch.testing.assert_close(frequencies(**options), torch.tensor(expected).double(), atol=3e-4, rtol=0)


@pytest.mark.parametrize(
    ("prompts", "options", "word"),
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
def test_refuses_in_one_line(prompts, options, word):
    with pytest.raises(ConfigProblem, match=word) as problem:
        write(make("gpt"), prompts, **options)
    assert "\n" not in problem.value.line


@pytest.mark.parametrize("kind", ["gpt", "t5"])
def test_a_model_that_is_not_finite_is_named(kind):
    model = make(kind)
    with torch.no_grad():
        next(model.parameters())[0, 0] = float("nan")
    with pytest.raises(NumericsProblem, match="embed_tokens"):
        generate(model, [[1, 2]], max_new_tokens=2, start=start_of(model))
