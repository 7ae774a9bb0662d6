"""Answers are transformers' own: greedy and beam search of tiny random models of its architectures."""

from __future__ import annotations

import hf_models
import pytest
import torch

from bigtfm.generation.beam_search import beam_search
from bigtfm.generation.sampling import generate

PROMPTS = [[11, 12, 13], [14], [15, 16, 17, 18, 19, 20, 21, 15, 16, 17, 18, 19], [22, 23]]
NEW = 10


def their_answers(model, prompt, eos, **options):
    """(tokens without the end, score) of each sequence that transformers returns for one prompt.

    Without its cache, which in 5.24 fails for a T5 whose stacks differ in length.
    """
    from transformers import GenerationConfig

    start = model.config.decoder_start_token_id if model.config.is_encoder_decoder else None
    options = GenerationConfig(
        max_new_tokens=NEW, do_sample=False, eos_token_id=eos, pad_token_id=0, decoder_start_token_id=start,
        return_dict_in_generate=True, use_cache=False, output_scores=True, **options,
    )  # fmt: skip
    found = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), generation_config=options
    )
    skipped = 1 if model.config.is_encoder_decoder else len(prompt)
    scores = found.sequences_scores.tolist() if "sequences_scores" in found else [None]
    answers = []
    for tokens, score in zip(found.sequences[:, skipped:].tolist(), scores, strict=True):
        answers.append((tokens[: tokens.index(eos)] if eos in tokens else tokens, score))
    return answers


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "t5", "t5-gated", "bart", "marian"])
def test_answers_are_those_of_transformers(name, tmp_path):
    theirs, ours = hf_models.both(name, tmp_path)
    greedy = generate(ours, PROMPTS, max_new_tokens=NEW, temperature=0)
    assert [tokens for tokens, _ in (their_answers(theirs, prompt, None)[0] for prompt in PROMPTS)] == greedy
    eos, ended = greedy[0][3], 0
    for num_beams, length_penalty in ((2, 1.0), (4, 0.0), (5, 2.0), (3, -1.0)):
        shared = {"num_beams": num_beams, "length_penalty": length_penalty, "num_return_sequences": 2}
        found = beam_search(ours, PROMPTS, max_new_tokens=NEW, eos_id=eos, **shared)
        for prompt, best in zip(PROMPTS, found, strict=True):
            # "never": transformers' other ends are heuristics
            expected = their_answers(theirs, prompt, eos, early_stopping="never", **shared)
            assert [one.tokens for one in best] == [tokens for tokens, _ in expected]
            assert [one.score for one in best] == pytest.approx([score for _, score in expected], abs=1e-4)
            ended += sum(len(one.tokens) < NEW for one in best)
    assert ended, "so that ends are looked at"
