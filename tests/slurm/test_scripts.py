"""The scripts beside train.sbatch, and how a run goes on where requeue is forbidden, on a real cluster."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import ROOT
from slurm.cluster import Cluster
from slurm.site import Site, trainers, wait_until

from bigtfm.data.indexed import TokenDataset
from bigtfm.data.prepare import prepare

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(600)]


@pytest.fixture
def site(slurm: Cluster, tmp_path: Path, tiny_data: Path) -> Iterator[Site]:
    yield Site.lay_out(slurm, tmp_path, tiny_data)
    slurm.scancel("--user=root")


def test_an_array_prepares_what_one_process_does(site: Site) -> None:
    """One task is stopped by its time limit's warning, requeued, and the join waits for it."""
    folder = site.folder
    text = folder / "in.txt"
    text.write_text("".join(f"A line about number {n} and its square {n * n}.\n\n" for n in range(160_000)))
    prepare([str(text)], folder / "whole", vocab_size=500, progress=False)
    bigtfm = folder / "bin" / "bigtfm"  # whose second shard hangs at its first start
    bigtfm.parent.mkdir()
    bigtfm.write_text(
        "#!/bin/bash\n"
        '[[ "$*" = *"--shard 1/3"* ]] && [ -z "${SLURM_RESTART_COUNT:-}" ] && exec sleep 100\n'
        f'exec {ROOT}/.venv/bin/bigtfm "$@"\n'
    )
    bigtfm.chmod(0o755)
    environ = {
        "INPUT": str(text),
        "OUT": "parts",
        "OPTIONS": "--vocab-size 500",
        "PYTHONPATH": str(ROOT),
        "SETUP": f"PATH={bigtfm.parent}:$PATH",
    }
    options = ["--array=4-8:2", "--cpus-per-task=1", "--time=5", "slurm/prepare.sbatch"]
    job = site.slurm.sbatch(*options, cwd=folder, environ=environ)

    def log(pattern: str = "slurm-prepare*.log") -> str:
        return "\n".join(f"{path.name}: {path.read_text()}" for path in sorted(folder.glob(pattern)))

    wait_until(lambda: log().count("done in") == 2, 120, log)
    assert not (folder / "parts" / "dataset.json").exists()
    site.slurm.scancel("--batch", "--signal=USR1", f"{job}_6")  # as --signal=B:USR1@120 does
    wait_until((folder / "parts" / "dataset.json").exists, 120, log)
    wait_until(lambda: "prepared in" in log("slurm-prepare-join-*.log"), 20, log)
    header = (folder / "whole" / "dataset.json").read_bytes()
    assert (folder / "parts" / "dataset.json").read_bytes() == header
    TokenDataset.open(folder / "parts").verify()
    assert len(list(folder.glob("slurm-prepare-join-*.log"))) == 1, log()


def test_a_run_is_fine_tuned_and_looked_at(site: Site) -> None:
    first = site.train("first", nodes=1, overrides=("run.steps=20",))
    overrides = " ".join(site.overrides("run.steps=10", "save.every=10"))
    tuned = site.train(
        "tuned", f"--dependency=afterok:{first}", script="slurm/finetune.sbatch", nodes=1,
        INIT_FROM="runs/first", CONFIG="runs/first/run.toml", OVERRIDES=overrides,
    )  # fmt: skip
    prompts = site.folder / "prompts.txt"
    prompts.write_text("The\nA union\n")
    knobs = {"RUNS": "runs/first runs/tuned", "PROMPTS": "prompts.txt", "OPTIONS": "--max-new-tokens 5"}
    looked = site.slurm.sbatch(
        f"--dependency=afterok:{tuned}", "--array=0-1", "--cpus-per-task=1", "slurm/eval.sbatch",
        cwd=site.folder, environ=site.environ() | knobs,
    )  # fmt: skip
    scored = site.slurm.sbatch(
        f"--dependency=afterok:{first}", "--ntasks=2", "--cpus-per-task=1", "slurm/eval.sbatch",
        cwd=site.folder, environ=site.environ() | {"RUNS": "runs/first", "DATA": "prompts.txt"},
    )  # fmt: skip
    for job in (first, tuned, f"{looked}_0", f"{looked}_1", scored):
        site.slurm.wait_for(job, "COMPLETED", "FAILED", seconds=200)
        assert site.slurm.job(job)["JobState"] == "COMPLETED", site.story("tuned")
    for name, step in (("first", 20), ("tuned", 10)):
        answers = (site.run_dir(name) / f"answers-step-{step:08d}.jsonl").read_text().splitlines()
        assert [json.loads(line)["prompt"] for line in answers] == ["The", "A union"]
    scores = json.loads((site.run_dir("first") / "scores-step-00000020.json").read_text())
    assert scores["examples"] == 1, "the text is one document, and one of the two tasks has none"
    assert 1 < scores["metrics"]["perplexity"] < 10_000
    assert site.rows("tuned")[0]["loss"] < site.rows("first")[0]["loss"] - 0.1  # it began with those weights


def test_a_sweep_is_an_array_a_rung(site: Site) -> None:
    """Four trials on two ranks each, two of which go on, then one; one diverges. The report is the end."""
    folder = site.folder
    words = [word for word in site.overrides() if "run.steps" not in word]
    (folder / "space.toml").write_text(
        'deepspeed_config = "ds.json"\nmethod = "halving"\ntrials = 4\neta = 2\nsteps = 8\nranks = 2\n'
        f"overrides = {json.dumps(words)}\n"
        '[space]\n"optimizer.params.lr" = [1e-4, 3e-3, 1e-3, 1e30]\n'
    )
    environ = {
        "SPACE": "space.toml",
        "OUT": "runs/search",
        "OPTIONS": "--gpus-per-node=2 --ntasks-per-node=2 --cpus-per-task=1 --time=10",
        "PYTHONPATH": str(ROOT),
        "SETUP": f"PATH={ROOT}/.venv/bin:$PATH",
    }
    site.slurm.run("bash", "slurm/sweep.sbatch", cwd=folder, environ=environ)
    out = folder / "runs" / "search"

    def said() -> str:
        return "\n".join(f"{path.name}: {path.read_text()[-1500:]}" for path in sorted(out.glob("*.log")))

    wait_until((out / "best.json").exists, 300, said)
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [len([row for row in rows if row["rung"] == rung]) for rung in range(3)] == [4, 2, 1], rows
    assert [row["exit_code"] for row in rows if row["value"] is None] == [70], rows
    assert rows[-1]["steps"] == 8


def stand_in(folder: Path, name: str, body: str) -> None:
    """A program of that name, which notes its command line and then does `body`."""
    (folder / "bin").mkdir(exist_ok=True)
    path = folder / "bin" / name
    path.write_text(f'#!/bin/bash\nprintf "%s\\n" "$*" >> {folder}/{name}.said\n{body}\n')
    path.chmod(0o755)


def test_a_sif_is_apptainers(site: Site) -> None:
    """The stand-in does what Apptainer does with `exec`: run the command, with the same environment."""
    stand_in(
        site.folder, "apptainer", 'while [[ "$1" != *.sif ]]; do shift; done; shift; IN_IT=yes exec "$@"'
    )
    job = site.train(
        "boxed", script="slurm/train-container.sbatch", overrides=("run.steps=10",), CONTAINER="my.sif",
        CONTAINER_OPTIONS="--bind /scratch", SETUP=f"PATH={site.folder}/bin:{ROOT}/.venv/bin:$PATH",
    )  # fmt: skip
    site.slurm.wait_for(job, "COMPLETED", "FAILED", seconds=200)
    assert site.slurm.job(job)["JobState"] == "COMPLETED", site.story("boxed")
    said = (site.folder / "apptainer.said").read_text().splitlines()
    inside = "exec --nv --bind /scratch my.sif bigtfm "
    assert all(line.startswith(inside) for line in said), said
    assert [line.removeprefix(inside).split()[0] for line in said] == ["check", *["train"] * 4, "again"]
    assert site.rows("boxed")[-1]["step"] == 10


def test_another_image_is_pyxis(site: Site) -> None:
    """srun refuses --container-image where there is no Pyxis; the stand-in takes it, as Pyxis would."""
    body = (
        "kept=()\n"
        'for word in "$@"; do case $word in --container-*) ;; *) kept+=("$word") ;; esac; done\n'
        'exec /usr/bin/srun "${kept[@]}"'
    )
    stand_in(site.folder, "srun", body)
    image = ["--container-image=nvcr.io#nvidia/pytorch:25.06-py3", "--container-mounts=/scratch:/scratch"]
    job = site.train(
        "pulled", script="slurm/train-container.sbatch", overrides=("run.steps=10",),
        CONTAINER=image[0].partition("=")[2], CONTAINER_OPTIONS=image[1],
        SETUP=f"PATH={site.folder}/bin:{ROOT}/.venv/bin:$PATH",
    )  # fmt: skip
    site.slurm.wait_for(job, "COMPLETED", "FAILED", seconds=200)
    assert site.slurm.job(job)["JobState"] == "COMPLETED", site.story("pulled")
    said = (site.folder / "srun.said").read_text().splitlines()
    assert len(said) == 3
    assert all(set(image) <= set(line.split()) for line in said), said
    assert [line.split("bigtfm ")[1].split()[0] for line in said] == ["check", "train", "again"]
    with pytest.raises(RuntimeError, match="unrecognized option"):
        site.slurm.run("srun", image[0], "true", cwd=site.folder)


def test_a_chain_where_requeue_is_forbidden(site: Site) -> None:
    slurm = site.slurm
    job = site.train("chained", "--no-requeue", "--time=7", AGAIN="chain")
    numbers = [job]
    for _ in range(2):
        site.wait_for_step("chained", 10 + (site.rows("chained") or [{"step": 0}])[-1]["step"])
        slurm.scancel(f"--signal={signal.SIGUSR1.name}", job)
        came_to = slurm.wait_for(job, "FAILED", seconds=60)
        assert came_to["ExitCode"] == "75:0", site.story("chained")
        (job,) = slurm.run("squeue", "-h", "-o", "%i", "-n", "chained", cwd=site.folder).split()
        numbers.append(job)
        starts = len(numbers)
        wait_until(
            lambda n=starts: len(site.status("chained")["starts"]) == n, 120, lambda: site.story("chained")
        )
    slurm.wait_for(job, "COMPLETED", "FAILED", seconds=200)
    found = slurm.job(job)
    assert (found["JobState"], found["TimeLimit"], found["NumNodes"]) == ("COMPLETED", "00:07:00", "2"), (
        site.story("chained")
    )
    status = site.status("chained")
    assert [start["job"] for start in status["starts"]] == numbers
    assert all(later["first"] == earlier["last"] for earlier, later in pairwise(status["starts"]))
    wait_until(lambda: not slurm.run("squeue", "-h", "-n", "chained", cwd=site.folder), 20)  # nothing waits


def test_where_requeue_is_refused_the_log_says_what_to_do(site: Site) -> None:
    job = site.train("refused", "--no-requeue", nodes=1)
    site.wait_for_step("refused", 5)
    site.slurm.scancel("--signal=USR1", job)
    assert site.slurm.wait_for(job, "FAILED", seconds=60)["ExitCode"] == "75:0"
    said = (site.folder / f"slurm-refused-{job}.log").read_text()
    assert (
        "Slurm does not requeue this job. Fix: submit it again, it goes on; the next time with AGAIN=chain"
        in said
    )


def test_status_knows_a_start_before_its_ranks_do(site: Site) -> None:
    """Requeued five times while it starts: it is running or waiting, never failed, and goes on."""
    job = site.train("early", nodes=1, overrides=("run.steps=20",))
    for number in range(1, 6):
        site.slurm.wait_for(job, "RUNNING", seconds=60)
        wait_until(lambda n=number: len(site.events("early")) >= n, 30)
        told = site.status("early")
        assert (told["state"], told["step"], told["tokens_per_second"]) == ("running", 0, None), told
        assert "no step yet" in told["where"]
        time.sleep(number)
        site.slurm.scontrol("requeue", job)
        site.slurm.wait_for(job, "PENDING", "RUNNING", seconds=60, restarts=number)
        assert site.status("early")["state"] in ("waiting", "running"), site.status("early")
    site.slurm.wait_for(job, "COMPLETED", "FAILED", seconds=120)
    assert site.slurm.job(job)["JobState"] == "COMPLETED", site.story("early")


def test_two_jobs_of_one_run(site: Site) -> None:
    """The second is sent away, and neither its end nor its words are taken for the first's."""
    first = site.train("both", nodes=1, overrides=("run.steps=4000",))
    site.wait_for_step("both", 5)
    second = site.train("both", nodes=1, overrides=("run.steps=4000",))
    site.slurm.wait_for(second, "FAILED", seconds=120)
    assert (site.slurm.job(second)["ExitCode"], site.slurm.job(second)["Restarts"]) == ("64:0", "0")
    assert "another training is at work here" in (site.folder / f"slurm-both-{second}.log").read_text()
    status = site.status("both")
    assert (status["state"], status["job"]) == ("running", first)
    os.kill(trainers(site.slurm, site.slurm.job(first)["NodeList"])[0], signal.SIGKILL)
    site.slurm.wait_for(first, "PENDING", "RUNNING", seconds=60, restarts=1)


def test_a_run_whose_folder_is_gone_begins_anew(site: Site) -> None:
    job = site.train("gone", nodes=1)
    site.wait_for_step("gone", 5)
    shutil.rmtree(site.run_dir("gone"))
    site.slurm.wait_for(job, "PENDING", "RUNNING", seconds=120, restarts=1)
    site.wait_for_step("gone", 1)
