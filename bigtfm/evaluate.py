"""Evaluation: bits per byte, comparable between tokenizers, and the baseline that a model has to beat."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bigtfm.config.problems import DataProblem

if TYPE_CHECKING:
    from bigtfm.data.indexed import Split, TokenDataset
    from bigtfm.data.loader import Loader
    from bigtfm.engine.distributed import Ranks
    from bigtfm.resilience.signals import StopRequest

CHUNK = 1_000_000  # tokens read at once
UNIGRAM_TOKENS = 50_000_000  # tokens of each split that the baseline looks at


def bits_per_byte(loss: float, predicted_tokens: int, num_bytes: int) -> float:
    """A mean loss in nats a token as bits a byte of text: loss * predicted_tokens / (ln 2 * num_bytes)."""
    return loss * predicted_tokens / (math.log(2) * num_bytes)


def predicted_tokens(split: Split) -> int:
    """Tokens of the split that something predicts: all but the BOS of each document."""
    return split.num_tokens - split.num_documents


def unigram_bits_per_byte(dataset: TokenDataset) -> float:
    """Bits a byte of validation text for a model that only knows how frequent each token is in training.

    Frequencies are smoothed by adding one to each of the vocabulary's ids. At most the first 50 M tokens of
    each split are read; a longer validation split is taken to go on as it began.

    Raises:
        DataProblem: the validation split is empty.
    """
    train, validation = dataset.split("train"), dataset.split("validation")
    if not predicted_tokens(validation) or not validation.num_bytes:
        raise DataProblem(
            "the validation split has no text",
            where=str(dataset.path),
            fix="prepare with more documents or a larger share",
        )
    train_counts = _count(train, dataset.vocab_size)
    counts = _count(validation, dataset.vocab_size)
    log_probabilities = np.log((train_counts + 1) / (train_counts.sum() + dataset.vocab_size))
    loss = -float(counts @ log_probabilities) / int(counts.sum())
    return bits_per_byte(loss, predicted_tokens(validation), validation.num_bytes)


def _count(split: Split, vocab_size: int) -> NDArray[np.int64]:
    """How often each id is predicted: int64 [vocab_size]."""
    counts = np.zeros(vocab_size, np.int64)
    for tokens, documents in _chunks(split):
        if tokens.max(initial=0) >= vocab_size:
            raise DataProblem(
                f"the {split.name} split has a token id beyond the vocabulary of {vocab_size}",
                where="data set",
                fix="prepare it again",
            )
        counts += np.bincount(tokens, minlength=vocab_size)
        counts -= np.bincount(tokens[documents], minlength=vocab_size)
    return counts


def _chunks(split: Split) -> Iterator[tuple[NDArray[Any], NDArray[np.int64]]]:
    """Tokens, and the places among them where a document begins."""
    end = min(split.num_tokens, UNIGRAM_TOKENS)
    for start in range(0, end, CHUNK):
        stop = min(end, start + CHUNK)
        yield split.read(start, stop), split.document_starts(start, stop) - start


def require_labels(loader: Loader, max_tokens: int) -> None:
    """Raises DataProblem when none of the windows that `validation_loss` looks at has anything to predict."""
    windows = num_windows(loader, max_tokens)
    if not any(loader.batch(window, 1).num_labels for window in range(windows)):
        raise DataProblem(
            f"nothing is to be predicted in the first {windows} windows of the validation split",
            where="data set",
            fix="prepare more validation text, or set larger eval.tokens or objective.mask_fraction",
        )


def num_windows(loader: Loader, max_tokens: int) -> int:
    """How many windows an evaluation looks at."""
    return min(loader.num_samples, max(1, max_tokens // loader.seq_len))


def validation_loss(
    engine: Any, loader: Loader, ranks: Ranks, micro_batch: int, max_tokens: int, stop: StopRequest
) -> float | None:
    """Mean loss in nats a token over the first windows of a split, the same at any number of ranks.

    None: a rank was asked to stop, and it is cut short. Every rank runs as many forwards as the others, since
    each gathers the weights together at ZeRO stage 3.
    """
    import torch

    windows = num_windows(loader, max_tokens)
    starts = range(0, windows, micro_batch)
    loss_sum = tokens = 0.0
    engine.eval()
    with torch.no_grad():
        for turn in range(0, len(starts), ranks.world_size):
            ranks.pulse.enter("evaluate")
            if any(ranks.sum([stop.signal])):
                engine.train()
                return None
            mine = turn + ranks.rank
            start = starts[min(mine, len(starts) - 1)]
            batch = loader.batch(start, min(micro_batch, windows - start)).to(ranks.device)
            loss, count = engine(**batch.model_inputs())
            if mine < len(starts):  # else a repetition for company
                loss_sum += float(loss)
                tokens += float(count)
    engine.train()
    loss_sum, tokens = ranks.sum([loss_sum, tokens])
    return loss_sum / tokens
