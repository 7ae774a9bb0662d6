"""A text for a text: what translation and summarisation share."""

from __future__ import annotations

from collections.abc import Sequence

from bigtfm.config.marks import WRITTEN
from bigtfm.data.documents import Row
from bigtfm.data.examples import Example, Reader, text
from bigtfm.data.tokenizer import text_of
from bigtfm.tasks.predictor import Predictor


def make(row: Row, reader: Reader, *, cut: bool) -> list[Example]:
    """BOS source EOS target EOS, the target and its EOS marked. An empty side: no example.

    cut: a pair that is too long loses the end of its source (and of a target that leaves none, its own);
    else it is left out.
    """
    source, target = (reader.tokenizer.encode(text(row, name)) for name in ("source", "target"))
    room = reader.max_tokens - 3
    if not source or not target or (len(source) + len(target) > room and not cut):
        return []
    target = target[: max(1, room * 3 // 4)]
    return [document(source[: room - len(target)], target, reader)]


def texts(row: Row) -> list[str]:
    return [text(row, "source"), text(row, "target")]


def document(source: list[int], target: list[int], reader: Reader) -> Example:
    lead = [*source, reader.tokenizer.eos_id]
    return reader.document([(lead, [0] * len(lead)), (target, [WRITTEN] * len(target))], eos=WRITTEN)


def predict(predictor: Predictor, rows: Sequence[Row], reader: Reader) -> list[str]:
    """What the model writes to each source."""
    tokenizer, special = reader.tokenizer, predictor.special
    lead = [special.bos] if predictor.causal or special.bos != special.eos else []
    longest = min(reader.max_tokens, predictor.model.config.max_seq_len) - 2
    longest -= 1 if predictor.causal else 0  # one token to write, at the least
    prompts = [[*lead, *tokenizer.encode(text(row, "source"))[:longest], tokenizer.eos_id] for row in rows]
    return [text_of(ids, tokenizer).strip() for ids in predictor.answers(prompts)]


def reference(row: Row) -> str:
    return text(row, "target")
