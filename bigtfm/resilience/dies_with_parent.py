"""Imported by a fork server before all else: it dies with the process that started it.

By itself it would notice that end only when it has imported the rest, which takes seconds.
"""

import os

from bigtfm.resilience.lifeline import die_with

die_with(os.getppid())
