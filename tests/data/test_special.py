import io
import json
import subprocess
import sys
from importlib import resources

import numpy as np
import pytest
from sentencepiece import SentencePieceTrainer

from bigtfm.config.problems import ConfigProblem, DataProblem
from bigtfm.config.run import RunConfig
from bigtfm.data.masking import PAIR_TOKENS
from bigtfm.data.special import special_ids
from bigtfm.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer
from bigtfm.data.train_tokenizer import train_sentencepiece

CORPUS = resources.files("bigtfm.data") / "corpus" / "state_of_the_union.jsonl"
SPEECHES = [json.loads(line)["text"] for line in CORPUS.read_text(encoding="utf-8").splitlines()[:4]]
PLAIN = SentencePieceTokenizer(train_sentencepiece([s.encode() for s in SPEECHES], vocab_size=700))
NAMES = {"eos_token": "</s>", "bos_token": "<s>"}


def run_config(family="bert", *, objective=None, **model):
    model = {"family": family, "max_seq_len": 64, **model}
    if (objective or {}).get("next_sentence"):
        model |= {"next_sentence": True, "token_types": 2}
    return RunConfig.model_validate({"model": model, "objective": objective or {}})


def with_pieces(*pieces):
    """A sentencepiece model with user-defined pieces."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(SPEECHES[0].split(". ")),
        model_writer=model,
        vocab_size=400,
        user_defined_symbols=list(pieces),
        minloglevel=2,
    )
    return SentencePieceTokenizer(model.getvalue())


def hugging_face(model, special=("<s>", "</s>"), pre_tokenizer=None):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(getattr(tokenizers.models, model)(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizer or tokenizers.pre_tokenizers.Whitespace()
    trainer = getattr(tokenizers.trainers, f"{model.replace('BPE', 'Bpe')}Trainer")
    tokens = ["<unk>", *special]
    tokenizer.train_from_iterator(
        [*SPEECHES, "a\nb"], trainer(vocab_size=600, special_tokens=tokens, show_progress=False)
    )
    return HuggingFaceTokenizer(tokenizer.to_str().encode(), NAMES)


def test_what_a_tokenizer_lacks_stands_behind_its_vocabulary():
    """So one data set serves all families."""
    ids = special_ids(PLAIN, run_config("gpt"))
    assert (ids.vocab_size, ids.mask, ids.sentinels) == (700, None, ())
    for run in (run_config("bert"), run_config("encoder_decoder", objective={"kind": "infilling"})):
        ids = special_ids(PLAIN, run)
        assert (ids.vocab_size, ids.mask, ids.bos, ids.eos, ids.start) == (701, 700, 1, 2, 1)
        assert np.flatnonzero(ids.is_special).tolist() == [0, 1, 2, 700]
        assert ids.ordinary.tolist() == list(range(3, 700))
        assert ids.word_starts is None
    ids = special_ids(PLAIN, run_config("encoder_decoder", decoder_start_id=0))
    assert ids.vocab_size == 800
    assert ids.sentinels == tuple(range(799, 699, -1))  # as T5's: the first is the last id
    assert (ids.mask, ids.start) == (None, 0)
    dense = {"mask_fraction": 0.3, "span_length": 1.0}
    ids = special_ids(PLAIN, run_config("encoder_decoder", objective=dense, max_seq_len=1024))
    assert len(ids.sentinels) == 307  # what 1024 tokens may need


def test_what_it_has_is_found_by_name():
    tokenizer = with_pieces("[MASK]", "<pad>")
    ids = special_ids(tokenizer, run_config())
    assert ids.mask == tokenizer.token_id("[MASK]") < ids.vocab_size == 400
    assert ids.is_special[[ids.mask, tokenizer.token_id("<pad>")]].all()
    assert not np.isin([ids.mask, 0, 1, 2], ids.ordinary).any()
    assert tokenizer.token_id("no such piece") is None
    assert tokenizer.token_id("<unk>") == 0

    t5 = with_pieces(*(f"<extra_id_{n}>" for n in (2, 1, 0)))
    ids = special_ids(t5, run_config("encoder_decoder"))
    assert ids.sentinels == tuple(t5.token_id(f"<extra_id_{n}>") for n in range(3))
    assert ids.sentinels[0] > ids.sentinels[2]
    assert ids.vocab_size == 400
    with pytest.raises(DataProblem, match="has 3 sentinels") as caught:
        special_ids(t5, run_config("encoder_decoder", max_seq_len=256))
    assert "span_length" in caught.value.fix


def test_a_stated_vocabulary_is_the_models():
    ids = special_ids(PLAIN, run_config(vocab_size=1000))
    assert (ids.vocab_size, len(ids.is_special), ids.mask) == (1000, 1000, 700)
    assert ids.is_special[700:].all()  # a random token is one that the data have
    with pytest.raises(ConfigProblem, match="vocab_size 700 is less than the 701") as caught:
        special_ids(PLAIN, run_config(vocab_size=700))
    assert "701" in caught.value.fix
    with pytest.raises(ConfigProblem, match="decoder_start_id 800 is outside"):
        special_ids(PLAIN, run_config("encoder_decoder", decoder_start_id=800))
    assert special_ids(PLAIN, run_config("encoder_decoder", decoder_start_id=799)).start == 799


@pytest.mark.parametrize(
    ("family", "objective", "least"),
    [
        ("bert", {}, 2),
        ("bert", {"next_sentence": 1.0}, PAIR_TOKENS),
        ("encoder_decoder", {}, 2),
        ("encoder_decoder", {"kind": "infilling"}, 2),
    ],
)
def test_a_sequence_that_is_too_short(family, objective, least):
    special_ids(PLAIN, run_config(family, objective=objective, max_seq_len=max(least, 3)))
    with pytest.raises(ConfigProblem, match="too short") as caught:
        special_ids(PLAIN, run_config(family, objective=objective, max_seq_len=least - 1))
    assert str(least) in caught.value.fix


def test_targets_that_are_too_long_for_the_decoder():
    most = {"mask_fraction": 0.5, "span_length": 1.0}
    with pytest.raises(ConfigProblem, match=r"up to 65 tokens, more than model\.max_seq_len 64"):
        special_ids(PLAIN, run_config("encoder_decoder", objective=most))
    special_ids(PLAIN, run_config("encoder_decoder", objective={**most, "mask_fraction": 0.48}))


def test_nothing_but_special_tokens():
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    with pytest.raises(DataProblem, match="every token is a special one"):
        special_ids(HuggingFaceTokenizer(tokenizer.to_str().encode(), NAMES), run_config())


def words(tokenizer, text, starts):
    """The text of each word of `text`."""
    out = []
    for token in tokenizer.encode(text):
        if starts[token] or not out:
            out.append([])
        out[-1].append(token)
    return [tokenizer.decode(word) for word in out]


def whole_words(tokenizer):
    ids = special_ids(tokenizer, run_config(objective={"whole_words": True}))
    assert len(ids.word_starts) == ids.vocab_size
    return ids.word_starts


def test_words_of_sentencepiece():
    text = "Unbelievably good citizens\nof the  Republic, today"
    assert words(PLAIN, text, whole_words(PLAIN)) == [
        "Unbelievably", " good", " citizens", "\nof", " the", " ", " Republic,", " today"
    ]  # fmt: skip
    assert len(PLAIN.encode(text)) > 12  # words have several tokens


def test_words_of_hugging_face_tokenizers():
    tokenizers = pytest.importorskip("tokenizers")
    text = "unbelievable citizens of Nebraska"
    word_piece = hugging_face("WordPiece")
    starts = whole_words(word_piece)
    pieces = [word_piece._tokenizer.id_to_token(i) for i in word_piece.encode(text)]
    assert [bool(starts[i]) for i in word_piece.encode(text)] == [p[:2] != "##" for p in pieces]
    assert sum(p[:2] == "##" for p in pieces) > 3

    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_bpe = hugging_face("BPE", pre_tokenizer=byte_level)
    byte_bpe._tokenizer.decoder = tokenizers.decoders.ByteLevel()
    text = "unbelievable citizens\nof Nebraska"
    assert words(byte_bpe, text, whole_words(byte_bpe)) == ["unbelievable", " citizens", "\nof", " Nebraska"]

    metaspace = hugging_face("BPE", pre_tokenizer=tokenizers.pre_tokenizers.Metaspace())
    metaspace._tokenizer.decoder = tokenizers.decoders.Metaspace()
    text = "unbelievable citizens of Nebraska"
    assert words(metaspace, text, whole_words(metaspace)) == text.split()

    assert whole_words(hugging_face("WordLevel")).all()


def test_a_tokenizer_that_hides_where_words_begin():
    with pytest.raises(DataProblem, match="where words begin") as caught:
        whole_words(hugging_face("BPE"))  # blanks are dropped, and nothing says where
    assert "whole_words" in caught.value.fix


def test_special_tokens_of_hugging_face_tokenizers():
    tokenizer = hugging_face("WordPiece", special=("<s>", "</s>", "[MASK]", "[PAD]", "<tool>"))
    assert tokenizer.special == {0, 1, 2, 3, 4, 5}
    ids = special_ids(tokenizer, run_config())
    assert (ids.mask, ids.vocab_size) == (3, tokenizer.vocab_size)
    assert ids.ordinary.min() == 6
    assert tokenizer.token_id("no such token") is None


def test_no_torch_is_needed():
    code = "import sys, bigtfm.data.special, bigtfm.data.objectives; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
