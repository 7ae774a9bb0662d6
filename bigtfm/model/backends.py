"""Which attention backend a run takes, and why: a table of rules. No torch: `bigtfm check` reads it."""

from __future__ import annotations

from typing import Literal

Backend = Literal[
    "flash_attn_2", "flash_attn_3", "flash_attn_4", "varlen", "flex",
    "sdpa", "sdpa_cudnn", "sdpa_flash", "sdpa_efficient", "sdpa_math", "reference",
]  # fmt: skip
