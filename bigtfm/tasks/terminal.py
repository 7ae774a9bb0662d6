"""`bigtfm chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from pathlib import Path

from bigtfm.config.problems import ConfigProblem
from bigtfm.generation.sampling import generate
from bigtfm.model.gpt import GPT
from bigtfm.run_directory import open_run, saved_task
from bigtfm.tasks.chat import Turn, prompt, shown
from bigtfm.tasks.evaluate import reader_of


def talk(
    run_dir: Path, system: str | None, *, max_new_tokens: int, temperature: float, top_p: float, seed: int
) -> None:
    """Reads a line, answers it, and so on; what was said before is remembered as far as the model reads.

    Raises:
        ConfigProblem: the run has not learnt to chat.
    """
    header = saved_task(run_dir)
    if header is None or header.name != "chat":
        raise ConfigProblem(
            "the run has not learnt to chat",
            where=str(run_dir),
            fix="train one on conversations: bigtfm prepare --task chat, objective.kind=completion",
        )
    model, tokenizer, special = open_run(run_dir)
    assert isinstance(model, GPT), "no other family learns completion"
    reader, first = reader_of(header, tokenizer), [Turn("system", system)] if system else []
    room = max(model.config.max_seq_len - max_new_tokens, model.config.max_seq_len // 2)
    turns = list(first)
    while (line := _ask()) is not None:
        if line == "/new":
            turns = list(first)
            continue
        turns.append(Turn("user", line))
        [ids] = generate(
            model, [prompt(turns, reader, room)], max_new_tokens=max_new_tokens, temperature=temperature,
            top_p=top_p, seed=seed + len(turns), eos_id=special.eos,
        )  # fmt: skip
        answer = shown(ids, reader)
        turns.append(Turn("assistant", answer))
        print(answer, flush=True)


def _ask() -> str | None:
    """The next line; None: there is none, or it is empty."""
    if sys.stdin.isatty():
        print("> ", end="", flush=True)
    return sys.stdin.readline().strip() or None
