"""What a BERT puts into the places that a mask hides."""

from __future__ import annotations

from bigtfm.config.problems import ConfigProblem
from bigtfm.generation.decoding import Prompts, check_prompts, inference, pack
from bigtfm.model.bert import BERT


def fill_mask(
    model: BERT, prompts: Prompts, mask_id: int, top_k: int = 5
) -> list[list[list[tuple[int, float]]]]:
    """For each mask of each prompt the top_k likeliest tokens, best first: (id, probability).

    The model reads all prompts at once, packed. It judges each place on its own, the other masks unfilled.

    Raises:
        ConfigProblem: a prompt is empty, too long, holds an unknown id or no mask; or top_k is below 1.
    """
    check_prompts(model, prompts)
    if top_k < 1:
        raise ConfigProblem(f"top_k is {top_k}", where="fill_mask", fix="use at least 1")
    for number, prompt in enumerate(prompts, start=1):
        if mask_id not in prompt:
            fix = "put a mask ([MASK] or <mask> in text) where a token is to be found"
            raise ConfigProblem("nothing in it is masked", where=f"prompt {number}", fix=fix)
    if not prompts:
        return []
    with inference(model):
        input_ids, places, _, documents = pack(prompts, model.embed_tokens.weight.device)
        x = model.hidden(input_ids, places, documents)[input_ids == mask_id]  # [M, C]
        probabilities = model.vocabulary(x).double().softmax(-1)  # [M, V]
        top = probabilities.topk(min(top_k, model.vocab_size))
    found = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    masks = [list(zip(*sides, strict=True)) for sides in found]
    answers = iter(masks)
    return [[next(answers) for token in prompt if token == mask_id] for prompt in prompts]
