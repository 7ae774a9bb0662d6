"""The ids that an objective works with: found by name in the tokenizer, or added behind its vocabulary.

So one prepared data set serves all families: what its tokenizer lacks is the run's alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigtfm.config.problems import ConfigProblem, DataProblem
from bigtfm.config.run import RunConfig
from bigtfm.data.masking import PAIR_TOKENS
from bigtfm.data.spans import span_sizes
from bigtfm.data.tokenizer import Tokenizer

MASK_NAMES = ("[MASK]", "<mask>", "<|mask|>")
PAD_NAMES = ("[PAD]", "<pad>", "<|pad|>", "<|padding|>")
SENTINELS = 100  # as many as T5 has, where more are not needed


@dataclass(frozen=True, eq=False)
class SpecialIds:
    """Ids with a meaning, and tables over the model's vocabulary of V tokens."""

    vocab_size: int  # V: the tokenizer's, what was added, and what the config adds to it
    bos: int
    eos: int
    mask: int | None  # masked_lm and infilling
    sentinels: tuple[int, ...]  # span_corruption: the k-th stands for the k-th hidden span
    start: int  # what a decoder reads first
    is_special: NDArray[np.bool_]  # [V]: never hidden, never a random token
    ordinary: NDArray[np.int64]  # the ids of all others
    word_starts: NDArray[np.bool_] | None  # [V]: begins a word; None unless asked for

    @property
    def writes_bos(self) -> bool:
        """Whether a decoder that writes a whole text writes its BOS first, as BART's does.

        Not where it has read BOS already, as its start: with relative positions it could not tell one from
        two, and would write BOS for ever. Nor where BOS is EOS, which ends the text.
        """
        return self.bos not in (self.start, self.eos)


def special_ids(tokenizer: Tokenizer, run: RunConfig) -> SpecialIds:
    """What the run's objective needs of the tokenizer and adds to it.

    Raises:
        ConfigProblem: data.seq_len, model.vocab_size or model.decoder_start_id does not fit.
        DataProblem: the tokenizer has too few sentinels, no ordinary token, or hides where words begin.
    """
    _check_lengths(run)
    kind, size = run.objective_kind, tokenizer.vocab_size
    mask, sentinels = None, tuple[int, ...]()
    if kind in ("masked_lm", "infilling"):
        mask = next(iter(_ids(tokenizer, MASK_NAMES)), size)
        size = max(size, mask + 1)
    if kind == "span_corruption":
        sentinels = _sentinels(tokenizer, run)
        size = max(size, *(i + 1 for i in sentinels))
    start = run.model.decoder_start_id
    vocab_size = run.model.vocab_size or size
    _check_vocabulary(run, size)

    is_special = np.ones(vocab_size, np.bool_)  # whatever is no token of the tokenizer's
    is_special[: tokenizer.vocab_size] = False
    marked = tokenizer.special | {
        tokenizer.bos_id,
        tokenizer.eos_id,
        *_ids(tokenizer, MASK_NAMES + PAD_NAMES),
    }
    is_special[[*marked, *sentinels]] = True
    ordinary = np.flatnonzero(~is_special)
    if kind == "masked_lm" and not len(ordinary):
        raise DataProblem(
            "every token is a special one: there is nothing to hide",
            where="tokenizer",
            fix="prepare the data set with a tokenizer that has ordinary tokens",
        )
    return SpecialIds(
        vocab_size,
        tokenizer.bos_id,
        tokenizer.eos_id,
        mask,
        sentinels,
        tokenizer.bos_id if start is None else start,
        is_special,
        ordinary,
        _word_starts(tokenizer, vocab_size) if kind == "masked_lm" and run.objective.whole_words else None,
    )


def _ids(tokenizer: Tokenizer, names: tuple[str, ...]) -> list[int]:
    """Ids of those of the names that the tokenizer has."""
    return [token for token in map(tokenizer.token_id, names) if token is not None]


def _sentinels(tokenizer: Tokenizer, run: RunConfig) -> tuple[int, ...]:
    """<extra_id_0>, <extra_id_1>, ... of the tokenizer, or as many as are needed behind its vocabulary.

    Added ones count down from the last id, as T5's do.
    """
    needed = int(_longest(run)[1])
    named: list[int] = []
    while (token := tokenizer.token_id(f"<extra_id_{len(named)}>")) is not None:
        named.append(token)
    if not named:
        count = max(SENTINELS, needed)
        return tuple(range(tokenizer.vocab_size + count - 1, tokenizer.vocab_size - 1, -1))
    if len(named) < needed:
        raise DataProblem(
            f"has {len(named)} sentinels, <extra_id_0> and so on, but {run.seq_len} tokens may have {needed} "
            "hidden spans",
            where="tokenizer",
            fix="set a larger objective.span_length, or a smaller objective.mask_fraction or data.seq_len",
        )
    return tuple(named)


def _longest(run: RunConfig) -> tuple[Any, Any]:
    """Hidden tokens and spans in the longest text that a run reads."""
    hidden, spans = span_sizes(np.array([run.seq_len]), run.objective)
    return hidden[0], spans[0]


def _check_lengths(run: RunConfig) -> None:
    kind = run.objective_kind
    least = 2 if kind in ("masked_lm", "span_corruption", "infilling") else 1
    if run.objective.next_sentence:
        least = PAIR_TOKENS
    if run.seq_len < least:
        pairs = " with sentence pairs" if run.objective.next_sentence else ""
        raise ConfigProblem(
            f"data.seq_len {run.seq_len} is too short for {kind}{pairs}",
            where="run config",
            fix=f"set data.seq_len to {least} or more",
        )
    if kind == "span_corruption" and (length := sum(_longest(run)) + 1) > run.model.max_seq_len:
        raise ConfigProblem(
            f"the decoder would write up to {length} tokens, more than model.max_seq_len "
            f"{run.model.max_seq_len}",
            where="run config",
            fix="set a smaller objective.mask_fraction or data.seq_len, or a larger objective.span_length",
        )


def _check_vocabulary(run: RunConfig, size: int) -> None:
    stated, start = run.model.vocab_size, run.model.decoder_start_id
    if stated is not None and stated < size:
        raise ConfigProblem(
            f"model.vocab_size {stated} is less than the {size} tokens of the data and the objective",
            where="run config",
            fix=f"set model.vocab_size to {size} or more, or leave it out",
        )
    if start is not None and start >= (stated or size):
        raise ConfigProblem(
            f"model.decoder_start_id {start} is outside the vocabulary of {stated or size}",
            where="run config",
            fix="set it to the id of a token, or leave it out: the data set's BOS",
        )


def _word_starts(tokenizer: Tokenizer, vocab_size: int) -> NDArray[np.bool_]:
    table = np.ones(vocab_size, np.bool_)
    table[: tokenizer.vocab_size] = tokenizer.word_starts()
    if not table[: tokenizer.vocab_size].any():
        raise DataProblem(
            "its tokens do not show where words begin",
            where="tokenizer",
            fix="set objective.whole_words to false, or prepare the data set with another tokenizer",
        )
    return table
