"""What a worker process of test_prefetch imports: awkward objectives, and a worker without protection."""

import time

from bigtfm.config.problems import DataProblem
from bigtfm.data import prefetch
from bigtfm.data.objectives import causal_lm


def uneven(samples):
    """The later a sample, the quicker, so that what was asked for first is there last."""
    time.sleep(0.03 if samples.token_keys[0] // samples.seq_len % 24 < 8 else 0.0)
    return causal_lm(samples)


def failing(samples, bad_sample):
    """A problem where `bad_sample` is read."""
    if samples.token_keys[0] // samples.seq_len <= bad_sample <= samples.token_keys[-1] // samples.seq_len:
        raise DataProblem(f"sample {bad_sample} is bad", where="here", fix="mend it")
    return causal_lm(samples)


serve = prefetch._serve


def serve_unprotected(connection, pickled):
    """A worker that ends with the first signal."""
    prefetch.POLITE.clear()
    serve(connection, pickled)
