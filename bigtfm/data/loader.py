"""From sample numbers to packed batches. A batch is a pure function of its sample numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from bigtfm.config.problems import DataProblem
from bigtfm.data.objectives import MakeExamples, causal_lm
from bigtfm.data.order import sample_windows
from bigtfm.data.windows import Windows

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
    """Packed documents: T positions in N of them, no padding; attention stays inside each.

    Document n is what the objective made of segment n, the part of a document that lies in one window. With
    an encoder-decoder it is the encoder's, and the decoder has another: U positions in N documents.
    """

    input_ids: torch.Tensor  # [T] int64
    labels: torch.Tensor  # [T] int64, with a decoder [U]; -100 where there is nothing to predict
    position_ids: torch.Tensor  # [T] int64, from 0 in each document
    cu_seqlens: torch.Tensor  # [N + 1] int32: where documents begin, and T
    seq_lens: tuple[int, ...]  # N lengths, on the host
    token_keys: torch.Tensor  # [T] int64: sample number * seq_len + the segment's offset in the window +
    # position; the key of dropout
    num_labels: int  # positions with a label
    samples: tuple[int, ...]  # window indices, in order
    token_type_ids: torch.Tensor | None = None  # [T] int64: 0 sentence A, 1 sentence B
    next_sentence_labels: torch.Tensor | None = None  # [N] int64: 0 B follows A, 1 it does not, -100 no pair
    decoder_input_ids: torch.Tensor | None = None  # [U] int64
    decoder_position_ids: torch.Tensor | None = None  # [U] int64
    decoder_cu_seqlens: torch.Tensor | None = None  # [N + 1] int32
    decoder_seq_lens: tuple[int, ...] | None = None
    decoder_token_keys: torch.Tensor | None = None  # [U] int64: as token_keys, with twice the distances

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device; copies do not block the host."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)
        }
        return replace(self, **moved)

    def model_inputs(self) -> dict[str, Any]:
        """The keyword arguments of a model's forward: all that there is but num_labels and samples."""
        return {
            name: value
            for name, value in vars(self).items()
            if value is not None and name not in ("num_labels", "samples")
        }


class Loader:
    """Batches of windows of `seq_len` consecutive positions of a split's token stream.

    Window w holds the tokens w * seq_len .. (w + 1) * seq_len - 1, and the one after it, which causal_lm
    predicts; `objective` makes of it what a model reads. With `shuffle`, sample n is a window of epoch
    n // num_windows, each epoch in an order of its own and all windows full; fewer than seq_len tokens at the
    end of the split are left out. Without, sample n is window n, and the last one may be shorter: causal_lm
    predicts every token exactly once.

    vocab_size: of the data set; no id that is read may be beyond it.

    Raises:
        DataProblem: the split has no full window (without `shuffle`: nothing to predict).
    """

    def __init__(
        self,
        split: TokenStream,
        seq_len: int,
        seed: int,
        vocab_size: int,
        objective: MakeExamples = causal_lm,
        shuffle: bool = True,
    ) -> None:
        self.split, self.seq_len, self.seed = split, seq_len, seed
        self.vocab_size, self.objective, self.shuffle = vocab_size, objective, shuffle
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
        indices = self.windows(first_sample, count)
        windows = self._read_windows(first_sample, indices)
        made = self.objective(windows)
        fields = _packed(windows, made.seq_lens, stretch=1)
        if made.token_type_ids is not None and made.next_sentence_labels is not None:
            fields["token_type_ids"] = torch.from_numpy(made.token_type_ids)
            fields["next_sentence_labels"] = torch.from_numpy(made.next_sentence_labels)
        if made.decoder_input_ids is not None:
            fields["decoder_input_ids"] = torch.from_numpy(made.decoder_input_ids)
            decoder = _packed(windows, made.decoder_seq_lens, stretch=2)
            fields |= {f"decoder_{name}": value for name, value in decoder.items()}
        return Batch(
            input_ids=torch.from_numpy(made.input_ids),
            labels=torch.from_numpy(made.labels),
            num_labels=made.num_labels,
            samples=tuple(indices.tolist()),
            **fields,
        )

    def _read_windows(self, first_sample: int, indices: NDArray[np.int64]) -> Windows:
        """The windows of the samples from `first_sample` on, cut into segments."""
        starts = indices * self.seq_len
        stops = np.minimum(starts + self.seq_len, self.num_positions)
        offsets = np.arange(len(indices)) * self.seq_len  # of each window in the batch
        total = int(offsets[-1] + stops[-1] - starts[-1])  # only the last window of a batch can be short
        boundaries = self._boundaries(starts, stops, offsets)
        begins = np.zeros(total + 1, np.bool_)
        begins[offsets] = begins[boundaries] = begins[total] = True
        return Windows(
            rows=self._rows(starts, stops),
            boundaries=boundaries,
            cu_seqlens=np.flatnonzero(begins),
            first_key=first_sample * self.seq_len,
            stops=stops,
            stream_size=self.split.num_tokens,
            read=self._read,
        )

    def _rows(self, starts: NDArray[np.int64], stops: NDArray[np.int64]) -> NDArray[Any]:
        """The windows' tokens and the one after each: [n, seq_len + 1], zeros behind a short one."""
        ranges = zip(starts.tolist(), (stops + 1).tolist(), strict=True)
        rows = [self.split.read(start, stop) for start, stop in ranges]
        if len(rows[-1]) <= self.seq_len:
            rows.append(np.zeros(self.seq_len + 1 - len(rows[-1]), rows[-1].dtype))
        tokens = np.concatenate(rows).reshape(len(starts), self.seq_len + 1)
        if tokens.max() >= self.vocab_size:
            row, column = np.argwhere(tokens >= self.vocab_size)[0]
            raise self._beyond_vocabulary(tokens[row, column], starts[row] + column)
        return tokens

    def _read(self, start: int, stop: int) -> NDArray[Any]:
        """Tokens start .. stop - 1 of the stream."""
        tokens = self.split.read(start, stop)
        if tokens.max(initial=0) >= self.vocab_size:
            place = int(np.argmax(tokens >= self.vocab_size))
            raise self._beyond_vocabulary(tokens[place], start + place)
        return tokens

    def _beyond_vocabulary(self, token: int, place: int) -> DataProblem:
        return DataProblem(
            f"token {place} is {token}, beyond the vocabulary of {self.vocab_size}",
            where=f"data set, {self.split.name} split",
            fix="prepare the data set again with the tokenizer that belongs to it",
        )

    def _boundaries(
        self, starts: NDArray[np.int64], stops: NDArray[np.int64], offsets: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Flat positions, 1 .. T, at which a document begins inside or right behind a window."""
        first, last = self.split.documents_before(np.concatenate([starts, stops]) + 1).reshape(2, -1)
        counts = last - first
        documents = np.arange(counts.sum()) + np.repeat(last - np.cumsum(counts), counts)
        return self.split.document_positions(documents) + np.repeat(offsets - starts, counts)


def _packed(windows: Windows, seq_lens: NDArray[np.int64] | None, stretch: int) -> dict[str, Any]:
    """Places, positions and keys of one document for each segment, of the segments' lengths where None.

    Its tokens' keys count from `stretch` times the segment's first key, so they are its own if it has at most
    `stretch` times the segment's length.
    """
    if seq_lens is None:
        lengths, cu_seqlens = windows.seq_lens, windows.cu_seqlens
        index = np.arange(cu_seqlens[-1])
        keys = windows.first_key + index
    else:
        lengths, cu_seqlens = seq_lens, np.append(0, np.cumsum(seq_lens))
        index = np.arange(cu_seqlens[-1])
        keys = index + np.repeat(stretch * windows.segment_keys - cu_seqlens[:-1], lengths)
    return {
        "position_ids": torch.from_numpy(index - np.repeat(cu_seqlens[:-1], lengths)),
        "cu_seqlens": torch.from_numpy(cu_seqlens.astype(np.int32)),
        "seq_lens": tuple(lengths.tolist()),
        "token_keys": torch.from_numpy(keys),
    }
