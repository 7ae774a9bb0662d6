import json
from importlib import resources

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from bigtfm.config.problems import DataProblem
from bigtfm.data.tokenizer import SEGMENT_BYTES, SentencePieceTokenizer, load_tokenizer, segments
from bigtfm.data.train_tokenizer import train_sentencepiece

CORPUS = resources.files("bigtfm.data") / "corpus" / "state_of_the_union.jsonl"
SPEECHES = [json.loads(line)["text"].encode() for line in CORPUS.read_text(encoding="utf-8").splitlines()]
MODELS = {
    kind: train_sentencepiece(SPEECHES[:8], vocab_size=800, model_type=kind) for kind in ("bpe", "unigram")
}
TOKENIZERS = {kind: SentencePieceTokenizer(model) for kind, model in MODELS.items()}
AWKWARD = [
    b"",
    b"a\xff\xfeb",
    b"\xe2\x96",
    b"\xed\xa0\x80",  # half a surrogate pair
    "\u2581 \u2581\u2581a \u2581".encode(),
    b"\0a\0",
    b"  a   b    \n\n\n\t c \r\n ",
    b"<s></s> <unk> <pad> <0x41>",
    "\u2585 \u2047 \ufeff caf\u00e9 \u6f22\u5b57 \U0001f600".encode(),
    bytes(range(256)) * 20,
    b" " * 5000,
    b"x" * 200_000,
]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("data", AWKWARD, ids=lambda data: repr(data[:16]))
def test_awkward_bytes_come_back(kind, data):
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(data)
    assert tokenizer.decode_bytes(ids) == data
    assert tokenizer.decode(ids) == data.decode("utf-8", "replace")
    assert not {tokenizer.bos_id, tokenizer.eos_id, 0} & set(ids)  # no special piece out of text


PIECES = st.sampled_from(
    [b" ", b"\n", "\u2581".encode(), b"<s>", b"<0x41>", b"\xff", b"\0", b"the ", "\u00e9".encode()]
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.one_of(st.binary(max_size=12), st.text(max_size=12).map(str.encode), PIECES)).map(b"".join)
)
def test_any_bytes_come_back(data):
    for tokenizer in TOKENIZERS.values():
        assert tokenizer.decode_bytes(tokenizer.encode(data)) == data


def test_bare_sentencepiece_does_not_bring_them_back():
    """Negative control: without the detour over byte pieces these bytes are lost."""
    bare = SentencePieceProcessor(model_proto=MODELS["bpe"])
    for data in (b"a\xff\xfeb", "\u2581a".encode()):
        assert bare.decode(bare.encode(data)).encode() != data


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_segments_change_no_token(kind):
    bare = SentencePieceProcessor(model_proto=MODELS[kind])
    text = b"\n\n".join(SPEECHES[8:10]) + b"  two  blanks \n  and a line " * 300
    assert len(text) > 20 * SEGMENT_BYTES
    assert TOKENIZERS[kind].encode(text) == bare.encode(text)


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="ab \n\u6f22", max_size=200).map(str.encode), st.integers(1, 20))
def test_segments_join_to_the_text(data, target):
    parts = list(segments(data, target))
    assert b"".join(parts) == data
    assert all(part for part in parts)
    assert all(part[:1] in b" \n" for part in parts[1:])


def test_batch_equals_one_by_one():
    tokenizer = TOKENIZERS["bpe"]
    documents = [*AWKWARD, *SPEECHES[:3]]
    batch = tokenizer.encode_batch(documents)
    assert [ids.tolist() for ids in batch] == [tokenizer.encode(document) for document in documents]
    assert all(ids.dtype == np.int32 for ids in batch)


def test_the_same_sample_gives_the_same_model():
    for kind, model in MODELS.items():
        assert train_sentencepiece(SPEECHES[:8], vocab_size=800, model_type=kind) == model


def test_pieces_and_default_size():
    tokenizer = SentencePieceTokenizer(train_sentencepiece(SPEECHES, vocab_size=None))
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (2048, 1, 2)
    assert tokenizer.lossless
    assert len(tokenizer.encode(SPEECHES[0])) < len(SPEECHES[0]) / 3  # it has learned something


def test_default_size_shrinks_to_a_small_text():
    tokenizer = SentencePieceTokenizer(train_sentencepiece([b"hello world, hello there"], vocab_size=None))
    assert 260 <= tokenizer.vocab_size < 400


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_size_that_the_text_cannot_give(kind):
    with pytest.raises(
        DataProblem, match=r"too small for a vocabulary of 50000: \d+ is the largest"
    ) as caught:
        train_sentencepiece(SPEECHES[:1], vocab_size=50000, model_type=kind)
    largest = int(caught.value.fix.split()[2])
    train_sentencepiece(SPEECHES[:1], vocab_size=largest, model_type=kind)
    with pytest.raises(DataProblem, match="can't hold") as caught:
        train_sentencepiece(SPEECHES[:1], vocab_size=265, model_type=kind)
    train_sentencepiece(SPEECHES[:1], vocab_size=int(caught.value.fix.split()[2]), model_type=kind)


@pytest.mark.parametrize("sample", [[], [b"\xff\xfe"]])
def test_nothing_to_learn_from(sample):
    with pytest.raises(DataProblem, match="no text to learn from"):
        train_sentencepiece(sample, vocab_size=None)


def test_training_is_silent(capfd):
    train_sentencepiece(SPEECHES[:1], vocab_size=400)
    assert capfd.readouterr() == ("", "")


def test_save_and_load(tmp_path):
    TOKENIZERS["bpe"].save(tmp_path / "new" / "folder")
    for path in (tmp_path / "new" / "folder", tmp_path / "new" / "folder" / "tokenizer.model"):
        loaded = load_tokenizer(path)
        assert loaded.identity == TOKENIZERS["bpe"].identity
        assert loaded.encode("text") == TOKENIZERS["bpe"].encode("text")


def test_a_foreign_sentencepiece_model(tmp_path):
    """NFKC, dummy prefix, no bytes, no BOS: used as it is, with EOS as BOS."""
    SentencePieceTrainer.train(
        sentence_iterator=iter(SPEECHES[0].decode().split(". ")),
        model_prefix=str(tmp_path / "foreign"),
        vocab_size=300,
        bos_id=-1,
        minloglevel=2,
    )
    tokenizer = load_tokenizer(tmp_path / "foreign.model")
    bare = SentencePieceProcessor(model_file=str(tmp_path / "foreign.model"))
    assert not tokenizer.lossless
    assert tokenizer.bos_id == tokenizer.eos_id
    assert tokenizer.encode(SPEECHES[1]) == bare.encode(SPEECHES[1].decode())
    assert tokenizer.decode(tokenizer.encode("the people")) == "the people"
    assert tokenizer.decode_bytes(tokenizer.encode(b"the people\xff")).startswith(b"the people")


def test_damaged_models(tmp_path):
    for name, content in (
        ("empty.model", b""),
        ("bad.model", b"garbage"),
        ("bad.json", b"{"),
        ("x.json", b""),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(DataProblem) as caught:
            load_tokenizer(path)
        assert str(path) in caught.value.line
        assert "\n" not in caught.value.line
    with pytest.raises(DataProblem, match="no such tokenizer"):
        load_tokenizer(tmp_path / "missing")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataProblem):
        load_tokenizer(tmp_path / "folder")


@pytest.fixture
def byte_bpe(tmp_path):
    """A GPT-2 like tokenizer.json."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        (speech.decode() for speech in SPEECHES[:3]),
        vocab_size=500,
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_hugging_face_tokenizer(byte_bpe, tmp_path):
    tokenizer = load_tokenizer(byte_bpe / "tokenizer.json")
    assert tokenizer.kind == "huggingface"
    assert tokenizer.vocab_size == 500
    assert tokenizer.bos_id == tokenizer.eos_id == 0  # <|endoftext|>
    text = "We the people \u2581 <|endoftext|> caf\u00e9"
    ids = tokenizer.encode(text)
    assert 0 not in ids  # a document can't forge the end of itself
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch([b"a b", b""])[1].tolist() == []
    tokenizer.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert (again.identity, again.encode(text)) == (tokenizer.identity, ids)


def test_hugging_face_special_tokens_from_its_folder(byte_bpe):
    (byte_bpe / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": {"content": "a"}, "eos_token": "b"})
    )
    tokenizer = load_tokenizer(byte_bpe)
    assert (tokenizer.decode([tokenizer.bos_id]), tokenizer.decode([tokenizer.eos_id])) == ("a", "b")
    (byte_bpe / "tokenizer_config.json").write_text(json.dumps({"eos_token": "no such piece"}))
    with pytest.raises(DataProblem, match="no end-of-sequence token"):
        load_tokenizer(byte_bpe)


def test_transformers_reads_what_is_saved(byte_bpe, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = load_tokenizer(byte_bpe / "tokenizer.json")
    tokenizer.save(tmp_path / "saved")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert theirs("We the people", add_special_tokens=False)["input_ids"] == tokenizer.encode("We the people")
    assert theirs.eos_token_id == tokenizer.eos_id
