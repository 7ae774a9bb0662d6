"""Training through the real command, on real ranks, under real DeepSpeed."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rank_runner
from conftest import TINY, losses

from bigtfm.resilience import events

Json = Callable[..., Path]
pytestmark = pytest.mark.launcher


def train(
    folder: Path, data: Path, json_file: Path, *overrides: str, world_size: int = 1, name: str = "run"
) -> rank_runner.Finished:
    args = [
        "train",
        "--deepspeed_config",
        str(json_file),
        f"data.path={data}",
        f"run.name={name}",
        *TINY,
        *overrides,
    ]
    return rank_runner.run(args, folder, world_size)


def trained(*args: Any, **kwargs: Any) -> Path:
    """The run directory of a training that ended well."""
    finished = train(*args, **kwargs)
    assert finished.codes == [0] * len(finished.codes), finished.output[-3000:]
    return args[0] / "runs" / kwargs.get("name", "run")


def trained_all(folder: Path, data: Path, json_files: list[Path], world_size: int) -> list[list[float]]:
    """20 losses of a training with each of the files, one after the other in the same processes."""
    fixed = [f"data.path={data}", *TINY, "steps=20"]
    jobs = [[str(path), f"run.name={path.stem}", *fixed] for path in json_files]
    finished = rank_runner.train_all(jobs, folder, world_size)
    assert finished.codes == [0] * world_size, finished.output[-3000:]
    return [losses(folder / "runs" / path.stem) for path in json_files]


def shard_hashes(run_dir: Path, step: int) -> dict[str, str]:
    """SHA-256 of every file of weights and moments in a checkpoint."""
    manifest = json.loads((run_dir / f"checkpoints/step-{step:08d}/manifest.json").read_text())
    return {name: file["sha256"] for name, file in manifest["files"].items() if name.endswith(".safetensors")}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> list[float]:
    """20 losses at stage 0 on one rank: what every other arrangement has to give."""
    folder = tmp_path_factory.mktemp("reference")
    content = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "weight_decay": 0.1}},
        "gradient_clipping": 1.0,
    }
    (folder / "deepspeed.json").write_text(json.dumps(content))
    result = losses(trained(folder, tiny_data, folder / "deepspeed.json", "steps=20"))
    assert result[0] > 6.0
    assert result[-1] < result[0] - 0.5, "it learns, so equal curves mean something"
    return result


def test_stages_on_two_ranks_give_the_same_losses(
    tmp_path: Path, tiny_data: Path, deepspeed_json: Json, reference: list[float]
) -> None:
    json_files = [deepspeed_json(f"stage-{stage}.json", stage=stage) for stage in (0, 1, 2, 3)]
    for curve in trained_all(tmp_path, tiny_data, json_files, world_size=2):
        assert curve == pytest.approx(reference, abs=1e-5)


def test_another_seed_gives_other_losses(
    tmp_path: Path, tiny_data: Path, deepspeed_json: Json, reference: list[float]
) -> None:
    """The control: these comparisons can fail."""
    run_dir = trained(tmp_path, tiny_data, deepspeed_json(), "steps=20", "seed=4321")
    assert losses(run_dir) != pytest.approx(reference, abs=1e-2)


@pytest.mark.parametrize("world_size", [1, 2])
def test_dropout_does_not_depend_on_ranks(
    world_size: int, tmp_path: Path, tiny_data: Path, deepspeed_json: Json, reference: list[float]
) -> None:
    one = trained(tmp_path, tiny_data, deepspeed_json(), "steps=6", "dropout=0.2", name="one")
    other = trained(
        tmp_path,
        tiny_data,
        deepspeed_json(stage=2),
        "steps=6",
        "dropout=0.2",
        "recompute=full",
        world_size=2,
        name="two",
    )
    assert losses(one) == pytest.approx(losses(other), abs=1e-5)
    assert losses(one) != pytest.approx(reference[:6], abs=1e-3), "dropout does something"


@pytest.mark.parametrize(
    "zero",
    [
        {"stage": 1, "offload_optimizer": {"device": "cpu"}},
        {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
    ],
)
def test_offload_to_the_cpu_gives_the_same_losses_and_resumes(
    zero: dict[str, Any], tmp_path: Path, tiny_data: Path, deepspeed_json: Json, reference: list[float]
) -> None:
    for steps in (7, 20):
        run_dir = trained(
            tmp_path, tiny_data, deepspeed_json(zero_optimization=zero), f"steps={steps}", world_size=2
        )
    assert losses(run_dir) == pytest.approx(reference, abs=1e-5)


OPTIMIZERS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "Adam": ({"lr": 3e-3, "adam_w_mode": False, "weight_decay": 0.01}, [0, 1, 2, 3]),
    "Adagrad": ({"lr": 1e-2}, [0, 1, 2, 3]),
    "SGD": ({"lr": 0.1, "momentum": 0.9}, [0, 1, 2, 3]),
    "Lion": ({"lr": 3e-4, "weight_decay": 0.1}, [0, 1, 2, 3]),
    "Lamb": ({"lr": 1e-2}, [0, 0]),
    "Lars": ({"lr": 10.0, "weight_decay": 1e-4}, [0, 0]),
    "Muon": ({"lr": 1e-2}, [0, 3, 0, 3]),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_optimizer_learns_resumes_and_agrees_between_stages(
    kind: str, tmp_path: Path, tiny_data: Path, deepspeed_json: Json
) -> None:
    """Eight steps at stage 0 equal eight that go on from stage to stage, with a resume at each change."""
    params, stages = OPTIMIZERS[kind]

    def json_file(stage: int) -> Path:
        changes: dict[str, Any] = {"optimizer": {"type": kind, "params": params}}
        if kind == "Muon":
            zero = {"stage": stage, "reduce_scatter": stage < 3}
            changes |= {"gradient_clipping": 0, "zero_optimization": zero}
        return deepspeed_json(stage=stage, **changes)

    whole = losses(trained(tmp_path, tiny_data, json_file(0), "steps=8", world_size=2, name="whole"))
    for part, stage in enumerate(stages, start=1):
        steps = f"steps={8 * part // len(stages)}"
        run_dir = trained(tmp_path, tiny_data, json_file(stage), steps, world_size=2, name="parts")
    tolerance = 1e-4 if kind == "Muon" else 2e-5  # its Newton-Schulz iteration computes in bf16
    assert losses(run_dir) == pytest.approx(whole, abs=tolerance)
    assert whole[-1] < whole[0] - 0.02


@pytest.mark.parametrize(
    ("kind", "params"),
    [
        ("WarmupLR", {"warmup_num_steps": 4, "warmup_max_lr": 3e-3}),
        ("WarmupDecayLR", {"warmup_num_steps": 4, "warmup_max_lr": 3e-3, "total_num_steps": 12}),
        ("WarmupCosineLR", {"warmup_num_steps": 4, "total_num_steps": 12}),
        (
            "OneCycle",
            {"cycle_min_lr": 1e-4, "cycle_max_lr": 3e-3, "cycle_first_step_size": 4, "cycle_momentum": False},
        ),
        (
            "LRRangeTest",
            {"lr_range_test_min_lr": 3e-3, "lr_range_test_step_size": 2, "lr_range_test_step_rate": 1.0},
        ),
        ("InverseSquareRoot", {"warmup_num_steps": 4}),
        ("WSD", {"warmup_num_steps": 2, "decay_num_steps": 4, "total_num_steps": 12}),
        ("ReduceOnPlateau", {"factor": 0.5, "patience": 1, "threshold": 0.5, "warmup_num_steps": 2}),
    ],
)
def test_every_schedule_resumes_exactly(
    kind: str, params: dict[str, Any], tmp_path: Path, tiny_data: Path, deepspeed_json: Json
) -> None:
    json_file = deepspeed_json(stage=1, scheduler={"type": kind, "params": params})
    whole = trained(
        tmp_path, tiny_data, json_file, "steps=12", "eval.every=2", "eval.min_delta=10.0", name="whole"
    )
    for steps in (6, 12):
        parts = trained(
            tmp_path,
            tiny_data,
            json_file,
            f"steps={steps}",
            "eval.every=2",
            "eval.min_delta=10.0",
            name="parts",
        )
    rows = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (whole, parts)
    ]
    assert [row["lr"] for row in rows[0]] == [row["lr"] for row in rows[1]]
    assert len({row["lr"] for row in rows[0]}) > 2, "the schedule moves the lr"
    assert losses(whole) == losses(parts)


def test_bf16_agrees_between_stages(tmp_path: Path, tiny_data: Path, deepspeed_json: Json) -> None:
    curves = []
    for stage in (0, 1, 2, 3):
        json_file = deepspeed_json(stage=stage, bf16={"enabled": True})
        curves.append(
            losses(trained(tmp_path, tiny_data, json_file, "steps=8", world_size=2, name=f"stage-{stage}"))
        )
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], abs=2e-2)


def test_fp16_is_refused_where_there_is_none(tmp_path: Path, tiny_data: Path, deepspeed_json: Json) -> None:
    import torch

    if torch.ops.mkldnn._is_mkldnn_fp16_supported():  # what DeepSpeed asks
        pytest.skip("this CPU computes in fp16")
    finished = train(tmp_path, tiny_data, deepspeed_json(fp16={"enabled": True}), "steps=2")
    assert finished.code == 64
    assert "fp16 is not supported on this device (cpu)" in finished.output
    assert "Traceback" not in finished.output


def test_evaluation_is_the_same_on_two_ranks(tmp_path: Path, tiny_data: Path, deepspeed_json: Json) -> None:
    rows = []
    for world_size in (1, 2):
        run_dir = trained(
            tmp_path,
            tiny_data,
            deepspeed_json(stage=3),
            "steps=2",
            world_size=world_size,
            name=f"ranks-{world_size}",
        )
        rows.append(json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1]))
    assert rows[0]["val_loss"] == pytest.approx(rows[1]["val_loss"], abs=1e-6)
    assert rows[0]["sample_digest"] == rows[1]["sample_digest"]


def test_early_stop_keeps_the_best_checkpoint(tmp_path: Path, tiny_data: Path, deepspeed_json: Json) -> None:
    run_dir = trained(
        tmp_path,
        tiny_data,
        deepspeed_json(),
        "steps=50",
        "eval.every=2",
        "eval.patience=3",
        "eval.min_delta=0.5",
        "save.keep=1",
    )
    state = json.loads(max((run_dir / "checkpoints").glob("step-*")).joinpath("state.json").read_text())[
        "progress"
    ]
    assert state["step"] < 50
    assert state["stale_evaluations"] == 3
    kept = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert kept == [f"step-{state['best_step']:08d}", f"step-{state['step']:08d}"]


def test_nan_ends_the_run_and_never_reaches_a_checkpoint(
    tmp_path: Path, tiny_data: Path, deepspeed_json: Json
) -> None:
    json_file = deepspeed_json(optimizer={"type": "SGD", "params": {"lr": 1e30}}, gradient_clipping=None)
    finished = train(tmp_path, tiny_data, json_file, "steps=10", "save.every=1")
    assert finished.code == 70, finished.output
    assert finished.output.count("error:") == 1
    failure = json.loads((tmp_path / "runs/run/failure.json").read_text())
    assert failure["exit_code"] == 70
    assert "is nan" in failure["what"] or "is inf" in failure["what"]


def test_a_signal_saves_and_the_same_command_goes_on(
    tmp_path: Path, tiny_data: Path, deepspeed_json: Json
) -> None:
    whole = trained(tmp_path, tiny_data, deepspeed_json(stage=2), "steps=60", world_size=2, name="whole")
    args = [
        "train",
        "--deepspeed_config",
        str(deepspeed_json(stage=2)),
        f"data.path={tiny_data}",
        "run.name=cut",
        *TINY,
    ]
    ranks = rank_runner.start([*args, "steps=60"], tmp_path, 2)
    metrics = tmp_path / "runs/cut/metrics.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        time.sleep(0.02)
    os.kill(ranks[1].pid or 0, signal.SIGUSR1)  # one rank is told, all of them stop at the same step
    cut = rank_runner.finish(ranks, tmp_path)
    assert cut.codes == [75, 75], cut.output
    assert 3 <= len(losses(tmp_path / "runs/cut")) < 60
    again = rank_runner.run([*args, "steps=60"], tmp_path, 2)
    assert again.codes == [0, 0], again.output
    assert losses(tmp_path / "runs/cut") == losses(whole)
    assert shard_hashes(tmp_path / "runs/cut", 60) == shard_hashes(whole, 60)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("seed=1", "seed"),
        ("model.hidden_size=64", "model.hidden_size"),
        ("label_smoothing=0.1", "objective.label_smoothing"),
    ],
)
def test_resuming_as_another_run_is_refused(
    change: str, named: str, tmp_path: Path, tiny_data: Path, deepspeed_json: Json
) -> None:
    trained(tmp_path, tiny_data, deepspeed_json(), "steps=2")
    finished = train(tmp_path, tiny_data, deepspeed_json(), "steps=4", change)
    assert finished.code == 64
    assert f"{named} was" in finished.output
    assert "Traceback" not in finished.output


def test_resuming_under_another_recipe_is_refused_unless_allowed(
    tmp_path: Path, tiny_data: Path, deepspeed_json: Json
) -> None:
    trained(tmp_path, tiny_data, deepspeed_json(), "steps=2")
    other = deepspeed_json(optimizer={"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.1}})
    finished = train(tmp_path, tiny_data, other, "steps=4")
    assert finished.code == 64
    assert "recipe.optimizer.params.lr was 0.003" in finished.output
    assert "resume.allow=recipe" in finished.output
    assert len(losses(trained(tmp_path, tiny_data, other, "steps=4", "resume.allow=recipe"))) == 4


def test_a_finished_run_says_so(tmp_path: Path, tiny_data: Path, deepspeed_json: Json) -> None:
    before = losses(trained(tmp_path, tiny_data, deepspeed_json(), "steps=3"))
    finished = train(tmp_path, tiny_data, deepspeed_json(), "steps=3")
    assert finished.code == 0, finished.output
    assert "already" in finished.output
    assert "has no rows" not in finished.output
    assert losses(tmp_path / "runs/run") == before
    metrics = tmp_path / "runs/run/metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:1]))  # as a power cut may
    finished = train(tmp_path, tiny_data, deepspeed_json(), "steps=3")
    assert "metrics.jsonl has no rows from step 2 to 3; the checkpoint of step 3 is whole" in finished.output
    [row] = [row for row in events.read(tmp_path / "runs/run") if row["event"] == "rows missing"]
    assert (row["last"], row["step"]) == (1, 3)


def test_l1_shrinks_weights_alike_at_every_stage(
    tmp_path: Path, tiny_data: Path, deepspeed_json: Json
) -> None:
    curves = {}
    for stage, world_size in ((0, 1), (2, 2), (3, 2)):
        run_dir = trained(
            tmp_path,
            tiny_data,
            deepspeed_json(stage=stage),
            "steps=8",
            "l1=1e-3",
            world_size=world_size,
            name=f"s{stage}",
        )
        curves[stage] = losses(run_dir)
    assert curves[2] == pytest.approx(curves[0], abs=1e-5)
    assert curves[3] == pytest.approx(curves[0], abs=1e-5)
    plain = losses(trained(tmp_path, tiny_data, deepspeed_json(), "steps=8", name="plain"))
    assert plain != pytest.approx(curves[0], abs=1e-4), "it does something"
