"""Numbers that data and model share: what labels and the marks of a task's tokens mean."""

from __future__ import annotations

IGNORE = -100  # label of a position that predicts nothing: torch's own ignore_index
SELECTABLE, BEGINS, ENDS = 1, 2, 4  # question answering: bits of a token that may be, is, an answer's border
WRITTEN = 1  # mark of a token that is to be written
