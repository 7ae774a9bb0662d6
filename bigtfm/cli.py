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


@app.command()
def train(
    deepspeed_config: DeepSpeedFile,
    config: RunConfigFile = None,
    overrides: Overrides = None,
    local_rank: Annotated[int | None, typer.Option("--local_rank", hidden=True)] = None,
) -> None:
    """Train, or go on with the run that stands in the run directory. One process, or a rank of any launcher."""
    from bigtfm.config.launch import Launch

    with one_line():
        launch = Launch.from_environment(os.environ, local_rank)
    with one_line(speaks=launch.local_rank == 0):
        from bigtfm.job import check_job

        job = check_job(config, deepspeed_config, overrides or [], launch.world_size)
    with one_line(job.run.run_dir):
        from bigtfm.train import train as run

        run(job, launch)


def train_alone() -> None:
    """`train` as a program of its own, for launchers that put --local_rank right after a script's name."""
    typer.run(train)


@app.command()
def check(
    deepspeed_config: DeepSpeedFile,
    config: RunConfigFile = None,
    overrides: Overrides = None,
    world_size: Annotated[int, typer.Option(min=1, help="Number of ranks (GPUs) that the job will have.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check both files and the data set, and print what they come to, without training."""
    with one_line():
        from bigtfm.check import render
        from bigtfm.job import check_job

        resolved = check_job(config, deepspeed_config, overrides or [], world_size).resolved
    if as_json:
        print(resolved.to_json(), end="")
    else:
        from rich.console import Console

        Console().print(render(resolved))
