"""Word vectors of others (data/vectors.py) as a fresh run's token embedding.

V tokens of the vocabulary, C features of the model, D of the vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bigtfm.config.problems import DataProblem
from bigtfm.config.sections import ModelSection
from bigtfm.data.tokenizer import Tokenizer
from bigtfm.engine import fragments

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
