"""A spike of the loss: the run goes back, leaves out the data around it, and can be had again from that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import rank_runner
import spiky
from many_runs import SCHEDULE, events_of, fork_run, job, rows_of, shards_of
from rank_runner import outcomes_of

pytestmark = [pytest.mark.launcher, pytest.mark.slow]
GUARD = ("guard.spike=6", "guard.spike_window=8", "guard.spike_skip=2", "guard.spike_lr=0.5")
STEPS, SAVED = 18, 16
RUNS: dict[str, tuple[str, ...]] = {
    "clean": ("steps=20",),
    "spike": (f"steps={STEPS}",),
    "two": ("steps=14",),
    "limit": ("steps=14", "guard.spikes=1"),
    "early": ("steps=12", "save.every=0"),
    "ignored": (f"steps={STEPS}", "guard.spikes=1"),
    "used-up": (f"steps={STEPS}",),
}
WINDOW = {"step": 14, "back_to": 12, "first_sample": 96, "end_sample": 112, "lr": 0.5}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """All of them; then, in new processes, one that is given the windows, and one that goes on."""
    folder = tmp_path_factory.mktemp("spikes")

    def made(name: str, *overrides: str) -> list[str]:
        common = ("save.every=4", "eval.tokens=64", *GUARD)
        return job(folder, tiny_data, name, *common, *overrides, stage=2, scheduler=SCHEDULE)

    jobs = {name: made(name, *overrides) for name, overrides in RUNS.items()}
    tokens = json.loads((tiny_data / "dataset.json").read_text())["splits"]["train"]["tokens"]
    passes = 150.5 / ((tokens - 1) // spiky.SEQ_LEN)  # 150 samples: 18 steps of 8, and 6
    jobs["used-up"].remove(f"data.path={tiny_data}")
    jobs["used-up"].append(f'data.sources=[{{path = "{tiny_data}", max_epochs = {passes}}}]')
    train(list(jobs.values()), folder / "first")
    windows = progress_of(folder / "spike", STEPS)["spikes"]
    (folder / "windows.json").write_text(json.dumps(windows))
    fork_run(folder / "spike", folder / "resumed", SAVED)
    train([made(name, f"steps={STEPS}") for name in ("given", "resumed")], folder / "second")
    return folder


def train(jobs: list[list[str]], folder: Path) -> None:
    finished = rank_runner.train_all(jobs, folder, 2, spiky.train_jobs)
    assert finished.codes == [0, 0], finished.output[-3000:]


def progress_of(run_dir: Path, step: int) -> dict[str, Any]:
    state = json.loads((run_dir / f"checkpoints/step-{step:08d}/state.json").read_text())
    return dict(state["progress"])


def curve(run_dir: Path) -> list[tuple[str, str, str, str]]:
    """Of each step: loss, norm and lr to the bit, and the samples."""
    return [
        (row["loss"].hex(), row["grad_norm"].hex(), row["lr"].hex(), row["sample_digest"])
        for row in rows_of(run_dir)
    ]


def digests(run_dir: Path) -> list[str]:
    return [row["sample_digest"] for row in rows_of(run_dir)]


def test_a_run_goes_back_and_leaves_out_the_window(runs: Path) -> None:
    rows, clean = rows_of(runs / "spike"), rows_of(runs / "clean")
    assert outcomes_of(runs / "spike") == [{"code": 0, "line": ""}] * 2
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert curve(runs / "spike")[:12] == curve(runs / "clean")[:12]
    assert digests(runs / "spike") == [row["sample_digest"] for row in (*clean[:12], *clean[14:])]
    assert [row["lr"] for row in rows[12:]] == [row["lr"] / 2 for row in clean[12:STEPS]]
    [event] = events_of(runs / "spike", "spike")
    assert {key: event[key] for key in WINDOW} == WINDOW
    cut = [json.loads(line) for line in (runs / "spike" / event["cut"]).read_text().splitlines()]
    assert [row["step"] for row in cut] == [13, 14]
    assert cut[1]["loss"] == event["loss"] == pytest.approx(1.5 * clean[13]["loss"], rel=1e-6)
    assert progress_of(runs / "spike", STEPS)["spikes"] == [WINDOW]


def test_a_fresh_process_given_the_window_has_the_same_curve_and_weights(runs: Path) -> None:
    assert curve(runs / "given") == curve(runs / "spike")
    assert shards_of(runs / "given", STEPS) == shards_of(runs / "spike", STEPS)


def test_a_later_resume_still_leaves_it_out(runs: Path) -> None:
    assert len(rows_of(runs / "resumed")) == STEPS
    assert curve(runs / "resumed") == curve(runs / "spike")
    assert shards_of(runs / "resumed", STEPS) == shards_of(runs / "spike", STEPS)


def test_two_spikes_add_up(runs: Path) -> None:
    clean = rows_of(runs / "clean")
    assert outcomes_of(runs / "two")[0]["code"] == 0
    assert [event["step"] for event in events_of(runs / "two", "spike")] == [10, 12]
    taken = [row["sample_digest"] for row in (*clean[:8], *clean[10:12], *clean[14:18])]
    assert digests(runs / "two") == taken
    factors = [1.0] * 8 + [0.25] * 6
    assert [row["lr"] for row in rows_of(runs / "two")] == [
        row["lr"] * factor for row, factor in zip(clean, factors, strict=False)
    ]
    assert [row.get("rewinds", 0) for row in rows_of(runs / "two")] == [0] * 8 + [2] * 6


def test_one_spike_too_many_ends_the_run(runs: Path) -> None:
    first, second = outcomes_of(runs / "limit")
    assert first == second
    assert first["code"] == 70
    loss = rows_of(runs / "limit")[-1]["loss"]
    assert first["line"] == (
        f"error: step 12: the loss jumps to {loss:.4g}, after spikes at steps 10. Fix: lower the lr or warm "
        "up longer (DeepSpeed JSON), and look for extreme values in the run config; guard.spikes allows "
        "more; what was saved is from before the spike"
    )


def test_before_the_first_checkpoint_it_goes_on(runs: Path) -> None:
    assert outcomes_of(runs / "early")[0]["code"] == 0
    assert digests(runs / "early") == digests(runs / "clean")[:12]
    [event] = events_of(runs / "early", "spike")
    assert (event["step"], event["back_to"]) == (10, None)


def test_a_window_that_is_not_left_out_is_met_again(runs: Path) -> None:
    """The control: going back alone does not help."""
    outcome = outcomes_of(runs / "ignored")[0]
    assert outcome["code"] == 70
    assert ", after spikes at steps 14." in outcome["line"]


def test_sources_that_had_no_more_to_spare_end_it_with_a_line(runs: Path) -> None:
    for outcome in outcomes_of(runs / "used-up"):
        assert outcome["code"] == 65
        assert outcome["line"] == (
            "error: run config: data.sources have 150 sequences within their max_epochs; 18 steps need 160 "
            "with those left out after spikes of the loss. Fix: start again with fewer run.steps or a "
            "smaller guard.spike_skip; or with larger max_epochs and resume.allow=data"
        )
