"""events.jsonl: what happened to a run besides its steps, an object a line, from whichever process saw it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bigtfm.config.problems import say

EVENTS = "events.jsonl"


def note(run_dir: Path, event: str, **details: Any) -> None:
    """Appends {"time": Unix seconds, "event": its name, **details}.

    One write to a file opened for appending: rows of several processes do not mix. A disk that does not take
    it is not worth ending a run for.
    """
    row = {"time": round(time.time(), 3), "event": event} | details
    try:
        handle = os.open(run_dir / EVENTS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(handle, json.dumps(row, default=str).encode() + b"\n")
        finally:
            os.close(handle)
    except OSError:
        pass


def tell(run_dir: Path, event: str, line: str, **details: Any) -> None:
    """`note`, and a line on stderr for whoever watches."""
    note(run_dir, event, **details)
    say(f"note: {line}")


def read(run_dir: Path) -> Iterator[dict[str, Any]]:
    """The rows that are whole, oldest first; none where there is no file."""
    try:
        lines = (run_dir / EVENTS).read_bytes().splitlines()
    except OSError:
        return
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # torn by a kill
            continue
        if isinstance(row, dict) and isinstance(row.get("event"), str):
            yield row
