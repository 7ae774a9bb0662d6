"""A tokenizer as Hugging Face's fast one, with the same ids; and what a Hugging Face folder has for one.

A sentencepiece model becomes a tokenizer.json. Its pieces are written with blanks instead of word marks: then
no normaliser has to put the marks in, and a word mark that stands in the text stays one (byte pieces, as in
tokenizer.py). Two things differ, in unigram models alone: HF adds up scores in 64 bits, sentencepiece in 32,
so a run of one character may be cut at another place; and HF's charsmap loses a combining mark behind a
character that the map changes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bigtfm.config.problems import DataProblem
from bigtfm.data.special import MASK_NAMES, PAD_NAMES
from bigtfm.data.tokenizer import WORD_MARK, SentencePieceTokenizer, Tokenizer, load_tokenizer

# Everything that a Hugging Face folder may hold of a tokenizer.
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
    "source.spm",
    "target.spm",
    "chat_template.jinja",
)
_PIECE = {"normal": 1, "unknown": 2, "control": 3, "user_defined": 4, "byte": 6}  # sentencepiece_model.proto
_UNIGRAM, _BPE = 1, 2
UNKNOWN_NAMES = ("<unk>", "[UNK]", "<|unk|>")
PROBE = (
    "",
    " ",
    " The  quick brown fox\n\n\tjumps over 12,345.67 lazy dogs!  ",
    "naïve façade, Æsop, Straße, ﬁn, ½, Å",
    "Ещё один текст; 日本語のテキスト; 한국어; हिन्दी; العربية",
    "👩‍👩‍👧‍👦 🇫🇷 🙂\u200b\u00a0\ufeff",
    "a\u2581b <0x41> <0x0A",
    "\r\n\x00\x7f",
)


def read_tokenizer(folder: Path, model_type: str) -> tuple[Tokenizer | None, str]:
    """The tokenizer of a Hugging Face folder, or None and why there is none.

    Raises:
        DataProblem: it is damaged, or makes nothing of a text.
    """
    tokenizer, missing = _read(folder, model_type)
    if tokenizer is not None and not tokenizer.encode(PROBE[2]):
        raise DataProblem(
            f"its tokenizer makes no token of {PROBE[2].strip()!r}",
            where=str(folder),
            fix="restore the tokenizer's files, or remove them to import the weights alone",
        )
    return tokenizer, missing


def _read(folder: Path, model_type: str) -> tuple[Tokenizer | None, str]:
    if (folder / "tokenizer.json").is_file():
        return load_tokenizer(folder), ""
    for name in ("tokenizer.model", "spiece.model"):
        if (folder / name).is_file():
            return load_tokenizer(folder / name), ""
    if (folder / "source.spm").is_file():
        return _marian(folder)
    vocabulary = "vocab.txt" if model_type == "bert" else "vocab.json"  # WordPiece's is BERT's alone
    if (folder / vocabulary).is_file():
        return load_tokenizer(folder), ""  # by transformers
    return None, "no tokenizer found"


def hf_files(
    tokenizer: Tokenizer,
    added: Mapping[int, str],
    *,
    closes: bool,
    token_types: bool = False,
    pads: bool = True,
    longest: int | None = None,
) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json, as AutoTokenizer loads them.

    added: ids behind the tokenizer's vocabulary, and their names. closes: EOS follows a text; BOS leads it
    anyway. token_types: the model tells sentence A from B. pads: whether a token may pad. longest: tokens of
    a task's example, around which stands what ours have, whatever the tokenizer's own file says.

    Raises:
        DataProblem: the tokenizer can't be converted exactly.
    """
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as FastTokenizer

    if isinstance(tokenizer, SentencePieceTokenizer):
        fast = from_sentencepiece(tokenizer.files["tokenizer.model"])
        _require_same_ids(fast, tokenizer)
    else:
        fast = FastTokenizer.from_buffer(tokenizer.files["tokenizer.json"])
    if isinstance(tokenizer, SentencePieceTokenizer) or longest is not None:
        bos, eos = ((fast.id_to_token(i), i) for i in (tokenizer.bos_id, tokenizer.eos_id))
        fast.post_processor = _template(bos, eos, closes)
    for i, name in sorted(added.items()):  # a blank before a mask belongs to what it stands for
        fast.add_special_tokens([AddedToken(name, special=True, normalized=False, lstrip=True)])
        assert fast.token_to_id(name) == i, "added ids follow the vocabulary without a gap"
    names = {
        "bos_token": tokenizer.bos_id,
        "eos_token": tokenizer.eos_id,
        "pad_token": pad_id(tokenizer) if pads else None,
        "unk_token": _first(tokenizer, UNKNOWN_NAMES),
        "mask_token": next((i for name in MASK_NAMES if (i := fast.token_to_id(name)) is not None), None),
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", *(["token_type_ids"] if token_types else []), "attention_mask"],
        **({"model_max_length": longest} if longest is not None else {}),
        **{name: fast.id_to_token(i) for name, i in names.items() if i is not None},
    }
    return {
        "tokenizer.json": fast.to_str(pretty=True).encode(),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n",
    }


def pad_id(tokenizer: Tokenizer) -> int:
    """What Hugging Face pads with: the padding token, else the unknown one, else EOS. We never pad."""
    for names in (PAD_NAMES, UNKNOWN_NAMES):
        if (token := _first(tokenizer, names)) is not None:
            return token
    return tokenizer.eos_id


def _first(tokenizer: Tokenizer, names: Iterable[str]) -> int | None:
    return next((token for name in names if (token := tokenizer.token_id(name)) is not None), None)


def _template(bos: tuple[str, int], eos: tuple[str, int], closes: bool) -> Any:
    """What stands around a text, and a pair of texts, as in our data."""
    from tokenizers.processors import TemplateProcessing

    end = f" {eos[0]}" if closes else ""
    return TemplateProcessing(
        single=f"{bos[0]} $A{end}",
        pair=f"{bos[0]} $A{end} $B:1{end and end + ':1'}",
        special_tokens=list(dict([bos, eos]).items()),
    )


def from_sentencepiece(model: bytes) -> Any:
    """A tokenizers.Tokenizer that gives the ids of a sentencepiece model.

    Raises:
        DataProblem: the model has something that Hugging Face's form can't say.
    """
    from sentencepiece import sentencepiece_model_pb2 as proto
    from tokenizers import AddedToken, decoders, models
    from tokenizers import Tokenizer as FastTokenizer

    parsed = proto.ModelProto.FromString(model)
    spec, trainer, pieces = parsed.normalizer_spec, parsed.trainer_spec, list(parsed.pieces)
    defined = [piece.piece for piece in pieces if piece.type == _PIECE["user_defined"]]
    obstacles = {
        "it is neither BPE nor unigram": trainer.model_type not in (_UNIGRAM, _BPE),
        "its blanks belong to the word before": trainer.treat_whitespace_as_suffix,
        "its blanks are not marked": not spec.escape_whitespaces,
        "it has unused pieces": any(piece.type not in _PIECE.values() for piece in pieces),
        "it normalises around user-defined pieces": bool(defined)
        and (spec.add_dummy_prefix or spec.remove_extra_whitespaces or bool(spec.precompiled_charsmap)),
    }
    if reasons := [reason for reason, stands in obstacles.items() if stands]:
        fix = "keep the sentencepiece model beside the export, for sentencepiece itself"
        raise DataProblem(f"can't become a tokenizer.json: {reasons[0]}", where="tokenizer", fix=fix)

    vocabulary = [(_text(piece), piece.score) for piece in pieces]
    normal = [
        text for (text, _), piece in zip(vocabulary, pieces, strict=True) if piece.type == _PIECE["normal"]
    ]
    unknown = next(i for i, piece in enumerate(pieces) if piece.type == _PIECE["unknown"])
    bytes_too = trainer.byte_fallback
    if trainer.model_type == _BPE:
        fast = FastTokenizer(
            models.BPE(
                {text: i for i, (text, _) in enumerate(vocabulary)},
                _merges(dict(vocabulary), normal),
                unk_token=pieces[unknown].piece,
                byte_fallback=bytes_too,
                fuse_unk=True,
            )
        )
    else:
        fast = FastTokenizer(models.Unigram(vocabulary, unk_id=unknown, byte_fallback=bytes_too))
        fast.pre_tokenizer = _spelled_out([piece.piece for piece in pieces if piece.type in (2, 3, 6)])
    if (normalizer := _normalizer(spec)) is not None:
        fast.normalizer = normalizer
    parts = [decoders.ByteFallback(), decoders.Fuse()]
    fast.decoder = decoders.Sequence(parts + [decoders.Strip(" ", 1, 0)] * spec.add_dummy_prefix)
    control = [piece.piece for piece in pieces if piece.type in (_PIECE["unknown"], _PIECE["control"])]
    fast.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in control])
    fast.add_tokens([AddedToken(name, special=False, normalized=False) for name in defined])
    return fast


def _text(piece: Any) -> str:
    """A piece as it stands in text."""
    return str(piece.piece.replace(WORD_MARK, " ") if piece.type == _PIECE["normal"] else piece.piece)


def _merges(scores: Mapping[str, float], normal: list[str]) -> list[tuple[str, str]]:
    """Pairs of pieces that are merged, the best result first: sentencepiece knows results alone."""
    known = set(normal)
    merges = [
        (-scores[text], cut, (text[:cut], text[cut:]))
        for text in normal
        for cut in range(1, len(text))
        if text[:cut] in known and text[cut:] in known
    ]
    return [pair for *_, pair in sorted(merges)]


def _spelled_out(names: list[str]) -> Any:
    """A cut behind the first character of "<0x0A>", "</s>" ... in a text.

    In HF's unigram model every piece may match, in sentencepiece normal ones alone.
    """
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import Split

    rest: dict[str, list[str]] = {}
    for name in names:
        rest.setdefault(name[0], []).append(re.escape(name[1:]))
    pattern = "|".join(f"{re.escape(first)}(?={'|'.join(ends)})" for first, ends in rest.items())
    return Split(Regex(pattern), "isolated")


def _normalizer(spec: Any) -> Any:
    """What sentencepiece does to a text before it cuts it; None: nothing."""
    from tokenizers import Regex
    from tokenizers import normalizers as n

    parts: list[Any] = []
    if spec.precompiled_charsmap:
        parts.append(n.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        parts += [n.Replace(Regex(" {2,}"), " "), n.Replace(Regex("^ | $"), "")]
    if spec.add_dummy_prefix:
        parts.append(n.Prepend(" "))
    if not parts:
        return None  # a word mark in the text becomes bytes, as in SentencePieceTokenizer
    return n.Sequence([*parts, n.Replace(WORD_MARK, " ")])


def _require_same_ids(fast: Any, tokenizer: SentencePieceTokenizer) -> None:
    fast.encode_special_tokens = True  # as text
    for text in PROBE:
        if fast.encode(text, add_special_tokens=False).ids != tokenizer.encode(text):
            raise DataProblem(
                f"as a tokenizer.json it would give other ids for {text!r}",
                where="tokenizer",
                fix="keep the sentencepiece model beside the export, for sentencepiece itself",
            )
    fast.encode_special_tokens = False


def _marian(folder: Path) -> tuple[Tokenizer | None, str]:
    """Marian's sentencepiece model with the ids that its vocab.json gives the pieces.

    It has one for the source and one for the target. Only where they are the same does one tokenizer do.
    """
    from sentencepiece import sentencepiece_model_pb2 as proto

    try:
        source, target = ((folder / f"{side}.spm").read_bytes() for side in ("source", "target"))
        ids: dict[str, int] = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        model = proto.ModelProto.FromString(source)
        pieces = {piece.piece: piece for piece in model.pieces}
        lost = [name for name, piece in pieces.items() if piece.type == _PIECE["normal"] and name not in ids]
        has_gaps = sorted(ids.values()) != list(range(len(ids)))
    except Exception as error:
        fix = "download source.spm, target.spm and vocab.json again"
        raise DataProblem(f"its tokenizer can't be read: {error}", where=str(folder), fix=fix) from None
    if source != target or lost or has_gaps:
        differ = "source.spm and target.spm are two tokenizers"
        return (
            None,
            f"no tokenizer: {differ if source != target else 'vocab.json lacks pieces of source.spm'}",
        )
    del model.pieces[:]
    for name in sorted(ids, key=ids.__getitem__):
        control = proto.ModelProto.SentencePiece(piece=name, type=_PIECE["control"])
        model.pieces.append(pieces.get(name, control))
    return SentencePieceTokenizer(model.SerializeToString(), where=str(folder / "source.spm")), ""
