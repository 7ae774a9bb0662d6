"""Saving beside training, what is kept, and the gate on loading: real ranks, real files, real kills."""

from __future__ import annotations

import hashlib
import json
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rank_runner
import signing
import torch
from conftest import TINY, losses
from safetensors.torch import load_file, save_file

from bigtfm.resilience import events

Json = Callable[..., Path]
pytestmark = pytest.mark.launcher


def command(data: Path, json_file: Path, *overrides: str) -> list[str]:
    return [
        "train",
        "--deepspeed_config",
        str(json_file),
        f"data.path={data}",
        "run.name=run",
        *TINY,
        *overrides,
    ]


def steps_of(run_dir: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run_dir / "checkpoints").glob("step-*"))


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)


# --- programs that ranks run: the real command on a slower or smaller disk


def slow_disk() -> None:
    """`bigtfm` with a disk that takes a second to flush a shard."""
    flush = os.fsync
    os.fsync = lambda file: (time.sleep(1.0), flush(file))[1]
    rank_runner._bigtfm()


def small_disk() -> None:
    """`bigtfm` where no file may be longer than a shard needs."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    rank_runner._bigtfm()


@pytest.mark.parametrize("asynchronous", [True, False])
def test_steps_go_on_while_a_checkpoint_is_written(
    asynchronous: bool, tmp_path: Path, tiny_data: Path, deepspeed_json: Json
) -> None:
    """While step 2's is being flushed, more steps are taken; with a synchronous save, none is."""
    options = ["steps=400", "save.every=2", f"save.asynchronous={str(asynchronous).lower()}"]
    ranks = rank_runner.start(
        command(tiny_data, deepspeed_json(stage=2), *options), tmp_path, 2, program=slow_disk
    )
    run_dir = tmp_path / "runs/run"
    building = run_dir / "checkpoints/.building-step-00000002"
    try:
        wait_for(building.exists)
        wait_for(lambda: (run_dir / "checkpoints/step-00000002").exists())
        taken = len(losses(run_dir))
        if asynchronous:  # and that it is too slow is told
            wait_for(lambda: any(row["event"] == "slow save" for row in events.read(run_dir)))
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    # Asynchronous: step 4's save waits for step 2's, so steps 3 and 4 are done by then, and no more.
    assert (3 <= taken <= 4) if asynchronous else taken == 2


def test_a_full_disk_ends_the_run_on_all_ranks_and_loses_nothing(
    tmp_path: Path, tiny_data: Path, deepspeed_json: Json
) -> None:
    args = command(tiny_data, deepspeed_json(stage=2), "save.every=2")
    assert rank_runner.run([*args, "steps=2"], tmp_path, 2).codes == [0, 0]
    ranks = rank_runner.start([*args, "steps=100", "save.retry_seconds=0"], tmp_path, 2, program=small_disk)
    finished = rank_runner.finish(ranks, tmp_path)
    assert finished.codes == [74, 74], finished.output
    assert "writing" in finished.output
    assert "File too large" in finished.output
    assert "Traceback" not in finished.output
    assert steps_of(tmp_path / "runs/run") == [2]
    assert json.loads((tmp_path / "runs/run/failure.json").read_text())["exit_code"] == 74
    again = rank_runner.run([*args, "steps=6"], tmp_path, 2)
    assert again.codes == [0, 0], again.output
    assert len(losses(tmp_path / "runs/run")) == 6


def test_kill_9_while_saving_costs_no_more_than_the_save(
    tmp_path: Path, tiny_data: Path, deepspeed_json: Json
) -> None:
    """Killed at whatever moment, six times, the run ends with the curve of one that was left alone."""
    args = command(tiny_data, deepspeed_json(stage=2), "save.every=1", "steps=60")
    whole = rank_runner.run([*args, "run.name=whole"], tmp_path, 2)
    assert whole.codes == [0, 0], whole.output
    run_dir, reached = tmp_path / "runs/run", 0
    for turn in range(6):
        ranks = rank_runner.start(args, tmp_path, 2)
        goal = min(reached + 3, 60)
        wait_for(lambda goal=goal: max(steps_of(run_dir), default=0) >= goal)
        time.sleep(0.007 * turn)
        for rank in ranks:
            rank.kill()
            rank.join()
        reached = steps_of(run_dir)[-1]
    again = rank_runner.run(args, tmp_path, 2)
    assert again.codes == [0, 0], again.output
    assert losses(run_dir) == losses(tmp_path / "runs/whole")
    assert not list((run_dir / "checkpoints").glob(".building-*"))


def test_retention(tmp_path: Path, tiny_data: Path, deepspeed_json: Json) -> None:
    options = ["steps=11", "save.every=2", "save.keep=2", "save.keep_every=4"]
    finished = rank_runner.run(command(tiny_data, deepspeed_json(), *options), tmp_path)
    assert finished.code == 0, finished.output
    assert steps_of(tmp_path / "runs/run") == [4, 8, 10, 11]


# --- the gate


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Changes the first shard's tensors and signs the checkpoint again, as no accident would."""
    shard = folder / "shard-00000.safetensors"
    tensors = load_file(shard)
    edit(tensors)
    save_file(tensors, shard)
    manifest = signing.read(folder / "manifest.json")
    manifest["files"][shard.name] = {
        "bytes": shard.stat().st_size,
        "sha256": hashlib.sha256(shard.read_bytes()).hexdigest(),
    }
    signing.write(folder / "manifest.json", manifest)


def reverse_embedding(tensors: dict[str, torch.Tensor]) -> None:
    weights = next(tensors[name] for name in sorted(tensors) if name.endswith("embed_tokens.weight|fp32"))
    weights.copy_(weights.flip(0))


@pytest.fixture
def saved(tmp_path: Path, tiny_data: Path, deepspeed_json: Json) -> Callable[..., rank_runner.Finished]:
    """Two steps at stage 2 on two ranks; called, it trains on to step 4 under other settings."""

    def train(*overrides: str, stage: int = 2, world_size: int = 2, **changes: Any) -> rank_runner.Finished:
        args = command(tiny_data, deepspeed_json(stage=stage, **changes), *overrides)
        return rank_runner.run(args, tmp_path, world_size)

    finished = train("steps=2")
    assert finished.codes == [0, 0], finished.output
    return lambda *overrides, **changes: train("steps=4", *overrides, **changes)


@pytest.mark.parametrize(("stage", "world_size"), [(2, 2), (3, 1)])
def test_changed_weights_are_found_by_the_probe_and_named(
    stage: int, world_size: int, tmp_path: Path, saved: Callable[..., rank_runner.Finished]
) -> None:
    change(tmp_path / "runs/run/checkpoints/step-00000002", reverse_embedding)
    finished = saved(stage=stage, world_size=world_size)
    assert finished.codes == [76] * world_size, finished.output
    line = finished.output.strip().splitlines()[-1]
    assert "the probe batch has loss" in line
    assert "embed_tokens.weight" in line
    assert "mlp" not in line, "only what has changed is named"
    assert "resume.allow=probe" in line
    assert "Traceback" not in finished.output
    wrote = rank_runner.run(["generate", "--run", "runs/run", "--max-new-tokens", "1"], tmp_path)
    assert wrote.code == 76
    assert "embed_tokens.weight" in wrote.output
    assert saved("resume.allow=probe", stage=stage, world_size=world_size).codes == [0] * world_size


def test_what_is_unchanged_passes_at_other_stages_ranks_and_precisions(
    tmp_path: Path, saved: Callable[..., rank_runner.Finished]
) -> None:
    for stage, world_size, changes in ((0, 1, {}), (3, 2, {"bf16": {"enabled": True}}), (1, 2, {})):
        finished = saved(stage=stage, world_size=world_size, **changes)
        assert finished.codes == [0] * world_size, finished.output


def test_another_mathematics_is_not_blamed_on_the_weights(
    tmp_path: Path, saved: Callable[..., rank_runner.Finished]
) -> None:
    state = tmp_path / "runs/run/checkpoints/step-00000002/state.json"
    content = json.loads(state.read_text())
    content["probe"]["loss"] *= 1.01
    content["probe"]["setting"]["attention"] = "flash_attn_9"
    state.write_text(json.dumps(content))
    manifest = signing.read(state.parent / "manifest.json")
    manifest["files"]["state.json"] = {
        "bytes": state.stat().st_size,
        "sha256": hashlib.sha256(state.read_bytes()).hexdigest(),
    }
    signing.write(state.parent / "manifest.json", manifest)
    finished = saved()
    assert finished.codes == [76, 76], finished.output
    assert "every tensor is as it was saved" in finished.output
    assert "attention flash_attn_9 -> " in finished.output


# --- what an attacker found


def stopped_at_once() -> None:
    """Jobs without a supervisor, with a signal that has come before the first step."""
    from bigtfm.config.problems import RequeueRequested
    from bigtfm.resilience import lifeline

    class Stopped(lifeline.StopRequest):
        @property
        def signal(self) -> int:
            return signal.SIGTERM

    lifeline.StopRequest = Stopped
    try:
        rank_runner.train_jobs()
    except RequeueRequested as problem:
        sys.exit(problem.exit_code)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_stop_before_the_first_step_can_be_gone_on_from(
    stage: int, tmp_path: Path, tiny_data: Path, deepspeed_json: Json
) -> None:
    args = command(tiny_data, deepspeed_json(stage=stage), "steps=3")
    stopped = rank_runner.train_all([args[2:]], tmp_path, 2, program=stopped_at_once)
    assert stopped.codes == [75, 75], stopped.output
    assert steps_of(tmp_path / "runs/run") == [0]
    again = rank_runner.run(args, tmp_path, 2)
    assert again.codes == [0, 0], again.output
    whole = rank_runner.run([*args, "run.name=whole"], tmp_path, 2)
    assert whole.codes == [0, 0], whole.output
    assert losses(tmp_path / "runs/run") == losses(tmp_path / "runs/whole")


def test_a_stop_right_after_a_resume_writes_nothing_again(
    tmp_path: Path, tiny_data: Path, deepspeed_json: Json
) -> None:
    args = command(tiny_data, deepspeed_json(stage=2), "save.every=2", "save.keep=1")
    assert rank_runner.run([*args, "steps=2"], tmp_path, 2).codes == [0, 0]
    folder = tmp_path / "runs/run/checkpoints/step-00000002"
    before = folder.stat().st_ino
    stopped = rank_runner.train_all([[*args[2:], "steps=4"]], tmp_path, 2, program=stopped_at_once)
    assert stopped.codes == [75, 75], stopped.output
    assert folder.stat().st_ino == before


@pytest.mark.parametrize("keep", [1, 2])
def test_a_model_that_has_become_nan_is_never_saved(
    keep: int, tmp_path: Path, tiny_data: Path, deepspeed_json: Json
) -> None:
    """The lr explodes with the update of a step whose own loss is finite: the step before it stays saved."""
    schedule = {"type": "LRRangeTest", "params": LEAP}
    args = command(tiny_data, deepspeed_json(scheduler=schedule, optimizer=ADAM))
    finished = rank_runner.run([*args, "steps=8", "save.every=1", f"save.keep={keep}"], tmp_path)
    assert finished.code == 70, finished.output
    assert "the loss of the probe is" in finished.output
    rows = losses(tmp_path / "runs/run")
    assert all(map(math.isfinite, rows))
    assert steps_of(tmp_path / "runs/run")[-1] == len(rows) - 1 >= 2


# to 2e18: scores overflow, where larger weights would be taken for infinite and normalised to 0
LEAP = {"lr_range_test_min_lr": 1e-3, "lr_range_test_step_size": 3, "lr_range_test_step_rate": 2e21,
        "lr_range_test_staircase": True}  # fmt: skip
SGD = {"type": "SGD", "params": {"lr": 1e-3}}
ADAM = {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.0}}


def test_another_optimizer_and_another_lr_are_taken_where_the_recipe_may_change(
    tmp_path: Path, tiny_data: Path, deepspeed_json: Json
) -> None:
    args = ["steps=2", "resume.allow=recipe"]
    assert rank_runner.run(command(tiny_data, deepspeed_json(optimizer=SGD), *args), tmp_path).code == 0
    args[0] = "steps=4"
    finished = rank_runner.run(command(tiny_data, deepspeed_json(), *args), tmp_path)
    assert finished.code == 0, finished.output
    args[0] = "steps=5"
    other = {"type": "AdamW", "params": {"lr": 1e-4, "weight_decay": 0.1}}
    finished = rank_runner.run(command(tiny_data, deepspeed_json(optimizer=other), *args), tmp_path)
    assert finished.code == 0, finished.output
    rows = [json.loads(line) for line in (tmp_path / "runs/run/metrics.jsonl").read_text().splitlines()]
    assert [row["lr"] for row in rows] == [1e-3, 1e-3, 3e-3, 3e-3, 1e-4]


def test_an_allowed_change_of_the_schedule_acts_from_the_first_step_on(
    tmp_path: Path, tiny_data: Path, deepspeed_json: Json
) -> None:
    def train(lr: float, name: str, steps: int) -> list[float]:
        schedule = {"type": "WarmupCosineLR", "params": {"total_num_steps": 8, "warmup_num_steps": 2}}
        json_file = deepspeed_json(optimizer={"type": "AdamW", "params": {"lr": lr}}, scheduler=schedule)
        args = command(tiny_data, json_file, f"run.name={name}", f"steps={steps}", "resume.allow=recipe")
        assert rank_runner.run(args, tmp_path).code == 0
        rows = (tmp_path / f"runs/{name}/metrics.jsonl").read_text().splitlines()
        return [json.loads(row)["lr"] for row in rows]

    before, whole = train(1e-3, "run", 4), train(2e-3, "whole", 8)
    assert train(2e-3, "run", 8) == [*before, *whole[4:]]


def test_a_refused_second_start_leaves_the_first_one_alone(
    tmp_path: Path, tiny_data: Path, deepspeed_json: Json
) -> None:
    args = command(tiny_data, deepspeed_json(), "steps=100000")
    ranks = rank_runner.start(args, tmp_path, 1)
    run_dir = tmp_path / "runs/run"
    try:
        wait_for(lambda: (run_dir / "metrics.jsonl").exists())
        second = tmp_path / "second"
        second.mkdir()
        finished = rank_runner.run([*args, f"run.dir={tmp_path / 'runs'}", "seed=5"], second)
        assert finished.code == 64
        assert "another training is at work here" in finished.output
        assert not (run_dir / "failure.json").exists()
    finally:
        ranks[0].kill()
        ranks[0].join()


def test_one_process_may_train_a_run_directory_twice(
    tmp_path: Path, tiny_data: Path, deepspeed_json: Json
) -> None:
    job = [str(deepspeed_json()), f"data.path={tiny_data}", f"run.dir={tmp_path}", "run.name=run", *TINY]
    finished = rank_runner.train_all([[*job, "steps=2"], [*job, "steps=4"]], tmp_path / "ranks", 1)
    assert finished.codes == [0], finished.output
    assert len(losses(tmp_path / "run")) == 4
