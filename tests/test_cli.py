"""The command line as a contract: its commands and flags are frozen here, its help is quick and complete."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from bigtfm.cli import app

BIGTFM = Path(sys.executable).with_name("bigtfm")
REQUIRED = "required"
HEAVY = ("torch", "deepspeed", "mlflow", "datasets", "transformers", "matplotlib", "pyarrow", "sentencepiece")

# Whoever changes this changes what users have in their scripts: say so in CHANGELOG.md.
FROZEN: dict[str, dict[str, Any]] = {
    "train": {"--deepspeed_config": REQUIRED, "--config": None, "[KEY=VALUE]...": None, "--local_rank": None},
    "check": {
        "--deepspeed_config": REQUIRED,
        "--config": None,
        "[KEY=VALUE]...": None,
        "--world-size": 1,
        "--json": False,
    },
    "prepare": {
        "--input": None,
        "--out": "data/quickstart",
        "--tokenizer": None,
        "--vocab-size": None,
        "--model-type": "bpe",
        "--text-column": "text",
        "--validation-fraction": 0.1,
        "--document-bytes": None,
        "--stdin-format": "txt",
        "--task": None,
        "--column": None,
        "--labels": None,
        "--max-tokens": 512,
        "--template": None,
        "--shard": None,
        "--workers": None,
        "--filters": None,
        "--exclude": None,
        "--force": False,
    },
    "pack": {"data": REQUIRED, "--seq-len": REQUIRED, "--json": False},
    "generate": {
        "--run": REQUIRED,
        "--prompt": None,
        "--max-new-tokens": 100,
        "--temperature": 0.8,
        "--top-k": 50,
        "--top-p": 1.0,
        "--seed": 0,
        "--num-beams": 1,
        "--length-penalty": 1.0,
        "--num-return-sequences": 1,
        "--json": False,
    },
    "inspect": {
        "--run": REQUIRED,
        "--text": REQUIRED,
        "--target": None,
        "--max-new-tokens": 50,
        "--layers": None,
        "--heads": None,
        "--out": None,
        "--step": None,
        "--best": False,
        "--json": False,
    },
    "import-hf": {"DIR_OR_NAME": REQUIRED, "out": REQUIRED, "--vocab-size": None, "--compare": True},
    "export-hf": {"run_dir": REQUIRED, "out": REQUIRED, "--architecture": None, "--compare": True},
    "export": {
        "run_dir": REQUIRED,
        "OUT.safetensors": REQUIRED,
        "--dtype": "fp32",
        "--step": None,
        "--best": False,
        "--force": False,
    },
    "compress": {
        "--run": REQUIRED,
        "--out": REQUIRED,
        "--method": REQUIRED,
        "--share": None,
        "--group-size": None,
        "--data": None,
        "--eval-tokens": None,
        "--json": False,
    },
    "import-deepspeed": {
        "checkpoint": REQUIRED,
        "out": REQUIRED,
        "--deepspeed_config": REQUIRED,
        "--config": None,
        "[KEY=VALUE]...": None,
        "--trust-pickles": False,
    },
    "plan": {
        "--deepspeed_config": REQUIRED,
        "--config": None,
        "[KEY=VALUE]...": None,
        "--gpus": 8,
        "--gpu": "h100-80g",
        "--gpus-per-node": 8,
        "--search": False,
        "--write": None,
        "--confirm": 0,
        "--calibration": None,
        "--calibrate": None,
        "--picture": None,
        "--json": False,
    },
    "compare": {
        "run_a": REQUIRED,
        "run_b": REQUIRED,
        "--tolerance": 1e-5,
        "--picture": None,
        "--json": False,
    },
    "bench": {
        "[MATRIX]...": None,
        "--matrix": None,
        "--out": "runs/bench",
        "--runs": None,
        "--against": None,
        "--calibration": None,
        "--mlflow": "sqlite:///mlflow.db",
        "--json": False,
    },
    "evaluate": {
        "--run": REQUIRED,
        "--data": REQUIRED,
        "--column": None,
        "--text-column": "text",
        "--predictions": None,
        "--num-beams": 4,
        "--length-penalty": 1.0,
        "--max-new-tokens": 128,
        "--batch-tokens": 4096,
        "--stride": None,
        "--json": False,
    },
    "predict": {
        "--run": REQUIRED,
        "--data": REQUIRED,
        "--column": None,
        "--num-beams": 4,
        "--length-penalty": 1.0,
        "--max-new-tokens": 128,
        "--batch-tokens": 4096,
    },
    "harness": {},
    "chat": {
        "--run": REQUIRED,
        "--system": None,
        "--max-new-tokens": 256,
        "--temperature": 0.7,
        "--top-p": 0.9,
        "--seed": 0,
    },
    "sweep": {"file": REQUIRED, "--out": "runs/sweep", "--jobs": 1, "--due": False, "--json": False},
    "lr-range": {
        "--deepspeed_config": REQUIRED,
        "--config": None,
        "[KEY=VALUE]...": None,
        "--out": "runs/lr-range",
        "--steps": 200,
        "--min-lr": 1e-6,
        "--max-lr": 1.0,
        "--ranks": 1,
        "--json": False,
    },
    "noise-scale": {
        "--run": REQUIRED,
        "--batches": 64,
        "--micro-batch": None,
        "--data": None,
        "--step": None,
        "--every-checkpoint": False,
        "--picture": None,
        "--json": False,
    },
    "lr-scale": {
        "--deepspeed_config": REQUIRED,
        "--batch": REQUIRED,
        "--rule": None,
        "--out": None,
        "--json": False,
    },
    "doctor": {"--run": None, "--json": False},
    "submit": {
        "--deepspeed_config": REQUIRED,
        "--config": REQUIRED,
        "[KEY=VALUE]...": None,
        "--nodes": 1,
        "--gpus-per-node": 8,
        "--time": "24:00:00",
        "--partition": None,
        "--sbatch": None,
        "--set": None,
        "--dry-run": False,
    },
    "again": {"--run": REQUIRED, "--code": REQUIRED, "--since": 0.0, "--retries": 3},
    "status": {"RUN_OR_JOB": REQUIRED, "--watch": False, "--json": False},
    "sync": {"run_dir": REQUIRED},
    "version": {},
}

UNITS = {  # of every number: the word that its help has to hold
    "--world-size": "ranks",
    "--vocab-size": "pieces",
    "--validation-fraction": "share of the documents",
    "--document-bytes": "bytes",
    "--workers": "processes",
    "--max-tokens": "tokens",
    "--batch-tokens": "tokens",
    "--stride": "tokens",
    "--max-new-tokens": "tokens",
    "--temperature": "0: the likeliest token",
    "--top-k": "0: all",
    "--top-p": "1: all",
    "--seed": "seed",
    "--num-beams": "beams",
    "--length-penalty": "log-probability / tokens^this",
    "--num-return-sequences": "answers",
    "--tolerance": "relative difference",
    "--step": "optimizer step",
    "--seq-len": "tokens",
    "--jobs": "at a time",
    "--steps": "optimizer steps",
    "--min-lr": "learning rate",
    "--max-lr": "learning rate",
    "--ranks": "one a gpu",
    "--nodes": "number of nodes",
    "--gpus-per-node": "gpus",
    "--gpus": "one a rank",
    "--confirm": "how many",
    "--code": "exit code",
    "--share": "share of each matrix",
    "--group-size": "columns",
    "--eval-tokens": "validation tokens",
    "--batches": "micro-batches",
    "--micro-batch": "sequences",
    "--batch": "sequences",
    "--since": "unix seconds",
    "--retries": "starts in a row",
}


def commands() -> dict[str, Any]:
    return typing.cast(Any, typer.main.get_command(app)).commands


def flag(parameter: Any) -> str:
    """--flag, or an argument's name."""
    if parameter.param_type_name == "option":
        return str(parameter.opts[0])
    return str(parameter.metavar or parameter.name)


def options() -> list[Any]:
    """Function and parameter of everything that --help shows."""
    return [
        pytest.param(command.callback, parameter, id=f"{name} {flag(parameter)}")
        for name, command in commands().items()
        for parameter in command.params
        if not getattr(parameter, "hidden", False)
    ]


def test_commands_flags_and_defaults_are_frozen() -> None:
    now = {
        name: {
            flag(parameter): REQUIRED if parameter.required else parameter.default
            for parameter in command.params
        }
        for name, command in commands().items()
    }
    assert json.loads(json.dumps(now, default=str)) == FROZEN


@pytest.mark.parametrize(("function", "parameter"), options())
def test_every_help_text_states_unit_and_default(function: Any, parameter: Any) -> None:
    text = (parameter.help or "").lower()
    assert text, "it says nothing"
    kind = typing.get_type_hints(function)[parameter.name]
    numeric = {int, float} & {kind, *typing.get_args(kind)}
    if numeric:
        assert UNITS[flag(parameter)] in text
    is_option = parameter.param_type_name == "option"
    if is_option and not parameter.required and parameter.default is None:
        assert "default: " in text, "unset is a default too: say what it means"


@pytest.mark.parametrize("name", FROZEN)
def test_the_list_of_commands_shows_each_in_one_whole_sentence(name: str) -> None:
    shown = run("--help").stdout
    line = next(line for line in shown.splitlines() if line.split()[:1] == [name])
    assert line.endswith("."), "cut off: shorten the first sentence"
    assert "..." not in line


def test_help_shows_the_defaults() -> None:
    shown = " ".join(run("generate", "--help").stdout.split())
    for default in ("100", "0.8", "50", "1.0"):
        assert f"[default: {default}" in shown


def processor_seconds_of(call: Callable[[], object], tries: int = 3) -> float:
    """Of the processes that `call` runs, at best: what else the machine does hardly shows in it."""
    seconds = []
    for _ in range(tries):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        call()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(seconds)


def test_help_answers_at_once() -> None:
    assert processor_seconds_of(lambda: run("--help")) < 0.5


def test_check_answers_in_two_seconds_without_torch(tiny_data: Path, deepspeed_json: Any) -> None:
    arguments = ["check", "--deepspeed_config", str(deepspeed_json()), "steps=10", f"data.path={tiny_data}"]
    assert json.loads(run(*arguments, "--json").stdout)["steps"] == 10
    assert processor_seconds_of(lambda: run(*arguments, "--json")) < 2
    assert heavy_modules_of(*arguments) == ["sentencepiece"]  # the data set's tokenizer is looked at


@pytest.mark.parametrize("arguments", [["--help"], ["version"], ["train", "--help"], ["prepare", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    assert heavy_modules_of(*arguments) == []


def test_generating_imports_torch() -> None:
    """The control: the look into sys.modules sees what is imported."""
    assert "torch" in heavy_modules_of("generate", "--run", "nowhere")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([BIGTFM, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done


def heavy_modules_of(*arguments: str) -> list[str]:
    """What the command has imported of HEAVY by its end."""
    program = (
        "import sys\n"
        "from bigtfm.cli import app\n"
        "try:\n"
        f"    app({list(arguments)!r})\n"
        "finally:\n"
        f"    print('heavy', *[name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    return next(line.split()[1:] for line in done.stdout.splitlines() if line.startswith("heavy"))


@pytest.mark.parametrize("command", [["status"], ["doctor", "--run"]])
def test_brackets_in_a_message_are_no_markup(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "resolved.json").write_text("{}")
    failure = {"exit_code": 74, "what": "no [/tmp] of [rank0]", "where": "here", "fix": "none"}
    (tmp_path / "failure.json").write_text(json.dumps(failure))
    with pytest.raises(SystemExit):
        app([*command, str(tmp_path)])
    assert "no [/tmp] of [rank0]" in " ".join(capsys.readouterr().out.split())
