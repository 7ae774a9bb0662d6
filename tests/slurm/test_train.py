"""Real trainings on a real Slurm cluster: two nodes of two ranks, and everything that happens to a job."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import cycle, islice
from pathlib import Path

import pytest
import rank_runner
from slurm.cluster import Cluster, cluster
from slurm.conftest import require_slurm
from slurm.settings import Settings
from slurm.site import EVENTS, EVERY, STEPS, Site, trainers, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.launcher, pytest.mark.timeout(600)]


@pytest.fixture
def site(slurm: Cluster, tmp_path: Path, tiny_data: Path) -> Iterator[Site]:
    yield Site.lay_out(slurm, tmp_path, tiny_data)
    slurm.scancel("--user=root")


@pytest.fixture(scope="module")
def alone(slurm: Cluster, tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """The run directory of the same training on one machine, without Slurm and never interrupted."""
    site = Site.lay_out(slurm, tmp_path_factory.mktemp("alone"), tiny_data)
    files = ["--config", "run.toml", "--deepspeed_config", "ds.json"]
    command = ["train", *files, *site.overrides("run.name=alone")]
    done = rank_runner.finish(rank_runner.start(command, site.folder, 4), site.folder, timeout=120 + STEPS)
    assert done.codes == [0] * 4, done.output
    return site.run_dir("alone")


def require_same_run(site: Site, name: str, alone: Path) -> None:
    """Every loss and every sample, and the last checkpoint, to the bit."""
    columns = ("step", "loss", "grad_norm", "lr", "tokens", "sample_digest")
    expected = [json.loads(line) for line in (alone / "metrics.jsonl").read_text().splitlines()]
    assert [[row[c] for c in columns] for row in site.rows(name)] == [
        [row[c] for c in columns] for row in expected
    ]
    last = f"checkpoints/step-{STEPS:08d}"
    for path in (alone / last).glob("*.safetensors"):
        assert (site.run_dir(name) / last / path.name).read_bytes() == path.read_bytes(), path.name


def test_two_nodes_train_as_one_machine_does(site: Site, alone: Path) -> None:
    job = site.train("mine")
    site.slurm.wait_for(job, "COMPLETED", "FAILED", seconds=400)
    assert site.slurm.job(job)["JobState"] == "COMPLETED", site.story("mine")
    require_same_run(site, "mine", alone)
    status = site.status("mine")
    assert (status["state"], status["step"], len(status["starts"])) == ("done", STEPS, 1)


@pytest.mark.timeout(600 + 150 * EVENTS)
def test_a_run_outlives_all_that_happens_to_its_job(site: Site, alone: Path) -> None:
    """Warned, preempted, requeued, a rank killed, a node lost: each is a restart, and the run is the same."""
    slurm, at = site.slurm, 0
    database = site.folder / "mlflow.db"
    job = site.train("long", overrides=("track.mlflow=true", f"track.uri=sqlite:///{database}"))

    def warned() -> None:
        slurm.scancel("--signal=USR1", job)  # as --signal=USR1@120 does

    def preempted() -> None:
        slurm.sbatch("-N2", "--exclusive", "-p", "high", "--wrap", "sleep 1", cwd=site.folder)

    def requeued() -> None:
        slurm.scontrol("requeue", job)

    def rank_killed() -> None:
        os.kill(trainers(slurm, "n2")[0], signal.SIGKILL)

    names = cycle(("n1", "n2"))  # that of rank 0 and the batch script, and the other one

    def node_lost() -> None:
        name = next(names)
        slurm.kill_node(name)
        slurm.scontrol("update", f"NodeName={name}", "State=DOWN", "Reason=power")
        slurm.start_node(name)

    # The first start comes to have an MLflow run, which the later ones are to go on with. Its sender imports
    # mlflow for longer than some of these steps last: one rank holds the others up.
    site.wait_for_step("long", 2)
    held = trainers(slurm, "n2")[0]
    os.kill(held, signal.SIGSTOP)
    sent = site.run_dir("long") / "mlflow.json"
    wait_until(lambda: sent.exists() and '"run_id"' in sent.read_text(), 100, lambda: site.story("long"))
    os.kill(held, signal.SIGCONT)

    codes = {warned: (75,), preempted: (75,), requeued: (75,), rank_killed: (79,), node_lost: (None, 75, 79)}
    order = list(islice(cycle(codes), EVENTS))
    for number, happens in enumerate(order, 1):
        site.wait_for_step("long", at + 10)
        began = time.monotonic()
        happens()
        wait_until(lambda n=number: slurm.job(job).get("Restarts") == str(n), 120, lambda: site.story("long"))
        came_to = 0

        def started(n: int = number) -> list[int]:
            """Steps that the starts went on from; until there is a new one the ranks may still do steps."""
            nonlocal came_to
            came_to = max(came_to, site.rows("long")[-1]["step"])
            return [event["step"] for event in site.events("long") if event["event"] == "start"][n:]

        wait_until(lambda: bool(started()), 240, lambda: site.story("long"))
        at = started()[-1]
        seconds, lost = time.monotonic() - began, came_to - at
        print(f"{happens.__name__:12} at step {came_to:4}: on after {seconds:3.0f} s, {lost:2} steps lost")
        assert lost <= (0 if codes[happens] == (75,) else EVERY), (happens, came_to)
    slurm.wait_for(job, "COMPLETED", "FAILED", seconds=400)
    assert slurm.job(job)["JobState"] == "COMPLETED", site.story("long")
    require_same_run(site, "long", alone)
    status = site.status("long")
    for happened, start in zip(order, status["starts"], strict=False):  # the last start has no event
        assert start["code"] in codes[happened], (happened, start)
        if happened is rank_killed:
            assert start["reason"].startswith("rank ")
            assert "was killed by signal 9 (SIGKILL)" in start["reason"]
    assert (status["state"], len(status["starts"])) == ("done", EVENTS + 1)
    with closing(sqlite3.connect(database)) as rows:
        assert rows.execute("select count(*), min(status) from runs").fetchall() == [(1, "FINISHED")]
        sent = rows.execute("select step from metrics where key = 'loss'").fetchall()
    assert {step for (step,) in sent} == set(range(1, STEPS + 1))


@pytest.mark.long
def test_it_outlives_the_daemons_and_scancel_saves_and_ends_for_good(site: Site) -> None:
    job = site.train("cancelled")
    at = site.wait_for_step("cancelled", 10)
    site.slurm.stop_controller()
    site.slurm.kill_slurmd("n2")
    site.slurm.nodes["n2"].power_on()
    site.slurm.start_controller()
    site.wait_for_step("cancelled", at + 20)
    site.slurm.scancel(job)
    site.slurm.wait_for(job, "CANCELLED", seconds=30)
    failure = json.loads((site.run_dir("cancelled") / "failure.json").read_text())
    assert failure["exit_code"] == 75
    status = site.status("cancelled")
    assert status["saved"] == status["step"] == site.rows("cancelled")[-1]["step"]
    assert (status["state"], site.slurm.job(job)["Restarts"]) == ("stopped", "0")


def test_a_mistake_is_told_once_and_not_repeated(site: Site) -> None:
    job = site.train("wrong", overrides=("model.hidden_size=31",))
    site.slurm.wait_for(job, "FAILED", seconds=30)
    assert (site.slurm.job(job)["ExitCode"], site.slurm.job(job)["Restarts"]) == ("64:0", "0")
    said = (site.folder / f"slurm-wrong-{job}.log").read_text()
    assert said.count("error:") == 1
    assert "hidden_size" in said
    assert site.status("wrong")["state"] == "failed"


def test_a_node_with_a_gpu_too_many_is_told_before_a_rank_starts(site: Site) -> None:
    job = site.train("lonely", "--ntasks-per-node=1")
    site.slurm.wait_for(job, "FAILED", seconds=30)
    assert (site.slurm.job(job)["ExitCode"], site.slurm.job(job)["Restarts"]) == ("64:0", "0")
    said = (site.folder / f"slurm-lonely-{job}.log").read_text()
    assert "--ntasks-per-node=1: a node has 2 of the job's GPUs. Fix: ask for --ntasks-per-node=2" in said
    assert not list(site.run_dir("lonely").glob("logs/rank-*"))


def test_a_crash_at_every_start_is_retried_three_times(site: Site) -> None:
    """Every rank dies by SIGSEGV before it can say anything."""
    broken = site.folder / "broken"
    broken.mkdir()
    program = "import os\nif 'SLURM_STEP_ID' in os.environ: os.kill(os.getpid(), 11)\n"
    (broken / "sitecustomize.py").write_text(program)
    job = site.train("crashing", PYTHONPATH=f"{broken}:{site.environ()['PYTHONPATH']}")
    site.slurm.wait_for(job, "FAILED", seconds=120)
    assert site.slurm.job(job)["Restarts"] == "3", site.story("crashing")
    said = (site.folder / f"slurm-crashing-{job}.log").read_text()
    assert said.count("starting again") == 3
    assert (
        "not started again: 4 starts have ended with no checkpoint: started again 3 times, not more" in said
    )


@pytest.mark.long
def test_a_node_that_kills_its_ranks_twice_is_left_out(tmp_path: Path, tiny_data: Path) -> None:
    require_slurm()
    with cluster(Settings(nodes=3)) as slurm:
        site = Site.lay_out(slurm, tmp_path, tiny_data)
        job = site.train("shifty", overrides=("run.steps=60", "save.every=0"))
        for number in (1, 2):
            site.wait_for_step("shifty", 3)
            os.kill(trainers(slurm, "n2")[0], signal.SIGKILL)
            slurm.wait_for(job, "PENDING", seconds=60, restarts=number)
            (site.run_dir("shifty") / "metrics.jsonl").unlink()
        slurm.wait_for(job, "COMPLETED", "FAILED", seconds=120)
        found = slurm.job(job)
        assert (found["JobState"], found["ExcNodeList"], found["NodeList"]) == (
            "COMPLETED",
            "n2",
            "n[1,3]",
        ), site.story("shifty")


@pytest.mark.long
def test_a_cut_cable_moves_the_run_to_another_node(tmp_path: Path, tiny_data: Path, alone: Path) -> None:
    """The node that is cut off runs on, but its ranks end by themselves: they hear nothing any more."""
    require_slurm()
    with cluster(Settings(nodes=3, own_network=True)) as slurm:
        site = Site.lay_out(slurm, tmp_path, tiny_data)
        job = site.train("cut")
        at = site.wait_for_step("cut", EVERY + 10)
        left = trainers(slurm, "n2")
        slurm.cable("n2", plugged=False)
        slurm.wait_for(job, "RUNNING", seconds=90, restarts=1)
        assert slurm.job(job)["NodeList"] == "n[1,3]"
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in left), 60)
        slurm.wait_for(job, "COMPLETED", "FAILED", seconds=300)
        assert slurm.job(job)["JobState"] == "COMPLETED", site.story("cut")
        require_same_run(site, "cut", alone)
        assert EVERY <= site.status("cut")["starts"][1]["first"] <= at


@pytest.mark.long
def test_one_node_after_two_and_back(site: Site, alone: Path) -> None:
    """The global batch stays; losses are those of rounding, digests the same."""
    for nodes, stop in ((2, 60), (1, 130), (2, STEPS)):
        job = site.train("elastic", nodes=nodes, overrides=(f"run.steps={stop}",))
        site.slurm.wait_for(job, "COMPLETED", "FAILED", seconds=300)
        assert site.slurm.job(job)["JobState"] == "COMPLETED", site.story("elastic")
    rows = site.rows("elastic")
    expected = [json.loads(line) for line in (alone / "metrics.jsonl").read_text().splitlines()]
    assert [row["sample_digest"] for row in rows] == [row["sample_digest"] for row in expected]
    assert [row["loss"] for row in rows[:60]] == [row["loss"] for row in expected[:60]]
    assert [row["loss"] for row in rows[:70]] == pytest.approx([r["loss"] for r in expected[:70]], rel=1e-5)
    assert [start["ranks"] for start in site.status("elastic")["starts"]] == [4, 2, 4]


@pytest.mark.long
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_other_launchers_train_the_same(site: Site, alone: Path, launcher: str) -> None:
    job = site.train(
        launcher, script="slurm/train-torchrun.sbatch", overrides=("run.steps=20",), LAUNCHER=launcher
    )
    site.slurm.wait_for(job, "COMPLETED", "FAILED", seconds=300)
    assert site.slurm.job(job)["JobState"] == "COMPLETED", site.story(launcher)
    expected = [json.loads(line)["loss"] for line in (alone / "metrics.jsonl").read_text().splitlines()[:20]]
    assert [row["loss"] for row in site.rows(launcher)] == expected


@pytest.mark.long
def test_the_benchmark_reports_by_itself(site: Site) -> None:
    recipe = json.loads((site.folder / "ds.json").read_text())
    for stage in (0, 2):
        recipe["zero_optimization"]["stage"] = stage
        (site.folder / f"zero{stage}.json").write_text(json.dumps(recipe))
    site.train(
        "speed", "--array=0-2", script="slurm/bench.sbatch", nodes=1, STEPS="20", BENCH_DIR="runs/speed",
        DEEPSPEED_CONFIGS="zero0.json zero2.json missing.json",
    )  # fmt: skip
    report = site.folder / "runs" / "speed" / "report.md"
    wait_until(report.exists, 200, lambda: site.story("speed"))
    text = report.read_text()
    assert "| zero0, ZeRO 0 | 8 = 1 x 4 x 2 |" in text
    assert "| zero2, ZeRO 2 | 8 = 1 x 4 x 2 |" in text
    assert "missing" in text.partition("## Failed")[2]


@pytest.mark.long
@pytest.mark.parametrize("signal", ["USR1@60", "CONT@1"])
def test_the_run_goes_on_after_its_time_limit(site: Site, signal: str) -> None:
    """Slurm's own clock: limits are whole minutes, and it looks every 30 s.

    Without a warning that the ranks understand, they save when Slurm ends the job at its limit.
    """
    overrides = ("run.steps=4000", "save.every=0")
    job = site.train("limited", "--time=3", f"--signal={signal}", overrides=overrides)
    wait_until(lambda: site.slurm.job(job).get("Restarts") == "1", 300, lambda: site.story("limited"))
    came_to = site.rows("limited")[-1]["step"]
    wait_until(lambda: len(site.status("limited")["starts"]) == 2, 120, lambda: site.story("limited"))
    status = site.status("limited")
    assert status["starts"][0]["code"] == 75
    assert status["starts"][1]["first"] == came_to
    assert status["state"] == "running"
