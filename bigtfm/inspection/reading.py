"""From a text to what a model reads, as its family and objective have it."""

from __future__ import annotations

from dataclasses import dataclass

from bigtfm.config.problems import ConfigProblem
from bigtfm.data.special import SpecialIds
from bigtfm.data.tokenizer import Tokenizer
from bigtfm.generation.prompts import decoder_lead, encoder_document, marked
from bigtfm.generation.sampling import generate
from bigtfm.model.bert import BERT
from bigtfm.model.encoder_decoder import EncoderDecoder
from bigtfm.model.gpt import GPT
from bigtfm.model.heads import LanguageModel


@dataclass(frozen=True)
class Reading:
    """Token ids of both sides; a side that the model does not have is empty.

    labels: what the decoder is to say after each of its tokens, or None. hidden: the places of the encoder's
    tokens that can be asked for by hiding them, of a bert.
    """

    encoder: tuple[int, ...] = ()
    decoder: tuple[int, ...] = ()
    labels: tuple[int | None, ...] = ()
    hidden: tuple[int, ...] = ()


def read(
    model: LanguageModel,
    tokenizer: Tokenizer,
    special: SpecialIds,
    text: str,
    *,
    target: str | None = None,
    max_new_tokens: int = 50,
) -> Reading:
    """What the model reads of `text`, and of an encoder-decoder its decoder of `target`.

    target: None: what the model answers, greedily, in at most max_new_tokens tokens.

    Raises:
        ConfigProblem: a text has no tokens, or more than the model reads; or a target where there is none.
    """
    if target is not None and not isinstance(model, EncoderDecoder):
        fix = "leave --target out"
        what = f"a {model.config.family} has no decoder that reads another text"
        raise ConfigProblem(what, where="--target", fix=fix)
    if not text or not tokenizer.encode(text):
        raise ConfigProblem("it has no tokens", where="--text", fix='give a text, such as --text "Once upon"')
    if isinstance(model, GPT):
        decoder = (special.bos, *tokenizer.encode(text))
        _require_length(model, len(decoder), "--text")
        return Reading(decoder=decoder, labels=(*decoder[1:], None))
    encoder = tuple(encoder_document(text, "--text", tokenizer, special))
    _require_length(model, len(encoder), "--text")
    if isinstance(model, BERT):
        known = (place for place, token in enumerate(encoder) if not special.is_special[token])
        return Reading(encoder, hidden=tuple(known))
    assert isinstance(model, EncoderDecoder)
    lead = decoder_lead(special)
    if target is None:
        written, ending = _written(model, special, encoder, lead, max_new_tokens)
    else:
        written, ending = marked(target, "--target", tokenizer, special), special.eos
        if not written:
            fix = "give a text, or leave --target out: the model writes one"
            raise ConfigProblem("it has no tokens", where="--target", fix=fix)
    decoder = (*lead, *written)
    _require_length(model, len(decoder), "--target")
    return Reading(encoder, decoder, (*decoder[1:], ending))


def _written(
    model: EncoderDecoder, special: SpecialIds, encoder: tuple[int, ...], lead: list[int], at_most: int
) -> tuple[list[int], int | None]:
    """The model's own answer, and EOS if it came to an end."""
    room = model.config.max_seq_len - len(lead)  # the decoder is going to read all that it has written
    if room < 1:
        fix = "train with a larger model.max_seq_len"
        raise ConfigProblem("the decoder has no room to write", where="model.max_seq_len", fix=fix)
    limit = min(at_most, room)
    (answer,) = generate(
        model, [encoder], max_new_tokens=limit, temperature=0, start=lead, eos_id=special.eos
    )
    return answer, special.eos if len(answer) < limit else None


def _require_length(model: LanguageModel, length: int, where: str) -> None:
    limit = model.config.max_seq_len
    if length > limit:
        fix = f"shorten it; the model reads at most {limit} (model.max_seq_len)"
        raise ConfigProblem(f"it has {length} tokens, special ones included", where=where, fix=fix)
