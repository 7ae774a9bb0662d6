"""NaN and infinity in loss, gradient or weight of one rank of two: no run trains on them, none exits 0."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import many_runs
import not_finite
import pytest
import rank_runner
from many_runs import events_of, job, rows_of, shards_of
from plain_torch import relative
from rank_runner import outcomes_of

from bigtfm.engine import checkpoint

pytestmark = [pytest.mark.launcher, pytest.mark.slow]
STEPS, BAD = 4, not_finite.STEP
PRECISIONS: dict[str, dict[str, Any]] = {"fp32": {}, "bf16": {"bf16": {"enabled": True}}}
HALVES = {"gradient_accumulation_steps": 2}
SCHEDULE = {"type": "WarmupCosineLR", "params": {"warmup_num_steps": 2, "total_num_steps": 8}}
MUON = {"optimizer": {"type": "Muon", "params": {"lr": 1e-2}}, "gradient_clipping": 0}
SETTINGS: dict[str, tuple[int, dict[str, Any]]] = {  # ZeRO stage, changes of the DeepSpeed JSON
    f"{precision}-{stage}": (stage, PRECISIONS[precision]) for precision in PRECISIONS for stage in range(4)
}
ELSEWHERE: dict[str, tuple[int, dict[str, Any]]] = {
    "offload-2": (2, {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}),
    "offload-3": (3, {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}),
    "bf16optimizer-1": (1, PRECISIONS["bf16"] | {"data_types": {"grad_accum_dtype": "fp32"}}),
    "muon-0": (0, MUON),
    "muon-3": (3, MUON | {"zero_optimization": {"stage": 3, "reduce_scatter": False}}),
    **{f"halves-{stage}": (stage, HALVES) for stage in (0, 2)},
}


def cells() -> Iterator[str]:
    """PLACE-VALUE-WHEN-TURN-SETTING of every run."""
    for setting in SETTINGS:
        yield f"none-nan-once-0-{setting}"
        yield f"weight-nan-once-0-{setting}"
        for place in ("loss", "gradient"):
            yield from (f"{place}-nan-{when}-0-{setting}" for when in ("once", "always"))
            if setting.startswith("fp32"):
                yield f"{place}-inf-once-0-{setting}"
    yield from (f"gradient-nan-once-0-{setting}" for setting in ELSEWHERE)
    yield from ("weight-inf-once-0-bf16-1", "gradient-inf-always-0-bf16-3")
    yield "loss-inf-transient-0-fp32-2"


CELLS = list(cells())
ALONE, CONTROL = "reduced-nan-once-0-fp32-0", "gradient-nan-once-0-control-0"
ONCE = [cell for cell in CELLS if cell.split("-")[2] == "once" and cell.split("-")[0] in ("loss", "gradient")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """All of them, trained in the same two processes."""
    folder = tmp_path_factory.mktemp("not-finite")
    common = (f"steps={STEPS}", "guard.bad_steps=1", "save.every=1", "eval.tokens=64")

    def made(cell: str) -> list[str]:
        setting = "-".join(cell.split("-")[4:])
        stage, changes = (SETTINGS | ELSEWHERE | {"control-0": (0, {})})[setting]
        return job(folder, tiny_data, cell, *common, stage=stage, scheduler=SCHEDULE, **changes)

    finished = rank_runner.train_all(
        [made(c) for c in (*CELLS, ALONE, CONTROL)], folder / "ranks", 2, not_finite.train_jobs
    )
    assert finished.codes == [0, 0], finished.output[-3000:]
    return folder


def require_finite_checkpoint(run_dir: Path) -> int:
    """The step of the newest, of which every weight and moment has been looked at."""
    from safetensors.torch import load_file

    newest = checkpoint.newest(run_dir / "checkpoints")
    assert newest is not None
    for shard in newest.glob("*.safetensors"):
        assert all(bool(tensor.isfinite().all()) for tensor in load_file(shard).values()), shard
    return int(newest.name.removeprefix("step-"))


@pytest.mark.parametrize("cell", CELLS)
def test_no_run_trains_on_it_or_exits_0(cell: str, runs: Path) -> None:
    place, value, when, *_ = cell.split("-")
    first, second = outcomes_of(runs / cell)
    assert (first["code"], first["line"]) == (second["code"], second["line"])
    assert first["code"] == (0 if place == "none" else 70), first["line"]
    saved = require_finite_checkpoint(runs / cell)
    if place == "weight":
        assert saved == BAD - 1
        assert f"error: step {BAD}: weight " in first["line"]
        assert " of rank 1 is not finite" in first["line"]
    elif when == "always":
        assert saved == BAD - 1
        said = f"error: step {BAD + 1}: " + (f"the loss is {value}" if place == "loss" else "the gradient is")
        assert first["line"].startswith(said)
        assert "(as 1 before it)" in first["line"]
    else:
        assert saved == STEPS


@pytest.mark.parametrize("cell", ONCE)
def test_a_step_is_left_out_on_all_ranks_and_touches_nothing(cell: str, runs: Path) -> None:
    """Every bit of weights, moments and update counts is what it was, also after the step was run again."""
    place, value, _, _, *setting = cell.split("-")
    run_dir = runs / cell
    for outcome in outcomes_of(run_dir):
        assert outcome["untouched"] == [True]
        assert outcome["line"] == (
            f"error: {run_dir}: finished and saved, but step {BAD} was left out: loss or gradient not "
            "finite. Fix: events.jsonl there tells rank, layer and samples; the checkpoint is good to use"
        )
    rows = rows_of(run_dir)
    assert [row.get("skipped", False) for row in rows] == [step == BAD for step in range(1, STEPS + 1)]
    assert (str(rows[BAD - 1]["loss"]).lower() in ("nan", "infinity")) == (place == "loss")
    lr = [row["lr"] for row in rows]
    assert lr[BAD - 1] == lr[BAD], "the schedule counts updates"
    [event] = events_of(run_dir, "step left out")
    what = "loss" if place == "loss" else f"gradient of decoder.{not_finite.PARAMETER}"
    assert (event["step"], event["rank"]) == (BAD, 1)
    assert (event["what"], event["value"]) == (what, value)
    if setting[0] not in PRECISIONS:
        return
    clean = rows_of(runs / f"none-nan-once-0-{'-'.join(setting)}")
    assert rows[0]["loss"] == clean[0]["loss"]
    assert [row["sample_digest"] for row in rows] == [row["sample_digest"] for row in clean]
    assert not math.isclose(rows[-1]["loss"], clean[-1]["loss"], rel_tol=1e-5), "an update is missing"


@pytest.mark.parametrize("place", ["loss", "gradient"])
def test_what_is_left_of_it_is_the_same_at_all_stages(place: str, runs: Path) -> None:
    for precision, tolerance in (("fp32", 1e-6), ("bf16", 2e-3)):
        curves = [
            [row["loss"] for row in rows_of(runs / f"{place}-{value}-once-0-{precision}-{stage}")[BAD:]]
            for value in (("nan", "inf") if precision == "fp32" else ("nan",))
            for stage in range(4)
        ]
        assert all(relative(curve, curves[0]) < tolerance for curve in curves)


def test_the_samples_named_are_those_of_the_micro_batch(runs: Path) -> None:
    """Of samples 8 to 15 rank 1 has 12 to 15 in one micro-batch, or 10, 11 in the first of two."""
    [whole], [half] = (
        events_of(runs / f"gradient-nan-once-0-{name}", "step left out") for name in ("fp32-0", "halves-0")
    )
    assert len(set(whole["samples"])) == 4
    assert len(set(half["samples"])) == 2
    assert not set(half["samples"]) & set(whole["samples"])


def test_a_fault_that_is_gone_when_run_again_is_told_apart(runs: Path) -> None:
    run_dir = runs / "loss-inf-transient-0-fp32-2"
    [event] = events_of(run_dir, "step left out")
    assert (event["what"], event["rank"]) == ("finite when run again", 1)
    assert outcomes_of(run_dir)[0]["untouched"] == [True]


def test_ranks_that_disagree_whether_a_step_is_finite_end(runs: Path) -> None:
    """One has updated its weights and the other has not: running the step again would mean nothing."""
    for outcome in outcomes_of(runs / ALONE):
        assert outcome["code"] == 70
        assert outcome["line"] == (
            f"error: step {BAD}: the gradients, which are all ranks' sum, are not finite on rank 1 alone: "
            "memory or a device failed. Fix: start the same command again: it resumes from the last "
            "checkpoint; if it happens again, take that machine out"
        )
    assert require_finite_checkpoint(runs / ALONE) == BAD - 1


def test_without_our_look_fp32_at_stage_0_trains_on_it(runs: Path) -> None:
    """The control."""
    assert outcomes_of(runs / CONTROL)[0]["untouched"] == []
    assert not any(row.get("skipped") for row in rows_of(runs / CONTROL)[:BAD])
    assert "step 2: after the update the loss of the probe is nan" in outcomes_of(runs / CONTROL)[0]["line"]


def test_a_finished_run_started_again_says_the_same(runs: Path, tiny_data: Path, tmp_path: Path) -> None:
    """And one that ended goes on from its last checkpoint, with what is struck no more."""
    again, ended = "loss-nan-once-0-fp32-1", "gradient-inf-always-0-bf16-3"
    before = shards_of(runs / again, STEPS), outcomes_of(runs / again)[0]
    common = (f"steps={STEPS}", "guard.bad_steps=1", "save.every=1", "eval.tokens=64")
    job_again = job(runs, tiny_data, again, *common, stage=1, scheduler=SCHEDULE)
    job_ended = job(runs, tiny_data, ended, *common, stage=3, scheduler=SCHEDULE, **PRECISIONS["bf16"])
    finished = rank_runner.train_all([job_again], tmp_path / "again", 2, not_finite.train_jobs)
    assert finished.codes == [0, 0], finished.output[-3000:]
    assert (shards_of(runs / again, STEPS), outcomes_of(runs / again)[0]) == (
        before[0],
        before[1] | {"untouched": []},
    )
    many_runs.train_all([job_ended], tmp_path, 2)
    rows, clean = rows_of(runs / ended), rows_of(runs / "none-nan-once-0-bf16-3")
    assert [row["loss"] for row in rows] == [row["loss"] for row in clean]
