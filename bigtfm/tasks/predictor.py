"""What tasks ask a model for: scores at the places of examples, answers to prompts.

N examples, T tokens of those of one batch, C features, L labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bigtfm.data.examples import Example
from bigtfm.data.special import SpecialIds
from bigtfm.generation.beam_search import beam_search
from bigtfm.generation.decoding import inference, pack
from bigtfm.generation.sampling import generate
from bigtfm.model.bert import BERT
from bigtfm.model.encoder_decoder import EncoderDecoder
from bigtfm.model.gpt import GPT
from bigtfm.model.heads import LanguageModel

Step = Callable[[int, int], None]  # done, of how many


@dataclass(frozen=True)
class Predictor:
    """A model, and how it is asked.

    batch_tokens: tokens of a batch, about. num_beams 1: greedy. step: hears of progress.
    """

    model: LanguageModel
    special: SpecialIds
    batch_tokens: int = 4096
    num_beams: int = 4
    length_penalty: float = 1.0
    max_new_tokens: int = 128
    step: Step = field(default=lambda done, total: None)

    @property
    def causal(self) -> bool:
        return self.model.config.family == "gpt"

    def scores(self, examples: Sequence[Example]) -> list[NDArray[np.float32]]:
        """Of each example its head's scores [tokens, L], in the order given."""
        assert self.model.task_head is not None, "its objective has no head of its own"
        found: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(examples)
        with inference(self.model):
            for numbers in self.batches([len(example.ids) for example in examples]):
                x, lengths = self._features([examples[number].ids for number in numbers])
                parts = self.model.task_head(x).cpu().numpy()
                pieces = np.split(parts, np.cumsum(lengths)[:-1])
                for number, piece in zip(numbers, pieces, strict=True):
                    found[number] = piece
        return found

    def _features(self, ids: list[list[int]]) -> tuple[Tensor, list[int]]:
        model = self.model
        assert isinstance(model, GPT | BERT)
        input_ids, places, _, documents = pack(ids, model.embed_tokens.weight.device)
        return model.hidden(input_ids, places, documents), list(documents.seq_lens)

    def answers(self, prompts: Sequence[list[int]]) -> list[list[int]]:
        """What the model writes to each prompt, without end token, in the order given."""
        model = self.model
        assert isinstance(model, GPT | EncoderDecoder)
        start = [self.special.start] if isinstance(model, EncoderDecoder) else []
        found: list[list[int]] = [[]] * len(prompts)
        room = self.max_new_tokens
        for numbers in self.batches([len(prompt) + room * self.num_beams for prompt in prompts]):
            batch = [prompts[number] for number in numbers]
            if self.num_beams > 1:
                best = beam_search(
                    model, batch, num_beams=self.num_beams, length_penalty=self.length_penalty,
                    num_return_sequences=1, max_new_tokens=room, start=start, eos_id=self.special.eos,
                )  # fmt: skip
                written = [hypotheses[0].tokens for hypotheses in best]
            else:
                written = generate(
                    model, batch, max_new_tokens=room, temperature=0.0, start=start, eos_id=self.special.eos
                )
            for number, tokens in zip(numbers, written, strict=True):
                found[number] = tokens
        return found

    def batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Numbers of examples of these lengths, a batch at a time."""
        return batches(lengths, self.batch_tokens, self.step)


def batches(lengths: Sequence[int], batch_tokens: int, step: Step) -> Iterator[list[int]]:
    """Numbers of examples, alike in length, of about batch_tokens together; step: hears of progress."""
    batch: list[int] = []
    tokens = done = 0
    for number in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and tokens + lengths[number] > batch_tokens:
            yield batch
            done += len(batch)
            step(done, len(lengths))
            batch, tokens = [], 0
        batch.append(number)
        tokens += lengths[number]
    if batch:
        yield batch
        step(len(lengths), len(lengths))
