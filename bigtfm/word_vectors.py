"""Word vectors of others as a fresh run's token embedding: GloVe, word2vec (text, binary) and fastText files.

V tokens of the vocabulary, C features of the model, D of the vectors.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bigtfm.config.optional import library
from bigtfm.config.problems import DataProblem
from bigtfm.config.sections import ModelSection
from bigtfm.data.tokenizer import Tokenizer
from bigtfm.engine import fragments

FASTTEXT = 793712314  # first number of fastText's own files
EMBEDDING = "embed_tokens.weight"


@dataclass(frozen=True)
class Coverage:
    """How many tokens that begin a word have a vector."""

    found: int
    words: int
    dimensions: int

    def line(self, path: str, hidden_size: int) -> str:
        """What the user is told."""
        how = "" if self.dimensions == hidden_size else f", projected from {self.dimensions} to {hidden_size}"
        share = f"{self.found:,} of {self.words:,} tokens that begin a word"
        return f"{path}: vectors for {share} ({self.found / max(self.words, 1):.0%}){how}"


def load_vectors(path: Path) -> Any:
    """gensim's KeyedVectors of a file, whatever its format.

    Raises:
        ConfigProblem: gensim is not installed.
        DataProblem: there is no such file, or it holds no word vectors.
    """
    lacking = {"lacking": "gensim is not installed", "where": "run.vectors", "extra": "vectors"}
    KeyedVectors = library("gensim.models", **lacking).KeyedVectors
    load_facebook_vectors = library("gensim.models.fasttext", **lacking).load_facebook_vectors
    try:
        with path.open("rb") as file:
            begin = file.read(4)
            file.seek(0)
            first = file.readline(1 << 20)
        if len(begin) == 4 and struct.unpack("<i", begin)[0] == FASTTEXT:
            return load_facebook_vectors(str(path))
        if len(parts := first.split()) == 2 and all(part.isdigit() for part in parts):
            return KeyedVectors.load_word2vec_format(str(path), binary=path.suffix == ".bin")
        dimensions = len(parts) - 1
        words, values = _without_header(path, dimensions)
        vectors = KeyedVectors(vector_size=dimensions)
        vectors.add_vectors(words, values)
        return vectors
    except FileNotFoundError:
        raise DataProblem("no such file", where=str(path), fix="pass a file of word vectors") from None
    except (ValueError, EOFError, IndexError, OverflowError, MemoryError, struct.error, OSError) as error:
        raise DataProblem(
            f"holds no word vectors: {str(error)[:200]}",
            where=str(path),
            fix="pass GloVe's or word2vec's text, or word2vec's or fastText's .bin",
        ) from None


def _without_header(path: Path, dimensions: int) -> tuple[list[str], NDArray[np.float32]]:
    """GloVe's text: a word and its numbers a line; some of its words have blanks."""
    words, values = [], []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            word, *numbers = line.rstrip().rsplit(" ", dimensions)
            if not dimensions or len(numbers) != dimensions:
                raise ValueError(f"line {number} has no {max(dimensions, 1)} numbers behind a word")
            words.append(word)
            values.append(np.array(numbers, dtype=np.float32))
    if not words:
        raise ValueError("it is empty")
    return words, np.stack(values)


def rows_of(
    vectors: Any, tokenizer: Tokenizer, model: ModelSection, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.float32], Coverage]:
    """Tokens that have a vector [N], their rows [N, C], and how many they are.

    A token has one if it begins a word and is a word of theirs, as it stands or in small letters. Rows have
    the mean 0 and the standard deviation init_std, as the others.
    """
    starts = np.flatnonzero(tokenizer.word_starts())
    words = [piece.decode("utf-8", "replace").strip() if isinstance(piece, bytes) else ""
             for piece in tokenizer.pieces(starts.tolist())]  # fmt: skip
    known = vectors.key_to_index
    names = [word if word in known else word.lower() for word in words]
    found = [n for n, name in enumerate(names) if name and name in known]
    coverage = Coverage(len(found), sum(map(bool, words)), vectors.vector_size)
    if not found:
        raise DataProblem(
            "none of its words is a token that begins one",
            where="run.vectors",
            fix="pass vectors of the data's language, or prepare the data with a tokenizer of whole words",
        )
    values = np.stack([vectors[names[n]] for n in found]).astype(np.float64)
    values = projected(values - values.mean(0), model.hidden_size, seed)
    values *= model.init_std / max(float(values.std()), 1e-12)
    return starts[found], values.astype(np.float32), coverage


def projected(values: NDArray[np.float64], size: int, seed: int) -> NDArray[np.float64]:
    """[N, D] -> [N, size]: their main components (PCA), or where there are fewer, turned at random into more.

    Turning keeps all angles and distances: the rows of the turn are orthonormal.
    """
    dimensions = values.shape[1]
    if dimensions == size:
        return values
    if dimensions > size:
        _, axes = np.linalg.eigh(values.T @ values)
        return values @ axes[:, ::-1][:, :size]
    turn, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((size, dimensions)))
    return values @ turn.T


def fill(engine: Any, rows: NDArray[np.int64], values: NDArray[np.float32]) -> None:
    """Puts rows [N, C] into the engine's token embedding, wherever its parts lie."""
    size = values.shape[1]
    tensor = torch.from_numpy(values)
    for fragment in fragments.owned_fragments(engine):
        if fragment.name == EMBEDDING:
            target, start = fragment.view(fragment.flat), fragment.start
            for row, value in zip(rows.tolist(), tensor, strict=True):
                low, high = max(row * size, start), min((row + 1) * size, start + target.numel())
                if low < high:
                    target[low - start : high - start].copy_(value[low - row * size : high - row * size])
    fragments.weights_follow_masters(engine)
