"""Every command in README.md and docs/ is run, in a copy of the project, by the order of the text."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rank_runner import free_port

from bigtfm.config.reference import written_into

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHORT = "eval.tokens=2048 track.mlflow=false"

# How a command of a ```bash fence is run: {} is the command itself, to which something may be added.
AS_IT_STANDS = "{}"
RUN = {
    "make quickstart": "make quickstart STEPS=20 ARGS='eval.tokens=2048'",
    "make test": "make -n test",  # this test is part of it
    "bigtfm prepare --input my.txt --out data/mine": AS_IT_STANDS,
    "bigtfm pack data/mine --seq-len 2048": AS_IT_STANDS,
    "bigtfm train --deepspeed_config ds_configs/zero2_fp32.json --config configs/quickstart.toml "
    "data.path=data/mine run.name=mine": f"{{}} steps=3 {SHORT}",
    'bigtfm generate --run runs/mine --prompt "Once upon a time" --max-new-tokens 50': AS_IT_STANDS,
    "deepspeed --num_gpus 2 launch/train.py --deepspeed_config ds_configs/zero3_fp32.json --config "
    "configs/quickstart.toml data.path=data/mine run.name=zero3 steps=50": f"{{}} steps=3 {SHORT}",
    "bigtfm compare runs/mine runs/zero3": AS_IT_STANDS,
    "deepspeed --num_gpus 2 launch/train.py --deepspeed_config ds_configs/zero2_fp32.json --config "
    "configs/quickstart.toml run.name=two steps=20": f"{{}} steps=3 {SHORT}",
    "bigtfm check --deepspeed_config ds_configs/zero2_fp32.json --config configs/quickstart.toml "
    "--world-size 2": AS_IT_STANDS,
    "bigtfm train --deepspeed_config ds_configs/zero2_fp32.json --config configs/quickstart.toml "
    "model.family=bert run.name=bert steps=20": f"{{}} steps=3 {SHORT}",
    'bigtfm generate --run runs/bert --prompt "My fellow <mask>,"': AS_IT_STANDS,
    'bigtfm generate --run runs/mine --prompt "My fellow Americans," --num-beams 4 '
    "--num-return-sequences 2": AS_IT_STANDS,
    'bigtfm generate --run runs/bert --prompt "The <mask> of the Union" --json --top-k 10': AS_IT_STANDS,
    'bigtfm generate --run runs/t5 --prompt "The state of the <extra_id_0> is <extra_id_1>." '
    "--num-beams 4": AS_IT_STANDS,
    'bigtfm inspect --run runs/mine --text "My fellow Americans, the state of our Union is strong."': (
        AS_IT_STANDS
    ),
    'bigtfm inspect --run runs/t5 --text "The state of the <extra_id_0> is strong." --layers 0-1 --json': (
        AS_IT_STANDS
    ),
    "bigtfm export runs/mine mine.safetensors": AS_IT_STANDS,
    "bigtfm prepare --task classification --input bigtfm/data/corpus/state_of_the_union.jsonl --column "
    "label=party --out data/party --max-tokens 128": AS_IT_STANDS,
    "bigtfm train --deepspeed_config ds_configs/zero2_fp32.json --config configs/quickstart.toml "
    "model.family=bert objective.kind=classification data.path=data/party data.packing=best_fit "
    "run.name=party steps=30": f"{{}} steps=3 {SHORT}",
    "bigtfm evaluate --run runs/party --data bigtfm/data/corpus/state_of_the_union.jsonl --column "
    "label=party": AS_IT_STANDS,
    "bigtfm predict --run runs/party --data bigtfm/data/corpus/state_of_the_union.jsonl": AS_IT_STANDS,
    "bigtfm train --deepspeed_config ds_configs/zero2_fp32.json --config configs/quickstart.toml "
    "data.path=data/mine run.init_from=runs/mine run.name=adapted tune.lora_rank=8 steps=20": (
        f"{{}} steps=3 {SHORT}"
    ),
    'bigtfm generate --run runs/adapted --prompt "Once upon a time" --max-new-tokens 20': AS_IT_STANDS,
    "bigtfm evaluate --run runs/mine --data my.txt": AS_IT_STANDS,
    "bigtfm compress --run runs/mine --out runs/mine-int8 --method int8": "{} --eval-tokens 1024",
    'bigtfm generate --run runs/mine-int8 --prompt "Once upon a time" --max-new-tokens 20': AS_IT_STANDS,
    "bigtfm bench --matrix benchmarks/matrices/quick.toml --out runs/quick": "printf "
    "'[measure]\\nsteps = 3\\n[[grid]]\\n' > benchmarks/matrices/quick.toml; {} --mlflow ''",
    "bigtfm bench --out runs/quick --against runs/quick --mlflow ''": AS_IT_STANDS,
    "bigtfm plan --deepspeed_config ds_configs/zero1_bf16.json --config configs/gpt_1.3b.toml --gpus 8 --gpu "
    "h100-80g data.path=none model.vocab_size=50257": AS_IT_STANDS,
    "bigtfm plan --deepspeed_config ds_configs/zero2_fp32.json --config configs/quickstart.toml --gpus 2 "
    "--gpu cpu --search --write found.json": AS_IT_STANDS,
    "bigtfm lr-range --deepspeed_config ds_configs/zero2_fp32.json --config configs/quickstart.toml --out "
    "runs/lr-range": "{} --steps 20 --min-lr 1e-4",
    "bigtfm noise-scale --run runs/mine": "{} --batches 4 --micro-batch 2",
    "bigtfm check --deepspeed_config ds_configs/zero2_fp32.json --config configs/quickstart.toml "
    "rampup_sizes=4,8 rampup_steps=100,100": AS_IT_STANDS,
    "bigtfm lr-scale --deepspeed_config ds_configs/zero2_fp32.json --batch 64 --out large.json": AS_IT_STANDS,
    "bigtfm doctor": "{} || test $? = 1",  # whatever is wrong with this machine
    "bigtfm doctor --run runs/mine": AS_IT_STANDS,
    "bigtfm export runs/mine best.safetensors --best --dtype bf16": AS_IT_STANDS,
    "bigtfm export-hf runs/mine mine-hf": AS_IT_STANDS,
    "bigtfm import-hf mine-hf runs/again": AS_IT_STANDS,
    "bigtfm train --deepspeed_config ds_configs/zero2_fp32.json --config configs/quickstart.toml "
    "model.family=encoder_decoder run.name=t5 steps=20": f"{{}} steps=3 {SHORT}",
    "bigtfm check --deepspeed_config ds_configs/zero2_fp32.json --config configs/quickstart.toml steps=100 "
    "model.dropout=0.1 --json": AS_IT_STANDS,
}
NOT_RUN = {  # of the ```console fences: what no test here can run, and why
    "bigtfm prepare --input hf:Skylion007/openwebtext:train --vocab-size 50257 "
    "--out data/openwebtext": "downloads 40 GB from the Hugging Face hub",
    "deepspeed --num_gpus 8 launch/train.py --deepspeed_config ds_configs/zero1_bf16.json --config "
    "configs/gpt_124m.toml": "needs eight GPUs and OpenWebText",
    "make setup && source .venv/bin/activate": "the test's environment is set up",
    "bigtfm prepare --input my.txt --out data/mine": "it is run where it stands in README.md",
    "bigtfm submit --nodes 2 --gpus-per-node 8 --time 12:00:00 --config configs/gpt_124m.toml "
    "--deepspeed_config ds_configs/zero1_bf16.json data.path=data/mine run.name=first": "needs Slurm",
    "bigtfm status runs/first --watch": "needs that job",
    "CONFIG=configs/llama_1b.toml DEEPSPEED_CONFIG=ds_configs/zero2_bf16.json "
    "OVERRIDES='data.path=data/mine' sbatch --job-name=llama --nodes=4 slurm/train.sbatch": "needs Slurm",
    "bigtfm bench --runs runs/bench-1234 --out runs/bench-1234": "needs the runs of a Slurm job",
    "bigtfm prepare --input web/ --filters filters.toml --exclude eval.jsonl --out data/web": (
        "needs such files; tests/data/test_filters.py runs filters"
    ),
    "bigtfm sweep my_sweep.toml --out runs/search --jobs 2": "trains for minutes; tests/sweep/ runs sweeps",
    "SPACE=my_sweep.toml OUT=runs/search bash slurm/sweep.sbatch": "needs Slurm",
    "bigtfm compress --run runs/mine --out runs/half --method magnitude --share 0.5": "is an example",
    "bigtfm train --deepspeed_config ds.json --config runs/half/run.toml run.init_from=runs/half "
    "run.name=half-tuned": "needs that run",
    "bigtfm compress --run runs/half-tuned --out runs/fewer --method magnitude --share 0.75": "likewise",
    "bigtfm train --deepspeed_config ds.json --config small.toml distill.teacher=runs/large "
    "run.name=taught": "needs a teacher",
    "make bench": "takes an hour; tests/benchmarks/ runs parts",
    "bigtfm harness run --model bigtfm --model_args run=runs/mine --tasks hellaswag": (
        "downloads the task; tests/tasks/test_harness.py runs a local one"
    ),
    "bigtfm chat --run runs/chat": "needs a run that has learnt to; tests/tasks/ talks to one",
    "torchrun --nproc_per_node 8 --no-python -- bigtfm evaluate --run runs/translation --data "
    "newstest.jsonl": "is an example; tests/integration/test_tasks.py evaluates as two ranks",
    "torchrun --nproc_per_node 8 --no-python -- bigtfm noise-scale --run runs/mine --batches 512": (
        "is an example; tests/large_batch/ measures as two ranks"
    ),
    "deepspeed --num_gpus 8 launch/train.py --deepspeed_config ds_configs/large_batch_lamb.json --config "
    "configs/bert_110m.toml data.seq_len=128": "needs eight GPUs and BERT's data",
    "bigtfm import-hf openai-community/gpt2 runs/gpt2": "downloads from the Hugging Face hub",
    "bigtfm prepare --tokenizer runs/gpt2/tokenizer --out data/mine --input my.txt": "needs that import",
    "bigtfm train --deepspeed_config ds_configs/zero2_bf16.json --config runs/gpt2/run.toml "
    "run.init_from=runs/gpt2 run.name=mine data.path=data/mine": "needs that import",
    "bigtfm prepare --input sample.jsonl --out data/sample": "needs a sample of a data set on the hub",
    "bigtfm train --deepspeed_config ds.json data.path=data/sample data.stream=hf:allenai/c4@en:train": (
        "reads from the Hugging Face hub"
    ),
    "bigtfm import-deepspeed ckpt runs/mine --deepspeed_config ds.json --config run.toml "
    "data.path=data/mine steps=20000": "needs a training of another program",
    "bigtfm train --deepspeed_config ds.json --config run.toml data.path=data/mine steps=20000 run.dir=runs "
    "run.name=mine": "needs that import",
}
NO_COMMANDS = {"text", "toml", "json", "python"}  # fences that show something else


def fences(document: Path) -> Iterator[tuple[str, str]]:
    """(language, content) of every fenced block."""
    text = document.read_text(encoding="utf-8")
    assert text.count("```") % 2 == 0, f"an open fence in {document.name}"
    yield from re.findall(r"^```([^\n]*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def commands(language: str) -> list[str]:
    """Every command, in the order of the text; a backslash at a line's end goes on with it."""
    contents = [content for document in DOCUMENTS for name, content in fences(document) if name == language]
    lines = "".join(contents).replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines if line.strip() and not line.lstrip().startswith("#")]


def test_this_test_knows_every_command_and_no_other() -> None:
    assert set(commands("bash")) == set(RUN)
    assert set(commands("console")) == set(NOT_RUN)
    languages = {name for document in DOCUMENTS for name, _ in fences(document)}
    assert languages <= {"bash", "console"} | NO_COMMANDS, "a command could hide in such a fence"


def test_torchrun_reads_its_commands_as_they_stand() -> None:
    """Without -- it takes a program's options, such as --run, for beginnings of its own."""
    from torch.distributed.run import parse_args

    found = [command.split()[1:] for command in commands("console") if command.startswith("torchrun ")]
    assert found
    for arguments in found:
        given = parse_args(arguments)
        assert [given.training_script, *given.training_script_args] == arguments[arguments.index("--") + 1 :]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", document.read_text(encoding="utf-8"))
    missing = [
        link
        for link in links
        if not link.startswith(("http://", "https://")) and not (document.parent / link).exists()
    ]
    assert missing == []


def test_the_reference_is_that_of_the_code() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert text == written_into(text), "run: python -m bigtfm.config.reference docs/configuration.md"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The project's files as a fresh clone has them, and an environment that make takes for complete."""
    folder = tmp_path / "clone"
    git = ["git", "-c", "safe.directory=*", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():  # what is deleted but still known to git is not
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / ".venv").mkdir()
    for part in Path(sys.prefix).iterdir():
        if not part.name.startswith("."):
            (folder / ".venv" / part.name).symlink_to(part)
    makefile = (folder / "Makefile").read_text(encoding="utf-8")
    version = re.search(r"^TORCH_VERSION \?= (\S+)", makefile, flags=re.MULTILINE)
    assert version is not None
    for stamp in (".python", f".torch-{version[1]}", ".ready"):
        (folder / ".venv" / stamp).touch()
    speech = (folder / "bigtfm/data/corpus/state_of_the_union.jsonl").read_text(encoding="utf-8").splitlines()
    (folder / "my.txt").write_text(
        "\n\n".join(json.loads(line)["text"] for line in speech[:3]), encoding="utf-8"
    )
    return folder


def runnable(command: str) -> str:
    """The form in which a command is run; a launcher gets a port that no other test run uses."""
    short = RUN[command].format(command)
    return re.sub(r"^deepspeed ", f"deepspeed --master_port {free_port()} ", short)


def run(command: str, folder: Path) -> str:
    """What `command` prints, in `folder`, as typed by somebody who has the environment first in PATH."""
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "PYTEST"))
    }
    environment = inherited | {
        "PATH": f"{folder / '.venv' / 'bin'}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.mark.timeout(900)  # some 70 s where nothing else runs
@pytest.mark.launcher
@pytest.mark.slow
def test_the_commands_do_what_the_text_says(clone: Path) -> None:
    printed = {command: run(runnable(command), clone) for command in dict.fromkeys(commands("bash"))}

    quickstart = printed["make quickstart"]
    assert "unigram baseline" in quickstart
    assert "step 20/20" in quickstart
    assert quickstart.splitlines()[-2].startswith("My fellow Americans,"), "it ends with a sample"
    run_dir = clone / "runs/quickstart"
    assert (run_dir / "curve.png").read_bytes().startswith(b"\x89PNG")
    mlflow_run = json.loads((run_dir / "mlflow.json").read_text())["run_id"]
    assert mlflow_run in quickstart
    assert json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 20
    assert "pip" not in quickstart, "the environment was there"

    assert "pytest" in printed["make test"]
    rows = {name: (clone / f"runs/{name}/metrics.jsonl").read_text().splitlines() for name in ("mine", "two")}
    assert {name: len(lines) for name, lines in rows.items()} == {"mine": 3, "two": 3}
    generated = next(text for command, text in printed.items() if "generate" in command)
    assert generated.startswith("Once upon a time")
    filled = next(text for command, text in printed.items() if "runs/bert" in command and "--json" in command)
    assert len(json.loads(filled)["masks"][0]) == 10
    assert (clone / "runs/mine/inspect/inspect.html").is_file()
    assert (clone / "mine-hf/model.safetensors").is_file()
    assert (clone / "runs/again/run.toml").is_file()
    checked = next(text for command, text in printed.items() if "check" in command and "--json" in command)
    assert json.loads(checked)["steps"] == 100


def test_a_command_that_fails_is_noticed(tmp_path: Path) -> None:
    """The control."""
    with pytest.raises(AssertionError, match="no such file"):
        run(f"{Path(sys.executable).with_name('bigtfm')} check --deepspeed_config nope.json", tmp_path)
