import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bigtfm.data import order
from bigtfm.data.mixture import Mixture
from bigtfm.data.order import MAX_SIZE, Windows, digest, epoch_key, permute, shuffled

KEYS = st.integers(0, 2**64 - 1)
PINNED_TEN = [0, 2, 7, 5, 1, 9, 8, 6, 4, 3]
PINNED_LARGE = [834617529362, 688718398323, 58981973611]
PINNED_WINDOWS = "7afce0baca8fae5c"
PINNED_DIGEST = "77ba1ae68d5afbb4"


def key_of(seed, epoch=0):
    return int(epoch_key(seed, np.array([epoch]))[0])


@settings(max_examples=150, deadline=None)
@given(size=st.integers(1, 3000), key=KEYS)
@example(size=1, key=0)
@example(size=2, key=2**64 - 1)
def test_permute_is_a_bijection_of_every_small_size(size, key):
    assert np.array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


@pytest.mark.parametrize("size", [2**20, 2**20 - 1, 2**20 + 1, 1_000_003])
def test_permute_is_a_bijection_of_a_million(size):
    assert np.array_equal(np.sort(permute(np.arange(size), size, 7)), np.arange(size))


@settings(max_examples=150, deadline=None)
@given(
    size=st.one_of(st.integers(1, MAX_SIZE), st.integers(60, 62).map(lambda b: 2**b)),
    key=KEYS,
    data=st.data(),
)
def test_large_sizes_stay_inside_and_never_collide(size, key, data):
    index = np.array(
        data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=200, unique=True)), np.int64
    )
    out = permute(index, size, key)
    assert out.dtype == np.int64
    assert out.min() >= 0
    assert out.max() < size
    assert len(np.unique(out)) == len(index)


@pytest.mark.parametrize(
    ("rows", "columns"), [(2**31, 2**31), (2**31, 2**31 - 1), (1_000_000, 999_999), (4, 3)]
)
def test_feistel_rounds_can_be_undone(rows, columns):
    """A bijection also where nobody can enumerate it: its inverse, written here, gives the input back."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, rows * columns, 5000).astype(np.uint64)
    keys = rng.integers(0, 2**63, (order.ROUNDS, 1)).astype(np.uint64)
    y = order._feistel(x, rows, columns, keys)
    left, right = y // np.uint64(columns), y % np.uint64(columns)
    for i in reversed(range(0, order.ROUNDS, 2)):
        right = _unshift(right, left, keys[i + 1], columns)
        left = _unshift(left, right, keys[i], rows)
    assert np.array_equal(left * np.uint64(columns) + right, x)


def _unshift(half, other, key, modulus):
    shift = order._shift(np.zeros_like(other), other, key, np.uint64(modulus))
    return (half + np.uint64(modulus) - shift) % np.uint64(modulus)


def test_permutation_is_pinned():
    """Changing the permutation would silently change the order of every run that is resumed."""
    assert permute(np.arange(10), 10, 1).tolist() == PINNED_TEN
    assert permute(np.array([0, 1, 10**12 - 1]), 10**12, key_of(1234)).tolist() == PINNED_LARGE


def test_the_order_of_windows_is_pinned():
    """5000 samples, over eight epochs, of a data set of 9447 tokens in windows of 16."""
    order = Mixture([Windows(9447, 16)], seed=5)
    assert digest(order.pieces(0, 5000).ids) == PINNED_WINDOWS


def mixing(out, size):
    """Worst of the statistics, in standard deviations from what a random permutation has."""
    n = len(out)
    scaled = out / size - 0.5
    neighbours = np.mean(scaled[1:] * scaled[:-1]) * 12 * math.sqrt(n)
    in_place = np.mean(scaled * (np.arange(n) / n - 0.5)) * 12 * math.sqrt(n)
    cells = 64
    scores = [neighbours, in_place]
    for sample in (
        out[: n // 2],
        np.diff(out)[: n // 2] % size,
        out[::2][: n // 4],
    ):  # positions, strides, every 2nd
        expected = len(sample) / cells
        counts = np.bincount((sample * cells // size).astype(np.int64), minlength=cells)
        chi_square = float(((counts - expected) ** 2 / expected).sum())
        scores.append((chi_square - (cells - 1)) / math.sqrt(2 * (cells - 1)))
    pairs = np.bincount(out[:-1] % 8 * 8 + out[1:] % 8, minlength=64)  # low bits of neighbours
    expected = (n - 1) / 64
    scores.append((float(((pairs - expected) ** 2 / expected).sum()) - 63) / math.sqrt(126))
    return max(abs(score) for score in scores)


@pytest.mark.parametrize("size", [50_000, 2**16, 10**6, 10**9 + 7, 10**12])
def test_mixing_is_that_of_a_random_permutation(size):
    scores = [mixing(permute(np.arange(50_000), size, key_of(seed)), size) for seed in range(5)]
    assert max(scores) < 5.0, scores


def test_mixing_test_sees_a_weak_permutation(monkeypatch):
    """Negative control: an affine map, a shift, and the same network with two rounds all go red."""
    size = 10**6
    index = np.arange(50_000)
    assert mixing((index * 7919 + 13) % size, size) > 5
    assert mixing((index + 12345) % size, size) > 5
    monkeypatch.setattr(order, "ROUND_STEPS", order.ROUND_STEPS[:2])
    assert mixing(permute(index, size, 1), size) > 5


def unevenness(size, draws):
    """Chi-square, in standard deviations, of how often each of the size! permutations is drawn."""
    numbers = permutation_numbers(
        np.array([permute(np.arange(size), size, key_of(seed)) for seed in range(draws)])
    )
    cells = math.factorial(size)
    counts = np.bincount(np.unique(numbers, return_inverse=True)[1], minlength=cells)
    chi_square = float(((counts - draws / cells) ** 2).sum() / (draws / cells))
    return (chi_square - (cells - 1)) / math.sqrt(2 * (cells - 1))


def permutation_numbers(permutations):
    return permutations @ (permutations.shape[1] ** np.arange(permutations.shape[1]))


def test_all_permutations_of_a_tiny_set_are_equally_frequent(monkeypatch):
    assert abs(unevenness(5, 3600)) < 5
    monkeypatch.setattr(order, "ROUND_STEPS", order.ROUND_STEPS[:4])  # negative control
    assert unevenness(5, 3600) > 5


def test_seed_and_epoch_both_change_the_order():
    size, n = 10**6, 4000
    base = permute(np.arange(n), size, key_of(1))
    for seed, epoch in [(1, 1), (2, 0), (0, 1)]:
        other = permute(np.arange(n), size, key_of(seed, epoch))
        assert np.sum(base == other) < 5
        assert abs(np.corrcoef(base, other)[0, 1]) < 5 / math.sqrt(n)


def test_samples_run_through_every_epoch_once_and_reshuffle():
    size = 1000
    samples = shuffled(np.arange(3 * size), size, seed=5).reshape(3, size)
    for epoch in samples:
        assert np.array_equal(np.sort(epoch), np.arange(size))
    assert np.sum(samples[0] == samples[1]) < 20


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(0, 50), min_size=1, max_size=8), st.integers(1, 100))
def test_samples_do_not_depend_on_how_they_are_split(first, counts, size):
    whole = shuffled(np.arange(first, first + sum(counts)), size, seed=3)
    parts, start = [], first
    for count in counts:
        parts.append(shuffled(np.arange(start, start + count), size, seed=3))
        start += count
    assert np.array_equal(np.concatenate(parts), whole)


def test_a_key_for_each_index_is_the_same_as_one_key_at_a_time():
    keys = epoch_key(9, np.arange(300))
    index = np.arange(300) % 7
    one_by_one = [int(permute(index[i : i + 1], 7, int(keys[i]))[0]) for i in range(300)]
    assert permute(index, 7, keys).tolist() == one_by_one
    assert len(np.unique(keys)) == 300


def test_digest_is_of_the_sequence_and_the_same_on_every_machine():
    assert (
        digest(np.array([1, 2, 3]))
        == digest(np.array([1, 2, 3], ">i8"))
        == digest(np.array([1, 2, 3], np.int32))
    )
    assert digest(np.array([1, 2, 3])) == PINNED_DIGEST
    assert digest(np.array([1, 3, 2])) != PINNED_DIGEST
    assert len({digest(np.array([1, 2, 3]), of=data) for data in ("", "one", "other")}) == 3
    assert len(digest(np.array([], np.int64))) == 16


def test_a_trillion_samples_are_shuffled_without_storing_them():
    tracemalloc.start()
    assert len(shuffled(np.arange(10**11, 10**11 + 8), 10**12, seed=0)) == 8
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000  # bytes


@pytest.mark.parametrize(("index", "size"), [([5], 5), ([-1], 5), ([0], 0), ([0], MAX_SIZE + 1)])
def test_an_index_outside_is_our_own_mistake(index, size):
    with pytest.raises(AssertionError):
        permute(np.array(index), size, 1)
