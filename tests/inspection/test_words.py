"""Tokens that a reader can tell apart, of each kind of tokenizer."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from bigtfm.data.tokenizer import HuggingFaceTokenizer, load_tokenizer
from bigtfm.inspection.pictures import drawable
from bigtfm.inspection.words import LONGEST, Words, legible


def special(mask=None, sentinels=()):
    return SimpleNamespace(mask=mask, sentinels=sentinels)


def hugging_face(vocabulary, model, **parts):
    ids = {piece: i for i, piece in enumerate(["<s>", "</s>", *vocabulary])}
    added = [
        {"id": i, "content": name, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False}
        for i, name in enumerate(("<s>", "</s>"))
    ]  # fmt: skip
    content = {"version": "1.0", "added_tokens": added, "model": model | {"vocab": ids}, **parts}
    return HuggingFaceTokenizer(json.dumps(content).encode(), {"bos_token": "<s>", "eos_token": "</s>"})


@pytest.fixture(scope="module")
def ours(tiny_data):
    return load_tokenizer(tiny_data / "tokenizer")


def test_words_of_our_tokenizer(ours):
    words = Words(ours, special(ours.vocab_size, (ours.vocab_size + 2, ours.vocab_size + 1)))
    ids = [ours.bos_id, *ours.encode("the people\n\tof"), ours.vocab_size, ours.vocab_size + 1, ours.eos_id]
    shown = words.text(ids)
    assert shown[0] == "<s>"
    assert "".join(shown[1:-3]) == "the·people↵→of"
    assert shown[-3:] == ["<mask>", "<extra_id_1>", "</s>"]
    assert [words.alone(i) for i in ids] == shown
    assert words.alone(ours.vocab_size + 7) == f"<{ours.vocab_size + 7}>"


def test_characters_of_several_tokens(ours):
    words = Words(ours, special())
    ids = ours.encode("a 你é")
    assert words.text(ids)[-5:] == ["你 1/3", "你 2/3", "你 3/3", "é 1/2", "é 2/2"]
    assert words.alone(ids[-1]) == "\\xa9"
    broken = ours.encode(b"\xe4\xbdthe")
    assert words.text(broken) == ["\\xe4", "\\xbd", *words.text(ours.encode("the"))]
    assert words.text(ours.encode(b"the\xe4")) == [*words.text(ours.encode("the")), "\\xe4"]
    assert words.text([*ours.encode(b"\xe4"), ours.eos_id]) == ["\\xe4", "</s>"]


def test_word_pieces():
    tokenizer = hugging_face(
        ["[UNK]", "play", "##ing", "."],
        {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
         "max_input_chars_per_word": 100},
    )  # fmt: skip
    assert Words(tokenizer, special()).text([0, 3, 4, 5, 2]) == ["<s>", "·play", "ing", "·.", "[UNK]"]


def test_byte_level_pieces():
    tokenizer = hugging_face(
        ["Ġthe", "ä", "½", "Ċ", "ł", "Ã©"],
        {"type": "BPE", "merges": []},
        decoder={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    )
    words = Words(tokenizer, special())
    assert words.text([2, 3, 4, 6, 5, 7]) == ["·the", "你 1/3", "你 2/3", "你 3/3", "↵", "é"]
    assert words.alone(3) == "\\xe4"


def test_every_byte_has_one_character_in_byte_level_pieces():
    """The table is the library's own."""
    import tokenizers

    from bigtfm.data.tokenizer import _byte_level_table

    table = _byte_level_table()
    assert table.keys() == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    assert sorted(table.values()) == [bytes([byte]) for byte in range(256)]
    decoder = tokenizers.decoders.ByteLevel()
    assert all(
        decoder.decode([character]) == byte.decode() for character, byte in table.items() if byte < b"\x80"
    )


def test_metaspace_pieces():
    tokenizer = hugging_face(
        ["▁the", "n", "<0xE4>"],
        {"type": "BPE", "merges": [], "byte_fallback": True},
        decoder={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    )
    assert Words(tokenizer, special()).text([2, 3, 4]) == ["·the", "n", "\\xe4"]


def test_what_has_no_picture_is_written_out():
    assert legible(" a\u202eb") == "·a\\u202eb", "it would turn the text behind it round"
    assert legible("\u200b") == "\\u200b"
    assert legible("\x07\r") == "␇␍"
    assert legible("\u0301") == "◌\u0301"
    assert legible("क्\u200dष") == "क्\u200dष", "within a word it belongs to the writing"
    assert legible("\u00a0") == "\\u00a0"
    assert len(legible("x" * 100)) == LONGEST
    assert legible("x" * 100).endswith("…")


def test_what_the_pictures_font_lacks_is_a_box():
    assert drawable("aé你↵·") == "aé□↵·"
