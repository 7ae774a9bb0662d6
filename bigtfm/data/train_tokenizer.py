"""Training a sentencepiece model: on a bounded sample of the input, the same model for the same input."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np

from bigtfm.config.problems import DataProblem
from bigtfm.data.sources import Span, Unit
from bigtfm.data.tokenizer import LONGEST_SEGMENT_BYTES, SEGMENT_BYTES, WORD_MARK, segments

ModelType = Literal["bpe", "unigram"]
SAMPLE_BYTES = 20_000_000  # of text, at most, that a model is trained on
SAMPLE_UNITS = 256  # of the input, at most, that they are taken from


def sample_documents(
    units: Sequence[Unit],
    documents: Callable[[Span], Iterator[bytes]],
    where: str,
    report: Callable[[str, int, int], None],
) -> list[bytes]:
    """Documents from all over the input, at most SAMPLE_BYTES; the same for the same input. where: its name.

    Raises:
        DataProblem: there is no text.
    """
    if sum(span.weight for unit in units for span in unit) > SAMPLE_BYTES:
        step = max(len(units) / SAMPLE_UNITS, 1)
        units = [units[int(i * step)] for i in range(int(len(units) / step))]
    sample: list[bytes] = []
    room = SAMPLE_BYTES
    for number, unit in enumerate(units):
        share = room // (len(units) - number)  # what a small unit leaves goes to the later ones
        room -= share
        for document in (document for span in unit for document in documents(span)):
            sample.append(document[:share])
            share -= len(sample[-1])
            if share <= 0:
                break
        room += share
        report("reading for the tokenizer", SAMPLE_BYTES - room, 0)
    if not any(sample):
        raise DataProblem(
            "no text in the input", where=where, fix="check --input, and the column of the text"
        )
    report("training the tokenizer", 0, 0)
    return sample


def train_sentencepiece(
    sample: Sequence[bytes], *, vocab_size: int | None, model_type: ModelType = "bpe"
) -> bytes:
    """Train a lossless model on `sample` (documents, held in memory); the same sample gives the same bytes.

    Pieces 0-2 are <unk>, <s>, </s>, then come 256 byte pieces. `vocab_size` None: the power of two that suits
    the sample, 1024 to 32768 (2048 for the embedded corpus), or the largest possible if the text offers less.

    Raises:
        DataProblem: the sample is too small for `vocab_size` (the line names the largest possible), or
            `vocab_size` is too small for the sample's characters.
    """
    suited = 2 ** int(np.log2(max(sum(map(len, sample)), 1) / 500 + 1))
    wanted = vocab_size or min(max(suited, 1024), 32768)
    try:
        return _train(sample, wanted, model_type)
    except RuntimeError as error:
        if largest := re.search(r"value <= (\d+)", str(error)):
            if vocab_size is None:
                return _train(sample, int(largest[1]), model_type)
            raise DataProblem(
                f"the text is too small for a vocabulary of {wanted}: {largest[1]} is the largest possible",
                where="tokenizer",
                fix=f"pass --vocab-size {largest[1]} or less",
            ) from None
        if smallest := re.search(r"required_chars\. \d+ vs (\d+)", str(error)):
            raise DataProblem(
                f"a vocabulary of {wanted} can't hold the bytes and characters of the text",
                where="tokenizer",
                fix=f"pass --vocab-size {smallest[1]} or more",
            ) from None
        if "sentences_.empty()" in str(error):
            raise DataProblem(
                "the input holds no text to learn from", where="tokenizer", fix="check the input"
            ) from None
        message = re.sub(r"^\w+: \S+\(\d+\) \[.*?\] ?", "", str(error)) or str(error)
        raise DataProblem(
            f"training failed: {message}", where="tokenizer", fix="give more text, or --tokenizer"
        ) from None


def _train(sample: Sequence[bytes], vocab_size: int, model_type: ModelType) -> bytes:
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=_sentences(sample),
        model_writer=model,
        vocab_size=vocab_size,
        model_type=model_type,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        max_sentence_length=2 * LONGEST_SEGMENT_BYTES,  # longer ones are left out: there are none
        num_threads=4,  # a constant, whatever the machine: unigram sums in an order that depends on it
        minloglevel=2,
    )
    return model.getvalue()


def _sentences(sample: Sequence[bytes]) -> Iterator[str]:
    """Lines, the long ones cut, without what a model must not learn (line ends, word marks, NUL, tab)."""
    for document in sample:
        for segment in segments(document, 4 * SEGMENT_BYTES):
            yield from filter(None, re.split(f"[\\n\\r\\t\\0{WORD_MARK}]", segment.decode("utf-8", "ignore")))
