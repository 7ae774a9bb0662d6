"""bigtfm compare, on runs that were really trained, and on rows that were changed behind their back."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rank_runner
import signing
from conftest import TINY

from bigtfm.compare.cause import likely_cause
from bigtfm.compare.difference import Comparison, compare, relative
from bigtfm.compare.report import draw, verdict
from bigtfm.compare.runs import read_run
from bigtfm.config.problems import ConfigProblem, DataProblem, StorageProblem
from bigtfm.resilience.events import note

BIGTFM = Path(sys.executable).with_name("bigtfm")
STEPS = 12
pytestmark = [pytest.mark.launcher, pytest.mark.slow]


def write_json(path: Path, **changes: Any) -> Path:
    content = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "weight_decay": 0.1}},
        "gradient_clipping": 1.0,
    } | changes
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """The folder of runs that differ from `base` in one thing each."""
    folder = tmp_path_factory.mktemp("compare")
    base = write_json(folder / "base.json")
    other_lr = write_json(
        folder / "lr.json", optimizer={"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.1}}
    )
    other_decay = write_json(
        folder / "decay.json", optimizer={"type": "AdamW", "params": {"lr": 3e-3, "weight_decay": 0.0}}
    )
    other_batch = write_json(folder / "batch.json", train_batch_size=16)
    stage_2 = write_json(folder / "stage-2.json", zero_optimization={"stage": 2})
    fixed = [f"data.path={tiny_data}", *TINY, f"steps={STEPS}"]
    alone = [
        [str(file), f"run.name={name}", *fixed, *overrides]
        for name, file, overrides in (
            ("base", base, []),
            ("longer", base, ["steps=15", "eval.tokens=1024"]),
            ("seed", base, ["seed=7"]),
            ("smooth", base, ["label_smoothing=0.1"]),
            ("l1", base, ["l1=1e-3"]),
            ("narrow", base, ["model.ffn_hidden_size=64"]),
            ("lr", other_lr, []),
            ("decay", other_decay, []),
            ("batch", other_batch, []),
            ("cut", base, ["steps=6"]),
            ("ramp-3", base, ["rampup_sizes=4", "rampup_steps=3"]),
            ("ramp-6", base, ["rampup_sizes=4", "rampup_steps=6"]),
        )
    ]
    for share in (1, 3):
        mixture = f'[{{path = "{tiny_data}"}}, {{path = "{folder / "b"}", weight = {share}.0}}]'
        alone.append([str(base), f"run.name=mixed-{share}", *fixed[1:], f"data.sources={mixture}"])
    shutil.copytree(tiny_data, folder / "b")
    for jobs, ranks in ((alone, 1), ([[str(stage_2), "run.name=two", *fixed]], 2)):
        finished = rank_runner.train_all(jobs, folder, ranks)
        assert finished.codes == [0] * ranks, finished.output[-3000:]
    return folder / "runs"


def compared(runs: Path, a: str, b: str, tolerance: float = 1e-5) -> Comparison:
    return compare(read_run(runs / a), read_run(runs / b), tolerance)


@pytest.fixture
def doctored(runs: Path, tmp_path: Path) -> Callable[..., Comparison]:
    """`base`, compared with a copy of it whose rows a function has changed."""

    def run(change: Callable[[list[dict[str, Any]]], None]) -> Comparison:
        copy = tmp_path / "copy"
        shutil.copytree(runs / "base", copy)
        rows = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
        change(rows)
        (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return compare(read_run(runs / "base"), read_run(copy))

    return run


def test_another_number_of_ranks_and_another_stage_are_the_same_run(runs: Path) -> None:
    c = compared(runs, "base", "two")
    assert c.step is None
    assert verdict(c).startswith(f"same: {STEPS} steps, losses within ")
    assert likely_cause(c) == ("", ())
    assert c.columns["loss"].largest > 0, (
        "other arithmetic, so equal bits would mean that the same run was read"
    )
    differing = {setting.key: setting.decides for setting in c.settings}
    assert differing["ranks"] is differing["zero_optimization.stage"] is False
    assert not any(differing.values())


def test_a_run_that_goes_on_is_the_same_as_far_as_both_go(runs: Path) -> None:
    c = compared(runs, "base", "longer")
    assert verdict(c) == f"same: {STEPS} steps, equal to the bit; B goes on to step 15"
    assert (c.alone(c.a), c.alone(c.b)) == ([], [13, 14, 15])


@pytest.mark.parametrize(
    ("other", "step", "column", "keys"),
    [
        ("seed", 1, "sample_digest", ("run.seed",)),
        ("batch", 1, "sample_digest", ("train_batch_size",)),
        ("lr", 1, "lr", ("optimizer.params.lr",)),
        ("smooth", 1, "loss", ("objective.label_smoothing",)),
        ("narrow", 1, "loss", ("model.ffn_hidden_size",)),
        ("l1", 1, "grad_norm", ("objective.l1",)),
        ("decay", None, "loss", ("optimizer.params.weight_decay",)),
        ("mixed-3", 1, "sample_digest", ("data.sources[1].weight",)),
    ],
)
def test_what_makes_another_run_is_named(
    other: str, step: int | None, column: str, keys: tuple[str, ...], runs: Path
) -> None:
    c = compared(runs, "mixed-1" if other.startswith("mixed") else "base", other)
    assert c.step is not None
    assert c.step == step if step else c.step > 1
    assert c.differing[0] == column
    assert verdict(c).startswith(f"differ from step {c.step} on: ")
    said, named = likely_cause(c)
    assert named == keys
    assert all(key in said for key in keys)


@pytest.mark.parametrize(("factor", "same"), [(1 + 2e-5, False), (1 + 5e-6, True)])
def test_one_loss_of_a_run(factor: float, same: bool, doctored: Callable[..., Comparison]) -> None:
    """The control: a change of twice the tolerance in one row of the rest equal to the bit is found."""

    def change(rows: list[dict[str, Any]]) -> None:
        rows[6]["loss"] *= factor

    c = doctored(change)
    assert (c.step is None) == same
    assert c.columns["loss"].first_bit == c.columns["loss"].largest_at == 7
    if not same:
        assert verdict(c) == "differ from step 7 on: loss by 2.0e-05"
        assert likely_cause(c)[0].startswith(
            "step 7 alone, and the run goes on the same: that row was altered"
        )


def test_one_digest_that_contradicts_its_losses(doctored: Callable[..., Comparison]) -> None:
    def change(rows: list[dict[str, Any]]) -> None:
        rows[4]["sample_digest"] = "0123456789abcdef"

    c = doctored(change)
    assert verdict(c) == "differ from step 5 on: other samples"
    assert likely_cause(c)[0].startswith("step 5 alone, and the losses agree: that row was altered")


def test_a_step_that_one_run_left_out(doctored: Callable[..., Comparison]) -> None:
    def change(rows: list[dict[str, Any]]) -> None:
        rows[6] |= {"loss": math.nan, "skipped": True}

    said = "B left out step 7, whose loss or gradient was not finite (its events.jsonl says why)"
    assert likely_cause(doctored(change)) == (said, ())


def test_another_ramp_up_of_the_batch_is_named(runs: Path) -> None:
    for other, step, key in (("ramp-6", 4, "batch.rampup_steps"), ("base", 1, "batch.rampup_sizes")):
        c = compared(runs, "ramp-3", other)
        assert c.step == step
        said, keys = likely_cause(c)
        assert key in keys, said


def test_a_run_that_went_back_after_a_spike(doctored: Callable[..., Comparison], tmp_path: Path) -> None:
    def change(rows: list[dict[str, Any]]) -> None:
        note(tmp_path / "copy", "spike", step=9, back_to=6, first_sample=56, end_sample=72, loss=9.0)
        for row in rows[6:]:
            row["sample_digest"] = hashlib.sha256(row["sample_digest"].encode()).hexdigest()[:16]
            row["rewinds"] = 1

    c = doctored(change)
    assert c.step == 7
    assert likely_cause(c)[0] == (
        "B went back from step 9 to step 6 when its loss had jumped, and left out samples 56 to 71"
    )


def test_other_samples_from_a_step_on_where_a_process_began(doctored: Callable[..., Comparison]) -> None:
    def change(rows: list[dict[str, Any]]) -> None:
        for row in rows[8:]:
            row["sample_digest"] = hashlib.sha256(row["sample_digest"].encode()).hexdigest()[:16]
            row["loss"] *= 1.01
            row["time"] += 60.0

    assert likely_cause(doctored(change))[0] == "other samples from step 9 on, and B was started anew there"


def test_a_jump_is_told_from_rounding_that_grows(doctored: Callable[..., Comparison], tmp_path: Path) -> None:
    def jump(rows: list[dict[str, Any]]) -> None:
        for row in rows[8:]:
            row["loss"] *= 1.001

    def grow(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            row["loss"] *= 1 + 1e-8 * 2 ** row["step"]

    assert likely_cause(doctored(jump))[0].startswith(
        "a jump at step 9, equal to the bit until then, though no"
    )
    shutil.rmtree(tmp_path / "copy")
    c = doctored(grow)
    assert c.step == 10
    said, _ = likely_cause(c)
    assert said.startswith("rounding that grows tenfold in 3 steps")
    assert "the same within --tolerance 4.3e-05" in said


def test_numbers_that_are_none(doctored: Callable[..., Comparison], tmp_path: Path) -> None:
    def change(rows: list[dict[str, Any]]) -> None:
        for row in rows[5:]:
            row["loss"] = "NaN"

    c = doctored(change)
    assert verdict(c).startswith("differ from step 6 on: loss ")
    assert likely_cause(c)[0] == "loss of B is nan at step 6: numerics"
    both = compare(read_run(tmp_path / "copy"), read_run(tmp_path / "copy"))
    assert verdict(both) == f"same: {STEPS} steps, equal to the bit", "NaN at the same steps is the same"
    draw(both, tmp_path / "nan.png")
    assert [relative(*pair) for pair in ((2.0, 1.0), (float("inf"), 1.0), (0.0, 0.0))] == [
        0.5,
        float("inf"),
        0.0,
    ]


def test_resumes_that_skip_a_batch_or_change_its_size(runs: Path, tmp_path: Path, tiny_data: Path) -> None:
    """Real resumes: a sound one, one of a checkpoint that counts a batch too much, one with another batch."""
    args = ["train", "--deepspeed_config", str(runs.parent / "base.json"), f"data.path={tiny_data}", *TINY]
    write_json(runs.parent / "wide.json", train_batch_size=16)
    for name, off in (("sound", 0), ("off", 8), ("wide", 0)):
        copy = tmp_path / "runs" / name
        shutil.copytree(runs / "cut", copy)
        checkpoint = copy / "checkpoints" / "step-00000006"
        state = json.loads((checkpoint / "state.json").read_text())
        state["progress"]["samples"] += off
        rewrite(checkpoint, "state.json", json.dumps(state))
        if name == "wide":
            args[2] = str(runs.parent / "wide.json")
        resumed = [*args, f"run.name={name}", f"steps={STEPS}", "resume.allow=recipe"]
        finished = rank_runner.run(resumed, tmp_path)
        assert finished.code == 0, finished.output[-3000:]
    base = read_run(runs / "base")
    sound, off = (read_run(tmp_path / "runs" / name) for name in ("sound", "off"))
    assert sound.starts == off.starts == (7,), "the rows tell where it was started anew"
    assert base.starts == ()
    assert verdict(compare(base, sound)) == f"same: {STEPS} steps, equal to the bit"
    c = compare(base, off)
    assert verdict(c).startswith("differ from step 7 on: other samples")
    expected = "B takes at step 7 the samples of A's step 8: it is 1 step ahead, and B was started anew there"
    assert likely_cause(c)[0] == expected
    wide = compare(base, read_run(tmp_path / "runs" / "wide"))
    said, keys = likely_cause(wide)
    assert said.startswith(
        "B takes 512 tokens a step from step 7 on, 256 before: it was resumed with another"
    )
    assert keys == ("train_batch_size",)


def rewrite(checkpoint: Path, name: str, text: str) -> None:
    (checkpoint / name).write_text(text)
    manifest = signing.read(checkpoint / "manifest.json")
    manifest["files"][name] = {
        "bytes": len(text.encode()),
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    signing.write(checkpoint / "manifest.json", manifest)


def test_the_command(runs: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([BIGTFM, "compare", *arguments], capture_output=True, text=True, timeout=60)

    same = run(str(runs / "base"), str(runs / "two"))
    assert same.returncode == 0, same.stderr
    assert same.stdout.startswith(f"same: {STEPS} steps, losses within ")
    assert (runs / "base" / "compare-two.png").read_bytes().startswith(b"\x89PNG")
    picture = tmp_path / "seed.png"
    other = run(str(runs / "base"), str(runs / "seed"), "--json", "--picture", str(picture))
    assert other.returncode == 1, other.stderr
    found = json.loads(other.stdout)
    assert found["same"] is False
    assert found["keys"] == ["run.seed"]
    assert found["columns"]["sample_digest"]["first_step"] == 1
    assert found["columns"]["sample_digest"]["largest"] == "Infinity"
    assert {"key": "run.seed", "a": 1234, "b": 7, "decides_the_curve": True} in found["settings"]
    assert picture.stat().st_size > 10_000
    loose = run(str(runs / "base"), str(runs / "decay"), "--tolerance", "0.5", "--picture", str(picture))
    assert loose.returncode == 0, "within a tolerance of a half"
    absent = str(tmp_path / "nowhere" / "picture.png")
    undrawn = run(str(runs / "base"), str(runs / "two"), "--picture", absent)
    assert (undrawn.returncode, undrawn.stderr.count("\n")) == (74, 1)
    assert undrawn.stdout.startswith("same: "), "the verdict does not hang on the picture"
    nowhere = run(str(runs / "base"), str(tmp_path))
    assert nowhere.returncode == 65
    assert nowhere.stderr.count("\n") == 1
    assert "not a run directory: metrics.jsonl is missing" in nowhere.stderr


ROW = '{"step": 1, "loss": 2.0, "lr": 0.1, "sample_digest": "a"}\n'


def row(**changes: Any) -> str:
    return json.dumps(json.loads(ROW) | changes) + "\n"


@pytest.mark.parametrize("other", [b"a record", b"", None], ids=["a record", "empty", "a pipe"])
def test_a_picture_replaces_nothing_but_a_picture(runs: Path, tmp_path: Path, other: bytes | None) -> None:
    c, path = compared(runs, "base", "seed"), tmp_path / "there"
    os.mkfifo(path) if other is None else path.write_bytes(other)
    with pytest.raises(ConfigProblem, match="is there already, and no PNG"):
        draw(c, path)
    assert path.is_fifo() if other is None else path.read_bytes() == other
    path.unlink()
    for _ in range(2):  # the second replaces the first
        draw(c, path)
    assert [file.name for file in tmp_path.iterdir()] == ["there"]
    for nameless in ("", "/"):
        with pytest.raises(ConfigProblem, match="is no name of a file"):
            draw(c, Path(nameless))


def test_only_a_picture_that_was_asked_for_is_missed(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = tmp_path / ("n" * 250)  # its picture's name is longer than a file system takes
    shutil.copytree(runs / "base", long)
    c = compare(read_run(runs / "base"), read_run(long))
    draw(c, runs / "base" / f"compare-{long.name}.png")
    said = capsys.readouterr().err
    assert said.startswith("bigtfm: warning: no picture: ")
    assert said.endswith("can't be written: File name too long\n")
    with pytest.raises(StorageProblem, match="can't be written: No such file"):
        draw(c, tmp_path / "nowhere" / "picture.png")


def test_losses_as_large_as_a_float_are_drawn(doctored: Callable[..., Comparison], tmp_path: Path) -> None:
    def change(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            row["loss"] = 1e308 * (-1) ** row["step"]

    c = doctored(change)
    assert verdict(c).startswith("differ from step 1 on: loss ")
    draw(c, tmp_path / "large.png")


@pytest.mark.parametrize(
    "name",
    ["step", "tokens", "loss", "lr", "grad_norm", "val_loss", "time", "seconds", "mfu", "tokens_per_second"],
)
@pytest.mark.parametrize("value", ["much", None, [1], True, 10**400], ids=lambda value: str(value)[:5])
def test_a_value_of_a_wrong_type_or_size_is_a_line(name: str, value: Any, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(row() + row(**{"step": 2, name: value}))
    for file in ("resolved.json", "deepspeed.json"):
        (tmp_path / file).write_text("{}")
    with pytest.raises(DataProblem, match=r"metrics.jsonl:2: this line is no step"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("metrics.jsonl", "[" * 100_000 + "\n", "this line is damaged"),
        ("metrics.jsonl", '{"step": 1, "loss"\n{"step": 2}\n', "this line is damaged"),
        ("metrics.jsonl", '{"step": 1, "loss": "much", "lr": 0.1, "sample_digest": "a"}\n', "is no step"),
        ("metrics.jsonl", '{"step": 1, "loss": 2.0, "lr": 0.1}\n', "is no step"),
        ("metrics.jsonl", '{"step": 2, "loss": 2.0, "lr": 0.1, "sample_digest": "a"}\n' * 2, "out of order"),
        ("metrics.jsonl", "", "no step is in both runs"),
        ("resolved.json", "{", "is damaged"),
        ("resolved.json", '{"steps": 4}', "is damaged"),
    ],
)
def test_damaged_files_are_a_line(name: str, text: str, said: str, runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "base", tmp_path / "copy")
    (tmp_path / "copy" / name).write_text(text)
    with pytest.raises(DataProblem, match=said):
        compare(read_run(runs / "base"), read_run(tmp_path / "copy"))


def test_without_checkpoints_data_sets_go_by_their_paths(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "base", tmp_path / "copy")
    resolved = json.loads((tmp_path / "copy" / "resolved.json").read_text())
    resolved["run_config"]["data"]["path"] = "data/elsewhere"
    (tmp_path / "copy" / "resolved.json").write_text(json.dumps(resolved))

    def decisive() -> list[str]:
        c = compare(read_run(runs / "base"), read_run(tmp_path / "copy"))
        return [setting.key for setting in c.settings if setting.decides]

    assert decisive() == [], "the checkpoints say that the data are the same"
    shutil.rmtree(tmp_path / "copy" / "checkpoints")
    assert decisive() == ["data.path"]
