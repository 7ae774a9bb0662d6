"""The commands. No logic: each reads its flags and calls one function; `App` makes a failure one line."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from bigtfm import __version__
from bigtfm.config.problems import ConfigProblem, Problem, known_cause, say

SILENCE = 5.0  # seconds; launchers notice an end within one
UsageError: Any = typer.BadParameter.__bases__[0]  # click's, whichever click this typer brings


class App(typer.Typer):
    """A typer program of which every failure is one line on stderr and a documented exit code."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(
            add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, **settings
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # text that the terminal has no letters for
        with one_line():
            try:
                code = super().__call__(*args, standalone_mode=False, **kwargs)
                if sys.stdout is not None:
                    sys.stdout.flush()  # what can't be written is to fail here, not in the interpreter's exit
            except BrokenPipeError:  # whoever read our output has left
                code, sys.stdout = 1, open(os.devnull, "w", encoding="utf-8")
        raise SystemExit(code)  # None: 0; 130 after a Ctrl-C


app = App(help="Trains Transformers under DeepSpeed: the same loss, whatever you change.")


@app.callback(invoke_without_command=True)
def bigtfm(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


RunConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="Run config, a TOML file. Default: configs/quickstart.toml's values."),
]
DeepSpeedFile = Annotated[
    Path,
    typer.Option("--deepspeed_config", help="DeepSpeed JSON: batch, precision, optimizer, schedule, ZeRO."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Run config values to replace, e.g. run.steps=1000 (or steps=1000)."
    ),
]
RunDirectory = Annotated[Path, typer.Option("--run", help="Run directory, e.g. runs/quickstart.")]


@contextmanager
def one_line() -> Iterator[None]:
    """A failure becomes its line on stderr and its exit code.

    What fails on all ranks is said once: the others of a machine wait before they speak, and if the first
    has the same to say, its end makes their launcher end them in the meantime.
    """
    try:
        yield
        return
    except Exception as error:
        problem = _usage_problem(error) if isinstance(error, UsageError) else known_cause(error)
        if problem is None:
            raise
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(SILENCE)
    say(problem.line)
    raise SystemExit(problem.exit_code)


@contextmanager
def _one_thread() -> Iterator[None]:
    """numpy, imported here, starts no threads: the process is going to be forked."""
    before = os.environ.get("OPENBLAS_NUM_THREADS")
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        del os.environ["OPENBLAS_NUM_THREADS"]  # torch may come with an OpenBLAS of its own
        if before is not None:
            os.environ["OPENBLAS_NUM_THREADS"] = before


def _show(content: Any) -> None:
    """For reading, letter by letter: brackets in a name or a message are no markup."""
    from rich.console import Console

    Console(markup=False).print(content)


def _usage_problem(error: Any) -> Problem:
    """What click says of a wrong flag or argument."""
    program = error.ctx.command_path if error.ctx is not None else "bigtfm"
    what = error.format_message().rstrip(".?")
    return ConfigProblem(what, where="command line", fix=f"see {program} --help")


@app.command()
def train(
    deepspeed_config: DeepSpeedFile,
    config: RunConfigFile = None,
    overrides: Overrides = None,
    local_rank: Annotated[int | None, typer.Option("--local_rank", hidden=True)] = None,
) -> None:
    """Train, or resume the run that is there.

    Alone it is a job of one process; under deepspeed, torchrun, srun or any other launcher, a rank of it.
    """
    from bigtfm.config.launch import Launch, of_srun
    from bigtfm.resilience.lifeline import Lifeline
    from bigtfm.resilience.supervisor import supervise

    os.environ.update(of_srun(os.environ))
    launch = Launch.from_environment(os.environ, local_rank)
    with _one_thread():
        from bigtfm.job import check_job

        job = check_job(config, deepspeed_config, overrides or [], launch.world_size)

    def trainer(lifeline: Lifeline, changes: dict[str, Any]) -> None:
        from bigtfm.train import train as run

        # What has changed stands in the run directory: the micro batch that fits.
        again = check_job(config, deepspeed_config, overrides or [], launch.world_size) if changes else job
        run(again, launch, lifeline=lifeline)

    raise typer.Exit(supervise(launch, job.run.run_dir, job.run.guard, trainer))


def train_alone() -> None:
    """`train` as a program of its own, for launchers that put --local_rank right after a script's name."""
    alone = App()
    alone.command()(train)
    alone()


@app.command()
def check(
    deepspeed_config: DeepSpeedFile,
    config: RunConfigFile = None,
    overrides: Overrides = None,
    world_size: Annotated[int, typer.Option(min=1, help="Ranks that the job will have, one a GPU.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, not a table.")] = False,
) -> None:
    """Check a job without starting it.

    Prints what both files and the data set come to: batch, tokens a step, steps, epochs, parameters.
    """
    from bigtfm.check import render
    from bigtfm.job import check_job

    job = check_job(config, deepspeed_config, overrides or [], world_size)
    if as_json:
        print(job.resolved.to_json(), end="")
    else:
        try:
            attention = job.attention.reason
        except ConfigProblem as problem:  # the job may be meant for another machine
            attention = f"{problem.what}. Fix: {problem.fix}"
        _show(render(job.resolved, attention))


@app.command()
def prepare(
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            help="File (.parquet; .txt .jsonl .csv, also .gz), folder, '-' (stdin), 'embedded' (the corpus "
            "in the package), or hf:NAME[#REVISION][@CONFIG][:SPLIT]. May be given more than once. Default: "
            "embedded.",
        ),
    ] = None,
    out: Annotated[str, typer.Option(help="Folder of the data set.")] = "data/quickstart",
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="A sentencepiece .model, a tokenizer.json or a tokenizer's folder. Default: train one."
        ),
    ] = None,
    vocab_size: Annotated[
        int | None,
        typer.Option(
            help="Pieces of the tokenizer to train, 260 or more. Default: as suits the text, at most 32768."
        ),
    ] = None,
    model_type: Annotated[str, typer.Option(help="Kind of tokenizer to train: bpe or unigram.")] = "bpe",
    text_column: Annotated[
        str, typer.Option(help="Column (.csv .parquet) or key (.jsonl) of the text.")
    ] = "text",
    validation_fraction: Annotated[
        float, typer.Option(help="Share of the documents (0 to below 1) for validation, chosen by hash.")
    ] = 0.1,
    document_bytes: Annotated[
        int | None,
        typer.Option(
            help="Least bytes of a document that a .txt is cut into. Default: 1/100 of the text, 1 to 64 KiB."
        ),
    ] = None,
    stdin_format: Annotated[str, typer.Option(help="Format of '-': txt, jsonl or csv.")] = "txt",
    workers: Annotated[int | None, typer.Option(help="Number of processes. Default: one a core.")] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="Make examples of a task, of rows: classification, tagging, relation_extraction, "
            "question_answering, translation, summarisation or chat. Default: none, text."
        ),
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=COLUMN, where a task's column has another name, e.g. label=stars. May be given more "
            "than once. Default: its own names."
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            help="A task's labels in their order, with commas; one that has a comma in double quotes. "
            "Default: all in the rows, sorted."
        ),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(help="Most tokens of a task's example; data.seq_len has to hold it.")
    ] = 512,
    template: Annotated[
        str | None, typer.Option(help="How chat writes turns: plain or chatml. Default: plain.")
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="N/OF",
            help="Tokenise one part of many, from 0/16 to 15/16, beside the others; the command without "
            "--shard joins them. Default: all.",
        ),
    ] = None,
    filters: Annotated[
        Path | None,
        typer.Option(
            help="TOML file of filters: duplicates, language, rules of length and symbols, personal data. "
            "Default: none."
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            help="Evaluation set; documents that share 13 words in a row with it are dropped. May be given "
            "more than once. Default: none.",
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a data set that another command made.")
    ] = False,
) -> None:
    """Turn text into a data set to train on.

    Trains a tokenizer unless one is given. Repeated after a kill, the command goes on where it was.
    """
    from bigtfm.data.prepare import prepare as run

    setting = None
    if task is not None:
        from bigtfm.tasks.known import setting_of

        setting = setting_of(task, column or [], labels, max_tokens, template)
    elif column or labels or template:
        fix = "name the task with --task, or leave them out"
        raise ConfigProblem("--column, --labels and --template are a task's", where="command line", fix=fix)
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
        shard=shard,
        filters=filters,
        exclude=exclude or (),
        force=force,
        task=setting,
    )
    print(summary.line)
    if setting is not None and shard is None:
        from bigtfm.data.best_fit import pack as pack_examples

        folder, plan = pack_examples(out, setting.max_tokens)
        print(plan.line(folder))


@app.command()
def pack(
    data: Annotated[Path, typer.Argument(help="Folder that `bigtfm prepare` wrote, e.g. data/quickstart.")],
    seq_len: Annotated[int, typer.Option("--seq-len", min=1, help="Tokens in a training sequence.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, not a sentence.")] = False,
) -> None:
    """Pack whole documents into training sequences.

    Cuts only documents that are longer than a sequence. The plan lies beside the data, for data.packing =
    "best_fit".
    """
    from bigtfm.data.best_fit import pack as run

    folder, plan = run(data, seq_len)
    print(json.dumps(plan.record(folder)) if as_json else plan.line(folder))


@app.command()
def generate(
    context: typer.Context,
    run_dir: RunDirectory,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            help="Text to go on from; for an encoder, with [MASK] or <mask> where a token is to be found, or "
            "<extra_id_0>, <extra_id_1>, ... where a span is (span_corruption). May be given more than once. "
            "Default: none.",
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate for a prompt.")] = 100,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0: the likeliest token; 1: the model's own distribution.")
    ] = 0.8,
    top_k: Annotated[
        int,
        typer.Option(
            min=0,
            help="Sample among this many likeliest tokens; 0: all. Of a bert: how many alternatives --json "
            "lists for a mask, 5 unless given.",
        ),
    ] = 50,
    top_p: Annotated[
        float,
        typer.Option(
            min=0.0, max=1.0, help="Sample among the likeliest tokens that hold this probability; 1: all."
        ),
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling; the same seed, the same text.")] = 0,
    num_beams: Annotated[
        int,
        typer.Option(
            min=1, max=1000, help="Beams of a beam search, which draws nothing at random; 1: sampling."
        ),
    ] = 1,
    length_penalty: Annotated[
        float,
        typer.Option(
            help="Beam search ranks by log-probability / tokens^this; the larger, the longer the answers."
        ),
    ] = 1.0,
    num_return_sequences: Annotated[
        int,
        typer.Option(min=1, max=1000, help="Answers to a prompt: samples, or the best of beam search."),
    ] = 1,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object an answer, not plain text.")
    ] = False,
) -> None:
    """Answer prompts with a run's newest checkpoint.

    A gpt goes on from the prompt, a bert fills its masks in, an encoder_decoder writes what its sentinels
    stand for, or the whole text anew (infilling).
    """
    from bigtfm.generation.prompts import Settings, answers
    from bigtfm.run_directory import open_run

    settings = Settings(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        num_beams=num_beams,
        length_penalty=length_penalty,
        num_return_sequences=num_return_sequences,
    )
    for answer in answers(*open_run(run_dir), prompts or [""], settings, _given(context)):
        print(json.dumps(answer.record) if as_json else f"{answer.shown}\n")


Data = Annotated[
    list[str],
    typer.Option(
        "--data", help="File or folder of rows (.jsonl .csv .tsv .parquet) or text. More than once."
    ),
]
Columns = Annotated[
    list[str] | None,
    typer.Option(
        "--column",
        help="NAME=COLUMN, where a column has another name than when the data were prepared. Default: none.",
    ),
]
NumBeams = Annotated[int, typer.Option(min=1, max=1000, help="Beams of what is written; 1: greedy.")]
LengthPenalty = Annotated[
    float, typer.Option(help="Beam search ranks by log-probability / tokens^this; the larger, the longer.")
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Most tokens to write for a row.")]
BatchTokens = Annotated[int, typer.Option(min=1, help="Tokens of a batch, about.")]


@app.command()
def evaluate(
    run_dir: RunDirectory,
    data: Data,
    column: Columns = None,
    text_column: Annotated[
        str, typer.Option(help="Column of the text, for a run that has learnt text.")
    ] = "text",
    predictions: Annotated[
        Path | None, typer.Option(help="File to write predictions and references to. Default: none.")
    ] = None,
    num_beams: NumBeams = 4,
    length_penalty: LengthPenalty = 1.0,
    max_new_tokens: MaxNewTokens = 128,
    batch_tokens: BatchTokens = 4096,
    stride: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens by which windows over text move. Default: half a window."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, not a table.")] = False,
) -> None:
    """Say how good a run is on held-out rows, or text.

    The metrics of its task (accuracy, F1, BLEU, ROUGE, ...) with 95 % intervals, beside those of what would
    be said without a model; of text perplexity and bits per byte. Under a launcher each rank takes a share.
    """
    from bigtfm.config.launch import of_srun
    from bigtfm.tasks.evaluate import Options, render
    from bigtfm.tasks.evaluate import evaluate as run

    os.environ.update(of_srun(os.environ))
    options = Options(
        tuple(column or ()), text_column, num_beams, length_penalty, max_new_tokens, batch_tokens, stride
    )
    found = run(run_dir, data, options, predictions)
    if found is None:
        return
    if as_json:
        print(json.dumps(found.record()))
    else:
        _show(render(found))


@app.command()
def predict(
    run_dir: RunDirectory,
    data: Data,
    column: Columns = None,
    num_beams: NumBeams = 4,
    length_penalty: LengthPenalty = 1.0,
    max_new_tokens: MaxNewTokens = 128,
    batch_tokens: BatchTokens = 4096,
) -> None:
    """Say what a run of a task makes of each row.

    A JSON value a line, in the order of the rows.
    """
    from bigtfm.tasks.evaluate import Options
    from bigtfm.tasks.evaluate import predict as run

    options = Options(
        tuple(column or ()),
        num_beams=num_beams,
        length_penalty=length_penalty,
        max_new_tokens=max_new_tokens,
        batch_tokens=batch_tokens,
    )
    for said in run(run_dir, data, options):
        print(json.dumps(said))


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False
)
def harness(context: typer.Context) -> None:
    """Run lm-evaluation-harness with --model bigtfm.

    All that follows is its own command line, e.g. run --model bigtfm --model_args run=RUN --tasks arc_easy.
    """
    try:
        from bigtfm.tasks.harness import run_harness
    except ModuleNotFoundError:
        fix = "pip install 'bigtfm[harness]'"
        raise ConfigProblem("lm-eval is not installed", where="bigtfm harness", fix=fix) from None
    run_harness(context.args)


@app.command()
def chat(
    run_dir: RunDirectory,
    system: Annotated[
        str | None, typer.Option(help="What the assistant is told first. Default: nothing.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0: the likeliest token; 1: the model's own distribution.")
    ] = 0.7,
    top_p: Annotated[
        float,
        typer.Option(
            min=0.0, max=1.0, help="Sample among the likeliest tokens that hold this probability; 1: all."
        ),
    ] = 0.9,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.")] = 0,
) -> None:
    """Talk to a run that has learnt to chat.

    A line each, answers in between. /new begins another conversation; an empty line or the end of the input
    ends it.
    """
    from bigtfm.tasks.terminal import talk

    talk(run_dir, system, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)


def _given(context: typer.Context) -> list[str]:
    """The parameters that were set on the command line."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]


@app.command()
def inspect(
    run_dir: RunDirectory,
    text: Annotated[
        str,
        typer.Option(help="What the model reads; of an encoder, with masks or sentinels as in --prompt."),
    ],
    target: Annotated[
        str | None,
        typer.Option(
            help="What the decoder of an encoder_decoder reads. Default: what the model answers, greedily."
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens of that answer, where no --target is given.")
    ] = 50,
    layers: Annotated[
        str | None,
        typer.Option(help="Blocks whose attention is shown, numbered from 0, such as 0,2-3. Default: all."),
    ] = None,
    heads: Annotated[
        str | None, typer.Option(help="Heads whose attention is shown, numbered likewise. Default: all.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the page and the pictures. Default: RUN/inspect.")
    ] = None,
    step: Annotated[
        int | None, typer.Option(min=0, help="Optimizer step of the checkpoint. Default: the newest.")
    ] = None,
    best: Annotated[bool, typer.Option("--best", help="Take the checkpoint of the best evaluation.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, not plain text.")] = False,
) -> None:
    """Show what a model does inside while it reads a text.

    Attention maps and rollout, the loss of each token, the logit lens, norms of neurons and gradients by
    layer: as one HTML page, as PNGs, and the maps as tensors.
    """
    from bigtfm.inspection.command import inspect as run
    from bigtfm.inspection.command import told
    from bigtfm.inspection.report import to_json

    found = run(
        run_dir,
        text,
        target=target,
        max_new_tokens=max_new_tokens,
        layers=layers,
        heads=heads,
        out=out,
        step=step,
        best=best,
    )
    if as_json:
        print(json.dumps(to_json(found.report) | {"files": [str(path) for path in found.files]}))
    else:
        print(told(found))


Compare = Annotated[
    bool,
    typer.Option(
        "--compare/--no-compare",
        help="Require that transformers, if installed, gives the same outputs (holds both models in fp32).",
    ),
]
NewFolder = Annotated[Path, typer.Argument(help="Folder to make; it must not be there, or be empty.")]


@app.command("import-hf")
def import_hf(
    source: Annotated[
        str,
        typer.Argument(metavar="DIR_OR_NAME", help="A Hugging Face model: a folder, or a name on the hub."),
    ],
    out: NewFolder,
    vocab_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Pieces that its vocabulary is cut or extended to. Default: as it is.",
        ),
    ] = None,
    compare: Compare = True,
) -> None:
    """Make a run directory of a Hugging Face model.

    A training begins with its weights when run.init_from names that directory.
    """
    from bigtfm.huggingface.import_hf import import_hf as run

    print("\n".join(run(source, out, vocab_size=vocab_size, compare=compare)))


@app.command("export-hf")
def export_hf(
    run_dir: Annotated[Path, typer.Argument(help="Run directory, e.g. runs/quickstart.")],
    out: NewFolder,
    architecture: Annotated[
        str | None,
        typer.Option(
            help="Model type or class of transformers, e.g. llama. Default: what was imported, or what fits."
        ),
    ] = None,
    compare: Compare = True,
) -> None:
    """Make a Hugging Face model of a run's newest checkpoint."""
    from bigtfm.huggingface.export_hf import export_hf as run

    print("\n".join(run(run_dir, out, architecture=architecture, compare=compare)))


@app.command()
def export(
    run_dir: Annotated[Path, typer.Argument(help="Run directory, e.g. runs/quickstart.")],
    out: Annotated[Path, typer.Argument(metavar="OUT.safetensors", help="File to write.")],
    dtype: Annotated[str, typer.Option(help="Type of the weights in it: fp32, bf16 or fp16.")] = "fp32",
    step: Annotated[
        int | None, typer.Option(min=0, help="Optimizer step of the checkpoint. Default: the newest.")
    ] = None,
    best: Annotated[bool, typer.Option("--best", help="Take the checkpoint of the best evaluation.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it is there.")] = False,
) -> None:
    """Write all weights of a run into one safetensors file."""
    from bigtfm.export import export as run

    print(run(run_dir, out, dtype=dtype, step=step, best=best, force=force))


@app.command()
def compress(
    run_dir: RunDirectory,
    out: Annotated[Path, typer.Option(help="Run directory to make; it must not be there, or be empty.")],
    method: Annotated[
        str,
        typer.Option(
            help="int8, int4 (weights alone), int8-dynamic (features, too), magnitude, 2:4 (zeros), or heads."
        ),
    ],
    share: Annotated[
        float | None,
        typer.Option(
            help="Share of each matrix (magnitude) or of each layer's heads that is pruned. Default: 0.5."
        ),
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(min=1, help="int4: columns of a row that share a scale. Default: 64.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Data set to measure with. Default: the one that the run was trained on."),
    ] = None,
    eval_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Validation tokens that the loss is measured on. Default: the run's eval.tokens."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, not a table.")] = False,
) -> None:
    """Make a smaller or faster run of a run.

    Says what it costs: bytes on the disk, validation loss and speed, before and after. What was pruned is to
    be trained on (run.init_from); what was quantised is to be used as it is.
    """
    from dataclasses import asdict

    from bigtfm.compression.command import compress as run
    from bigtfm.console import at_work

    with at_work("compressing, and measuring both"):
        report = run(
            run_dir, out, method, share=share, group_size=group_size, data=data, eval_tokens=eval_tokens
        )
    if as_json:
        print(json.dumps(asdict(report)))
    else:
        from bigtfm.compression.view import render

        _show(render(report))


@app.command("import-deepspeed")
def import_deepspeed(
    checkpoint: Annotated[
        Path,
        typer.Argument(help="What DeepSpeed's save_checkpoint was given, or a global_stepN folder in it."),
    ],
    out: NewFolder,
    deepspeed_config: DeepSpeedFile,
    config: RunConfigFile = None,
    overrides: Overrides = None,
    trust_pickles: Annotated[
        bool,
        typer.Option(
            "--trust-pickles",
            help="Unpickle files that hold more than DeepSpeed puts there; they can run any code.",
        ),
    ] = False,
) -> None:
    """Make a run directory of a checkpoint of DeepSpeed's own.

    Of a model of bigtfm's, trained in a loop of your own: weights, moments, schedule and counters.
    """
    from bigtfm.import_deepspeed import import_deepspeed as run

    print("\n".join(run(checkpoint, out, deepspeed_config, config, overrides or [], trust=trust_pickles)))


@app.command()
def compare(
    run_a: Annotated[Path, typer.Argument(help="Run directory, e.g. runs/quickstart.")],
    run_b: Annotated[Path, typer.Argument(help="The run directory to compare it with.")],
    tolerance: Annotated[
        float,
        typer.Option(
            min=0.0,
            help="Largest relative difference of two numbers that count as equal; of gradient norms, 100 "
            "times as much.",
        ),
    ] = 1e-5,
    picture: Annotated[
        Path | None,
        typer.Option(help="PNG of both loss curves. Default: RUN_A/compare-<name of RUN_B>.png."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, not tables.")] = False,
) -> None:
    """Say whether two runs are the same.

    If not, from which step on, and a likely cause. The exit code is 0 if they are the same, 1 if they differ.
    """
    from bigtfm.compare.difference import compare as run
    from bigtfm.compare.report import draw, render, to_json
    from bigtfm.compare.runs import read_run

    found = run(read_run(run_a), read_run(run_b), tolerance)
    picture = picture or run_a / f"compare-{run_b.resolve().name}.png"
    if as_json:
        print(json.dumps(to_json(found, picture)))
    else:
        _show(render(found, picture))
    sys.stdout.flush()
    draw(found, picture)  # last: the verdict doesn't hang on it
    raise typer.Exit(0 if found.step is None else 1)


@app.command()
def bench(
    more: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[MATRIX]...", help="Further matrices: --matrix benchmarks/matrices/*.toml."),
    ] = None,
    matrix: Annotated[
        list[Path] | None,
        typer.Option(
            help="TOML file of the configurations to measure. May be given more than once. Default: none, a "
            "report of what is in --out."
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder of the results; what is there is not measured again.")
    ] = Path("runs/bench"),
    runs: Annotated[
        Path | None,
        typer.Option(help="Folder of finished runs to take into the report, too. Default: none."),
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="Folder of earlier results to compare with. Default: none.")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Rates that `bigtfm plan --calibrate` has measured: the planned step is shown beside the "
            "measured one. Default: of a GPU its data sheet's."
        ),
    ] = None,
    mlflow: Annotated[
        str, typer.Option(help="Tracking URI of the MLflow that the report goes to; '': to none.")
    ] = "sqlite:///mlflow.db",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines, not tables.")] = False,
) -> None:
    """Measure speed and memory per configuration.

    Each is trained for some steps in processes of its own; out of memory, a crash and a hang are results,
    too. Leaves report.html, report.md, results.csv and pictures in the folder. The exit code is 1 if
    something is worse than --against, else 0.
    """
    from bigtfm.bench.command import bench as run

    matrices = [*(matrix or []), *(more or [])]
    worse = run(
        matrices, out, runs=runs, against=against, calibration=calibration, mlflow=mlflow, as_json=as_json
    )
    raise typer.Exit(1 if worse else 0)


@app.command()
def plan(
    deepspeed_config: DeepSpeedFile,
    config: RunConfigFile = None,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of the job, one a rank.")] = 8,
    gpu: Annotated[
        str, typer.Option(help="h100-80g, h200, a100-40g, ..., cpu, or the name that torch gives the GPU.")
    ] = "h100-80g",
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of a node.")] = 8,
    search: Annotated[
        bool,
        typer.Option("--search", help="Find the fastest configuration that fits, at the same loss."),
    ] = False,
    write: Annotated[
        Path | None, typer.Option(help="DeepSpeed JSON to write what --search finds to. Default: none.")
    ] = None,
    confirm: Annotated[
        int, typer.Option(min=0, help="How many of the best that --search finds are tried out here.")
    ] = 0,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Rates that --calibrate has measured. Default: the data sheet's."),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            help="File to measure this machine's rates into, in minutes, and to plan with. Default: none."
        ),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="PNG of a rank's memory at every ZeRO stage. Default: none.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, not a table.")] = False,
) -> None:
    """Say whether a job fits, how fast it is, what it costs.

    It runs nothing, and needs no GPU and, where model.vocab_size is stated, no data set. The exit code is 1
    if it does not fit (of a search: if nothing does), else 0.
    """
    from bigtfm.plan.command import show

    fits = show(
        config,
        deepspeed_config,
        overrides or [],
        gpus=gpus,
        gpu=gpu,
        gpus_per_node=gpus_per_node,
        search=search,
        write=write,
        confirm=confirm,
        calibration=calibration,
        calibrate=calibrate,
        picture=picture,
        as_json=as_json,
    )
    raise typer.Exit(0 if fits else 1)


@app.command()
def sweep(
    file: Annotated[
        Path, typer.Argument(help="TOML file of the space, the method and the number of trials.")
    ],
    out: Annotated[
        Path, typer.Option(help="Folder of the trials and results; what is there is not trained again.")
    ] = Path("runs/sweep"),
    jobs: Annotated[int, typer.Option(min=1, help="Number of trials that are trained at a time.")] = 1,
    due: Annotated[
        bool,
        typer.Option(
            "--due",
            help="Train nothing: print the trials that a cluster is to train next, or make the report when "
            "none is left (slurm/sweep.sbatch).",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines, not tables.")] = False,
) -> None:
    """Search hyper-parameters of both files.

    Each trial is a run of its own; of those, the promising may go on (successive halving). A trial that
    diverges, crashes or runs out of memory is a result. Leaves sweep.csv, pictures, best.toml and best.json.
    """
    from bigtfm.sweep.command import next_trials
    from bigtfm.sweep.command import sweep as run

    if due:
        print(next_trials(file, out), end="")
    else:
        run(file, out, jobs=jobs, as_json=as_json)


@app.command("lr-range")
def lr_range(
    deepspeed_config: DeepSpeedFile,
    config: RunConfigFile = None,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="Folder of the run, the picture and the result.")] = Path(
        "runs/lr-range"
    ),
    steps: Annotated[int, typer.Option(min=20, help="Optimizer steps of the whole range.")] = 200,
    min_lr: Annotated[float, typer.Option(help="Learning rate of the first step.")] = 1e-6,
    max_lr: Annotated[float, typer.Option(help="Learning rate of the last step.")] = 1.0,
    ranks: Annotated[int, typer.Option(min=1, help="Processes of the run, one a GPU.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, not sentences.")] = False,
) -> None:
    """Find the range of learning rates that train.

    One run whose lr grows exponentially until the loss is back where it began; a picture, and an lr to try.
    """
    from bigtfm.sweep.lr_range import lr_range as run

    found = run(
        config, deepspeed_config, overrides or [], out, steps=steps, lrs=(min_lr, max_lr), ranks=ranks
    )
    print(json.dumps(found.record) if as_json else found.words)


@app.command("noise-scale")
def noise_scale(
    run_dir: RunDirectory,
    batches: Annotated[
        int, typer.Option(min=2, help="Number of micro-batches whose gradients are compared.")
    ] = 64,
    micro_batch: Annotated[
        int | None, typer.Option(min=1, help="Sequences in each of them. Default: the run's micro batch.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Prepared data set to measure on. Default: the run's own, from its next sample on."
        ),
    ] = None,
    step: Annotated[
        list[int] | None,
        typer.Option(
            min=0, help="Optimizer step of a checkpoint. May be given more than once. Default: the newest."
        ),
    ] = None,
    every_checkpoint: Annotated[
        bool, typer.Option("--every-checkpoint", help="Measure all checkpoints that the run has kept.")
    ] = False,
    picture: Annotated[
        Path | None, typer.Option(help="PNG of what each batch costs. Default: RUN/noise-scale.png.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, not tables.")] = False,
) -> None:
    """Say which batch size pays.

    The gradient noise scale of a run's checkpoints (McCandlish et al. 2018) with a 95 % interval, and what
    smaller and larger batches would take in steps and sequences. Under a launcher each rank takes a share.
    """
    from bigtfm.config.launch import of_srun
    from bigtfm.large_batch.command import measure
    from bigtfm.large_batch.view import draw, render, to_json, verdict

    os.environ.update(of_srun(os.environ))
    report = measure(
        run_dir,
        batches=batches,
        micro_batch=micro_batch,
        data=data,
        steps=step or (),
        every_checkpoint=every_checkpoint,
    )
    if report is None:
        return
    picture = picture or run_dir / "noise-scale.png"
    draw(report, picture)
    if as_json:
        print(json.dumps(to_json(report) | {"picture": str(picture)}))
    else:
        for each in report.measured:
            _show(render(each))
            print(verdict(each))
        print(picture)


@app.command("lr-scale")
def lr_scale(
    deepspeed_config: DeepSpeedFile,
    batch: Annotated[int, typer.Option(min=1, help="Sequences of the new global batch.")],
    rule: Annotated[
        str | None,
        typer.Option(help="linear, sqrt or adam (sqrt, with betas and eps). Default: the optimizer's own."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="DeepSpeed JSON to write. Default: none.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, not sentences.")] = False,
) -> None:
    """Say what a tuned recipe becomes at another batch.

    By the published rule of its optimizer: linear for SGD and Lars, square root for Lamb, square root with
    betas, eps and decay for Adam and AdamW. The number of samples stays. It runs nothing.
    """
    from bigtfm.large_batch.lr_scale import lr_scale as run
    from bigtfm.large_batch.lr_scale import to_json, told

    found = run(deepspeed_config, batch, rule, out)
    print(json.dumps(to_json(found, out)) if as_json else told(found, out))


@app.command()
def doctor(
    run: Annotated[
        Path | None, typer.Option(help="Run directory to look into. Default: none, but this machine.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, not a table.")] = False,
) -> None:
    """Say what is wrong here, or what stopped a run.

    Here: with this machine. Each finding comes with its fix. The exit code is 1 if one is an error, else 0.
    """
    from bigtfm.doctor.findings import is_well, render, to_json

    if run is None:
        from bigtfm.doctor.machine import examine_machine

        findings = examine_machine(os.environ, Path("runs"))
    else:
        from bigtfm.doctor.run import examine_run

        findings = examine_run(run)
    if as_json:
        print(json.dumps(to_json(findings)))
    else:
        _show(render(findings))
    raise typer.Exit(0 if is_well(findings) else 1)


@app.command()
def submit(
    deepspeed_config: DeepSpeedFile,
    config: Annotated[Path, typer.Option("--config", help="Run config, a TOML file.")],
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="Number of nodes.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of each node; a rank each.")] = 8,
    time: Annotated[
        str, typer.Option(help="Time limit of a start, as sbatch takes it; the run goes on after it.")
    ] = "24:00:00",
    partition: Annotated[str | None, typer.Option(help="Partition. Default: the cluster's own.")] = None,
    sbatch: Annotated[
        list[str] | None,
        typer.Option(
            help="Another option of sbatch, e.g. --sbatch=--account=mine. May be given more than once. "
            "Default: none."
        ),
    ] = None,
    knobs: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="NAME=VALUE of a variable at the top of slurm/train.sbatch, e.g. CONTAINER=image.sif. May "
            "be given more than once. Default: as it stands there.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the script; submit nothing.")] = False,
) -> None:
    """Submit a training to Slurm.

    The job is checked as training would, the script is written into the run directory and submitted, and the
    queue shown. It goes on by itself after its time limit, a preemption or a lost node.
    """
    from bigtfm.job import check_job
    from bigtfm.slurm.submit import Request, queue, write_script
    from bigtfm.slurm.submit import submit as run

    job = check_job(config, deepspeed_config, overrides or [], nodes * gpus_per_node)
    request = Request(nodes, gpus_per_node, time, partition, tuple(sbatch or ()), tuple(knobs or ()))
    text = request.script(job.run.run_dir, config, deepspeed_config, overrides or [])
    if dry_run:
        print(text, end="")
    else:
        path = write_script(job.run.run_dir, text)
        number = run(path)
        print(f"job {number}: {path}\n{queue(number)}", end="")


@app.command()
def again(
    run_dir: RunDirectory,
    code: Annotated[int, typer.Option(min=0, help="Exit code of the ranks, as srun gives it.")],
    since: Annotated[float, typer.Option(help="When they were started, in Unix seconds.")] = 0.0,
    retries: Annotated[
        int, typer.Option(min=0, help="Starts in a row that may end without a newer checkpoint.")
    ] = 3,
) -> None:
    """Say whether a Slurm job is to be started again.

    For the end of a batch script: prints the exit code that the ranks have agreed on, and the nodes to do
    without; its own is 0 if yes, 1 if no.
    """
    from bigtfm.slurm.again import note_and_decide

    now, decision = note_and_decide(run_dir, code, os.environ, since=since, retries=retries)
    if now.code:
        unsaid = f"exit code {now.code}, of which {run_dir / 'logs'} may say more"
        print(f"bigtfm: {now.line or unsaid}", file=sys.stderr)
    print(
        f"bigtfm: {'starting again' if decision.again else 'not started again'}: {decision.why}",
        file=sys.stderr,
    )
    print(now.code, ",".join(decision.exclude))
    raise typer.Exit(0 if decision.again else 1)


@app.command()
def status(
    run: Annotated[
        str, typer.Argument(metavar="RUN_OR_JOB", help="Run directory, or number of a Slurm job.")
    ],
    watch: Annotated[bool, typer.Option("--watch", help="Show it anew every 5 seconds.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, not a table.")] = False,
) -> None:
    """Say where a run is.

    Since when, how fast, its loss, its restarts and their reasons, the estimated end, and which share of its
    time went into steps.
    """
    from dataclasses import asdict

    from bigtfm.slurm.queue import run_dir_of
    from bigtfm.slurm.status import follow, render
    from bigtfm.slurm.status import status as look

    run_dir = run_dir_of(run)
    if as_json:
        print(json.dumps(asdict(look(run_dir))))
    elif watch:
        follow(run_dir)
    else:
        _show(render(look(run_dir)))


@app.command()
def sync(run_dir: Annotated[Path, typer.Argument(help="Run directory, e.g. runs/quickstart.")]) -> None:
    """Send to MLflow what is not sent yet."""
    from bigtfm.mlflow_mirror import sync as run

    print(f"MLflow run {run(run_dir)}")


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)
