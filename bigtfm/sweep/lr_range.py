"""The range test of learning rates (Smith 2017): one run whose lr grows until the loss is lost."""

from __future__ import annotations

import copy
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bigtfm.config.deepspeed import load_deepspeed_json
from bigtfm.config.problems import ConfigProblem, NumericsProblem, Problem
from bigtfm.config.run import load_run_config, to_toml
from bigtfm.console import progress_bar
from bigtfm.job import check_job
from bigtfm.mlflow_sender import read_json, write_json
from bigtfm.resilience.outcome import FAILURE
from bigtfm.sweep.ranks import Ranks, places
from bigtfm.tracking import read_metrics, smoothed
from bigtfm.whole_files import whole_file, write_whole

RESULT, PICTURE = "lr-range.json", "lr-range.png"
BELOW_EDGE = 3.0  # the suggested lr is this factor below the one from which on the loss first rose
_RISE = 0.1  # of what the loss has fallen: a rise that is none of the noise
_FALLEN, _FAR_ABOVE = 0.98, 1.5  # shares of the first loss
_POLL = 0.2  # seconds
_OWN = ("eval.every=0", "eval.tokens=1", "save.every=0", "track.mlflow=false", "guard.spike=0",
        "guard.replicas_every=0")  # fmt: skip


@dataclass(frozen=True)
class Range:
    """What the test found."""

    out: str
    suggested: float
    edge: float  # lr from which on the smoothed loss first rose
    steepest: float  # lr at which it fell fastest
    lost: float | None  # lr at which it was back where it began; None: it never was
    steps: int

    @property
    def record(self) -> dict[str, Any]:
        """For a machine."""
        return asdict(self)

    @property
    def words(self) -> str:
        """For a reader."""
        end = f"lost from {self.lost:.2g} on" if self.lost else "not lost up to the largest lr"
        return (
            f"suggested lr {self.suggested:.2g}: a third of {self.edge:.2g}, from which on the smoothed loss "
            f"first rose (it fell fastest at {self.steepest:.2g}, and was {end}; {self.steps} steps)\n"
            f"picture: {Path(self.out) / PICTURE}"
        )


def lr_range(
    config: Path | None,
    deepspeed: Path,
    overrides: Sequence[str],
    out: Path,
    *,
    steps: int,
    lrs: tuple[float, float],
    ranks: int = 1,
) -> Range:
    """Trains, watches the loss, and reads off the lr; what is in `out` of the same test is not trained again.

    Raises:
        ConfigProblem: the files or the range are wrong, or `out` holds another run.
        Problem: the run failed before the loss could be lost.
        NumericsProblem: the loss never fell.
    """
    if not 0 < lrs[0] < lrs[1] < math.inf:
        fix = "pass 0 < --min-lr < --max-lr"
        raise ConfigProblem(f"--min-lr {lrs[0]} and --max-lr {lrs[1]}", where="command line", fix=fix)
    files = _write(config, deepspeed, overrides, out, steps, lrs)
    check_job(*files, (), ranks)
    if not (out / RESULT).exists():
        (gpus, threads), *_ = places(1, ranks)
        started = Ranks(*files, ranks, out / "logs", gpus, threads)
        try:
            with progress_bar("training") as told:
                _watch(started, out, lambda taken: told(taken, steps))
        finally:
            started.kill()
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
    found = read_off(_losses(out), out)
    write_json(out / RESULT, found.record)
    _draw(_losses(out), found)
    return found


def _write(
    config: Path | None,
    deepspeed: Path,
    overrides: Sequence[str],
    out: Path,
    steps: int,
    lrs: tuple[float, float],
) -> tuple[Path, Path]:
    """Both files of the run, with a schedule that grows."""
    values = copy.deepcopy(load_deepspeed_json(deepspeed).values)
    params = values["optimizer"]["params"]
    values["optimizer"]["params"] = {k: v for k, v in params.items() if k not in ("muon_lr", "adam_lr")} | {
        "lr": lrs[0]
    }
    values["scheduler"] = {"type": "ExponentialRange", "params": {"max_lr": lrs[1], "total_num_steps": steps}}
    name = f"run.name={out.resolve().name}"
    run = load_run_config(config, [*overrides, f"run.dir={out.parent}", name, f"run.steps={steps}", *_OWN])
    texts = {
        out / "run.toml": to_toml(run, "# A range test of learning rates"),
        out / "deepspeed.json": json.dumps(values, indent=2) + "\n",
    }
    out.mkdir(parents=True, exist_ok=True)
    for path, text in texts.items():
        if path.exists() and path.read_text(encoding="utf-8") != text:
            fix = "pass another --out, or remove the folder"
            raise ConfigProblem("the folder holds another run", where=str(out), fix=fix)
        write_whole(path, text)
    config, deepspeed = texts
    return config, deepspeed


def _watch(ranks: Ranks, out: Path, tell: Callable[[int], None]) -> None:
    """Until the range is run through or the loss is lost. tell: hears how many steps were taken.

    Raises:
        Problem: it ended otherwise; its exit code is the run's.
    """
    while (code := ranks.poll()) is None:
        time.sleep(_POLL)
        losses = _losses(out)
        tell(len(losses))
        if lost_at(smoothed([loss for _, loss in losses])) is not None:
            ranks.kill()  # nothing of it is kept
            return
    if code not in (0, NumericsProblem.exit_code):
        failure = read_json(out / FAILURE)
        problem = Problem(
            str(failure.get("what", f"the run ended with exit code {code}")),
            where=str(failure.get("where", out)),
            fix=str(failure.get("fix", f"see {out / 'logs'}")),
        )
        problem.exit_code = code  # type: ignore[misc]
        raise problem


def _losses(out: Path) -> list[tuple[float, float]]:
    """(lr, loss) of the steps, up to the first loss that is not finite."""
    found = []
    for row in read_metrics(out / "metrics.jsonl"):
        if not math.isfinite(row["loss"]):
            break
        found.append((row["lr"], row["loss"]))
    return found


def lost_at(means: Sequence[float]) -> int | None:
    """The first place at which a loss that had fallen is back where it began, or is far above; None: none."""
    lowest = math.inf
    for place, mean in enumerate(means):
        lowest = min(lowest, mean)
        if mean > _FAR_ABOVE * means[0] or (mean > means[0] and lowest < _FALLEN * means[0]):
            return place
    return None


def read_off(points: Sequence[tuple[float, float]], out: Path) -> Range:
    """The lr to try: a third of the one from which on the smoothed loss first rose.

    Raises:
        NumericsProblem: the loss never fell.
    """
    means = smoothed([loss for _, loss in points])
    lost = lost_at(means)
    end = len(means) if lost is None else lost + 1
    edge = _edge(means[:end])
    if edge < 2:
        raise NumericsProblem(
            f"the loss never fell in {len(means)} steps", where=str(out), fix="begin at a smaller --min-lr"
        )
    falls = [means[place] - means[place - 1] for place in range(1, edge + 1)]
    steepest = min(range(len(falls)), key=lambda place: falls[place]) + 1
    at = points[edge][0]
    return Range(
        str(out), float(f"{at / BELOW_EDGE:.3g}"), at, points[steepest][0],
        None if lost is None else points[lost][0], len(points),
    )  # fmt: skip


def _edge(means: Sequence[float]) -> int:
    """Where the loss was lowest before it first rose noticeably. It may fall again after that."""
    lowest = 0
    for place, mean in enumerate(means):
        if mean < means[lowest]:
            lowest = place
        elif means[lowest] < _FALLEN * means[0] and mean - means[lowest] > _RISE * (means[0] - means[lowest]):
            break
    return lowest


def _draw(points: Sequence[tuple[float, float]], found: Range) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    lrs, losses = zip(*points, strict=True)
    axes.plot(lrs, losses, color="#a9c4e4", linewidth=0.8, label="loss")
    axes.plot(lrs, smoothed(losses), color="#1f5fa8", linewidth=1.8, label="smoothed")
    for name, colour in (("suggested", "#e08e2b"), ("edge", "#777777"), ("lost", "#b03a2e")):
        lr = getattr(found, name)
        if lr is not None and lrs[0] <= lr:
            axes.axvline(lr, color=colour, linestyle=(0, (4, 3)), linewidth=1.2, label=f"{name} {lr:.2g}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss (nats / token)")
    axes.set_ylim(top=max(losses[0] * 1.2, max(smoothed(losses)) * 1.05))
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8)
    with whole_file(Path(found.out) / PICTURE) as building:
        figure.savefig(building, format="png", dpi=110)
