"""Libraries of an extra (pyproject.toml), which need not be installed."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from bigtfm.config.problems import ConfigProblem


def library(module: str, lacking: str, *, where: str, extra: str) -> Any:
    """The module.

    Raises:
        ConfigProblem: it is not installed; lacking: what is said then, extra: what brings it.
    """
    try:
        return import_module(module)
    except ImportError:
        raise ConfigProblem(lacking, where=where, fix=f"pip install 'bigtfm[{extra}]'") from None


@contextmanager
def quietly() -> Iterator[None]:
    """Without what a library says, below an error, of libraries that it can't load and does not need here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
