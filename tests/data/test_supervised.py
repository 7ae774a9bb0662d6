"""Objectives on marked tokens: what is read, what is to be predicted, what a cut leaves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from loaders import windows_loader

from bigtfm.config.marks import BEGINS, ENDS, IGNORE, SELECTABLE, WRITTEN
from bigtfm.config.sections import ObjectiveSection
from bigtfm.data.loader import Loader
from bigtfm.data.objectives import make_objective
from bigtfm.data.order import InOrder, WholeDocuments
from bigtfm.data.special import SpecialIds

BOS, EOS, VOCAB = 1, 2, 50
SPECIAL = SpecialIds(VOCAB, BOS, EOS, None, (), BOS, np.zeros(VOCAB, bool), np.arange(3, VOCAB), None)


class Marked:
    """A split in memory: documents of (id, mark)."""

    name, marked = "train", True

    def __init__(self, documents: list[list[tuple[int, int]]]) -> None:
        flat = [token for document in documents for token in document]
        self.tokens, self.marks = (np.array(side, np.uint32) for side in zip(*flat, strict=True))
        self.starts = np.cumsum([0, *map(len, documents)])[:-1]
        self.num_tokens = len(flat)

    def read(self, start, stop):
        return self.tokens[start:stop]

    def read_marks(self, start, stop):
        return self.marks[start:stop]

    def documents_before(self, positions):
        return np.searchsorted(self.starts, positions)

    def document_positions(self, documents):
        return self.starts[documents]


def batch(documents, kind, *, seq_len=16, special=SPECIAL, causal=False):
    split = Marked(documents)
    objective = make_objective(ObjectiveSection(), kind, special, 5, causal=causal)
    order = InOrder(WholeDocuments(split.starts, split.num_tokens, seq_len))
    return Loader(split, order, seq_len, VOCAB, objective).batch(0, order.num_samples)


PAIRS = [
    [(BOS, 0), (10, 0), (11, 0), (EOS, 0), (20, WRITTEN), (21, WRITTEN), (EOS, WRITTEN)],
    [(BOS, 0), (12, 0), (EOS, 0), (22, WRITTEN), (EOS, WRITTEN)],
]


def test_completion_learns_what_is_marked_and_nothing_across_examples() -> None:
    made = batch(PAIRS, "completion")
    assert made.input_ids.tolist() == [BOS, 10, 11, EOS, 20, 21, EOS, BOS, 12, EOS, 22, EOS]
    i = IGNORE
    assert made.labels.tolist() == [i, i, i, 20, 21, EOS, i, i, i, 22, EOS, i]
    assert made.num_labels == 5
    assert made.seq_lens == (7, 5)


def test_an_encoder_reads_the_source_and_a_decoder_writes_the_target() -> None:
    made = batch(PAIRS, "sequence_to_sequence")
    assert made.input_ids.tolist() == [BOS, 10, 11, EOS, BOS, 12, EOS]
    assert made.seq_lens == (4, 3)
    assert made.labels.tolist() == [20, 21, EOS, 22, EOS]
    assert made.decoder_input_ids is not None
    assert made.decoder_input_ids.tolist() == [BOS, 20, 21, BOS, 22]
    assert made.decoder_seq_lens == (3, 2)
    assert made.num_labels == 5


def test_an_example_that_is_cut_has_both_sides_and_no_label() -> None:
    """No source fits, or no target: packed data have no such, a probe may."""
    alone = [[(BOS, 0), (10, 0), (11, 0)], [(20, 1), (21, 1)]]
    made = batch([*alone, PAIRS[1]], "sequence_to_sequence")
    assert made.seq_lens == (3, 2, 3)
    assert made.decoder_seq_lens == (1, 1, 2)
    assert made.labels.tolist() == [IGNORE, IGNORE, 22, EOS]
    assert made.num_labels == 2


def test_where_bos_is_eos_the_encoder_reads_no_leading_one() -> None:
    t5 = SpecialIds(VOCAB, EOS, EOS, None, (), 0, np.zeros(VOCAB, bool), np.arange(3, VOCAB), None)
    made = batch([[(EOS, 0), *PAIRS[0][1:]]], "sequence_to_sequence", special=t5)
    assert made.input_ids.tolist() == [10, 11, EOS]
    assert made.decoder_input_ids is not None
    assert made.decoder_input_ids.tolist() == [0, 20, 21]


@pytest.mark.parametrize(("causal", "place"), [(False, 0), (True, -1)])
def test_a_label_stands_where_all_has_been_seen(causal: bool, place: int) -> None:
    examples = [[(BOS, label + 1), (10, 0), (11, 0), (EOS, label + 1)] for label in (2, 0)]
    made = batch([*examples, [(BOS, 0), (12, 0), (EOS, 0)]], "classification", causal=causal)
    labels = np.split(made.labels.numpy(), np.cumsum(made.seq_lens)[:-1])
    assert [document[place] for document in labels] == [2, 0, IGNORE]
    assert made.num_labels == 2 == np.count_nonzero(made.labels.numpy() != IGNORE)


def test_tagging_labels_the_marked() -> None:
    made = batch([[(BOS, 0), (10, 3), (11, 0), (12, 1), (EOS, 0)]], "tagging")
    assert made.labels.tolist() == [IGNORE, 2, IGNORE, 0, IGNORE]
    assert made.num_labels == 2


def test_question_answering_keeps_the_marks_and_counts_the_answered() -> None:
    answered = [(BOS, 0), (10, SELECTABLE), (11, SELECTABLE | BEGINS), (12, SELECTABLE | ENDS), (EOS, 0)]
    made = batch([answered, [(BOS, 0), (10, SELECTABLE), (EOS, 0)]], "question_answering")
    assert made.labels.tolist() == [0, 1, 3, 5, 0, 0, 1, 0]
    assert made.num_labels == 1


def test_whole_documents_fill_sequences_and_none_is_cut() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 17, 500)
    starts = np.cumsum([0, *lengths])[:-1]
    source = WholeDocuments(starts, int(lengths.sum()), 16)
    _, _, begins, stops = source.pieces(np.arange(source.size))
    assert begins.tolist() == [0, *stops[:-1].tolist()], "no token is left out"
    assert stops[-1] == lengths.sum()
    assert (stops - begins).max() <= 16
    assert set(begins.tolist()) <= set(starts.tolist())
    room = 16 - (stops - begins)[:-1]
    following = np.diff(np.append(starts, lengths.sum()))[np.searchsorted(starts, stops[:-1])]
    assert (following > room).all(), "the next document would have fitted"


def test_of_a_document_that_is_too_long_the_beginning_is_read() -> None:
    source = WholeDocuments(np.array([0, 40, 45]), 50, 16)
    _, _, begins, stops = source.pieces(np.arange(source.size))
    assert (begins.tolist(), stops.tolist()) == ([0, 40], [16, 50])


def test_text_objectives_read_marked_data_too(tmp_path: Path) -> None:
    split = Marked(PAIRS)
    made = windows_loader(split, 12, 0, VOCAB, shuffle=False).batch(0, 1)
    assert made.labels.tolist()[:3] == [10, 11, EOS]
