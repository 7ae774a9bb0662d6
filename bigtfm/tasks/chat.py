"""Conversations: the assistant's turns are learnt, what the others say is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bigtfm.config.marks import WRITTEN
from bigtfm.data.documents import Row
from bigtfm.data.examples import Example, Format, Reader, Wrong, items, text
from bigtfm.data.tokenizer import text_of
from bigtfm.tasks.predictor import Predictor
from bigtfm.tasks.task import Scores, Sums, Task, metric_library, ratio

ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "observation": "tool"}  # ShareGPT's names


class Turn(NamedTuple):
    role: str  # system, user, assistant, tool
    content: str


class Template(NamedTuple):
    """How a turn is written: `before` with its role, its content, `after`; None: the tokenizer's EOS."""

    before: str
    after: str | None


TEMPLATES = {
    "plain": Template("{role}: ", None),
    "chatml": Template("<|im_start|>{role}\n", "<|im_end|>\n"),
}


def turns_of(row: Row) -> list[Turn]:
    """Of `messages` (OpenAI's role and content, ShareGPT's from and value), or of Alpaca's instruction, input
    and output.
    """
    if row.get("messages") is None:
        if "instruction" not in row:
            raise Wrong("neither messages nor instruction", "name their column with --column")
        asked = "\n".join(filter(None, [text(row, "instruction"), str(row.get("input") or "")]))
        answer = [Turn("assistant", text(row, "output"))] if row.get("output") is not None else []
        return [Turn("user", asked), *answer]
    turns = []
    for message in items(row, "messages"):
        if not isinstance(message, Mapping):
            raise Wrong("a message is no object", 'write {"role": "user", "content": "..."}')
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise Wrong("a message lacks its role or content", 'write {"role": "user", "content": "..."}')
        turns.append(Turn(ROLES.get(role, role), content))
    return turns


def texts(row: Row) -> list[str]:
    return [turn.content for turn in turns_of(row)]


def make(row: Row, reader: Reader) -> list[Example]:
    """One example of the whole conversation; what is too long loses its oldest turns, but for a system's."""
    turns = turns_of(row)
    while turns:
        parts = [part for turn in turns for part in _parts(turn, reader)]
        if sum(len(ids) for ids, _ in parts) + 2 <= reader.max_tokens:
            break
        del turns[1 if turns[0].role == "system" and len(turns) > 1 else 0]
    if not any(turn.role == "assistant" for turn in turns):
        return []
    return [reader.document(parts)]


def _parts(turn: Turn, reader: Reader) -> list[tuple[list[int], list[int]]]:
    before, after = template_of(reader.options)
    lead = reader.tokenizer.encode(before.format(role=turn.role))
    end = [reader.tokenizer.eos_id] if after is None else reader.tokenizer.encode(after)
    said = [*reader.tokenizer.encode(turn.content), *end]
    mark = WRITTEN if turn.role == "assistant" else 0
    return [(lead, [0] * len(lead)), (said, [mark] * len(said))]


def template_of(options: Mapping[str, Any] | None) -> Template:
    """The template that the options name.

    Raises:
        Wrong: there is no such one.
    """
    name = str((options or {}).get("template", "plain"))
    if name not in TEMPLATES:
        raise Wrong(f"unknown template '{name}'", f"use {' or '.join(TEMPLATES)}")
    return TEMPLATES[name]


def prompt(turns: Sequence[Turn], reader: Reader, room: int) -> list[int]:
    """What a model reads to answer: BOS, the turns, the beginning of its own. Old turns go where need be."""
    turns = list(turns)
    begin = reader.tokenizer.encode(template_of(reader.options).before.format(role="assistant"))
    while True:
        parts = [token for turn in turns for ids, _ in _parts(turn, reader) for token in ids]
        ids = [reader.tokenizer.bos_id, *parts, *begin]
        if len(ids) <= room or len(turns) <= 1:
            return ids[:1] + ids[1:][-(room - 1) :]
        del turns[1 if turns[0].role == "system" else 0]


def answers(predictor: Predictor, conversations: Sequence[Sequence[Turn]], reader: Reader) -> list[str]:
    """What the model says next in each conversation."""
    room = predictor.model.config.max_seq_len - 1
    written = predictor.answers([prompt(turns, reader, room) for turns in conversations])
    return [shown(ids, reader) for ids in written]


def shown(ids: Sequence[int], reader: Reader) -> str:
    """The text of an answer, without what ends a turn."""
    after = template_of(reader.options).after
    said = text_of(ids, reader.tokenizer)
    return (said if after is None else said.partition(after.strip())[0]).strip()


def predict(predictor: Predictor, rows: Sequence[Row], reader: Reader) -> list[str]:
    """The last answer of each conversation, to all that was said before it."""
    return answers(predictor, [turns_of(row)[: _last(row)] for row in rows], reader)


def reference(row: Row) -> str:
    return turns_of(row)[_last(row)].content


def _last(row: Row) -> int:
    """The number of the assistant's last turn."""
    places = [n for n, turn in enumerate(turns_of(row)) if turn.role == "assistant"]
    if not places:
        raise Wrong("the assistant says nothing", "remove that row")
    return places[-1]


def score(predicted: Sequence[str], gold: Sequence[str]) -> Scores:
    """chrf: mean over answers of sacrebleu's; exact_match, in percent."""
    chrf = metric_library("sacrebleu", "sacrebleu").CHRF()
    sums = np.array(
        [[chrf.sentence_score(said, [right]).score, 100.0 * (said.strip() == right.strip()), 1.0]
         for said, right in zip(predicted, gold, strict=True)]
    )  # fmt: skip
    return Scores(_metrics(sums.sum(0)), sums, _metrics)


def _metrics(sums: Sums) -> Mapping[str, float]:
    return {"chrf": ratio(sums[0], sums[2]), "exact_match": ratio(sums[1], sums[2])}


def most_frequent(rows: Sequence[Row]) -> list[str]:
    answers = [reference(row) for row in rows]
    return [max(sorted({*answers}), key=answers.count)] * len(rows)


TASK = Task(
    Format(
        "chat",
        columns={name: name for name in ("messages", "instruction", "input", "output")},
        texts=texts,
        kinds=("completion",),
        make=make,
        optional=frozenset({"messages", "instruction", "input", "output"}),
    ),
    predict,
    reference,
    score,
    ("the most frequent answer", most_frequent),
)
