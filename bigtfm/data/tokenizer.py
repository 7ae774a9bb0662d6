"""Tokenizers: a sentencepiece model or a Hugging Face one, behind one small interface.

A sentencepiece model trained here (train_tokenizer.py) has byte fallback, identity normalisation, no dummy
prefix, and keeps every blank, so that any bytes at all come back: `decode_bytes(encode(data)) == data`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from bigtfm.config.problems import DataProblem, Problem

if TYPE_CHECKING:
    import tokenizers

Ids = npt.NDArray[np.int32]

SEGMENT_BYTES = 1024  # sentencepiece is some 30 % faster on short inputs than on whole documents
LONGEST_SEGMENT_BYTES = (
    65536  # where nothing can be cut exactly (no blank for 64 KiB); bounds sentencepiece's memory
)
WORD_MARK = (
    "\u2581"  # sentencepiece writes a blank as this character, so the character itself must go as bytes
)
BYTE_LEVEL_BLANKS = (
    "\u0120",
    "\u010a",
    "\u010d",
    "\u0109",
)  # blank, \n, \r, \t as a byte-level BPE writes them
_SEGMENT_START = re.compile(rb"\n|(?<! ) ")
_NEEDS_BYTES = re.compile(
    f"[{WORD_MARK}\udc80-\udcff]+"
)  # surrogates: bytes that are no UTF-8 ("surrogateescape")
_BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")
_BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "[CLS]", "<|endoftext|>")
_EOS_NAMES = ("</s>", "<|end_of_text|>", "<eos>", "[SEP]", "<|endoftext|>")


class Tokenizer(Protocol):
    """Text to token ids and back. Documents are bytes (UTF-8, or anything else where `lossless`)."""

    @property
    def kind(self) -> str:
        """Which implementation: sentencepiece or huggingface."""

    @property
    def vocab_size(self) -> int:
        """Number of ids; every id is smaller."""

    @property
    def bos_id(self) -> int:
        """Id that starts a document (the end-of-sequence id where the model has no other)."""

    @property
    def eos_id(self) -> int:
        """Id that ends a document."""

    @property
    def identity(self) -> str:
        """SHA-256 of the model file's bytes, in hex."""

    @property
    def lossless(self) -> bool:
        """Whether any bytes come back exactly."""

    @property
    def special(self) -> frozenset[int]:
        """Ids that stand for no text: control, unknown and special tokens."""

    def token_id(self, name: str) -> int | None:
        """Id of the token of that name, if there is one."""

    def word_starts(self) -> npt.NDArray[np.bool_]:
        """Whether a token begins a word; a blank or line end belongs to the word behind it: [vocab_size]."""

    def pieces(self, ids: Iterable[int]) -> list[bytes | str]:
        """What each token stands for inside a text: its bytes or, where it stands for none, its name."""

    @property
    def files(self) -> dict[str, bytes]:
        """Name -> content of what `save` writes, the model file first."""

    def encode(self, text: str | bytes) -> list[int]:
        """Ids of one text, without BOS and EOS."""

    def encode_batch(self, documents: Sequence[bytes]) -> list[Ids]:
        """Ids of each document, without BOS and EOS."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; special tokens are left out, invalid UTF-8 becomes U+FFFD."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of ids; special tokens are left out."""

    def save(self, directory: Path) -> None:
        """Write what `load_tokenizer(directory)` needs to give the same tokenizer."""


def text_of(ids: Iterable[int], tokenizer: Tokenizer) -> str:
    """What a model has written: ids that it knows beyond the tokenizer's stand for no text."""
    return tokenizer.decode(token for token in ids if token < tokenizer.vocab_size)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A sentencepiece .model, a tokenizer.json, or a folder that holds one (or any Hugging Face tokenizer).

    Raises:
        DataProblem: nothing there, damaged, or without an end-of-sequence token.
    """
    path = Path(path)
    try:
        if path.is_file():
            return _load_file(path, path.parent)
        if path.is_dir():
            return _load_folder(path)
    except OSError as error:
        raise DataProblem(f"can't be read: {error}", where=str(path), fix="check its permissions") from None
    raise DataProblem(
        "no such tokenizer",
        where=str(path),
        fix="pass a sentencepiece .model, a tokenizer.json or a folder with one",
    )


def _load_folder(path: Path) -> Tokenizer:
    if (path / "tokenizer.json").is_file():
        return _load_file(path / "tokenizer.json", path)
    if (path / "tokenizer.model").is_file():
        return _load_file(path / "tokenizer.model", path)
    with _library("transformers", path):
        from transformers import AutoTokenizer

        slow_or_fast = AutoTokenizer.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False
        )
    backend = getattr(slow_or_fast, "backend_tokenizer", None)
    if backend is None:
        raise DataProblem(
            "has no fast tokenizer", where=str(path), fix="convert it to a tokenizer.json with transformers"
        )
    names = {"bos_token": slow_or_fast.bos_token, "eos_token": slow_or_fast.eos_token}
    return HuggingFaceTokenizer(backend.to_str().encode(), names, where=str(path))


def _load_file(path: Path, folder: Path) -> Tokenizer:
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path.read_bytes(), _special_names(folder), where=str(path))
    return SentencePieceTokenizer(path.read_bytes(), where=str(path))


class _library:
    """Turns what a tokenizer library raises into one line."""

    def __init__(self, name: str, where: object) -> None:
        self.name, self.where = name, str(where)

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ImportError):
            raise DataProblem(
                f"needs the package {self.name}", where=self.where, fix="pip install 'bigtfm[hf]'"
            ) from None
        if isinstance(error, Exception) and not isinstance(error, Problem):
            message = f"{self.name} can't load it: {str(error)[:300]}"
            raise DataProblem(
                message, where=self.where, fix="pass an undamaged tokenizer file or folder"
            ) from None


class SentencePieceTokenizer:
    """A sentencepiece model. One that keeps text as it is and has all 256 byte pieces is `lossless`."""

    kind = "sentencepiece"

    def __init__(self, model: bytes, *, where: str = "tokenizer") -> None:
        with _library("sentencepiece", where):
            from sentencepiece import SentencePieceProcessor

            if not model:
                raise ValueError("the file is empty")
            self._processor = processor = SentencePieceProcessor(model_proto=model)
        self._model = model
        self.identity = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = processor.vocab_size()
        self.eos_id: int = processor.eos_id()
        self.bos_id: int = processor.bos_id() if processor.bos_id() >= 0 else self.eos_id
        if self.eos_id < 0:
            raise DataProblem("has no end-of-sequence piece", where=where, fix="train it with eos_id >= 0")
        ids = range(self.vocab_size)
        pieces = [processor.id_to_piece(i) for i in ids]
        byte_ids = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        self.lossless = all(map(processor.is_byte, byte_ids)) and _keeps_text(processor)
        self._byte_ids = np.array(byte_ids, dtype=np.int32)
        self._bytes = [
            b""
            if processor.is_control(i) or processor.is_unknown(i)
            else piece.replace(WORD_MARK, " ").encode()
            for i, piece in zip(ids, pieces, strict=True)
        ]
        if self.lossless:
            for byte, i in enumerate(byte_ids):
                self._bytes[i] = bytes([byte])
        # If no piece runs on over a line's or a word's start, then cutting there changes no token.
        self._cuts_exactly = self.lossless and not any(
            "\n" in p or WORD_MARK in p.lstrip(WORD_MARK) for p in pieces
        )

    @property
    def files(self) -> dict[str, bytes]:
        return {"tokenizer.model": self._model}

    @property
    def special(self) -> frozenset[int]:
        kinds = (self._processor.is_control, self._processor.is_unknown, self._processor.is_unused)
        return frozenset(i for i in range(self.vocab_size) if any(kind(i) for kind in kinds))

    def token_id(self, name: str) -> int | None:
        token: int = self._processor.piece_to_id(
            name
        )  # of the unknown piece, where there is none of that name
        return token if self._processor.id_to_piece(token) == name else None

    def word_starts(self) -> npt.NDArray[np.bool_]:
        return np.array([_begins_word(self._processor.id_to_piece(i)) for i in range(self.vocab_size)])

    def pieces(self, ids: Iterable[int]) -> list[bytes | str]:
        return [self._piece(int(i)) for i in ids]

    def _piece(self, token: int) -> bytes | str:
        name: str = self._processor.id_to_piece(token)
        if match := _BYTE_PIECE.fullmatch(name):
            return bytes([int(match[1], 16)])
        return self._bytes[token] or name

    def encode(self, text: str | bytes) -> list[int]:
        data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
        ids: list[int] = self.encode_batch([data])[0].tolist()
        return ids

    def encode_batch(self, documents: Sequence[bytes]) -> list[Ids]:
        """One call into sentencepiece for all: the segments of every document that can be cut exactly."""
        parts: list[Any] = []  # bytes, or text where the model isn't lossless
        raw: dict[int, bytes] = {}  # part number -> bytes that must become byte pieces
        counts = []
        for document in documents:
            before = len(parts)
            if not self.lossless:
                parts.append(document.decode("utf-8", "replace"))
            elif _is_plain(document):
                parts += self._segments(document)
            else:
                for run, as_bytes in _runs(document):
                    if as_bytes:
                        raw[len(parts)] = run
                        parts.append(b"")
                    else:
                        parts += self._segments(run)
            counts.append(len(parts) - before)
        encoded: list[Ids] = self._processor.encode(parts, out_type="numpy", num_threads=1)
        for number, run in raw.items():
            encoded[number] = self._byte_ids[np.frombuffer(run, dtype=np.uint8)]
        ends = accumulate(counts, initial=0)
        nothing = np.zeros(0, dtype=np.int32)
        return [np.concatenate(encoded[a:b]) if b > a else nothing for a, b in pairwise(ends)]

    def _segments(self, data: bytes) -> Iterator[bytes]:
        return segments(data, SEGMENT_BYTES) if self._cuts_exactly else iter((data,))

    def decode(self, ids: Iterable[int]) -> str:
        if self.lossless:
            return self.decode_bytes(ids).decode("utf-8", "replace")
        text: str = self._processor.decode([int(i) for i in ids])
        return text

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join([self._bytes[i] for i in ids]) if self.lossless else self.decode(ids).encode()

    def save(self, directory: Path) -> None:
        _write(self.files, directory)


class HuggingFaceTokenizer:
    """A Hugging Face fast tokenizer (tokenizer.json). Special tokens are never read from text."""

    kind = "huggingface"
    lossless = False  # invalid UTF-8 becomes U+FFFD, and many normalise

    def __init__(self, model: bytes, names: dict[str, str | None], *, where: str = "tokenizer") -> None:
        with _library("tokenizers", where):
            import tokenizers

            self._tokenizer: tokenizers.Tokenizer = tokenizers.Tokenizer.from_buffer(model)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # "<|endoftext|>" written in a document is text
        self._model = model
        self.identity = hashlib.sha256(model).hexdigest()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1 if vocabulary else 0
        eos = names.get("eos_token") or next((name for name in _EOS_NAMES if name in vocabulary), None)
        bos = names.get("bos_token") or next((name for name in _BOS_NAMES if name in vocabulary), eos)
        if eos not in vocabulary or bos not in vocabulary:
            fix = "put a tokenizer_config.json with eos_token beside the tokenizer.json"
            raise DataProblem("has no end-of-sequence token", where=where, fix=fix)
        self._names = {"bos_token": bos, "eos_token": eos}
        self.bos_id, self.eos_id = vocabulary[bos], vocabulary[eos]

    @property
    def special(self) -> frozenset[int]:
        added = self._tokenizer.get_added_tokens_decoder().items()
        unknown = self.token_id(json.loads(self._model)["model"].get("unk_token") or "")
        return frozenset(
            [i for i, token in added if token.special] + [i for i in (unknown,) if i is not None]
        )

    def token_id(self, name: str) -> int | None:
        token: int | None = self._tokenizer.token_to_id(name)
        return token

    def word_starts(self) -> npt.NDArray[np.bool_]:
        parts = json.loads(self._model)
        prefix = parts["model"].get("continuing_subword_prefix")  # WordPiece's ##
        byte_level = _is_byte_level(parts)
        table = np.zeros(self.vocab_size, np.bool_)
        for piece, i in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if parts["model"]["type"] == "WordLevel":
                table[i] = True
            elif prefix:
                table[i] = not piece.startswith(prefix)
            else:
                table[i] = piece.startswith(BYTE_LEVEL_BLANKS) if byte_level else _begins_word(piece)
        return table

    def pieces(self, ids: Iterable[int]) -> list[bytes | str]:
        parts, special = json.loads(self._model), self.special
        prefix = parts["model"].get("continuing_subword_prefix")  # WordPiece's ##
        table = _byte_level_table() if _is_byte_level(parts) else None
        pieces: list[bytes | str] = []
        for i in map(int, ids):
            piece = self._tokenizer.id_to_token(i) or f"<{i}>"
            if i in special:
                pieces.append(piece)
            elif table is not None:
                pieces.append(b"".join(table.get(c, c.encode()) for c in piece))
            elif prefix:
                pieces.append(
                    (piece.removeprefix(prefix) if piece.startswith(prefix) else f" {piece}").encode()
                )
            elif match := _BYTE_PIECE.fullmatch(piece):
                pieces.append(bytes([int(match[1], 16)]))
            else:
                pieces.append(piece.replace(WORD_MARK, " ").encode("utf-8", "replace"))
        return pieces

    @property
    def files(self) -> dict[str, bytes]:
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self._names}
        return {
            "tokenizer.json": self._model,
            "tokenizer_config.json": json.dumps(config, indent=1).encode() + b"\n",
        }

    def encode(self, text: str | bytes) -> list[int]:
        data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
        ids: list[int] = self.encode_batch([data])[0].tolist()
        return ids

    def encode_batch(self, documents: Sequence[bytes]) -> list[Ids]:
        texts = [document.decode("utf-8", "replace") for document in documents]
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self.decode(ids).encode()

    def save(self, directory: Path) -> None:
        _write(self.files, directory)


def _is_byte_level(parts: dict[str, Any]) -> bool:
    """Whether a tokenizer.json writes every byte as a character of its own."""
    return '"ByteLevel"' in json.dumps([parts.get("pre_tokenizer"), parts.get("decoder")])


def _byte_level_table() -> dict[str, bytes]:
    """Character -> byte: Latin-1's visible ones as they are, the others from U+0100 on (GPT-2's code)."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): bytes([byte]) for byte in visible} | {
        chr(0x100 + n): bytes([byte]) for n, byte in enumerate(others)
    }


def segments(data: bytes, target: int) -> Iterator[bytes]:
    """Cut `data` into parts of at least `target` bytes; the later ones begin with a line end or blank."""
    start = 0
    while len(data) - start > target:
        limit = start + target + LONGEST_SEGMENT_BYTES
        border = _SEGMENT_START.search(data, start + target, limit)
        stop = border.start() if border else character_start(data, min(limit, len(data)))
        yield data[start:stop]
        start = stop
    if start < len(data):
        yield data[start:]


def character_start(data: bytes | bytearray, position: int) -> int:
    """The last start of a UTF-8 character at or before `position` (`position` itself in what is no UTF-8)."""
    for start in range(position, max(position - 4, 0), -1):
        if start == len(data) or data[start] & 0xC0 != 0x80:
            return start
    return position


def _is_plain(data: bytes) -> bool:
    """Valid UTF-8 without the word mark: what sentencepiece gives back as it is."""
    try:
        return WORD_MARK not in data.decode("utf-8") if not data.isascii() else True
    except UnicodeDecodeError:
        return False


def _runs(data: bytes) -> Iterator[tuple[bytes, bool]]:
    """`data` in runs; True marks one that must become byte pieces."""
    text = data.decode("utf-8", "surrogateescape")
    end = 0
    for match in _NEEDS_BYTES.finditer(text):
        if match.start() > end:
            yield text[end : match.start()].encode("utf-8"), False
        yield match[0].encode("utf-8", "surrogateescape"), True
        end = match.end()
    if end < len(text):
        yield text[end:].encode("utf-8"), False


def _begins_word(piece: str) -> bool:
    """Whether a piece begins with the word mark, or is the byte of a blank, line end or control character."""
    return piece.startswith(WORD_MARK) or (piece.startswith("<0x") and piece <= "<0x20>")


def _keeps_text(processor: Any) -> bool:
    """Whether the normaliser changes nothing: tried on blanks and the characters that rules exist for."""
    characters = [*range(1, 0x3400), *range(0xF900, 0xFFFE), *range(0x1D400, 0x1D500)]
    probe = "  a  b\n\n" + "".join(map(chr, characters)) + " "
    return bool(processor.normalize(probe) == probe.replace(" ", WORD_MARK))


def _special_names(folder: Path) -> dict[str, str | None]:
    """`bos_token` and `eos_token` from the folder's Hugging Face files."""
    names: dict[str, str | None] = {}
    for file in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
        try:
            values = json.loads(file.read_bytes()) if file.is_file() else {}
        except (ValueError, RecursionError) as error:
            raise DataProblem(f"not valid JSON: {error}", where=str(file), fix="restore the file") from None
        for key in ("bos_token", "eos_token"):
            value = values.get(key) if isinstance(values, dict) else values
            name = value.get("content") if isinstance(value, dict) else value
            if not isinstance(name, str | None):
                raise DataProblem(f"{key} is no text", where=str(file), fix="restore the file")
            if name:
                names[key] = name
    return names


def _write(files: dict[str, bytes], directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)
