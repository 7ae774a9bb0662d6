"""The page: one HTML file with everything in it, that asks no network for anything.

What is shown comes from texts that nobody has checked. It stands in the page as JSON without a `<`, and is
put in place as text; and the page's own policy lets nothing run but its one script, known by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import zlib
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from bigtfm.inspection.report import Maps, Report

STEPS = 65535  # a weight goes into the page as a multiple of 1/65535


def page(report: Report) -> str:
    """The report as HTML."""
    template, style, script = (
        files("bigtfm.inspection").joinpath(f"page.{kind}").read_text(encoding="utf-8")
        for kind in ("html", "css", "js")
    )
    policy = f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'"
    data = json.dumps(_data(report), ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    parts = {
        "policy": policy,
        "title": html.escape(report.title),
        "style": style,
        "data": data.encode("utf-8", "replace").decode(),
        "script": script,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda mark: parts[mark[1]], template)


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _data(report: Report) -> dict[str, Any]:
    last = "decoder" if "decoder" in report.words else "encoder"
    return {
        "facts": list(report.facts.items()),
        "family": report.family,
        "last": last,
        "words": report.words,
        "said": report.said,
        "meanLoss": report.mean_loss,
        "judged": {
            place: {"loss": one.loss, "rank": one.rank, "expected": one.expected}
            for place, one in report.judged.items()
        },
        "maps": [_map(maps) for maps in report.maps],
        "lens": report.lens,
        "norms": {side: vars(one) for side, one in report.norms.items()},
    }


def _map(maps: Maps) -> dict[str, Any]:
    """Each layer's planes [P, Q, S]: the heads', their mean, the rollout."""
    views = [*map(str, maps.heads), "mean"]
    planes = [maps.weights, maps.mean[:, None]]
    if maps.rollout is not None:
        views.append("rollout")
        planes.append(maps.rollout[:, None])
    return {
        "name": maps.name,
        "queries": maps.queries,
        "keys": maps.keys,
        "layers": maps.layers,
        "views": views,
        "planes": [packed(layer) for layer in torch.cat(planes, dim=1)],
    }


def packed(weights: Tensor) -> str:
    """Numbers from 0 to 1 as 16 bits each, little-endian, deflated, in base64."""
    steps = (weights.double().clamp(0, 1) * STEPS).round().to(torch.int32).numpy().astype("<u2")
    return base64.b64encode(zlib.compress(steps.tobytes(), 6)).decode()
