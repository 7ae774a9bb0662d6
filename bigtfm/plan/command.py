"""`bigtfm plan`: prints a plan or what a search finds, writes and draws what is asked for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from bigtfm.config.deepspeed import DeepSpeedConfig, load_deepspeed_json
from bigtfm.config.problems import ConfigProblem
from bigtfm.config.run import load_run_config
from bigtfm.plan.job import plan
from bigtfm.plan.view import BEST, advice, draw, render, render_candidates
from bigtfm.planner.search import Candidate, deepspeed_values
from bigtfm.whole_files import whole_file


def show(
    config: Path | None,
    deepspeed_json: Path,
    overrides: Sequence[str],
    *,
    gpus: int,
    gpu: str,
    gpus_per_node: int,
    search: bool = False,
    write: Path | None = None,
    confirm: int = 0,
    calibration: Path | None = None,
    calibrate: Path | None = None,
    picture: Path | None = None,
    as_json: bool = False,
) -> bool:
    """The command: prints the plan, or what a search finds, and says whether it fits.

    Raises:
        ConfigProblem: as `plan`; or options don't go together.
    """
    from rich.console import Console

    _options_fit(search, write, confirm, calibration, calibrate, picture)
    console = Console(stderr=as_json, markup=False)
    on_rates = partial(
        plan, config, deepspeed_json, overrides, gpus=gpus, gpu=gpu, gpus_per_node=gpus_per_node
    )
    stated, deepspeed = on_rates(calibration=calibration)
    if calibrate is not None or confirm:
        from bigtfm.bench.calibrate import calibrate as measure
        from bigtfm.bench.calibrate import require_here

        ranks = min(gpus, gpus_per_node) if calibrate is not None else gpus
        require_here(stated.target.device, gpu, ranks)
        if calibrate is not None:
            measure(calibrate, ranks, deepspeed.precision, console.print)
            stated, deepspeed = on_rates(calibration=calibrate)
    if picture is not None:
        draw(stated, picture)
    said, fits = stated.to_dict(), stated.fits
    if not as_json:
        console.print(render(stated))
    if not fits and not search:
        said["advice"] = advice(stated.candidates()[0])
        if not as_json:
            console.print(f"advice: {said['advice']}")
    if search:
        candidates = stated.candidates()
        fits = candidates[0].fits
        if confirm and fits:
            from bigtfm.bench.confirm import confirmed

            data = load_run_config(config, overrides).data.paths[0]
            candidates = confirmed(candidates, confirm, config, deepspeed_json, overrides, data)
        if not as_json:
            console.print(render_candidates(candidates, stated))
        said["found"] = [_found(candidate) for candidate in candidates[:BEST] if candidate.fits]
        if write is not None and fits:
            write_json(deepspeed, candidates[0], write)
            recompute = candidates[0].setting.recompute
            console.print(f"wrote {write}; train with it and compute.recompute={recompute}", highlight=False)
    if as_json:
        print(json.dumps(said))
    return fits


def _options_fit(
    search: bool, write: Path | None, confirm: int, calibration: Path | None, calibrate: Path | None,
    picture: Path | None,
) -> None:  # fmt: skip
    """Before anything is measured or found."""
    if not search and (write is not None or confirm):
        option = "--write" if write is not None else "--confirm"
        raise ConfigProblem(f"{option} is for what a search finds", where="command line", fix="add --search")
    if calibration is not None and calibrate is not None:
        fix = "leave one of them out"
        raise ConfigProblem("--calibration and --calibrate both say the rates", where="command line", fix=fix)
    if picture is not None and picture.suffix != ".png":
        raise ConfigProblem("--picture is a PNG", where=str(picture), fix="name it .png")
    for path in filter(None, (write, calibrate, picture)):
        if not path.parent.is_dir() or path.is_dir():
            raise ConfigProblem(
                "can't become a file", where=str(path), fix="name one in a folder that is there"
            )
    if write is not None and write.exists():
        raise ConfigProblem("is there already", where=str(write), fix="name another file, or remove it")


def _found(candidate: Candidate) -> dict[str, Any]:
    """A candidate as JSON has it."""
    s = candidate.setting
    return {
        "label": candidate.label, "zero_stage": s.stage, "micro_batch": s.micro_batch,
        "accumulation": s.accumulation, "recompute": s.recompute, "zero_optimization": dict(s.zero),
        "step_seconds": candidate.step.seconds, "tokens_per_second": candidate.step.tokens_per_second,
        "measured": candidate.measured,
        "memory": asdict(candidate.memory),
    }  # fmt: skip


def write_json(deepspeed: DeepSpeedConfig, candidate: Candidate, path: Path) -> None:
    """The user's DeepSpeed JSON with the candidate's choices; whole, or not there."""
    with whole_file(path) as building:
        building.write_text(
            json.dumps(deepspeed_values(deepspeed.values, candidate), indent=2) + "\n", "utf-8"
        )
        load_deepspeed_json(building)
