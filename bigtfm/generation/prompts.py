"""From prompts in text to answers in text, as the family and the objective of a run have it.

causal_lm: the answer goes on from the prompt. masked_lm: the prompt with its masks filled in.
span_corruption: the spans that stand for the prompt's sentinels, <extra_id_0> and so on, each behind its own.
infilling: the whole text, with what stands for the prompt's masks.
completion and sequence_to_sequence: the target of the prompt, which is the source.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from typing import Any

from bigtfm.config.problems import ConfigProblem
from bigtfm.data.special import MASK_NAMES, SpecialIds
from bigtfm.data.tokenizer import Tokenizer, text_of
from bigtfm.generation.beam_search import beam_search
from bigtfm.generation.fill_mask import fill_mask
from bigtfm.generation.sampling import generate
from bigtfm.model.bert import BERT
from bigtfm.model.encoder_decoder import EncoderDecoder
from bigtfm.model.gpt import GPT
from bigtfm.model.heads import LanguageModel

_MARK = re.compile(f" ?(?:{'|'.join(map(re.escape, MASK_NAMES))}|<extra_id_([0-9]{{1,9}})>)")
ALTERNATIVES = 5  # tokens listed for a mask, where no top_k is given


@dataclass(frozen=True)
class Settings:
    """Of all ways to answer, by the names of the functions' arguments. num_beams 1: sampling."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    num_beams: int
    length_penalty: float
    num_return_sequences: int


@dataclass(frozen=True)
class Answer:
    """One answer to one prompt."""

    record: dict[str, Any]  # as JSON: prompt, text and, by the way it was found, score or masks
    shown: str  # to a reader


def answers(
    model: LanguageModel,
    tokenizer: Tokenizer,
    special: SpecialIds,
    prompts: Sequence[str],
    settings: Settings,
    given: Collection[str] = (),
) -> Iterator[Answer]:
    """settings.num_return_sequences answers to each prompt, in order; of a bert one.

    given: the settings that the user has chosen, which are refused where they would do nothing.

    Raises:
        ConfigProblem: a prompt or a setting is not for this model.
    """
    if model.task_head is not None:
        raise ConfigProblem(
            f"a run of {model.objective.kind} writes no text",
            where="bigtfm generate",
            fix="see what it says of rows: bigtfm predict --run RUN --data FILE",
        )
    _refuse_idle(model.config.family, settings, set(given))
    if isinstance(model, BERT):
        top_k = settings.top_k if "top_k" in given else ALTERNATIVES
        return _fill(model, tokenizer, special, prompts, top_k)
    assert isinstance(model, GPT | EncoderDecoder)
    return _write(model, tokenizer, special, prompts, settings)


def _fill(
    model: BERT, tokenizer: Tokenizer, special: SpecialIds, prompts: Sequence[str], top_k: int
) -> Iterator[Answer]:
    assert special.mask is not None
    ids = [_read(text, number, tokenizer, special) for number, text in enumerate(prompts, start=1)]
    for text, tokens, masks in zip(prompts, ids, fill_mask(model, ids, special.mask, top_k), strict=True):
        likeliest = iter([alternatives[0][0] for alternatives in masks])
        filled = [next(likeliest) if token == special.mask else token for token in tokens]
        found = [
            [
                {"token": _show([token], tokenizer, special), "id": token, "probability": probability}
                for token, probability in alternatives
            ]
            for alternatives in masks
        ]
        shown = _show(filled, tokenizer, special)
        yield Answer({"prompt": text, "text": shown, "masks": found}, shown)


def _write(
    model: GPT | EncoderDecoder,
    tokenizer: Tokenizer,
    special: SpecialIds,
    prompts: Sequence[str],
    settings: Settings,
) -> Iterator[Answer]:
    start: list[int] = []
    if isinstance(model, GPT):
        end = [special.eos] if model.objective.kind == "completion" else []  # as the prompts it has learnt
        ids = [[special.bos, *tokenizer.encode(text), *end] for text in prompts]
    else:
        ids = [_read(text, number, tokenizer, special) for number, text in enumerate(prompts, start=1)]
        start = decoder_lead(special)
    common = {"max_new_tokens": settings.max_new_tokens, "start": start, "eos_id": special.eos}
    for text, found in zip(prompts, _found(model, ids, common, settings), strict=True):
        for tokens, score in found:
            answer = _show(tokens, tokenizer, special)
            shown = text + answer if isinstance(model, GPT) else answer
            yield Answer({"prompt": text, "text": answer, **score}, shown)


def _found(
    model: GPT | EncoderDecoder, ids: list[list[int]], common: dict[str, Any], settings: Settings
) -> list[list[tuple[list[int], dict[str, float]]]]:
    """The answers' tokens to each prompt, and what else there is to say of each."""
    count = settings.num_return_sequences
    if settings.num_beams > 1:
        best = beam_search(
            model,
            ids,
            num_beams=settings.num_beams,
            length_penalty=settings.length_penalty,
            num_return_sequences=count,
            **common,
        )
        return [[(one.tokens, {"score": one.score}) for one in hypotheses] for hypotheses in best]
    samples = iter(
        generate(
            model,
            [tokens for tokens in ids for _ in range(count)],
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            seed=settings.seed,
            **common,
        )
    )
    return [[(next(samples), {}) for _ in range(count)] for _ in ids]


def _lead(special: SpecialIds) -> list[int]:
    """What a document begins with: BOS, unless it is the token that ends documents."""
    return [special.bos] if special.bos != special.eos else []


def decoder_lead(special: SpecialIds) -> list[int]:
    """What an encoder-decoder's decoder reads first."""
    infilling = special.mask is not None
    return [special.start, *([special.bos] if infilling and special.writes_bos else [])]


def _read(text: str, number: int, tokenizer: Tokenizer, special: SpecialIds) -> list[int]:
    return encoder_document(text, f"prompt {number}", tokenizer, special)


def encoder_document(text: str, where: str, tokenizer: Tokenizer, special: SpecialIds) -> list[int]:
    """What an encoder reads: BOS, unless it is the token that ends documents; `marked` text; EOS."""
    return [*_lead(special), *marked(text, where, tokenizer, special), special.eos]


def marked(text: str, where: str, tokenizer: Tokenizer, special: SpecialIds) -> list[int]:
    """Ids of text with masks or sentinels, where the objective has such.

    A blank before one belongs to what it stands for: tokenizers join a blank to the word behind it.

    Raises:
        ConfigProblem: a sentinel is unknown; `where` is the text's name.
    """
    ids: list[int] = []
    end = 0
    for match in _MARK.finditer(text):
        mark = special.mask if match[1] is None else _sentinel(int(match[1]), where, special)
        if mark is not None:
            ids += [*tokenizer.encode(text[end : match.start()]), mark]
            end = match.end()
    return [*ids, *tokenizer.encode(text[end:])]


def _sentinel(place: int, where: str, special: SpecialIds) -> int | None:
    if not special.sentinels:
        return None
    if place >= len(special.sentinels):
        fix = f"use <extra_id_0> to <extra_id_{len(special.sentinels) - 1}>"
        raise ConfigProblem(f"<extra_id_{place}> is unknown", where=where, fix=fix)
    return special.sentinels[place]


def _show(ids: Sequence[int], tokenizer: Tokenizer, special: SpecialIds) -> str:
    """Text of ids, with the marks of `_read` readable; ids that stand for no text are left out."""
    marks = {token: f"<extra_id_{place}>" for place, token in enumerate(special.sentinels)}
    if special.mask is not None:
        marks[special.mask] = "<mask>"
    parts = []
    for mark, run in groupby(ids, key=marks.get):
        tokens = list(run)
        parts += [text_of(tokens, tokenizer)] if mark is None else ([mark] * len(tokens))
    return parts[0] if len(parts) == 1 else " ".join(part.strip() for part in parts)


def _refuse_idle(family: str, settings: Settings, given: set[str]) -> None:
    """A setting that would do nothing is a mistake, not a preference."""
    if family == "bert":
        idle, why = {field.name for field in fields(Settings)} - {"top_k"}, "a bert fills masks in"
    elif settings.num_beams > 1:
        idle, why = {"temperature", "top_k", "top_p", "seed"}, "beam search draws nothing at random"
    else:
        idle, why = {"length_penalty"}, "it is beam search's, with --num-beams 2 or more"
    for name in sorted(idle & given):
        flag = f"--{name.replace('_', '-')}"
        raise ConfigProblem(f"{flag} does nothing here: {why}", where="command line", fix=f"leave {flag} out")
    if settings.num_return_sequences > 1 and settings.num_beams == 1 and settings.temperature == 0:
        fix = "sample with a --temperature above 0, or search with --num-beams"
        raise ConfigProblem("greedy decoding has one answer", where="command line", fix=fix)
