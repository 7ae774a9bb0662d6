import math
from types import SimpleNamespace

import numpy as np
import pytest

from bigtfm import evaluate
from bigtfm.config.problems import DataProblem
from bigtfm.evaluate import bits_per_byte, unigram_bits_per_byte


class FakeSplit:
    def __init__(self, documents, num_bytes):
        self.tokens = np.array([token for document in documents for token in document], np.uint16)
        self.starts = np.cumsum([0] + [len(document) for document in documents])[:-1]
        self.num_tokens, self.num_documents, self.num_bytes = len(self.tokens), len(documents), num_bytes

    def read(self, start, stop):
        return self.tokens[start:stop]

    def document_starts(self, start, stop):
        return self.starts[(self.starts >= start) & (self.starts < stop)]


class FakeDataset:
    path = "some/where"

    def __init__(self, train, validation, vocab_size):
        self.splits, self.vocab_size = {"train": train, "validation": validation}, vocab_size

    def split(self, name):
        return self.splits[name]


BOS, EOS, A, B = 0, 1, 2, 3
TRAIN = [[BOS, A, A, B, EOS], [BOS, A, EOS]]  # predicted: A three times, B once, EOS twice
VALIDATION = [[BOS, A, B, EOS], [BOS, EOS]]  # predicted: A, B, EOS, EOS


def dataset():
    return FakeDataset(FakeSplit(TRAIN, 4), FakeSplit(VALIDATION, 5), vocab_size=6)


def by_hand():
    probability = {A: (3 + 1) / (6 + 6), B: (1 + 1) / (6 + 6), EOS: (2 + 1) / (6 + 6)}
    return -sum(math.log2(probability[token]) for token in (A, B, EOS, EOS)) / 5


def test_unigram_baseline_is_the_hand_computed_value():
    assert unigram_bits_per_byte(dataset()) == pytest.approx(by_hand(), rel=1e-12)
    assert by_hand() == pytest.approx((math.log2(3) + math.log2(6) + 2 * 2) / 5)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 8])
def test_chunks_change_nothing(chunk, monkeypatch):
    monkeypatch.setattr(evaluate, "CHUNK", chunk)
    assert unigram_bits_per_byte(dataset()) == pytest.approx(by_hand(), rel=1e-12)


def test_a_long_validation_split_is_extrapolated(monkeypatch):
    """Ten copies of the same documents have the same bits per byte, seen whole or in part."""
    repeated = FakeDataset(FakeSplit(TRAIN, 4), FakeSplit(VALIDATION * 10, 50), vocab_size=6)
    whole = unigram_bits_per_byte(repeated)
    monkeypatch.setattr(evaluate, "UNIGRAM_TOKENS", 12)  # all of train, two copies of validation
    assert unigram_bits_per_byte(repeated) == pytest.approx(whole, rel=1e-12)


def test_counting_the_bos_would_show():
    """Negative control: with BOS among the predicted tokens the value is another one."""
    with_bos = FakeDataset(FakeSplit(TRAIN, 4), FakeSplit(VALIDATION, 5), vocab_size=6)
    for split in with_bos.splits.values():
        split.document_starts = lambda start, stop: np.empty(0, np.int64)
    assert abs(unigram_bits_per_byte(with_bos) - by_hand()) > 0.1


def test_bits_per_byte():
    assert bits_per_byte(math.log(2), predicted_tokens=10, num_bytes=40) == pytest.approx(0.25)
    assert bits_per_byte(math.log(256), 100, 100) == pytest.approx(8)  # bytes drawn evenly cost 8 bits each


def test_an_empty_validation_split_says_so():
    empty = FakeDataset(FakeSplit(TRAIN, 4), FakeSplit([], 0), vocab_size=6)
    with pytest.raises(DataProblem, match="validation split has no text"):
        unigram_bits_per_byte(empty)


class FakeLoader:
    """Windows of 4 tokens with so many labels each."""

    seq_len = 4

    def __init__(self, labels):
        self.labels, self.num_samples = labels, len(labels)

    def batch(self, first, count):
        return SimpleNamespace(num_labels=sum(self.labels[first : first + count]))


def test_an_evaluation_has_something_to_predict():
    evaluate.require_labels(FakeLoader([0, 0, 1]), max_tokens=12)
    with pytest.raises(DataProblem, match="nothing is to be predicted in the first 2 windows"):
        evaluate.require_labels(FakeLoader([0, 0, 1]), max_tokens=8)
    with pytest.raises(DataProblem, match="first 1 windows"):
        evaluate.require_labels(FakeLoader([0, 1]), max_tokens=1)
