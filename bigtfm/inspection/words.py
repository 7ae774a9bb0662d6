"""Tokens as a reader can tell them apart: blanks, line ends, bytes of a letter, special tokens."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from bigtfm.data.special import SpecialIds
from bigtfm.data.tokenizer import Tokenizer

BLANK = "·"
LONGEST = 32  # characters of a word that are shown
_SIGNS = {" ": BLANK, "\n": "↵", "\t": "→"}
_HIDDEN = {"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp", "Zs"}  # Unicode's categories without a picture
_JOINERS = "\u200c\u200d"  # inside of Arabic and Indic words and of emoji
_CONTINUES = "◌"  # carries a mark that has no letter before it


class Words:
    """The shown words of a run's tokens."""

    def __init__(self, tokenizer: Tokenizer, special: SpecialIds) -> None:
        self.tokenizer = tokenizer
        self.added = {token: f"<extra_id_{place}>" for place, token in enumerate(special.sentinels)}
        if special.mask is not None and special.mask >= tokenizer.vocab_size:
            self.added[special.mask] = "<mask>"

    def text(self, ids: Sequence[int]) -> list[str]:
        """Of neighbouring tokens: where several make one character, each shows it and which part it is."""
        shown: list[str] = []
        parts: list[bytes] = []  # tokens whose bytes make no whole character yet
        for piece in [*self._pieces(ids), ""]:
            if isinstance(piece, bytes):
                parts.append(piece)
                whole = _decoded(b"".join(parts))
                if whole is not None:
                    shown += _shares(whole, len(parts))
                    parts = []
                elif len(parts) > 1 and _decoded(piece) is not None:  # bytes that are no text
                    shown += [*map(_hex, parts[:-1]), legible(piece.decode())]
                    parts = []
            else:
                shown += [*map(_hex, parts), _cut(piece)]
                parts = []
        return shown[:-1]

    def alone(self, token: int) -> str:
        """Of a token by itself."""
        (piece,) = self._pieces([token])
        if isinstance(piece, str):
            return _cut(piece)
        whole = _decoded(piece)
        return _hex(piece) if whole is None else legible(whole)

    def _pieces(self, ids: Sequence[int]) -> list[bytes | str]:
        """The tokenizer's pieces, and names of what the run has added to it."""
        known = self.tokenizer.vocab_size
        pieces = iter(self.tokenizer.pieces([i for i in ids if i < known]))
        return [next(pieces) if i < known else self.added.get(i, f"<{i}>") for i in ids]


def legible(text: str) -> str:
    """A text with a sign for each character that has no picture, or could turn its neighbours round."""
    shown = "".join(_sign(character, text) for character in text)
    if shown and unicodedata.combining(shown[0]):
        shown = _CONTINUES + shown
    return _cut(shown)


def _sign(character: str, text: str) -> str:
    if character in _SIGNS:
        return _SIGNS[character]
    if unicodedata.category(character) not in _HIDDEN or (character in _JOINERS and len(text) > 1):
        return character
    if ord(character) < 0x20:
        return chr(0x2400 + ord(character))  # Unicode's control pictures
    return f"\\u{ord(character):04x}"


def _decoded(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def _shares(whole: str, count: int) -> list[str]:
    if count == 1:
        return [legible(whole)]
    return [f"{legible(whole)} {number}/{count}" for number in range(1, count + 1)]


def _hex(piece: bytes) -> str:
    return _cut("".join(f"\\x{byte:02x}" for byte in piece))


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
