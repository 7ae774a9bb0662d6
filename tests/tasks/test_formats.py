"""From rows to marked examples, task by task, and the lines about rows that are none."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigtfm.config.marks import BEGINS, ENDS, SELECTABLE, WRITTEN
from bigtfm.config.problems import ConfigProblem, DataProblem
from bigtfm.data.examples import Example, Reader, Wrong
from bigtfm.data.indexed import TokenDataset
from bigtfm.data.labels import require_learnable
from bigtfm.data.prepare import Summary, prepare
from bigtfm.data.tokenizer import Tokenizer, load_tokenizer
from bigtfm.tasks import chat, question_answering
from bigtfm.tasks.known import TASKS, setting_of

Json = Any


@pytest.fixture(scope="module")
def tokenizer(tiny_data: Path) -> Tokenizer:
    return load_tokenizer(tiny_data / "tokenizer")


def text_of(tokenizer: Tokenizer, example: Example, mark: int) -> str:
    """What the tokens with that mark say."""
    return tokenizer.decode(t for t, m in zip(example.ids, example.marks, strict=True) if m == mark)


def make(
    name: str, row: dict[str, Any], tokenizer: Tokenizer, max_tokens: int = 64, **more: Any
) -> list[Example]:
    made = TASKS[name].format.make(row, Reader(tokenizer, max_tokens, **more))
    for example in made:
        assert len(example.ids) == len(example.marks) <= max_tokens
        assert (example.ids[0], example.ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
    return made


def test_a_class_is_marked_at_both_ends(tokenizer: Tokenizer) -> None:
    [one] = make(
        "classification", {"text": "A good film.", "label": "good"}, tokenizer, labels=("bad", "good")
    )
    assert tokenizer.decode(one.ids) == "A good film."
    assert one.marks[0] == one.marks[-1] == 2
    assert not any(one.marks[1:-1])


def test_of_a_pair_that_is_too_long_the_longer_side_gives_way(tokenizer: Tokenizer) -> None:
    row = {"text": "word " * 100, "second": "Short.", "label": "a"}
    [one] = make("classification", row, tokenizer, 40, labels=("a",))
    assert len(one.ids) == 40
    assert tokenizer.decode(one.ids).endswith("Short.")
    assert one.ids.count(tokenizer.eos_id) == 2


def test_a_words_first_token_has_its_tag_and_long_sentences_go_on(tokenizer: Tokenizer) -> None:
    words = [f"extraordinary{n}" for n in range(40)]
    tags = ["B-X" if n % 3 else "O" for n in range(40)]
    made = make("tagging", {"words": words, "tags": tags}, tokenizer, 48, labels=("B-X", "O"))
    assert len(made) > 1
    marks = [mark for example in made for mark in example.marks if mark]
    assert marks == [1 if tag == "B-X" else 2 for tag in tags]
    assert "".join(tokenizer.decode(example.ids) for example in made) == " ".join(words)


def test_words_and_tags_may_be_written_with_blanks(tokenizer: Tokenizer) -> None:
    row = {"words": "Ada lives", "tags": "B O"}
    as_lists = {"words": ["Ada", "lives"], "tags": ["B", "O"]}
    labels = {"labels": ("B", "O")}
    assert make("tagging", row, tokenizer, **labels) == make("tagging", as_lists, tokenizer, **labels)


RELATED = {"text": "Ada Lovelace, the daughter of Lord Byron, wrote notes.", "head": "Ada Lovelace"}


def test_both_entities_are_marked_in_the_text(tokenizer: Tokenizer) -> None:
    row = RELATED | {"tail": [30, 40], "relation": "child"}
    [one] = make("relation_extraction", row, tokenizer, labels=("child", "no_relation"))
    expected = "$ Ada Lovelace $, the daughter of # Lord Byron #, wrote notes."
    assert tokenizer.decode(one.ids) == expected
    assert (one.marks[0], one.marks[-1], sum(one.marks)) == (1, 1, 2)
    assert make("relation_extraction", RELATED | {"tail": "Lord Byron"}, tokenizer)[0].ids == one.ids
    turned = make("relation_extraction", row | {"head": row["tail"], "tail": row["head"]}, tokenizer, **LABEL)
    assert tokenizer.decode(turned[0].ids).startswith("# Ada Lovelace #, the daughter of $ Lord Byron $")


LABEL = {"labels": ("child",)}


def test_a_long_text_keeps_both_entities(tokenizer: Tokenizer) -> None:
    row = {"head": "Ada", "tail": "Byron", "relation": "child"}
    for text in ("word " * 50 + "Ada and Byron" + " word" * 50, "Ada and Byron" + " word" * 50):
        [one] = make("relation_extraction", row | {"text": text}, tokenizer, 32, **LABEL)
        assert len(one.ids) == 32
        assert "$ Ada $ and # Byron #" in tokenizer.decode(one.ids)
    far = row | {"text": "Ada" + " word" * 50 + " Byron"}
    assert make("relation_extraction", far, tokenizer, 32, **LABEL) == []


CONTEXT = (
    "The ship of state, she said, sails on. " * 6 + "Ada Lovelace wrote notes. " + "The end is near. " * 10
)


@pytest.mark.parametrize("answers", ["Ada Lovelace", ["Ada Lovelace"], {"text": ["Ada Lovelace"]}])
def test_an_answer_is_marked_in_each_window_that_holds_it(answers: Any, tokenizer: Tokenizer) -> None:
    row = {"question": "Who wrote?", "context": CONTEXT, "answers": answers}
    made = make("question_answering", row, tokenizer, 48)
    assert 1 <= len(made) < len(question_answering.windows(row, Reader(tokenizer, 48)))
    for example in made:
        [begin], [end] = (np.flatnonzero(np.array(example.marks) & bit) for bit in (BEGINS, ENDS))
        assert tokenizer.decode(example.ids[begin : end + 1]).strip() == "Ada Lovelace"
        question = [m for m in example.marks if not m & SELECTABLE]
        assert len(question) >= len(tokenizer.encode("Who wrote?"))


def test_windows_cover_the_context_and_overlap(tokenizer: Tokenizer) -> None:
    row = {"question": "Who?", "context": CONTEXT, "answers": "Ada"}
    windows = question_answering.windows(row, Reader(tokenizer, 40))
    covered = {span for window in windows for span in window.spans}
    assert "".join(CONTEXT[a:b] for a, b in sorted(covered)) == CONTEXT.replace(" ", "")
    assert all(set(a.spans) & set(b.spans) for a, b in pairwise(windows))


def test_squads_own_place_counts(tokenizer: Tokenizer) -> None:
    place = CONTEXT.index("The end") + len("The end is near. ")
    row = {"question": "?", "context": CONTEXT, "answers": {"text": ["The end"], "answer_start": [place]}}
    [one] = make("question_answering", row, tokenizer, 512)
    assert sum(bool(mark & BEGINS) for mark in one.marks) == 1, "it stands ten times, and one is meant"


@pytest.mark.parametrize("name", ["translation", "summarisation"])
def test_a_target_is_written_a_source_is_read(name: str, tokenizer: Tokenizer) -> None:
    [one] = make(name, {"source": "Good day.", "target": "Bonjour."}, tokenizer)
    assert text_of(tokenizer, one, 0) == "Good day."
    assert text_of(tokenizer, one, WRITTEN) == "Bonjour."
    assert one.marks[-1] == WRITTEN, "the end is learnt, too"


def test_a_long_translation_is_left_out_and_a_long_document_cut(tokenizer: Tokenizer) -> None:
    row = {"source": "word " * 100, "target": "mot"}
    assert make("translation", row, tokenizer, 32) == []
    [one] = make("summarisation", row, tokenizer, 32)
    assert (len(one.ids), text_of(tokenizer, one, WRITTEN)) == (32, "mot")


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "A model."},
    {"role": "user", "content": "And I?"},
    {"role": "assistant", "content": "A reader."},
]


@pytest.mark.parametrize("template", ["plain", "chatml"])
def test_only_the_assistants_turns_are_learnt(template: str, tokenizer: Tokenizer) -> None:
    [one] = make("chat", {"messages": MESSAGES}, tokenizer, 256, options={"template": template})
    learnt = text_of(tokenizer, one, WRITTEN)
    assert "A model." in learnt
    assert "A reader." in learnt
    assert not any(other in learnt for other in ("brief", "Who", "user", "assistant"))
    assert all(part in text_of(tokenizer, one, 0) for part in ("Be brief.", "Who are you?", "assistant"))


def test_sharegpt_and_alpaca_are_the_same_conversations(tokenizer: Tokenizer) -> None:
    ours = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    sharegpt = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    made = make("chat", {"messages": ours}, tokenizer)
    assert made == make("chat", {"messages": sharegpt}, tokenizer)
    assert made == make("chat", {"instruction": "Hi", "input": "", "output": "Ho"}, tokenizer)


def test_a_long_conversation_keeps_its_end_and_what_the_system_said(tokenizer: Tokenizer) -> None:
    long = [MESSAGES[0], *MESSAGES[1:3] * 20, *MESSAGES[3:]]
    [one] = make("chat", {"messages": long}, tokenizer, 64)
    said = tokenizer.decode(one.ids)
    assert "Be brief." in said
    assert said.endswith("A reader.")


def test_a_prompt_is_what_training_shows_before_an_answer(tokenizer: Tokenizer) -> None:
    reader = Reader(tokenizer, 256, options={"template": "plain"})
    [one] = make("chat", {"messages": MESSAGES}, tokenizer, 256)
    asked = chat.prompt(chat.turns_of({"messages": MESSAGES[:4]}), reader, 256)
    assert one.ids[: len(asked)] == asked


WRONG = [
    ("classification", {"text": 5.5j, "label": "a"}, "'text' is of type complex, not text"),
    ("classification", {"label": "a"}, "'text' is missing, not text"),
    ("classification", {"text": "x", "label": "c"}, "unknown label 'c'"),
    ("tagging", {"words": ["a"], "tags": ["a", "b"]}, "1 words, but 2 tags"),
    ("tagging", {"words": 5, "tags": []}, "'words' is of type int, not a list"),
    ("relation_extraction", {"text": "an adage", "head": "Ada", "tail": "an"}, "head 'Ada' does not stand"),
    ("relation_extraction", {"text": "a b", "head": "a", "tail": ""}, "tail '' does not stand"),
    ("relation_extraction", {"text": "a b", "head": "a b", "tail": "b"}, "head and tail overlap"),
    ("relation_extraction", {"text": "a b", "head": [0, 9], "tail": "b"}, "from 0 to 9 of 3 characters"),
    ("relation_extraction", {"text": "a b", "head": [0], "tail": "b"}, "'head' is no [start, stop]"),
    ("relation_extraction", {"text": "a b", "head": "a"}, "'tail' is missing, not text"),
    ("relation_extraction", {"text": "a b", "head": "a", "tail": "b", "relation": "c"}, "unknown label 'c'"),
    (
        "question_answering",
        {"question": "?", "context": "x", "answers": "y"},
        "does not stand in the context",
    ),
    ("question_answering", {"question": "?", "context": "x", "answers": []}, "no answer"),
    ("translation", {"source": "x", "target": None}, "'target' is missing"),
    ("chat", {"messages": ["hello"]}, "a message is no object"),
    ("chat", {"messages": [{"role": "user"}]}, "lacks its role or content"),
    ("chat", {}, "neither messages nor instruction"),
]


@pytest.mark.parametrize(("name", "row", "what"), WRONG)
def test_a_row_that_is_none(name: str, row: dict[str, Any], what: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(Wrong) as caught:
        make(name, row, tokenizer, labels=("a", "b"))
    assert what in caught.value.args[0]
    assert caught.value.args[1]


def lines(path: Path, *rows: str) -> str:
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return str(path)


def test_a_prepared_data_set_names_task_and_labels(tmp_path: Path, tiny_data: Path) -> None:
    rows = [f"film {n} was dull\tbad" if n % 2 else f"film {n} was fine\tgood" for n in range(60)]
    source = lines(tmp_path / "films.tsv", "review\tverdict", *rows)
    setting = setting_of("classification", ["text=review", "label=verdict"], max_tokens=32)
    for workers, unit_bytes in ((1, None), (2, 300)):
        out = tmp_path / f"out-{workers}"
        prepare([source], out, tokenizer=tiny_data / "tokenizer", task=setting, workers=workers,
                unit_bytes=unit_bytes, progress=False)  # fmt: skip
    dataset = TokenDataset.open(tmp_path / "out-1")
    task = dataset.header.task
    assert task is not None
    assert (task.name, task.labels, task.max_tokens) == ("classification", ("bad", "good"), 32)
    split = dataset.split("train")
    [first] = {int(m) for m in split.read_marks(0, 1)}
    assert first in (1, 2)
    assert split.read(0, split.num_tokens).max() < dataset.vocab_size, "marks are no part of the ids"
    other = TokenDataset.open(tmp_path / "out-2").split("train")
    assert (other.read_marks(0, 50) == split.read_marks(0, 50)).all(), "whatever the workers"
    dataset.verify()


@pytest.mark.parametrize(
    ("rows", "options", "what"),
    [
        (["text\tlabel", "fine\tgood"], ["label=stars"], r"no column 'stars'.*--column"),
        (["text\tlabel"], [], r"films.tsv: no labels in the input"),
        (["text\tlabel", *["fine\tgood"] * 3], [], '"good" is the label everywhere.*--column'),
        (["text\tlabel", "fine\tgood", "dull\t"], [], r"'label' is empty"),
        (
            ["text\tlabel", *[f"film {n}\treview {n}" for n in range(40)]],
            [],
            "40 different labels in 40 .*once",
        ),
        (["text\tlabel", *[f"film\t{n % 60 / 7:.2f}" for n in range(600)]], [], "60 different.*a quantity"),
        (["text\tlabel\ttext", "fine\tgood\tdull"], [], "films.tsv:1: two columns are named 'text'"),
        (["text\tlabel", "fine\tgood", "dull\tmeh"], ["labels"], r"films.tsv:3: unknown label 'meh'"),
    ],
)
def test_a_wrong_table_is_one_line(
    rows: list[str], options: list[str], what: str, tmp_path: Path, tiny_data: Path
) -> None:
    labels = "good,bad" if options == ["labels"] else None
    setting = setting_of("classification", [o for o in options if "=" in o], labels)
    source = lines(tmp_path / "films.tsv", *rows)
    with pytest.raises(DataProblem, match=what):
        prepare([source], tmp_path / "out", tokenizer=tiny_data / "tokenizer", task=setting, progress=False)


@pytest.mark.parametrize("role", ["robot", "user"])
def test_conversations_without_an_assistant_are_one_line(role: str, tmp_path: Path, tiny_data: Path) -> None:
    source = lines(tmp_path / "chat.jsonl", json.dumps({"messages": [{"role": role, "content": "hello"}]}))
    with pytest.raises(DataProblem, match=r"none has a turn of the assistant.*roles"):
        prepare(
            [source],
            tmp_path / "out",
            tokenizer=tiny_data / "tokenizer",
            task=setting_of("chat"),
            progress=False,
        )


def test_rows_that_become_no_example_are_counted(tmp_path: Path, tiny_data: Path) -> None:
    said = [json.dumps({"messages": [{"role": role, "content": "Hi."} for role in roles]})
            for roles in (("user", "assistant"), ("user",), ("user", "assistant"))]  # fmt: skip
    made = prepare([lines(tmp_path / "chat.jsonl", *said)], tmp_path / "out", task=setting_of("chat"),
                   tokenizer=tiny_data / "tokenizer", validation_fraction=0, progress=False)  # fmt: skip
    assert made.splits["train"].documents == 2
    assert "1 row without an example left out" in made.line


def test_a_command_may_be_repeated_sharded_and_corrected(tmp_path: Path, tiny_data: Path) -> None:
    rows = [f"film {number} was {'fine' if number % 2 else 'dull'}\t{number % 2}" for number in range(20)]
    source, out = lines(tmp_path / "films.tsv", "text\tlabel", *rows), tmp_path / "out"

    def made(out: Path, max_tokens: int = 64, **more: Any) -> Summary:
        setting = setting_of("classification", labels="0,1", max_tokens=max_tokens)
        return prepare([source], out, tokenizer=tiny_data / "tokenizer", task=setting, progress=False,
                       validation_fraction=0, unit_bytes=200, **more)  # fmt: skip

    first = made(out)
    assert "was there already" not in first.line
    assert "as long as --max-tokens allows" not in first.line
    assert "was there already" in made(out).line
    with pytest.raises(DataProblem, match=re.escape("(max_tokens was 64, is 8)")):
        made(out, max_tokens=8)
    assert "20 examples as long as --max-tokens allows" in made(out, max_tokens=8, force=True).line
    shards = [made(tmp_path / "shards", shard=f"{number}/2") for number in range(2)]
    assert sum(shard.splits["train"].documents for shard in shards) == 20
    assert made(tmp_path / "shards").splits["train"].tokens == first.splits["train"].tokens


def test_a_command_that_made_no_example_is_in_nobodys_way(tmp_path: Path, tiny_data: Path) -> None:
    turns = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "Nobody at all."}]
    source = lines(tmp_path / "chat.jsonl", json.dumps({"messages": turns}))

    def made(max_tokens: int) -> Summary:
        return prepare([source], tmp_path / "out", tokenizer=tiny_data / "tokenizer", progress=False,
                       task=setting_of("chat", max_tokens=max_tokens), validation_fraction=0)  # fmt: skip

    with pytest.raises(DataProblem, match="no row became an example"):
        made(8)
    assert made(128).splits["train"].documents == 1


def test_an_evaluation_set_without_rows_is_none(tmp_path: Path, tiny_data: Path) -> None:
    source = lines(tmp_path / "films.tsv", "text\tlabel", "fine\tgood", "dull\tbad")
    (tmp_path / "test.tsv").touch()
    with pytest.raises(DataProblem, match=r"test\.tsv: has nothing to keep out"):
        prepare([source], tmp_path / "out", tokenizer=tiny_data / "tokenizer", progress=False, workers=1,
                task=setting_of("classification"), exclude=[str(tmp_path / "test.tsv")])  # fmt: skip


def test_labels_that_can_be_learnt() -> None:
    for found in (
        "abcdefghij",
        "ab" * 3,
        map(str, [n / 2 for n in range(10)] * 2),
        map(str, [*range(99)] * 2),
    ):
        require_learnable(Counter(found), "films.tsv")


def test_labels_may_have_commas_and_be_true_or_false(tokenizer: Tokenizer) -> None:
    assert setting_of("classification", labels='no, "yes, but",maybe').labels == ("no", "yes, but", "maybe")
    for wrong in ('"yes, but', "good", "a,,b", '"a"b,c'):
        with pytest.raises(ConfigProblem, match="--labels"):
            setting_of("classification", labels=wrong)
    with pytest.raises(Wrong, match="'label' is missing"):  # as pandas writes what is not there
        make("classification", {"text": "fine", "label": float("nan")}, tokenizer)
    [one] = make("classification", {"text": "fine", "label": True}, tokenizer, labels=("false", "true"))
    assert one.marks[0] == 2


def test_labels_of_another_command_are_forgotten(tmp_path: Path, tiny_data: Path) -> None:
    source = lines(tmp_path / "films.tsv", "text\tlabel\tstars", "fine\tgood\t5", "dull\tbad\t1")

    def made(column: str, **more: Any) -> tuple[str, ...]:
        setting = setting_of("classification", [f"label={column}"])
        prepare([source], tmp_path / "out", tokenizer=tiny_data / "tokenizer", task=setting, progress=False,
                validation_fraction=0, **more)  # fmt: skip
        task = TokenDataset.open(tmp_path / "out").header.task
        assert task is not None
        return task.labels

    assert made("stars") == ("1", "5")
    work = tmp_path / "out" / ".prepare"  # as a kill leaves it
    work.mkdir()
    (work / "prepare.json").write_text("{}")
    (work / "labels.json").write_text('["1", "5"]')
    assert made("label", force=True) == ("bad", "good")


@pytest.mark.parametrize("name", ["translation", "chat", "classification"])
@pytest.mark.parametrize("given", [True, False])
def test_an_empty_file_is_named(name: str, given: bool, tmp_path: Path, tiny_data: Path) -> None:
    (tmp_path / "rows.jsonl").touch()
    model = tiny_data / "tokenizer" if given else None
    with pytest.raises(DataProblem, match=r"rows\.jsonl: no "):
        prepare(
            [str(tmp_path / "rows.jsonl")],
            tmp_path / "out",
            tokenizer=model,
            task=setting_of(name),
            progress=False,
        )


def test_text_has_no_columns(tmp_path: Path, tiny_data: Path) -> None:
    with pytest.raises(DataProblem, match="has no columns"):
        prepare([lines(tmp_path / "a.txt", "hello")], tmp_path / "out", tokenizer=tiny_data / "tokenizer",
                task=setting_of("translation"), progress=False)  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"name": "clasification"}, "unknown --task 'clasification'"),
        ({"name": "chat", "columns": ["text=x"]}, "--task chat reads no 'text'"),
        ({"name": "chat", "columns": ["messages"]}, "is not NAME=COLUMN"),
        ({"name": "translation", "labels": "a,b"}, "--labels does nothing"),
        ({"name": "classification", "labels": "a,a"}, "one twice"),
        ({"name": "translation", "template": "plain"}, "--template does nothing"),
        ({"name": "chat", "template": "llama"}, "unknown --template 'llama'"),
        ({"name": "chat", "max_tokens": 3}, "--max-tokens is 3"),
    ],
)
def test_a_wrong_setting_is_one_line(arguments: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigProblem, match=what):
        setting_of(**arguments)
