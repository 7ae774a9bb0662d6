"""From sample numbers to packed batches. A batch is a pure function of its sample numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from bigtfm.config.problems import DataProblem
from bigtfm.data.objectives import MakeExamples, causal_lm
from bigtfm.data.order import Order, Pieces
from bigtfm.data.samples import Samples, places


class TokenStream(Protocol):
    """What the loader asks of a bigtfm.data.indexed.Split."""

    @property
    def name(self) -> str: ...

    @property
    def num_tokens(self) -> int: ...
    @property
    def marked(self) -> bool: ...
    def read(self, start: int, stop: int) -> NDArray[Any]: ...
    def read_marks(self, start: int, stop: int) -> NDArray[Any]: ...
    def documents_before(self, positions: NDArray[np.int64]) -> NDArray[np.int64]: ...
    def document_positions(self, documents: NDArray[np.int64]) -> NDArray[np.int64]: ...


@dataclass(frozen=True)
class Batch:
    """Packed documents: T positions in N of them, no padding; attention stays inside each.

    Document n is what the objective made of segment n, the part of a document that lies in one piece. With
    an encoder-decoder it is the encoder's, and the decoder has another: U positions in N documents.
    """

    input_ids: torch.Tensor  # [T] int64
    labels: torch.Tensor  # [T] int64, with a decoder [U]; -100 where there is nothing to predict
    position_ids: torch.Tensor  # [T] int64, from 0 in each document
    cu_seqlens: torch.Tensor  # [N + 1] int32: where documents begin, and T
    seq_lens: tuple[int, ...]  # N lengths, on the host
    token_keys: torch.Tensor  # [T] int64: sample number * seq_len + the segment's offset in the sample +
    # position; the key of dropout
    num_labels: int  # positions with a label
    samples: tuple[int, ...]  # ids of the samples, in order
    token_type_ids: torch.Tensor | None = None  # [T] int64: 0 sentence A, 1 sentence B
    next_sentence_labels: torch.Tensor | None = None  # [N] int64: 0 B follows A, 1 it does not, -100 no pair
    labelled: torch.Tensor | None = (
        None  # [M] int64, places of the labels: no device is asked for their number
    )
    decoder_input_ids: torch.Tensor | None = None  # [U] int64
    decoder_position_ids: torch.Tensor | None = None  # [U] int64
    decoder_cu_seqlens: torch.Tensor | None = None  # [N + 1] int32
    decoder_seq_lens: tuple[int, ...] | None = None
    decoder_token_keys: torch.Tensor | None = None  # [U] int64: as token_keys, with twice the distances

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device; copies do not block the host."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same batch in pinned memory, from which copies to a GPU do not wait for the host."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        changed: dict[str, Any] = {
            name: change(value) for name, value in vars(self).items() if isinstance(value, torch.Tensor)
        }
        return replace(self, **changed)

    def model_inputs(self) -> dict[str, Any]:
        """The keyword arguments of a model's forward: all that there is but num_labels and samples."""
        return {
            name: value
            for name, value in vars(self).items()
            if value is not None and name not in ("num_labels", "samples")
        }


class Loader:
    """Batches of the samples of a stream that an order names, read and cut into segments at document starts.

    `objective` makes of them what a model reads.

    seq_len: most tokens in a sample. vocab_size: of the data set; no id that is read may be beyond it.
    """

    def __init__(
        self,
        stream: TokenStream,
        order: Order,
        seq_len: int,
        vocab_size: int,
        objective: MakeExamples = causal_lm,
    ) -> None:
        self.stream, self.order, self.seq_len = stream, order, seq_len
        self.vocab_size, self.objective = vocab_size, objective

    @property
    def num_samples(self) -> int:
        """How many there are; MAX_SIZE: there is no end."""
        return self.order.num_samples

    def ids(self, first_sample: int, count: int) -> NDArray[np.int64]:
        """What the samples first_sample .. first_sample + count - 1 are: int64 [count], for their digest."""
        return self.order.pieces(first_sample, count).ids

    def batch(self, first_sample: int, count: int) -> Batch:
        """Samples first_sample .. first_sample + count - 1, packed in that order.

        Raises:
            DataProblem: a token id lies outside the vocabulary.
        """
        pieces = self.order.pieces(first_sample, count)
        samples = self._read_pieces(first_sample, pieces)
        made = self.objective(samples)
        fields = _packed(samples, made.seq_lens, stretch=1)
        if made.token_type_ids is not None and made.next_sentence_labels is not None:
            fields["token_type_ids"] = torch.from_numpy(made.token_type_ids)
            fields["next_sentence_labels"] = torch.from_numpy(made.next_sentence_labels)
        if made.labelled is not None:
            fields["labelled"] = torch.from_numpy(made.labelled)
        if made.decoder_input_ids is not None:
            fields["decoder_input_ids"] = torch.from_numpy(made.decoder_input_ids)
            decoder = _packed(samples, made.decoder_seq_lens, stretch=2)
            fields |= {f"decoder_{name}": value for name, value in decoder.items()}
        return Batch(
            input_ids=torch.from_numpy(made.input_ids),
            labels=torch.from_numpy(made.labels),
            num_labels=made.num_labels,
            samples=tuple(pieces.ids.tolist()),
            **fields,
        )

    def _read_pieces(self, first_sample: int, pieces: Pieces) -> Samples:
        """The pieces of the samples from `first_sample` on, cut into segments."""
        lengths = pieces.stops - pieces.starts
        ends = np.cumsum(lengths)
        begins = ends - lengths
        boundaries = self._boundaries(pieces, begins, ends)
        tokens, behind = self._tokens(pieces, lengths)
        total = len(tokens)
        opens = np.zeros(total + 1, np.bool_)
        opens[begins] = opens[boundaries] = opens[total] = True
        token_keys = np.arange(first_sample * self.seq_len, first_sample * self.seq_len + total)
        if total < len(pieces.ids) * self.seq_len:  # some samples are not full
            samples = np.arange(len(pieces.ids))
            skipped = samples * self.seq_len - begins[np.searchsorted(pieces.samples, samples)]
            token_keys += np.repeat(skipped[pieces.samples], lengths)
        return Samples(
            tokens=tokens,
            token_keys=token_keys,
            cu_seqlens=np.flatnonzero(opens),
            boundaries=boundaries,
            ends=ends,
            behind=behind,
            stops=pieces.stops,
            seq_len=self.seq_len,
            stream_size=self.stream.num_tokens,
            read=self._read,
            marks=self._marks(pieces) if self.stream.marked else None,
        )

    def _marks(self, pieces: Pieces) -> NDArray[np.int64]:
        """The marks of the pieces' tokens [T]."""
        ranges = zip(pieces.starts.tolist(), pieces.stops.tolist(), strict=True)
        return np.concatenate([self.stream.read_marks(*piece) for piece in ranges]).astype(np.int64)

    def _tokens(
        self, pieces: Pieces, lengths: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The pieces' tokens [T], and the token behind each of them [P]; its last one at the stream's end."""
        stops = np.minimum(pieces.stops + 1, self.stream.num_tokens)
        ranges = list(zip(pieces.starts.tolist(), stops.tolist(), strict=True))
        runs = [self.stream.read(start, stop) for start, stop in ranges]
        own = [run[:length] for run, length in zip(runs, lengths.tolist(), strict=True)]
        tokens = np.concatenate(own + [run[-1:] for run in runs])
        if tokens.max() >= self.vocab_size:
            for start, stop in ranges:
                self._read(start, stop)
        tokens = tokens.astype(np.int64)
        return tokens[: -len(runs)], tokens[-len(runs) :]

    def _read(self, start: int, stop: int) -> NDArray[Any]:
        """Tokens start .. stop - 1 of the stream."""
        tokens = self.stream.read(start, stop)
        if tokens.max(initial=0) >= self.vocab_size:
            place = int(np.argmax(tokens >= self.vocab_size))
            raise self._beyond_vocabulary(tokens[place], start + place)
        return tokens

    def _beyond_vocabulary(self, token: int, place: int) -> DataProblem:
        return DataProblem(
            f"token {place} is {token}, beyond the vocabulary of {self.vocab_size}",
            where=f"data set, {self.stream.name} split",
            fix="prepare the data set again with the tokenizer that belongs to it",
        )

    def _boundaries(
        self, pieces: Pieces, begins: NDArray[np.int64], ends: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Places in the batch, 1 .. T, at which a document begins inside or right behind a piece."""
        positions = np.concatenate([pieces.starts, pieces.stops]) + 1
        first, last = self.stream.documents_before(positions).reshape(2, -1)
        counts = last - first
        documents = np.arange(counts.sum()) + np.repeat(last - np.cumsum(counts), counts)
        inside = self.stream.document_positions(documents) + np.repeat(begins - pieces.starts, counts)
        at_end = ends[pieces.stops == self.stream.num_tokens]
        return np.concatenate([inside, at_end]) if len(at_end) else inside


def _packed(samples: Samples, seq_lens: NDArray[np.int64] | None, stretch: int) -> dict[str, Any]:
    """Places, positions and keys of one document for each segment, of the segments' lengths where None.

    Its tokens' keys count from `stretch` times the segment's first key, so they are its own if it has at most
    `stretch` times the segment's length.
    """
    if seq_lens is None:
        lengths, cu_seqlens, keys = samples.seq_lens, samples.cu_seqlens, samples.token_keys
    else:
        lengths, cu_seqlens = seq_lens, np.append(0, np.cumsum(seq_lens))
        keys = places(stretch * samples.segment_keys, lengths)
    positions = np.arange(cu_seqlens[-1])
    positions -= np.repeat(cu_seqlens[:-1], lengths)  # in place: fresh memory costs more than the sum
    return {
        "position_ids": torch.from_numpy(positions),
        "cu_seqlens": torch.from_numpy(cu_seqlens.astype(np.int32)),
        "seq_lens": tuple(lengths.tolist()),
        "token_keys": torch.from_numpy(keys),
    }
