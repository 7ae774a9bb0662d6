"""The commands. No logic: each reads its flags, calls one function and turns a Problem into one line and an exit code."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from bigtfm import __version__
from bigtfm.config.problems import Problem

app = typer.Typer(
    help="Trains Transformers under DeepSpeed: the same loss, whatever you change.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

RunConfigFile = Annotated[
    Path | None, typer.Option("--config", help="Run config (TOML). Default: the quickstart's values.")
]
DeepSpeedFile = Annotated[Path, typer.Option("--deepspeed_config", help="DeepSpeed JSON, as DeepSpeed documents it.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Run config values, e.g. run.steps=1000 (or steps=1000).")
]
RunDirectory = Annotated[Path, typer.Option("--run", help="Run directory, e.g. runs/quickstart.")]


@contextmanager
def one_line(run_dir: Path | None = None, *, speaks: bool = True) -> Iterator[None]:
    """A Problem becomes its line on stderr, failure.json in the run directory, and its exit code."""
    try:
        yield
    except Problem as problem:
        if speaks:
            print(f"bigtfm: {problem.line}", file=sys.stderr, flush=True)
            if run_dir is not None and run_dir.is_dir():
                _write_failure(run_dir, problem)
        else:
            time.sleep(3)  # the rank that speaks must not be killed by its launcher before it has spoken
        raise SystemExit(problem.exit_code) from None


def _write_failure(run_dir: Path, problem: Problem) -> None:
    content = {"exit_code": problem.exit_code, "what": problem.what, "where": problem.where, "fix": problem.fix}
    try:
        (run_dir / "failure.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError:
        pass  # the line on stderr has said it
