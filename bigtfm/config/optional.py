"""Libraries of an extra (pyproject.toml), which need not be installed."""

from __future__ import annotations

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
