"""The loader of one data set, for tests of what reads its batches."""

from bigtfm.data.loader import Loader
from bigtfm.data.mixture import Mixture
from bigtfm.data.objectives import causal_lm
from bigtfm.data.order import InOrder, Windows


def windows_loader(split, seq_len, seed, vocab_size, objective=causal_lm, shuffle=True):
    """Full windows, each epoch in an order of its own; without `shuffle` all of them, in order."""
    windows = Windows(split.num_tokens, seq_len, full=shuffle)
    order = Mixture([windows], seed) if shuffle else InOrder(windows)
    return Loader(split, order, seq_len, vocab_size, objective)
