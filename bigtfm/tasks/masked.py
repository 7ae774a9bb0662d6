"""How well an encoder finds what masks hide: accuracy and perplexity of the hidden tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from bigtfm.config.marks import IGNORE
from bigtfm.data.masking import masked_lm
from bigtfm.data.samples import Samples
from bigtfm.data.tokenizer import Tokenizer
from bigtfm.generation.decoding import inference, pack
from bigtfm.model.bert import BERT
from bigtfm.tasks.likelihood import NOTHING, Foretold, predicted
from bigtfm.tasks.predictor import Predictor

SEED = 0  # of what is hidden


def foretold(
    predictor: Predictor, texts: Sequence[bytes], numbers: Sequence[int], tokenizer: Tokenizer
) -> list[Foretold]:
    """The hidden tokens of each text, read as BOS text EOS in pieces of max_seq_len.

    They are hidden as the run's objective has it, without sentence pairs. Which ones is a function of the
    text's number and of their place in it, not of who looks at it.
    """
    model = predictor.model
    assert isinstance(model, BERT)
    longest, found = model.config.max_seq_len, []
    with inference(model):
        for done, (number, text) in enumerate(zip(numbers, texts, strict=True), start=1):
            ids = np.array([predictor.special.bos, *tokenizer.encode(text), predictor.special.eos], np.int64)
            parts = [
                _of_piece(predictor, model, ids[first : first + longest], (number << 32) + first)
                for first in range(0, len(ids), longest)
            ]
            sides = list(zip(*parts, strict=True))
            found.append(Foretold(np.concatenate(sides[0]), sum(sides[1]), sum(sides[2]), len(text)))
            predictor.step(done, len(texts))
    return found


def _of_piece(predictor: Predictor, model: BERT, ids: np.ndarray, key: int) -> Foretold:
    ends = np.array([len(ids)])
    samples = Samples(
        ids, key + np.arange(len(ids)), np.array([0, len(ids)]), ends, ends, ends, ends, len(ids), len(ids),
        lambda first, last: ids[first:last],
    )  # fmt: skip
    options = model.objective.model_copy(update={"next_sentence": 0.0})
    hidden = masked_lm(samples, options=options, special=predictor.special, seed=SEED)
    at = np.flatnonzero(hidden.labels != IGNORE)
    if not len(at):
        return NOTHING
    device = model.embed_tokens.weight.device
    input_ids, places, _, documents = pack([hidden.input_ids.tolist()], device)
    x = model.hidden(input_ids, places, documents)[torch.from_numpy(at).to(device)]
    assert model.mlm_head is not None
    wanted = hidden.labels[at]
    losses, hits = predicted(model, model.mlm_head(x), torch.from_numpy(wanted).to(device))
    return Foretold(wanted, float(losses.double().sum()), int(hits.sum()), 0)
