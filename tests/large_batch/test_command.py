"""`bigtfm noise-scale` on a real run: its gradients, its report alone and on two ranks, and its failures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import many_runs
import numpy as np
import pytest
import rank_runner
import torch
from many_runs import job

from bigtfm.assembly import shuffled
from bigtfm.cli import app
from bigtfm.data.indexed import TokenDataset
from bigtfm.large_batch.command import Measured
from bigtfm.large_batch.gradients import gradients_of
from bigtfm.large_batch.noise import NoiseScale
from bigtfm.large_batch.view import sizes, verdict
from bigtfm.run_directory import open_run, saved_run

pytestmark = [pytest.mark.launcher, pytest.mark.slow]
Say = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """12 steps, the last 6 with twice the batch; two checkpoints."""
    folder = tmp_path_factory.mktemp("noise")
    ramp = ("rampup_sizes=4", "rampup_steps=6", "steps=12", "save.every=6", "model.dropout=0.1")
    many_runs.train_all([job(folder, tiny_data, "run", *ramp, train_micro_batch_size_per_gpu=2)], folder, 1)
    return folder / "run"


@pytest.fixture
def say(capfd: pytest.CaptureFixture[str]) -> Say:
    """Runs the command; its exit code, stdout and stderr."""

    def command(*args: object) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            app(["noise-scale", *map(str, args)])
        said = capfd.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return command


def test_the_gradients_are_those_of_the_micro_batches(run_dir: Path, tiny_data: Path) -> None:
    """Whose sum is the gradient of all their sequences at once, dropout and all."""
    model, _, special = open_run(run_dir)
    run = saved_run(run_dir).run
    loader = shuffled(run, [TokenDataset.open(tiny_data)], special)
    found = gradients_of(model, loader, range(0, 8, 2), 2)

    def gradient(first: int, count: int) -> Any:
        model.train().zero_grad()
        batch = loader.batch(first, count)
        loss, _ = model(**batch.model_inputs())
        (loss / found.labels.mean()).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double()

    rows = torch.stack([gradient(first, 2) for first in range(0, 8, 2)])
    assert found.gram == pytest.approx((rows @ rows.T).numpy(), rel=1e-4)
    whole = gradient(0, 8)
    assert found.gram.sum() == pytest.approx(float(whole @ whole), rel=1e-4)
    assert not np.allclose(found.gram, found.gram.mean()), "they differ"


def test_the_report(run_dir: Path, tmp_path: Path, say: Say) -> None:
    options = ("--run", run_dir, "--batches", 12, "--micro-batch", 2)
    code, out, err = say(*options, "--every-checkpoint", "--json")
    assert (code, err) == (0, "")
    said = json.loads(out)
    first, last = said["checkpoints"]
    assert [(each["step"], each["batch"]) for each in (first, last)] == [(6, 8), (12, 8)]
    scale = last["noise_scale"]
    assert scale["low"] <= scale["samples"] <= (scale["high"] or np.inf)
    assert 31 < last["tokens_per_sample"] < 32, "all but the first of each document"
    assert last["noise_scale_tokens"] == pytest.approx(last["tokens_per_sample"] * scale["samples"])
    own = next(row for row in last["batches"] if row["batch"] == 8)
    assert own["steps"] == pytest.approx(1 + scale["samples"] / 8)
    assert own["examples"] == pytest.approx(1 + 8 / scale["samples"])
    assert (run_dir / "noise-scale.png").read_bytes()[:4] == b"\x89PNG"

    again = json.loads(say(*options, "--step", 12, "--json", "--picture", tmp_path / "own.png")[1])
    assert again["checkpoints"] == [last], "the same numbers each time"
    assert (tmp_path / "own.png").exists()

    code, out, _ = say(*options)
    assert code == 0
    for words in ("after step 12", "The noise scale is", "Batches of 8 take", "noise-scale.png"):
        assert words in out


def test_two_ranks_find_what_one_finds(run_dir: Path, tmp_path: Path, say: Say) -> None:
    """Each takes every other of 13 micro-batches, so that they have not as many."""
    options = ["--run", str(run_dir), "--batches", "13", "--micro-batch", "2", "--json"]
    alone = json.loads(say(*options)[1])["checkpoints"][0]["noise_scale"]
    finished = rank_runner.run(["noise-scale", *options], tmp_path, 2)
    assert finished.codes == [0, 0], finished.output
    together = json.loads(finished.output.splitlines()[-1])["checkpoints"][0]["noise_scale"]
    assert finished.outputs[1].strip() == ""
    for name in ("samples", "gradient", "noise"):
        assert together[name] == pytest.approx(alone[name], rel=1e-5)


def test_failures_are_one_line(run_dir: Path, tmp_path: Path, say: Say) -> None:
    (tmp_path / "empty").mkdir()
    shutil.copytree(run_dir, tmp_path / "adapters")
    resolved = tmp_path / "adapters/resolved.json"
    values = json.loads(resolved.read_text())
    values["run_config"]["tune"]["lora_rank"] = 4
    resolved.write_text(json.dumps(values))
    for options, code, words in (
        (("--run", tmp_path / "empty"), 76, "no checkpoint"),
        (("--run", run_dir, "--step", 7), 76, "7"),
        (("--run", run_dir, "--data", tmp_path / "nothing"), 65, "nothing"),
        (("--run", tmp_path / "adapters"), 64, "trains a part of its weights"),
    ):
        ended, out, err = say(*options)
        assert (ended, out) == (code, "")
        assert err.count("\n") == 1
        assert words in err
        assert "Fix: " in err


def measured(samples: float, batch: int | None = 16) -> Measured:
    return Measured(10, 2.0, 100.0, NoiseScale(samples, samples / 2, samples * 2, 1.0, samples), batch)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (measured(16.0), "take 2.00 times the fewest steps and 2.00 times the fewest sequences"),
        (measured(112.0), "Twice the batch would save 44% of the steps for 12% more sequences"),  # 8 to 4.5
        (measured(4.0), "Half the batch would save 40% of the sequences for 20% more steps"),  # 1.25 to 1.5
        (measured(float("inf")), "not told from its noise"),
        (measured(0.0), "a batch of 1 suffices"),
        (
            measured(25_000.0, None),
            "The noise scale is 25 k sequences (12.5 k to 50 k), 2.5 M predicted tokens.",
        ),
    ],
)
def test_the_verdict(found: Measured, said: str) -> None:
    assert said in verdict(found)


def test_the_run_s_own_batch_is_always_shown() -> None:
    assert 16 in sizes(measured(1e6))
    assert 16 in sizes(measured(0.01))
    assert sizes(measured(16.0)) == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    assert sizes(measured(float("inf"))) == []
