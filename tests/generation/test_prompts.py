"""Prompts in text, answers in text: through run directories of every family and through the program."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from small_models import KINDS, save_run

from bigtfm.cli import app
from bigtfm.generation.beam_search import beam_search
from bigtfm.generation.prompts import Settings, answers
from bigtfm.generation.sampling import generate
from bigtfm.run_directory import open_run

RUNS = {"gpt": None, "bert": None, "t5": "span_corruption", "bart": "infilling"}
SETTINGS = Settings(
    max_new_tokens=8, temperature=1.0, top_k=0, top_p=1.0, seed=0, num_beams=1, length_penalty=1.0,
    num_return_sequences=1,
)  # fmt: skip
CONFIG = 64


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_data):
    """Run directories of random models, one of each kind."""
    folder = tmp_path_factory.mktemp("runs")
    for kind, objective in RUNS.items():
        save_run(folder / kind, tiny_data / "tokenizer", kind, objective)
    return folder


@pytest.fixture
def read(monkeypatch):
    """The token ids that each way to answer gets: they are appended here."""
    seen = []
    for name, function in (("generate", generate), ("beam_search", beam_search)):
        monkeypatch.setattr(
            f"bigtfm.generation.prompts.{name}",
            lambda model, ids, _function=function, **options: (
                seen.append((ids, options["start"])) or _function(model, ids, **options)
            ),
        )
    monkeypatch.setattr(
        "bigtfm.generation.prompts.fill_mask",
        lambda model, ids, mask, top_k: seen.append((ids, [])) or [[[(7, 1.0)]] * i.count(mask) for i in ids],
    )
    return seen


def ask(opened, *prompts, given=(), **settings):
    return list(answers(*opened, prompts, replace(SETTINGS, **settings), given))


def test_open_run_gives_each_family_with_its_ids(runs):
    for kind in RUNS:
        model, tokenizer, special = open_run(runs / kind)
        assert not model.training
        assert model.config.family == KINDS[kind]["family"]
        assert model.vocab_size == special.vocab_size
        added = special.vocab_size - tokenizer.vocab_size
        assert added == {"gpt": 0, "bert": 1, "t5": 100, "bart": 1}[kind]


@pytest.mark.parametrize("mark", ["[MASK]", "<mask>"])
def test_a_mask_stands_where_the_word_and_its_blank_stood(runs, read, mark):
    """The encoder reads what masked_lm would have made of the text."""
    opened = open_run(runs / "bert")
    _, tokenizer, special = opened
    tokens = tokenizer.encode("The people of the United States, and to me.")
    place = tokens.index(tokenizer.encode(" of")[0])
    assert tokenizer.encode(" of") == [tokens[place]], "so that one mask hides it"
    ask(opened, f"The people {mark} the United States, and to me.")
    hidden = [*tokens[:place], special.mask, *tokens[place + 1 :]]
    assert read[0][0] == [[special.bos, *hidden, special.eos]]


def test_sentinels_are_read_and_shown(runs, read, monkeypatch):
    opened = open_run(runs / "t5")
    _, tokenizer, special = opened
    prompt = "The <extra_id_0> of the<extra_id_1>"
    first, second, third = special.sentinels[:3]
    written = [first, *tokenizer.encode(" people"), second, *tokenizer.encode(" United States"), third]

    def written_anyway(model, ids, **options):
        read.append((ids, options["start"]))
        return [written]

    monkeypatch.setattr("bigtfm.generation.prompts.generate", written_anyway)
    (answer,) = ask(opened, prompt)
    middle = tokenizer.encode(" of the")
    ids = [special.bos, *tokenizer.encode("The"), first, *middle, second, special.eos]
    assert read == [([ids], [special.bos])]
    assert answer.shown == "<extra_id_0> people <extra_id_1> United States <extra_id_2>"
    assert answer.record == {"prompt": prompt, "text": answer.shown}


def test_infilling_begins_as_it_was_trained_to(runs, read):
    """With BOS, unless that is what the decoder starts with anyway."""
    model, tokenizer, special = open_run(runs / "bart")
    assert special.start == special.bos
    document = [special.bos, *tokenizer.encode("The"), special.mask, special.eos]
    for start, lead in ((special.bos, [special.bos]), (special.eos, [special.eos, special.bos])):
        ask((model, tokenizer, replace(special, start=start)), "The <mask>")
        assert read.pop() == ([document], lead)


def test_marks_of_another_objective_are_text(runs, read):
    for kind in ("gpt", "t5"):
        _, tokenizer, _ = opened = open_run(runs / kind)
        ask(opened, "a <mask>")
        assert tokenizer.decode(read[-1][0][0]) == "a <mask>"
    _, tokenizer, _ = opened = open_run(runs / "bart")
    ask(opened, "an <extra_id_0>")
    assert tokenizer.decode(read[-1][0][0]) == "an <extra_id_0>"


def test_a_tokenizer_of_its_own_names(tmp_path, read):
    """[MASK] is the tokenizer's; a BOS that is its EOS does not lead an encoder's text."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<|endoftext|>": 0, "[MASK]": 1, "the": 2, "state": 3, "of": 4, "union": 5}
    made = Tokenizer(models.WordLevel(words, unk_token="of"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    (tmp_path / "tokenizer").mkdir()
    made.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    for kind in ("bert", "bart", "gpt"):
        save_run(tmp_path / kind, tmp_path / "tokenizer", kind, RUNS[kind])
        ask(open_run(tmp_path / kind), "the [MASK] of")
    bert, bart, gpt = read
    assert bert == ([[2, 1, 4, 0]], [])
    assert bart == ([[2, 1, 4, 0]], [0])
    assert gpt[0][0][:2] == [0, 2]


def test_a_bert_fills_its_masks_in(runs):
    _, tokenizer, _ = opened = open_run(runs / "bert")
    prompts = ["The <mask> of <mask>.", "<mask>"]
    first, second = ask(opened, *prompts)
    assert [len(answer.record["masks"]) for answer in (first, second)] == [2, 1]
    for answer, prompt in zip((first, second), prompts, strict=True):
        assert answer.record["prompt"] == prompt
        filled = prompt
        for alternatives in answer.record["masks"]:
            assert len(alternatives) == 5
            values = [alternative["probability"] for alternative in alternatives]
            assert values == sorted(values, reverse=True)
            assert alternatives[0]["token"] == tokenizer.decode([alternatives[0]["id"]])
            filled = alternatives[0]["token"].join(re.split(" ?<mask>", filled, maxsplit=1))
        assert answer.shown == answer.record["text"] == filled
    assert len(ask(opened, "<mask>", given=["top_k"], top_k=3)[0].record["masks"][0]) == 3


@pytest.mark.parametrize("kind", ["gpt", "t5", "bart"])
def test_several_answers_to_several_prompts(runs, kind):
    opened = open_run(runs / kind)
    prompts = ["The people <mask>", "A <extra_id_0>"]
    for settings in ({}, {"num_beams": 4}):
        found = ask(opened, *prompts, num_return_sequences=3, **settings)
        assert [answer.record["prompt"] for answer in found] == [p for p in prompts for _ in range(3)]
        for prompt, three in ((prompts[0], found[:3]), (prompts[1], found[3:])):
            assert len({answer.shown for answer in three}) > 1
            assert three[0].shown == ask(opened, prompt, **settings)[0].shown
            if settings:
                scores = [answer.record["score"] for answer in three]
                assert scores == sorted(scores, reverse=True)
            if kind == "gpt":
                assert all(answer.shown == prompt + answer.record["text"] for answer in three)


def test_ids_behind_the_tokenizer_are_no_text(tmp_path, tiny_data):
    """A model that knows more tokens than its tokenizer, as imported ones do, may write them."""
    save_run(tmp_path / "gpt", tiny_data / "tokenizer", "gpt", vocab_size=4000)
    opened = open_run(tmp_path / "gpt")
    assert opened[0].vocab_size == 4000
    assert len(ask(opened, "The", num_beams=2, max_new_tokens=20)) == 1


BROKEN = [
    ("bert", ["--prompt", "no mask"], "nothing in it is masked"),
    ("bert", [], "nothing in it is masked"),
    ("bert", ["--prompt", "<mask>", "--num-beams", "2"], "--num-beams does nothing here"),
    ("bert", ["--prompt", "<mask>", "--temperature", "0.8"], "--temperature does nothing here"),
    ("bert", ["--prompt", "<mask>", "--max-new-tokens", "1"], "--max-new-tokens does nothing here"),
    ("bert", ["--prompt", "<mask>", "--top-k", "0"], "top_k is 0"),
    ("t5", ["--num-beams", "2", "--temperature", "0.8"], "--temperature does nothing here"),
    ("t5", ["--num-beams", "2", "--num-return-sequences", "3"], "num_return_sequences is 3"),
    ("t5", ["--num-beams", "2", "--length-penalty", "nan"], "length_penalty is nan"),
    ("t5", ["--length-penalty", "1"], "--length-penalty does nothing here"),
    ("t5", ["--prompt", "a <extra_id_100>"], "<extra_id_100> is unknown"),
    ("gpt", ["--num-beams", "2", "--seed", "0"], "--seed does nothing here"),
    ("gpt", ["--num-return-sequences", "2", "--temperature", "0"], "greedy decoding has one answer"),
    ("gpt", ["--num-beams", "0"], "--num-beams"),
]


@pytest.mark.parametrize(("kind", "flags", "piece"), BROKEN)
def test_what_a_run_can_not_do_is_one_line(runs, capsys, kind, flags, piece):
    assert call("--run", str(runs / kind), *flags) == CONFIG
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert said.err.startswith("bigtfm: error: ")
    assert piece in said.err
    assert ". Fix: " in said.err


def call(*flags: str) -> int:
    with pytest.raises(SystemExit) as ended:
        app(["generate", *flags])
    return int(ended.value.code or 0)


@pytest.mark.parametrize(
    ("kind", "flags", "keys"),
    [
        ("gpt", [], {"prompt", "text"}),
        ("gpt", ["--num-beams", "2"], {"prompt", "text", "score"}),
        ("t5", ["--temperature", "0"], {"prompt", "text"}),
        ("bart", ["--num-beams", "2", "--length-penalty", "0.5"], {"prompt", "text", "score"}),
        ("bert", ["--top-k", "2"], {"prompt", "text", "masks"}),
    ],
)
def test_the_program_prints_text_or_json(runs, capsys, kind, flags, keys):
    flags = ["--run", str(runs / kind), "--prompt", "The <mask>", "--prompt", "A <mask>", *flags]
    assert call(*flags, "--json") == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["prompt"] for record in records] == ["The <mask>", "A <mask>"]
    assert [set(record) for record in records] == [keys, keys]
    assert call(*flags) == 0
    shown = [record["prompt"] + record["text"] if kind == "gpt" else record["text"] for record in records]
    assert capsys.readouterr().out == "".join(f"{text}\n\n" for text in shown)
