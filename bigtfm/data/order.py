"""Order as a function: which sample stands at which place is computed, never stored.

A keyed permutation of range(size) costs no start-up time and no memory at any size, and sample n does not
depend on world size, workers, batch sizes or interruptions: a checkpoint keeps the count of samples, no more.
What an objective draws at random is a function in the same way, of a stream's key and an index.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from math import isqrt
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

MAX_SIZE = 2**62
ROUNDS = 16  # 4 make a pseudo-random permutation (Luby & Rackoff 1988); 16 choose evenly also for size 6
GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's increment: 2**64 / golden ratio, odd
ROUND_STEPS = np.arange(1, ROUNDS + 1, dtype=np.uint64)[:, None] * np.uint64(GOLDEN)


class Pieces(NamedTuple):
    """What consecutive samples are made of: P runs of consecutive tokens of one stream, sample by sample.

    A sample has one piece at least. Pieces of one sample follow each other in it without a gap; attention
    never crosses from one to the next.
    """

    ids: NDArray[np.int64]  # [count], what each sample is: the digest covers them
    samples: NDArray[np.int64]  # [P], which of the count samples a piece belongs to, in order
    starts: NDArray[np.int64]  # [P], first position in the stream
    stops: NDArray[np.int64]  # [P], the position behind the last one

    @property
    def num_tokens(self) -> int:
        """Tokens of all of them."""
        return int((self.stops - self.starts).sum())


class Order(Protocol):
    """Which samples a run takes, by their numbers from 0 on. A function: nothing is drawn or remembered."""

    @property
    def num_samples(self) -> int:
        """How many there are; MAX_SIZE: there is no end."""

    def pieces(self, first: int, count: int) -> Pieces:
        """The samples first .. first + count - 1."""


class Source(Protocol):
    """A data set cut into samples, which have indices from 0 on."""

    @property
    def size(self) -> int:
        """How many samples there are."""

    @property
    def tokens_per_sample(self) -> float:
        """On the average."""

    def pieces(self, indices: NDArray[np.int64]) -> Pieces:
        """The samples of these indices [count], which are their ids."""


@dataclass(frozen=True)
class Windows:
    """A source whose samples are windows of `seq_len` consecutive tokens, each with a token behind it.

    Window i holds the source's tokens i * seq_len .. (i + 1) * seq_len - 1. What is left over at its end
    makes a shorter one, unless only `full` ones are asked for.
    """

    num_tokens: int  # of the source
    seq_len: int
    full: bool = True
    start: int = 0  # the source's first position in the stream

    @property
    def size(self) -> int:
        positions = max(0, self.num_tokens - 1)  # the last token is only ever a label
        return positions // self.seq_len if self.full else -(-positions // self.seq_len)

    @property
    def tokens_per_sample(self) -> float:
        return self.seq_len if self.full else (self.num_tokens - 1) / self.size

    def pieces(self, indices: NDArray[np.int64]) -> Pieces:
        starts = self.start + indices * self.seq_len
        stops = starts + self.seq_len
        if not self.full:
            stops = np.minimum(stops, self.start + self.num_tokens - 1)
        return Pieces(indices, np.arange(len(indices)), starts, stops)


class WholeDocuments:
    """A source whose samples are documents one behind the other, as many whole ones as `seq_len` holds.

    Of a document that is longer, the tokens that fit.

    starts: where documents begin in the stream [documents].
    """

    def __init__(self, starts: NDArray[np.int64], num_tokens: int, seq_len: int) -> None:
        ends = np.append(starts[1:], num_tokens)
        firsts, document = [], 0
        while document < len(starts):
            firsts.append(document)
            behind = int(np.searchsorted(ends, starts[document] + seq_len, side="right"))
            document = max(behind, document + 1)
        self._starts = starts[firsts]
        self._stops = np.minimum(np.append(self._starts[1:], num_tokens), self._starts + seq_len)
        self.size = len(firsts)
        self.tokens_per_sample = num_tokens / max(self.size, 1)

    def pieces(self, indices: NDArray[np.int64]) -> Pieces:
        return Pieces(indices, np.arange(len(indices)), self._starts[indices], self._stops[indices])


@dataclass(frozen=True)
class InOrder:
    """The order of a source's own indices, once."""

    source: Source

    @property
    def num_samples(self) -> int:
        return self.source.size

    def pieces(self, first: int, count: int) -> Pieces:
        assert first + count <= self.num_samples, "there is one epoch"
        return self.source.pieces(np.arange(first, first + count))


def permute(index: NDArray[np.int64], size: int, key: int | NDArray[np.uint64]) -> NDArray[np.int64]:
    """Where a keyed bijection of range(size) sends each index: int64 [n] -> int64 [n], both in [0, size).

    A generalised Feistel network on the rectangle rows x columns >= size, with cycle walking: what lands
    beyond `size` is sent on until it lands inside (Black & Rogaway 2002, "Ciphers with arbitrary finite
    domains", methods 2 and 3). The rectangle exceeds `size` by less than its longer side, so walks are rare.
    The round function is splitmix64's finaliser.

    Args:
        index: [n]; values in [0, size).
        size: 1 to 2**62.
        key: chooses the permutation, 0 to 2**64 - 1; one for all, or [n], one for each index.
    """
    assert 1 <= size <= MAX_SIZE, f"size {size} is outside 1..2**62"
    assert index.size == 0 or (index.min() >= 0 and index.max() < size), f"an index is outside range({size})"
    round_keys = mix64(np.array(key, np.uint64, ndmin=1)) + ROUND_STEPS  # [ROUNDS, 1 or n]
    rows = isqrt(size - 1) + 1
    columns = -(-size // rows)
    out = _feistel(index.astype(np.uint64), rows, columns, round_keys)
    while (outside := np.flatnonzero(out >= size)).size:
        walking = round_keys[:, outside] if round_keys.shape[1] > 1 else round_keys
        out[outside] = _feistel(out[outside], rows, columns, walking)
    return out.view(np.int64)


def _feistel(
    x: NDArray[np.uint64], rows: int, columns: int, round_keys: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    """A bijection of range(rows * columns); rows and columns at most 2**31."""
    left = x // np.uint64(columns)
    right = x - left * np.uint64(columns)
    for even, odd in zip(round_keys[::2], round_keys[1::2], strict=True):
        left = _shift(left, right, even, np.uint64(rows))
        right = _shift(right, left, odd, np.uint64(columns))
    left *= np.uint64(columns)
    left += right
    return left


def _shift(
    half: NDArray[np.uint64], other: NDArray[np.uint64], key: NDArray[np.uint64], modulus: np.uint64
) -> NDArray[np.uint64]:
    """(half + a hash of `other`) mod modulus: undone by subtracting, so each round is a bijection."""
    shift = mix64(other + key)
    shift >>= np.uint64(32)
    shift *= modulus
    shift >>= np.uint64(32)  # multiply-shift instead of a division: 32 hash bits scaled to [0, modulus)
    shift += half
    np.minimum(shift, shift - modulus, out=shift)  # below the modulus the difference wraps round: huge
    return shift


def mix64(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser, in place (Steele, Lea & Flood 2014, constants of Stafford's variant 13)."""
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


def stream_key(seed: int, name: str) -> int:
    """The key of the random stream that belongs to `name` under `seed`: 0 to 2**64 - 1."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little")


def random_bits(index: NDArray[np.int64], key: int) -> NDArray[np.uint64]:
    """Number `index` of the stream `key`: int64 [n] -> uint64 [n], as splitmix64 counts. No two are equal."""
    bits = index.astype(np.uint64)
    bits *= np.uint64(GOLDEN)
    bits += np.uint64(key)
    return mix64(bits)


def uniform(index: NDArray[np.int64], key: int) -> NDArray[np.float64]:
    """The same as numbers in [0, 1), multiples of 2**-53."""
    return (random_bits(index, key) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def epoch_key(seed: int, epoch: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Keys of epochs' permutations: int64 [n] -> uint64 [n], a splitmix64 that starts at the mixed seed."""
    return mix64(mix64(np.array([seed], np.uint64)) + epoch.astype(np.uint64) * np.uint64(GOLDEN))


def shuffled(numbers: NDArray[np.int64], size: int, seed: int) -> NDArray[np.int64]:
    """Indices, in [0, size), of the samples of these numbers, in ascending order: int64 [n] -> int64 [n].

    Sample n belongs to epoch n // size; each epoch runs through all indices once, in an order of its own.
    """
    epoch = numbers // size
    places = numbers - epoch * size
    if len(numbers) and epoch[0] == epoch[-1]:
        epoch = epoch[:1]
    return permute(places, size, epoch_key(seed, epoch))


def digest(samples: NDArray[np.int64], of: str = "") -> str:
    """Fingerprint of numbers, and of what they count: 16 hex digits, BLAKE2b over little-endian int64.

    of: identity of the data, of which `samples` are ids; other data have other digests.
    """
    key = hashlib.sha256(of.encode()).digest() if of else b""
    return hashlib.blake2b(np.asarray(samples, dtype="<i8").tobytes(), digest_size=8, key=key).hexdigest()
