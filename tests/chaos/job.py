"""The training that is killed: a tiny GPT on two ranks with dropout, evaluations and saves, in layouts."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import rank_runner
from chaos import marks
from conftest import ROOT, TINY

from bigtfm.data.prepare import prepare

RANKS = 2
STEPS, SAVE_EVERY, EVALUATE_EVERY = 100, 7, 10


@dataclass(frozen=True)
class Layout:
    """How a run is split; each is compared with an uninterrupted run of its own."""

    stage: int
    precision: str = "fp32"
    workers: int = 0  # processes of a rank that read the data
    schedule: bool = True  # of the lr, over STEPS

    @property
    def name(self) -> str:
        return f"zero{self.stage}-{self.precision}" + (f"-workers{self.workers}" if self.workers else "")


LAYOUTS = (Layout(2, workers=1), Layout(3), Layout(0, "bf16"))


def make_data(folder: Path) -> Path:
    """A prepared data set of some 60,000 tokens of the embedded corpus, in folder/tokens."""
    tokens = folder / "tokens"
    if not tokens.exists():
        folder.mkdir(parents=True, exist_ok=True)
        corpus = ROOT / "bigtfm/data/corpus/state_of_the_union.jsonl"
        speeches = [json.loads(line)["text"] for line in corpus.read_text(encoding="utf-8").splitlines()]
        text = folder / "speeches.txt"
        text.write_text("\n\n".join(speeches)[:160_000], encoding="utf-8")
        prepare([str(text)], tokens, vocab_size=512, validation_fraction=0.1, workers=1, progress=False)
    return tokens


def deepspeed_json(folder: Path, layout: Layout) -> Path:
    content: dict[str, Any] = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "weight_decay": 0.1}},
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": layout.stage},
    }
    if layout.schedule:
        params = {"warmup_num_steps": 20, "total_num_steps": STEPS}
        content["scheduler"] = {"type": "WarmupCosineLR", "params": params}
    if layout.precision == "bf16":
        content["bf16"] = {"enabled": True}
    path = folder / f"{layout.name}.json"
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return path


def arguments(folder: Path, data: Path, layout: Layout, name: str, *overrides: str) -> list[str]:
    """Of `bigtfm train`, for a run folder/runs/NAME."""
    return [
        "train", "--deepspeed_config", str(deepspeed_json(folder, layout)), *TINY, f"data.path={data}",
        f"data.workers={layout.workers}", "model.dropout=0.1", f"run.dir={folder / 'runs'}",
        f"run.name={name}", f"eval.every={EVALUATE_EVERY}", "eval.tokens=256", f"save.every={SAVE_EVERY}",
        "save.keep=3", *overrides,
    ]  # fmt: skip


def start(args: Sequence[str], folder: Path, environ: Mapping[str, str] | None = None) -> list[BaseProcess]:
    """The ranks, each a process of its own; output and marks go to `folder`."""
    for rank in range(RANKS):
        (folder / f"marks-{rank}.txt").write_bytes(b"")
    return rank_runner.start(args, folder, RANKS, environ, program=marks.marked)


def launch(
    args: Sequence[str], folder: Path, script: Path = ROOT / "launch/train.py"
) -> subprocess.Popen[bytes]:
    """The same through the `deepspeed` launcher, in a session of its own; output goes to launcher.out."""
    program = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(RANKS)]
    program += ["--master_port", str(rank_runner.free_port()), str(script)]
    args = args[args[0] == "train" :]  # launch/train.py is that command
    environ = os.environ | {
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        "OMP_NUM_THREADS": "1",
    }
    environ["PATH"] = f"{Path(sys.executable).parent}:{environ['PATH']}"
    with (folder / "launcher.out").open("wb") as output:
        return subprocess.Popen(
            [*program, *args], cwd=folder, env=environ, stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def servers() -> set[int]:
    """Processes below this one that are no part of any job: the fork server and what it comes with."""
    from multiprocessing import forkserver, resource_tracker

    pids = (forkserver._forkserver._forkserver_pid, resource_tracker._resource_tracker._pid)
    return {pid for pid in pids if pid is not None}


def warm_up() -> None:
    """Starts the fork server: what it imports is not to count as any job's time."""
    process = multiprocessing.get_context("forkserver").Process(target=int)
    process.start()
    process.join()
