from __future__ import annotations

import itertools
import math
import random
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import KINDS, SMALL, make
from writing import PROMPTS, STD, WRITERS, from_scratch, start_of

from bigtfm.config.problems import ConfigProblem
from bigtfm.config.sections import ModelSection
from bigtfm.generation.beam_search import _search, beam_search
from bigtfm.generation.decoding import Decoding
from bigtfm.generation.sampling import generate
from bigtfm.model.families import make_model
from bigtfm.model.transformer import init_weights

PENALTIES = [-1.0, 0.0, 0.6, 1.0, 2.0]


def search(model, prompts, **options):
    """The best answers as (tokens, score); an encoder-decoder's decoder starts with token 0."""
    options = {"max_new_tokens": 6, "num_beams": 3, "start": start_of(model), **options}
    found = beam_search(model, prompts, **options)
    return [[(hypothesis.tokens, hypothesis.score) for hypothesis in best] for best in found]


def assert_same(found, expected):
    for best, other in zip(found, expected, strict=True):
        assert [tokens for tokens, _ in best] == [tokens for tokens, _ in other]
        assert [score for _, score in best] == pytest.approx([score for _, score in other], abs=1e-4)


def tiny(kind, vocab_size):
    model = make_model(ModelSection(**{**SMALL, **KINDS[kind], **STD}), vocab_size)
    init_weights(model)
    return model


def log_p(model, prompt, tokens):
    """Log-probability of these tokens, in this order."""
    table = from_scratch(model, prompt, tokens[:-1]).double().log_softmax(-1)
    return table.gather(-1, torch.tensor(tokens)[:, None]).sum().item()


@pytest.mark.parametrize("kind", ["gpt", "t5"])
def test_with_enough_beams_it_finds_the_best_of_all_texts(kind):
    vocab_size, longest, eos = 4, 4, 3
    model, prompts = tiny(kind, vocab_size), [[1, 2], [0], [2, 2, 1, 0]]
    texts = [
        [*text, *end]
        for length in range(1, longest + 1)
        for text in itertools.product(range(eos), repeat=length - 1)
        for end in ([[eos]] if length < longest else [[token] for token in range(vocab_size)])
    ]
    assert len(texts) == 1 + 3 + 9 + 27 * 4
    sums = [[log_p(model, prompt, text) for text in texts] for prompt in prompts]
    assert [sum(map(math.exp, values)) for values in sums] == pytest.approx([1, 1, 1])
    for penalty in PENALTIES:
        expected = []
        for values in sums:
            scored = [
                ([token for token in text if token != eos], value / len(text) ** penalty)
                for text, value in zip(texts, values, strict=True)
            ]
            expected.append(sorted(scored, key=lambda one: -one[1])[:5])
        options = {"max_new_tokens": longest, "eos_id": eos, "num_return_sequences": 5}
        found = search(model, prompts, num_beams=vocab_size**longest, length_penalty=penalty, **options)
        assert_same(found, expected)


def by_the_book(logits_after, *, new, width, penalty, best, eos):
    """Beam search of one prompt to the very end, without cache, batch or early end."""
    beams, found = [([], 0.0)], []
    for length in range(1, new + 1):
        candidates = []
        for text, total in beams:
            table = logits_after(text).double().log_softmax(-1).tolist()
            candidates += [([*text, token], total + value) for token, value in enumerate(table)]
        candidates.sort(key=lambda one: -one[1])
        for text, total in candidates[:width]:
            if text[-1] == eos or length == new:
                found.append((text[:-1] if text[-1] == eos else text, total / length**penalty))
        beams = [one for one in candidates if one[0][-1] != eos][:width]
    return sorted(found, key=lambda one: -one[1])[:best]


searches = st.fixed_dictionaries(
    {
        "new": st.integers(1, 6),
        "width": st.integers(1, 5),
        "penalty": st.sampled_from(PENALTIES),
        "best": st.integers(1, 5),
        "eos": st.sampled_from([None, 0, 1, 2]),
    }
)


@settings(max_examples=20, deadline=None)
@given(
    kind=st.sampled_from(WRITERS),
    prompts=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=3),
    vocab_size=st.integers(3, 9),  # few, so that many texts end
    options=searches,
)
def test_follows_the_book(kind, prompts, vocab_size, options):
    model, options = tiny(kind, vocab_size), {**options, "best": min(options["best"], options["width"])}
    expected = [
        by_the_book(lambda text, prompt=prompt: from_scratch(model, prompt, text)[-1], **options)
        for prompt in prompts
    ]
    found = search(
        model,
        prompts,
        max_new_tokens=options["new"],
        num_beams=options["width"],
        length_penalty=options["penalty"],
        num_return_sequences=options["best"],
        eos_id=options["eos"],
    )
    assert_same(found, expected)


class Tables:
    """What the search needs of a Decoding, over random logits for every text: thousands of cases a minute."""

    device = torch.device("cpu")

    def __init__(self, seed, rooms, vocab_size, spread, eos):
        self.seed, self.room, self.vocab_size, self.spread, self.eos = seed, rooms, vocab_size, spread, eos
        self.owners, self.texts = list(range(len(rooms))), [[] for _ in rooms]

    def begin(self):
        return torch.stack([self.logits_after(owner, []) for owner in self.owners])

    def advance(self, rows, tokens):
        self.owners = [self.owners[row] for row in rows]
        self.texts = [[*self.texts[row], token] for row, token in zip(rows, tokens.tolist(), strict=True)]
        return torch.stack([self.logits_after(*row) for row in zip(self.owners, self.texts, strict=True)])

    def logits_after(self, owner, text):
        draw = random.Random(f"{self.seed} {owner} {text}")
        logits = torch.tensor([draw.gauss(0, self.spread) for _ in range(self.vocab_size)])
        if self.eos is not None:
            logits[self.eos] += 0.5 * self.spread
        return logits


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 10**9),
    rooms=st.lists(st.integers(1, 8), min_size=1, max_size=3),
    vocab_size=st.integers(3, 6),
    spread=st.sampled_from([0.3, 1.0, 2.0]),
    options=searches,
)
def test_no_table_leads_it_astray(seed, rooms, vocab_size, spread, options):
    eos, best = options["eos"], min(options["best"], options["width"])
    tables = Tables(seed, rooms, vocab_size, spread, eos)
    found = _search(tables, options["width"], options["penalty"], best, eos)
    for owner, room in enumerate(rooms):
        logits_after = partial(tables.logits_after, owner)
        expected = by_the_book(logits_after, **{**options, "new": room, "best": best})
        assert_same([[(one.tokens, one.score) for one in found[owner]]], [expected])


@pytest.mark.parametrize("kind", ["gpt", "t5"])
def test_without_its_rows_reordered_it_errs(kind, monkeypatch):
    """The control: a beam must go on from its own keys and values."""
    model = make(kind, **STD)
    right = search(model, PROMPTS)
    advance = Decoding.advance

    def forgetful(decoding, rows, tokens):
        sorted_rows = [row for row in range(len(decoding.owners)) for _ in range(rows.count(row))]
        kept = list(range(len(rows))) if len(rows) == len(decoding.owners) else sorted_rows
        return advance(decoding, kept, tokens)

    monkeypatch.setattr(Decoding, "advance", forgetful)
    assert search(model, PROMPTS) != right


@pytest.mark.parametrize("kind", ["gpt", "gpt-window", "t5", "bart"])
def test_no_prompt_cares_for_the_rest_of_the_batch(kind):
    model = make(kind, **STD)
    options = {"num_return_sequences": 3, "max_new_tokens": 8, "eos_id": 0}
    alone = [search(model, [prompt], **options)[0] for prompt in PROMPTS]
    assert_same(search(model, PROMPTS, **options), alone)
    assert_same(search(model, PROMPTS[::-1], **options), alone[::-1])


def test_ends_when_no_beam_can_win_any_more(monkeypatch):
    """A likely end, ranked by probability alone: nothing longer is likelier, so nothing longer is read."""
    model, steps, advance = tiny("bart", 14), [], Decoding.advance
    monkeypatch.setattr(Decoding, "advance", lambda *args: steps.append(1) or advance(*args))

    def steps_of(bonus, penalty):
        steps.clear()
        with torch.no_grad():
            model.lm_head.bias[5] = bonus
        search(model, PROMPTS, max_new_tokens=20, length_penalty=penalty, eos_id=5)
        return len(steps)

    assert steps_of(20.0, 0.0) == 1  # the start token
    assert steps_of(20.0, 1.0) < 20
    assert steps_of(-20.0, 0.0) == 20, "the control: where hardly anything ends, it goes on"


def test_a_larger_penalty_gives_longer_answers():
    model = make("t5", **STD)
    lengths = [
        len(search(model, PROMPTS, length_penalty=penalty, eos_id=34, max_new_tokens=12)[0][0][0])
        for penalty in (-2.0, 0.0, 3.0)
    ]
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1]


def test_one_beam_that_never_ends_is_greedy():
    model = make("t5", **STD)
    greedy = generate(model, PROMPTS, max_new_tokens=9, temperature=0, start=[0])
    assert [best[0][0] for best in search(model, PROMPTS, num_beams=1, max_new_tokens=9)] == greedy


def test_prompts_of_unequal_room_end_each_at_its_own():
    model = make("gpt", **STD)
    limit = model.config.max_seq_len
    prompts = [[1] * limit, [2] * (limit - 2), [3]]
    found = search(model, prompts, max_new_tokens=5)
    assert [len(best[0][0]) for best in found] == [1, 3, 5]
    assert_same(found, [search(model, [prompt], max_new_tokens=5)[0] for prompt in prompts])


def test_a_vocabulary_smaller_than_the_beams():
    model = tiny("gpt", 2)
    found = search(model, [[0]], num_beams=8, max_new_tokens=2, num_return_sequences=8, eos_id=1)[0]
    assert sorted(tokens for tokens, _ in found) == [[], [0], [0, 0]]
    read = {0: 1, 1: 2, 2: 2}  # tokens of each, the end included: together they are all there is
    assert sum(math.exp(score * read[len(tokens)]) for tokens, score in found) == pytest.approx(1)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"num_beams": 0}, "num_beams"),
        ({"length_penalty": float("nan")}, "length_penalty"),
        ({"length_penalty": 11.0}, "length_penalty"),
        ({"num_return_sequences": 0}, "num_return_sequences"),
        ({"num_return_sequences": 4}, "num_beams"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"prompts": [[1], []]}, "prompt 2"),
    ],
)
def test_refuses_in_one_line(options, word):
    with pytest.raises(ConfigProblem, match=word) as problem:
        search(make("gpt"), **{"prompts": PROMPTS, **options})
    assert "\n" not in problem.value.line
