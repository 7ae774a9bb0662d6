"""Imported by a fork server before all else: it dies with the process that started it.

By itself it would notice that end only when it has imported the rest, which takes seconds. That process
states its number in BIGTFM_PARENT: it may be gone before this is imported.
"""

import os

from bigtfm.resilience.lifeline import die_with

die_with(int(os.environ.get("BIGTFM_PARENT", os.getppid())))
