"""From sample numbers to packed batches. A batch is a pure function of its sample numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from bigtfm.config.problems import DataProblem
from bigtfm.data.objectives import causal_lm
from bigtfm.data.order import sample_windows

BLOCK = 4096  # samples whose order is computed at once, which spreads the cost of many numpy calls


class TokenStream(Protocol):
    """What the loader asks of a bigtfm.data.indexed.Split."""

    @property
    def name(self) -> str: ...

    @property
    def num_tokens(self) -> int: ...
    def read(self, start: int, stop: int) -> NDArray[Any]: ...
    def documents_before(self, positions: NDArray[np.int64]) -> NDArray[np.int64]: ...
    def document_positions(self, documents: NDArray[np.int64]) -> NDArray[np.int64]: ...


@dataclass(frozen=True)
class Batch:
    """Packed sequences: T positions in N segments, no padding.

    A segment is the part of one document that lies in one window; attention stays inside it.
    """

    input_ids: torch.Tensor  # [T] int64
    labels: torch.Tensor  # [T] int64; -100 where there is nothing to predict
    position_ids: torch.Tensor  # [T] int64, from 0 in each segment
    cu_seqlens: torch.Tensor  # [N + 1] int32: where segments begin, and T
    seq_lens: tuple[int, ...]  # N lengths, on the host
    token_keys: torch.Tensor  # [T] int64: sample number * seq_len + offset in the window; the key of dropout
    num_labels: int  # positions with a label
    samples: tuple[int, ...]  # window indices, in order

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device; copies do not block the host."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)
        }
        return replace(self, **moved)

    def model_inputs(self) -> dict[str, Any]:
        """The keyword arguments of a model's forward."""
        names = ("input_ids", "labels", "position_ids", "cu_seqlens", "seq_lens", "token_keys")
        return {name: getattr(self, name) for name in names}


class Loader:
    """Batches of windows of `seq_len` consecutive positions of a split's token stream.

    Window w predicts the tokens w * seq_len + 1 .. (w + 1) * seq_len. With `shuffle`, sample n is a window of
    epoch n // num_windows, each epoch in an order of its own and all windows full; fewer than seq_len tokens
    at the end of the split are left out. Without, sample n is window n, and the last one may be shorter:
    every token is predicted exactly once.

    Raises:
        DataProblem: the split has no full window (without `shuffle`: nothing to predict).
    """

    def __init__(
        self, split: TokenStream, seq_len: int, seed: int, vocab_size: int, shuffle: bool = True
    ) -> None:
        self.split, self.seq_len, self.seed = split, seq_len, seed
        self.vocab_size, self.shuffle = vocab_size, shuffle
        self.num_positions = max(0, split.num_tokens - 1)  # the last token is only ever a label
        self.num_windows = self.num_positions // seq_len if shuffle else -(-self.num_positions // seq_len)
        if not self.num_windows:
            need = seq_len + 1 if shuffle else 2
            raise DataProblem(
                f"{split.num_tokens} tokens are too few: a window takes {need} at data.seq_len {seq_len}",
                where=f"data set, {split.name} split",
                fix="set a smaller data.seq_len or prepare more text",
            )
        self._block: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, np.int64))  # a memo; it only saves time

    def windows(self, first_sample: int, count: int) -> NDArray[np.int64]:
        """Window indices of the samples first_sample .. first_sample + count - 1: int64 [count]."""
        if not self.shuffle:
            assert first_sample + count <= self.num_windows, "without shuffle there is one epoch"
            return np.arange(first_sample, first_sample + count)
        number, place = divmod(first_sample, BLOCK)
        if place + count > BLOCK:
            return sample_windows(first_sample, count, self.num_windows, self.seed)
        memo = self._block  # read once: another thread may replace it
        if memo[0] != number:
            memo = self._block = (number, sample_windows(number * BLOCK, BLOCK, self.num_windows, self.seed))
        return memo[1][place : place + count]

    def batch(self, first_sample: int, count: int) -> Batch:
        """Samples first_sample .. first_sample + count - 1, packed in that order.

        Raises:
            DataProblem: a token id lies outside the vocabulary.
        """
        windows = self.windows(first_sample, count)
        starts = windows * self.seq_len
        stops = np.minimum(starts + self.seq_len, self.num_positions)
        offsets = np.arange(count) * self.seq_len  # of each window in the batch
        total = int(offsets[-1] + stops[-1] - starts[-1])  # only the last window of a batch can be short

        boundaries = self._boundaries(starts, stops, offsets)
        input_ids, labels = causal_lm(self._read(starts, stops), boundaries)
        begins = np.zeros(total + 1, np.bool_)
        begins[offsets] = begins[boundaries] = begins[total] = True
        cu_seqlens = np.flatnonzero(begins)
        lengths = np.diff(cu_seqlens)
        position_ids = np.arange(total) - np.repeat(cu_seqlens[:-1], lengths)
        first_key = first_sample * self.seq_len
        return Batch(
            input_ids=torch.from_numpy(input_ids[:total]),
            labels=torch.from_numpy(labels[:total]),
            position_ids=torch.from_numpy(position_ids),
            cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
            seq_lens=tuple(lengths.tolist()),
            token_keys=torch.from_numpy(np.arange(first_key, first_key + total)),
            num_labels=total - len(boundaries),
            samples=tuple(windows.tolist()),
        )

    def _read(self, starts: NDArray[np.int64], stops: NDArray[np.int64]) -> NDArray[Any]:
        """The windows' tokens and the one after each: [n, seq_len + 1], zeros behind a short one."""
        ranges = zip(starts.tolist(), (stops + 1).tolist(), strict=True)
        rows = [self.split.read(start, stop) for start, stop in ranges]
        if len(rows[-1]) <= self.seq_len:
            rows.append(np.zeros(self.seq_len + 1 - len(rows[-1]), rows[-1].dtype))
        tokens = np.concatenate(rows).reshape(len(starts), self.seq_len + 1)
        if tokens.max() >= self.vocab_size:
            row, column = np.argwhere(tokens >= self.vocab_size)[0]
            token, place = tokens[row, column], starts[row] + column
            raise DataProblem(
                f"token {place} is {token}, beyond the vocabulary of {self.vocab_size}",
                where=f"data set, {self.split.name} split",
                fix="prepare the data set again with the tokenizer that belongs to it",
            )
        return tokens

    def _boundaries(
        self, starts: NDArray[np.int64], stops: NDArray[np.int64], offsets: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Flat positions, 1 .. T, at which a document begins inside or right behind a window."""
        first, last = self.split.documents_before(np.concatenate([starts, stops]) + 1).reshape(2, -1)
        counts = last - first
        documents = np.arange(counts.sum()) + np.repeat(last - np.cumsum(counts), counts)
        return self.split.document_positions(documents) + np.repeat(offsets - starts, counts)
