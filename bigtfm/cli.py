"""The commands. No logic: each reads its flags, calls one function, and turns a Problem into its one line."""

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
DeepSpeedFile = Annotated[
    Path, typer.Option("--deepspeed_config", help="DeepSpeed JSON, as DeepSpeed documents it.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Run config values, e.g. run.steps=1000 (or steps=1000)."),
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
    content = {
        "exit_code": problem.exit_code,
        "what": problem.what,
        "where": problem.where,
        "fix": problem.fix,
    }
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
    """Train, or go on with the run that stands in the run directory; alone or as a rank of any launcher."""
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
    world_size: Annotated[
        int, typer.Option(min=1, help="Number of ranks (GPUs) that the job will have.")
    ] = 1,
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


@app.command()
def prepare(
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            help="File (.txt .jsonl .csv .parquet, also .gz), folder, '-' (stdin), 'embedded' (the package's "
            "corpus), or hf:NAME[@CONFIG][:SPLIT]. May be given more than once. Default: embedded.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("data/quickstart"),
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="A sentencepiece .model, a tokenizer.json or a tokenizer's folder. Default: train one."
        ),
    ] = None,
    vocab_size: Annotated[
        int | None,
        typer.Option(help="Pieces of the tokenizer to train. Default: what suits the size of the text."),
    ] = None,
    model_type: Annotated[str, typer.Option(help="Kind of tokenizer to train: bpe or unigram.")] = "bpe",
    text_column: Annotated[str, typer.Option(help="Column or key that holds the text.")] = "text",
    validation_fraction: Annotated[
        float, typer.Option(help="Share of the documents that go to validation, chosen by their hash.")
    ] = 0.1,
    document_bytes: Annotated[
        int | None,
        typer.Option(
            help="Least size in bytes of what a .txt is cut into. Default: 1/100 of the text, 1 to 64 KiB."
        ),
    ] = None,
    stdin_format: Annotated[str, typer.Option(help="What '-' is: txt, jsonl or csv.")] = "txt",
    workers: Annotated[int | None, typer.Option(help="Processes. Default: one a core.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a data set that another command made.")
    ] = False,
) -> None:
    """Turn text into a tokenised, memory-mapped data set. A killed command goes on where it was."""
    from bigtfm.data.prepare import prepare as run

    with one_line():
        summary = run(
            inputs or ["embedded"],
            out,
            tokenizer=tokenizer,
            vocab_size=vocab_size,
            model_type=model_type,  # type: ignore[arg-type]  # checked by prepare itself
            text_column=text_column,
            validation_fraction=validation_fraction,
            document_bytes=document_bytes,
            stdin_format=stdin_format,
            workers=workers,
            force=force,
        )
    print(summary.line)


@app.command()
def generate(
    run_dir: RunDirectory,
    prompts: Annotated[
        list[str] | None, typer.Option("--prompt", help="Text to go on from; may be given more than once.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate for each prompt.")] = 100,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0: greedy; 1: the model's own distribution.")
    ] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Sample among the k likeliest tokens; 0: all.")] = 50,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Sample among the likeliest tokens of this mass.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a prompt.")] = False,
) -> None:
    """Generate text with the newest checkpoint of a run."""
    with one_line():
        from bigtfm.generate import generate as run
        from bigtfm.run_directory import open_run

        model, tokenizer = open_run(run_dir)
        texts = prompts or [""]
        ids = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in texts]
        answers = run(
            model,
            ids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            eos_id=tokenizer.eos_id,
        )
    for text, answer in zip(texts, answers, strict=True):
        continuation = tokenizer.decode(answer)
        print(json.dumps({"prompt": text, "text": continuation}) if as_json else f"{text}{continuation}\n")


@app.command()
def sync(run_dir: Annotated[Path, typer.Argument(help="Run directory.")]) -> None:
    """Send to MLflow what could not be sent while training."""
    from bigtfm.mlflow_mirror import sync as run

    with one_line():
        print(f"MLflow run {run(run_dir)}")


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)
