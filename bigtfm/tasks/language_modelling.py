"""How well a decoder foretells text: perplexity a token, bits a byte, over windows that slide.

T tokens of a document, W tokens of a window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from bigtfm.config.problems import ConfigProblem
from bigtfm.data.tokenizer import Tokenizer
from bigtfm.generation.decoding import inference, pack
from bigtfm.model.gpt import GPT
from bigtfm.tasks.likelihood import Foretold, predicted
from bigtfm.tasks.predictor import Predictor


def slide(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(first, behind the last, first that is scored) of each window of a document of `length` tokens.

    Each but the first token is scored once, by the first window that reaches it: with `window - stride`
    tokens before it or more.
    """
    assert stride < window, "the first token of a window is not scored there"
    scored = 1
    for first in range(0, max(length - 1, 0), stride):
        last = min(first + window, length)
        yield first, last, scored
        if last == length:
            return
        scored = last


def token_losses(
    model: GPT, documents: Sequence[Sequence[int]], *, window: int, stride: int, batch_tokens: int = 4096
) -> list[NDArray[np.float64]]:
    """-log p of each token but the first, in nats, given what its window holds before it: [T - 1] each.

    It is what https://huggingface.co/docs/transformers/perplexity computes.
    """
    found = [np.zeros(max(len(ids) - 1, 0)) for ids in documents]
    waiting: list[tuple[int, int, int, int]] = []

    def flush() -> None:
        ids = [documents[number][first:last] for number, first, last, _ in waiting]
        input_ids, places, _, packed = pack(ids, model.embed_tokens.weight.device)
        x, begins = model.hidden(input_ids, places, packed), packed.cu_seqlens.tolist()
        for (number, first, last, scored), begin in zip(waiting, begins[:-1], strict=True):
            at = torch.arange(begin + scored - 1 - first, begin + last - 1 - first, device=x.device)
            losses, _ = predicted(model, x[at], input_ids[at + 1])
            found[number][scored - 1 : last - 1] = losses.double().cpu().numpy()
        waiting.clear()

    with inference(model):
        size = 0
        for number, ids in enumerate(documents):
            for first, last, scored in slide(len(ids), window, stride):
                if waiting and size + last - first > batch_tokens:
                    flush()
                    size = 0
                waiting.append((number, first, last, scored))
                size += last - first
        if waiting:
            flush()
    return found


def foretold(
    predictor: Predictor,
    texts: Sequence[bytes],
    tokenizer: Tokenizer,
    stride: int | None = None,
) -> list[Foretold]:
    """Each text, read as BOS text EOS.

    stride: tokens by which windows of max_seq_len move; None: half a window.
    """
    model = predictor.model
    assert isinstance(model, GPT)
    window = model.config.max_seq_len
    stride = stride or window // 2
    if not 0 < stride < window:
        raise ConfigProblem(
            f"windows of {window} tokens can't move by {stride}",
            where="command line",
            fix=f"pass a --stride of 1 to {window - 1}",
        )
    found = []
    for number, text in enumerate(texts):
        ids = [predictor.special.bos, *tokenizer.encode(text), predictor.special.eos]
        [losses] = token_losses(
            model, [ids], window=window, stride=stride, batch_tokens=predictor.batch_tokens
        )
        found.append(Foretold(np.array(ids[1:]), float(losses.sum()), 0, len(text)))
        predictor.step(number + 1, len(texts))
    return found
