"""JSON files that carry their own checksum: every byte that has changed is seen, even a blank."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

SEAL = b',\n "seal": "'


def seal(content: Mapping[str, Any]) -> bytes:
    """An object as JSON, with one more key at its end: the SHA-256 of all bytes before it."""
    text = json.dumps(content, indent=1, ensure_ascii=False)
    return _sealed(text.encode("utf-8", "backslashreplace").removesuffix(b"\n}"))  # half a surrogate pair


def unseal(text: bytes) -> bytes:
    """The JSON without its seal; one that has none (an earlier version's) as it is.

    A reader has to refuse unknown keys: else a flipped bit in "seal" would make it one of those.

    Raises:
        ValueError: it is not what was sealed.
    """
    body, found, _ = text.rpartition(SEAL)
    if not found:
        return text
    if text != _sealed(body):
        raise ValueError("its bytes are not those that were written: they differ from its own SHA-256")
    return body + b"\n}"


def _sealed(body: bytes) -> bytes:
    return body + SEAL + hashlib.sha256(body).hexdigest().encode() + b'"\n}\n'
