"""Files of word vectors of others: GloVe, word2vec (text, binary) and fastText. No torch."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bigtfm.config.optional import library
from bigtfm.config.problems import ConfigProblem, DataProblem

FASTTEXT = 793712314  # first number of fastText's own files
_FIRST_LINE = 1 << 20  # bytes: a longer one is none of a word's numbers
_LACKING = {"lacking": "gensim is not installed", "where": "run.vectors", "extra": "vectors"}


class Form(NamedTuple):
    """What a file's beginning says of it; dimensions: of "glove" alone."""

    kind: Literal["fasttext", "word2vec", "glove"]
    dimensions: int = 0


def form_of(path: Path) -> Form:
    """Of the first line alone, so that a run need not have started to hear of another file's path.

    Raises:
        ConfigProblem: gensim is not installed.
        DataProblem: there is no such file, or it begins as none of word vectors does.
    """
    if find_spec("gensim") is None:
        library("gensim", **_LACKING)
    with _told(path):
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise ValueError("it is no regular file")
        with path.open("rb") as file:
            first = file.readline(_FIRST_LINE)
        if first[:4] == struct.pack("<i", FASTTEXT):
            return Form("fasttext")
        parts = first.split()
        if len(parts) == 2 and all(part.isdigit() for part in parts):
            return Form("word2vec")
        if len(parts) < 2:
            raise ValueError("its first line has no word with numbers behind it" if parts else "it is empty")
        np.array([part.decode() for part in parts[1:]], dtype=np.float32)
        return Form("glove", len(parts) - 1)


def load_vectors(path: Path) -> Any:
    """gensim's KeyedVectors of a file, whatever its format.

    Raises:
        ConfigProblem: gensim is not installed.
        DataProblem: there is no such file, or it holds no word vectors.
    """
    form = form_of(path)
    KeyedVectors = library("gensim.models", **_LACKING).KeyedVectors
    with _told(path):
        if form.kind == "fasttext":
            return library("gensim.models.fasttext", **_LACKING).load_facebook_vectors(str(path))
        if form.kind == "word2vec":
            return KeyedVectors.load_word2vec_format(str(path), binary=path.suffix == ".bin")
        words, values = _without_header(path, form.dimensions)
        vectors = KeyedVectors(vector_size=form.dimensions)
        vectors.add_vectors(words, values)
        return vectors


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """What can go wrong with a file, as one line."""
    try:
        yield
    except ConfigProblem:
        raise
    except FileNotFoundError:
        raise DataProblem("no such file", where=str(path), fix="set run.vectors to one") from None
    except (ValueError, EOFError, IndexError, OverflowError, MemoryError, struct.error, OSError) as error:
        raise DataProblem(
            f"holds no word vectors: {str(error)[:200]}",
            where=str(path),
            fix="set run.vectors to GloVe's or word2vec's text, or word2vec's or fastText's .bin",
        ) from None


def _without_header(path: Path, dimensions: int) -> tuple[list[str], NDArray[np.float32]]:
    """GloVe's text: a word and its numbers a line; some of its words have blanks."""
    words, values = [], []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            word, *numbers = line.rstrip().rsplit(" ", dimensions)
            if len(numbers) != dimensions:
                raise ValueError(f"line {number} has no {dimensions} numbers behind a word")
            words.append(word)
            values.append(np.array(numbers, dtype=np.float32))
    return words, np.stack(values)
