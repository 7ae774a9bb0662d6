"""A user's folder on a test cluster: the project's scripts, a small job, what to look at while it runs."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conftest import ROOT, TINY
from slurm.cluster import Cluster, children

EVENTS = int(os.environ.get("SLURM_EVENTS", "5"))  # restarts of the long story; 30 in a long campaign
EVERY = 20  # steps between saves
STEPS = 60 + 40 * EVENTS


@dataclass(frozen=True)
class Site:
    slurm: Cluster
    folder: Path  # where jobs are submitted
    data: Path

    @classmethod
    def lay_out(cls, slurm: Cluster, folder: Path, data: Path) -> Site:
        for name in ("slurm", "launch", "benchmarks", ".venv"):
            (folder / name).symlink_to((ROOT / name).resolve())
        site = cls(slurm, folder, data)
        (folder / "run.toml").write_text("")
        recipe = {
            "train_batch_size": 8,
            "train_micro_batch_size_per_gpu": 1,
            "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "weight_decay": 0.1, "torch_adam": True}},
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": 1},
        }
        (folder / "ds.json").write_text(json.dumps(recipe))
        return site

    def overrides(self, *more: str) -> tuple[str, ...]:
        given = (
            *TINY,
            f"data.path={self.data}",
            f"run.steps={STEPS}",
            f"save.every={EVERY}",
            "track.every=50",
            *more,
        )
        return tuple({word.partition("=")[0]: word for word in given}.values())  # the later one counts

    def environ(self, *overrides: str, **knobs: str) -> dict[str, str]:
        return {
            "CONFIG": "run.toml",
            "DEEPSPEED_CONFIG": "ds.json",
            "OVERRIDES": " ".join(self.overrides(*overrides)),
            "PYTHONPATH": str(ROOT),
            "SETUP": f"PATH={Path(sys.executable).parent}:$PATH",
        } | knobs

    def train(
        self, name: str, *options: str, script: str = "slurm/train.sbatch", nodes: int = 2,
        overrides: tuple[str, ...] = (), **knobs: str,
    ) -> str:  # fmt: skip
        """Submits one of the shipped scripts on nodes of two ranks each; the job's number."""
        tasks = "1" if "torchrun" in script else "2"
        asked = [f"--job-name={name}", f"--nodes={nodes}", "--gpus-per-node=2", f"--ntasks-per-node={tasks}"]
        asked += ["--cpus-per-task=1", "--time=10", *options, script]
        return self.slurm.sbatch(*asked, cwd=self.folder, environ=self.environ(*overrides, **knobs))

    def run_dir(self, name: str) -> Path:
        return self.folder / "runs" / name

    def rows(self, name: str) -> list[dict[str, Any]]:
        path = self.run_dir(name) / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def wait_for_step(self, name: str, step: int, seconds: float = 240) -> int:
        """Until the run has come to `step`; where it is then."""

        def there() -> bool:
            rows = self.rows(name)
            return bool(rows) and rows[-1]["step"] >= step

        wait_until(there, seconds, lambda: self.story(name))
        return int(self.rows(name)[-1]["step"])

    def status(self, name: str) -> dict[str, Any]:
        bigtfm = str(ROOT / ".venv" / "bin" / "bigtfm")
        environ = {"PYTHONPATH": str(ROOT)}
        return json.loads(
            self.slurm.run(bigtfm, "status", f"runs/{name}", "--json", cwd=self.folder, environ=environ)
        )

    def events(self, name: str) -> list[dict[str, Any]]:
        path = self.run_dir(name) / "events.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def story(self, name: str) -> str:
        """All that a job has said, for the message of a test that fails."""
        paths = [*self.folder.glob(f"slurm-{name}-*.log"), *self.run_dir(name).glob("logs/*.log")]
        parts = [f"--- {path.name}\n{path.read_text(errors='replace')[-1500:]}" for path in paths]
        return "\n".join([*parts, *map(str, self.events(name)), self.slurm.log(lines=15)])


def wait_until(there: Callable[[], bool], seconds: float, story: Callable[[], str] = str) -> None:
    deadline = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s:\n{story()}"
        time.sleep(0.05)


def trainers(slurm: Cluster, node: str) -> list[int]:
    """The training processes of a node: those whose parent is one, too (a supervisor)."""
    found, below = [], [(slurm.nodes[node].first, False)]
    while below:
        pid, supervised = below.pop()
        for child in children(pid):
            trains = b"bigtfm\0train" in (Path("/proc") / str(child) / "cmdline").read_bytes()
            if trains and supervised:
                found.append(child)
            below.append((child, trains))
    return found
