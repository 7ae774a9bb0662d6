"""A split of a data set in memory, for tests of what reads one."""

import numpy as np


class MemorySplit:
    """Documents of the given lengths (BOS and EOS included).

    Their tokens are numbers of which neighbours differ. With `documents`: BOS 1 in front, EOS 2 at the end
    (BOS alone in a document of one token), and between them any other ids at random.
    """

    name = "train"
    marked = False

    def __init__(self, lengths, vocab_size=1000, dtype=np.uint16, *, documents=False, seed=0):
        self.starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
        self.num_tokens = int(np.sum(lengths))
        self.tokens = (np.arange(self.num_tokens) * 7 % vocab_size).astype(dtype)
        if documents:
            text = np.setdiff1d(np.arange(vocab_size), [1, 2])
            self.tokens = np.random.default_rng(seed).choice(text, self.num_tokens).astype(dtype)
            self.tokens[np.append(self.starts[1:], self.num_tokens) - 1] = 2
            self.tokens[self.starts] = 1

    def read(self, start, stop):
        return self.tokens[start:stop]

    def documents_before(self, positions):
        return np.searchsorted(self.starts, positions)

    def document_positions(self, documents):
        return self.starts[documents]
