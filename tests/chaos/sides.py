"""The two that meet the same faults: `bigtfm train`, and a loop by DeepSpeed alone (raw.py)."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import rank_runner
from chaos import job, processes
from chaos.job import RANKS, Layout
from conftest import ROOT

SABOTAGE = "CHAOS_SABOTAGE"  # environment: what `program` breaks on a rank, a name of SABOTAGES
RAW = Path(__file__).with_name("raw.py")
BAD_STEP = 5  # steps done when the gradient becomes NaN


@dataclass(frozen=True)
class Options:
    """Of a training; a run config's overrides are bigtfm's alone."""

    steps: int
    save_every: int = 5
    stage: int = 2
    bf16: bool = False
    overrides: tuple[str, ...] = ()
    mlflow: str = ""  # its URI


@dataclass
class Ended:
    """How a job ended. codes: of the ranks or the launcher; seconds: from the fault, or from the start."""

    codes: list[int | None]  # None: it had to be killed
    output: str
    seconds: float
    left: list[str] = field(default_factory=list)  # processes that had to be killed

    @property
    def lines(self) -> list[str]:
        """What bigtfm says of an end."""
        return [line for line in self.output.splitlines() if line.startswith("bigtfm: error: ")]


@dataclass(frozen=True)
class Side:
    """name: bigtfm or raw. All of a run lies in `folder`."""

    name: str
    folder: Path

    def args(self, options: Options) -> list[str]:
        """Of the program."""
        if self.name == "raw":
            flags = [str(self.folder), str(options.steps), "--save-every", str(options.save_every)]
            flags += ["--stage", str(options.stage), *(["--bf16"] if options.bf16 else [])]
            return [*flags, *(["--mlflow", options.mlflow] if options.mlflow else [])]
        layout = Layout(options.stage, "bf16" if options.bf16 else "fp32", schedule=False)
        tracked = (f"track.uri={options.mlflow}", "track.mlflow=true") if options.mlflow else ()
        data = job.make_data(
            next(folder for folder in self.folder.parents if folder.name == "faults") / "data"
        )
        return job.arguments(
            self.folder, data, layout, "run", f"steps={options.steps}", f"save.every={options.save_every}",
            "eval.every=0", *tracked, *options.overrides,
        )  # fmt: skip

    @property
    def run_dir(self) -> Path:
        return self.folder if self.name == "raw" else self.folder / "runs/run"

    @property
    def saved(self) -> Path:
        """Where its checkpoints are."""
        return self.run_dir / ("saved" if self.name == "raw" else "checkpoints")

    def newest(self) -> int:
        """The step of the last checkpoint, 0: none. Raw DeepSpeed's is what its file `latest` says."""
        if self.name == "raw":
            found = re.search(r"global_step(\d+)", _text(self.saved / "latest"))
            return int(found[1]) if found else 0
        return max((int(path.name[5:]) for path in self.saved.glob("step-*")), default=0)

    def losses(self) -> dict[int, str]:
        """The bits of each step's loss; of a step that was taken twice, the last."""
        name = "losses.jsonl" if self.name == "raw" else "metrics.jsonl"
        lines = _text(self.run_dir / name).splitlines(keepends=True)
        rows = [json.loads(line) for line in lines if line.endswith("\n") and line.startswith("{")]
        return {row["step"]: float(row["loss"]).hex() for row in rows}

    def start(self, options: Options, sabotage: str = "") -> list[BaseProcess]:
        """The ranks, each a process of its own."""
        self.folder.mkdir(parents=True, exist_ok=True)
        environ = {SABOTAGE: sabotage} if sabotage else {}
        return rank_runner.start(
            self.args(options), self.folder, RANKS, environ, program=_raw if self.name == "raw" else _bigtfm
        )

    def run(self, options: Options, sabotage: str = "", seconds: float = 90) -> Ended:
        """To its end."""
        return self.finish(self.start(options, sabotage), seconds)

    def finish(self, ranks: Sequence[BaseProcess], seconds: float) -> Ended:
        """Waits for the ranks and all that they have started; ends what is there after so many seconds."""
        began = time.monotonic()
        left = processes.wait_until_gone(job.servers(), seconds)
        ended = Ended(
            [], "", time.monotonic() - began, [process.command or str(process.pid) for process in left]
        )
        late = {process.pid for process in left}
        end_all()
        for rank in ranks:
            rank.join()
        ended.codes = [None if rank.pid in late else rank.exitcode for rank in ranks]
        ended.output = "".join(_text(self.folder / f"rank-{rank}.out") for rank in range(len(ranks)))
        return ended

    def launch(self, options: Options) -> subprocess.Popen[bytes]:
        """Through the `deepspeed` launcher."""
        self.folder.mkdir(parents=True, exist_ok=True)
        script = RAW if self.name == "raw" else ROOT / "launch/train.py"
        return job.launch(self.args(options), self.folder, script)

    def reached(self) -> int:
        return max(self.losses(), default=0)

    def wait_for_rows(self, number: int, saved: int, ranks: Sequence[Any], seconds: float = 150) -> bool:
        """Whether a start logged so many steps (bigtfm: beyond the `saved` one); False as wait_for_step."""
        rows = self.run_dir / "metrics.jsonl"
        inode = rows.stat().st_ino if rows.exists() else 0  # a resume puts a shorter file in its place
        before = _text(self.run_dir / "losses.jsonl").count("\n")
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and all(_alive(rank) for rank in ranks):
            now = _text(self.run_dir / "losses.jsonl").count("\n")
            anew = rows.exists() and rows.stat().st_ino != inode
            if (now - before if self.name == "raw" else anew and self.reached() - saved) >= number:
                return True
            time.sleep(0.005)
        return False

    def wait_for_step(self, step: int, ranks: Sequence[Any], seconds: float = 150) -> bool:
        """Whether it came that far; False as soon as a rank (or the launcher) has ended."""
        deadline = time.monotonic() + seconds
        while self.reached() < step:
            if time.monotonic() > deadline or not all(_alive(rank) for rank in ranks):
                return False
            time.sleep(0.01)
        return True


def end_all() -> None:
    """Kills whatever a job has left."""
    servers = job.servers()
    while left := processes.living(servers):
        processes.kill([process.pid for process in left])
        processes.wait_until_gone(servers, 1.0)


def _alive(rank: Any) -> bool:
    return rank.exitcode is None if isinstance(rank, BaseProcess) else rank.poll() is None


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


# --- what the ranks run


def _bigtfm() -> None:
    multiprocessing.current_process().daemon = False
    _sabotage()
    rank_runner._bigtfm()


def _raw() -> None:
    multiprocessing.current_process().daemon = False
    _sabotage()
    sys.argv[0] = str(RAW)
    runpy.run_path(str(RAW), run_name="__main__")


def _sabotage() -> None:
    if name := os.environ.get(SABOTAGE):
        SABOTAGES[name]()


def _nan(once: bool) -> None:
    """Rank 1's gradient of one parameter is NaN: in one step, or in all from then on."""
    if os.environ["RANK"] != "1":
        return
    import torch
    from deepspeed.runtime.engine import DeepSpeedEngine

    backward = DeepSpeedEngine.backward
    hooked: list[DeepSpeedEngine] = []

    def spoil(engine: DeepSpeedEngine, gradient: torch.Tensor) -> torch.Tensor:
        step = engine.global_steps
        bad = step == BAD_STEP if once else step >= BAD_STEP
        return gradient * float("nan") if bad else gradient

    def spoiling(engine: DeepSpeedEngine, *args: Any, **kwargs: Any) -> Any:
        if engine not in hooked:
            hooked.append(engine)
            parameter = list(engine.module.parameters())[-1]
            parameter.register_hook(lambda gradient: spoil(engine, gradient))
        return backward(engine, *args, **kwargs)

    DeepSpeedEngine.backward = spoiling


def _small_files() -> None:
    """No file of this process may be longer than 40,000 bytes, as on a disk that is full."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))


SABOTAGES: Mapping[str, Callable[[], None]] = {
    "nan-once": lambda: _nan(once=True),
    "nan-always": lambda: _nan(once=False),
    "small-files": _small_files,
}
