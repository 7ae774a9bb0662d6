"""Training text read and tokenized while training, from a data set that `datasets` can stream.

The stream has no end: epoch follows epoch, each of the source's documents in its order, as `bigtfm prepare`
writes them (`BOS t1 ... tn EOS`, without those that belong to validation). Window w is its tokens
w * seq_len .. (w + 1) * seq_len - 1; blocks of windows are shuffled, each by itself. So a sample is a
function of its number, and a rank has no more in memory than the blocks in use and the one read ahead.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bigtfm.config.problems import DataProblem
from bigtfm.data import tables
from bigtfm.data.documents import TEXT_COLUMN_FIX, as_bytes, document_hash
from bigtfm.data.indexed import TokenDataset
from bigtfm.data.order import MAX_SIZE, Pieces, digest, shuffled
from bigtfm.data.stream_source import BLOCK, StreamSource
from bigtfm.data.tokenizer import Tokenizer, load_tokenizer
from bigtfm.data.units import tokenize

BATCH_BYTES = 1 << 16  # of documents tokenized at once; a resumed run reads up to this much again

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class ShuffledBlocks:
    """The order of a stream's windows: each block of `block` of them in an order of its own."""

    seq_len: int
    seed: int
    block: int = BLOCK

    @property
    def num_samples(self) -> int:
        return MAX_SIZE

    def pieces(self, first: int, count: int) -> Pieces:
        """The samples first .. first + count - 1; their ids are the windows' numbers."""
        numbers = np.arange(first, first + count)
        windows = numbers - numbers % self.block + shuffled(numbers, self.block, self.seed)
        starts = windows * self.seq_len
        return Pieces(windows, np.arange(count), starts, starts + self.seq_len)


@dataclass(frozen=True)
class Mark:
    """A place between two documents, from which the stream can be read on."""

    position: int = 0  # tokens before it
    epoch: int = 0
    rows: dict[str, Any] | None = None  # state_dict of the rows; None: the epoch begins
    behind: str = ""  # digest of the tokens from here to the first of the block that is read from here


class _Batch(NamedTuple):
    """Consecutive documents."""

    mark: Mark  # where they begin
    tokens: NDArray[Any]
    starts: Ints  # of documents, as positions in the stream


class _Block(NamedTuple):
    """The tokens of one block of windows, and the one behind them."""

    number: int
    tokens: NDArray[Any]  # [block * seq_len + 1]
    starts: Ints  # of documents that begin in it, as positions in the stream
    documents: int  # how many began before, since reading began
    end: Mark  # from where the next block is read


class StreamedTokens:
    """The stream of tokens, of which only some blocks are in memory (a bigtfm.data.loader.TokenStream).

    Asked for ever later positions; `mark_of` lets go of what lies behind. A thread reads one block ahead.

    held_out: share of the documents that belongs to validation, as in `bigtfm prepare`. block: in windows.
    """

    name = "streamed"
    num_tokens = MAX_SIZE
    marked = False

    def __init__(
        self,
        source: StreamSource,
        tokenizer: Tokenizer,
        dtype: np.dtype[Any],
        seq_len: int,
        *,
        held_out: float = 0.0,
        block: int = BLOCK,
    ) -> None:
        self._source, self._tokenizer, self._dtype = source, tokenizer, dtype
        self._block, self._size = block, block * seq_len
        self._held_out = int(held_out * 2**64)
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = ThreadPoolExecutor(1, "read ahead")
        self.start(0, None)

    @classmethod
    def like(cls, dataset: TokenDataset, source: StreamSource, seq_len: int) -> StreamedTokens:
        """The source, tokenized as a data set was, without the documents that its validation takes."""
        return cls(
            source,
            load_tokenizer(dataset.tokenizer_path),
            np.dtype(dataset.header.dtype),
            seq_len,
            held_out=dataset.header.options.get("validation_fraction", 0.0),
        )

    def start(
        self,
        sample: int,
        state: dict[str, Any] | None,
        *,
        accept_changes: bool = False,
        say: Callable[[str], None] = print,
    ) -> None:
        """Goes on with the sample of this number, from the state that `mark_of` gave for it.

        Without one, or where it does not serve, the stream is read from its beginning up to there. Nothing is
        read before it is asked for.

        accept_changes: of the text before that sample. say: is told of reading from the beginning, in a line.
        """
        self._ahead: Future[_Block] | None = None
        self._blocks: dict[int, _Block] = {}
        self._next = sample // self._block
        saved = Mark(**state) if state else None
        self._marks = {self._next: saved}
        self._reading = self._read(self._next, saved, accept_changes, say)

    def mark_of(self, sample: int) -> dict[str, Any] | None:
        """The state to save for a run that goes on with `sample`; blocks before that sample's are let go."""
        number = sample // self._block
        if number not in self._marks:
            self._get(number - 1)  # other ranks may have read it
        for before in [n for n in list(self._blocks) if n < number]:
            del self._blocks[before]
        for before in [n for n in list(self._marks) if n < number]:
            del self._marks[before]
        mark = self._marks[number]
        return None if mark is None else asdict(mark)

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Tokens [start, stop), of the blocks from the last `mark_of` on.

        Raises:
            DataProblem: the source can't be read, or does not hold text.
        """
        parts = []
        while start < stop:
            block = self._get(start // self._size)
            first = block.number * self._size
            parts.append(block.tokens[start - first : stop - first])
            start += len(parts[-1])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def read_marks(self, start: int, stop: int) -> NDArray[Any]:
        raise AssertionError("a stream has no marks")

    def documents_before(self, positions: Ints) -> Ints:
        """How many documents begin before each position p, counted from where reading began; p - 1 is a
        position of a block from the last `mark_of` on, or that block's end."""
        first, last = positions.min() - 1, positions.max() - 2
        blocks = [self._get(n) for n in range(first // self._size, max(first, last) // self._size + 1)]
        return blocks[0].documents + np.searchsorted(_starts(blocks), positions)

    def document_positions(self, documents: Ints) -> Ints:
        """Where these documents begin, of those that `documents_before` has counted."""
        blocks = sorted(self._blocks.values())
        return _starts(blocks)[documents - blocks[0].documents]

    def held_bytes(self) -> int:
        """Bytes of the tokens and document starts in memory, but for what is being read."""
        return sum(block.tokens.nbytes + block.starts.nbytes for block in list(self._blocks.values()))

    def close(self) -> None:
        """Ends reading ahead."""
        self._closed.set()
        self._thread.shutdown(cancel_futures=True)

    def _get(self, number: int) -> _Block:
        with self._lock:
            while self._next <= number:
                self._ahead = self._ahead or self._thread.submit(next, self._reading)
                block = self._ahead.result()
                self._blocks[block.number] = block
                self._marks[block.number + 1] = block.end
                self._next += 1
                self._ahead = self._thread.submit(next, self._reading)
            assert number in self._blocks, f"block {number} has been let go"
            return self._blocks[number]

    def _read(
        self, number: int, saved: Mark | None, accept_changes: bool, say: Callable[[str], None]
    ) -> Iterator[_Block]:
        """The blocks from `number` on, read from the `saved` place where that works, else from the beginning.

        Raises:
            DataProblem: the text before block `number` is not what it was.
        """
        why = "no position was saved" if number else None
        if saved is not None:
            blocks = self._blocks_from(number, saved, saved)
            try:
                block = next(blocks)
            except DataProblem as problem:
                why = f"the saved position does not serve ({problem.what})"
            else:
                yield block
                yield from blocks
        if why is not None:
            sample = number * self._block
            say(f"{self._source.name}: {why}: reading from the beginning to sample {sample:,}")
        yield from self._blocks_from(number, Mark(), None if accept_changes else saved)

    def _blocks_from(self, number: int, begin: Mark, saved: Mark | None) -> Iterator[_Block]:
        """The blocks from `number` on, read from `begin`, if what lies behind `saved` is what it was."""
        batches, waiting = self._batches(begin), deque[_Batch]()
        documents, end = 0, begin.position  # documents before what is waiting; tokens up to its end
        while True:
            first, last = number * self._size, (number + 1) * self._size
            while end <= last:
                waiting.append(next(batches))
                end += len(waiting[-1].tokens)
                documents += _let_go(waiting, first if saved is None else saved.position)
            offset = waiting[0].mark.position
            tokens = np.concatenate([batch.tokens for batch in waiting])
            starts = np.concatenate([batch.starts for batch in waiting])
            if (
                saved is not None
                and digest(tokens[saved.position - offset : first - offset + 1]) != saved.behind
            ):
                raise DataProblem(
                    "the text before the saved position is not what it was",
                    where=self._source.name,
                    fix="bring the old files back, or accept the change with resume.allow=data",
                )
            saved = None
            before = documents + int(np.searchsorted(starts, first))
            documents += _let_go(waiting, last)
            mark = waiting[0].mark
            behind = digest(tokens[mark.position - offset : last - offset + 1])
            yield _Block(
                number,
                tokens[first - offset : last - offset + 1].copy(),
                starts[(starts >= first) & (starts <= last)],
                before,
                replace(mark, behind=behind),
            )
            number += 1

    def _batches(self, mark: Mark) -> Iterator[_Batch]:
        """The stream from `mark` on, without end."""
        position, epoch, state = mark.position, mark.epoch, mark.rows
        while True:
            epoch_begin = position
            for before, documents in self._documents(state):
                if self._closed.is_set():
                    raise CancelledError
                tokens, starts = tokenize(self._tokenizer, documents, self._dtype)
                yield _Batch(Mark(position, epoch, before), tokens, starts + position)
                position += len(tokens)
            if state is None and position == epoch_begin:
                raise DataProblem(
                    f"column '{self._source.text_column}' holds no text",
                    where=self._source.name,
                    fix=TEXT_COLUMN_FIX,
                )
            epoch, state = epoch + 1, None

    def _documents(self, state: dict[str, Any] | None) -> Iterator[tuple[dict[str, Any] | None, list[bytes]]]:
        """The rest of an epoch from `state` on: lists of documents, and the state before each of them."""
        name, column = self._source.name, self._source.text_column
        documents: list[bytes] = []
        size = 0
        with tables.datasets_errors(name):
            rows = self._source.rows(state)
            for row in rows:
                document = as_bytes(row[column], column, lambda: name)
                if document and document_hash(document) >= self._held_out:
                    documents.append(document)
                    size += len(document)
                if size >= BATCH_BYTES:
                    yield state, documents
                    state, documents, size = rows.state_dict(), [], 0
        if documents:
            yield state, documents


def _starts(blocks: list[_Block]) -> Ints:
    """Where documents begin in consecutive blocks; the end of one is the next one's beginning."""
    return np.unique(np.concatenate([block.starts for block in blocks]))


def _let_go(waiting: deque[_Batch], position: int) -> int:
    """Drops the batches that end at `position` or before; how many documents they held."""
    documents = 0
    while len(waiting) > 1 and waiting[1].mark.position <= position:
        documents += len(waiting.popleft().starts)
    return documents
