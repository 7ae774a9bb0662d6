"""Sealed files (manifest.json, dataset.json, plan.json), changed on purpose as no accident would do it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bigtfm.sealed import seal, unseal


def read(path: Path) -> dict[str, Any]:
    """What a sealed file says."""
    content: dict[str, Any] = json.loads(unseal(path.read_bytes()))
    return content


def write(path: Path, content: dict[str, Any]) -> None:
    """Seals it anew."""
    path.write_bytes(seal(content))
