"""Distillation: the loss, its sum over any split, what is refused, and that it teaches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import rank_runner
import small_models
import torch
import torch.nn.functional as F
from compression_runs import QUIET, SHAPE, Compress, ds_json
from conftest import losses

from bigtfm.model.distillation import Distillation


def pair(kind: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A student and a teacher twice as wide."""
    return small_models.make(kind).train(), small_models.make(kind, seed=5, hidden_size=32)


@pytest.mark.parametrize("kind", ["gpt", "bert", "modern-bert", "transformer", "t5", "bart"])
def test_the_loss_is_hintons_over_the_tokens_with_a_label(kind: str) -> None:
    """Against the formula with softmaxes written out, from the two models' own logits."""
    student, teacher = pair(kind)
    inputs = small_models.batch(student, [3, 7, 5])
    seen: dict[str, torch.Tensor] = {}

    def spy(name: str, model: torch.nn.Module) -> None:
        def keep(x: torch.Tensor, labels: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
            seen[name], seen["labels"] = model.project(x), labels
            return torch.zeros(()), torch.zeros((), dtype=torch.long)

        model.loss, kept = keep, model.loss
        model(**inputs)
        model.loss = kept

    with torch.no_grad():
        spy("student", student)
        spy("teacher", teacher)
        plain, count = student(**inputs)
        Distillation(teacher, temperature=3.0, weight=0.25).attach(student)
        mixed, mixed_count = student(**inputs)
        evaluated, _ = student.eval()(**inputs)
    known = seen["labels"] != -100
    hard = F.cross_entropy(seen["student"][known], seen["labels"][known], reduction="sum")
    p, q = (torch.softmax(seen[name][known] / 3, -1) for name in ("teacher", "student"))
    soft = 9 * (p * (p / q).log()).sum()
    beside = plain - hard  # of a BERT, the next-sentence loss
    torch.testing.assert_close(mixed, 0.75 * hard + 0.25 * soft + beside, rtol=1e-4, atol=1e-4)
    assert mixed_count == count
    torch.testing.assert_close(evaluated, plain, rtol=1e-5, atol=1e-5)
    assert abs(float(mixed - plain)) > 1e-2, "the control"


def test_the_teacher_is_frozen_and_no_part_of_the_student() -> None:
    student, teacher = pair("gpt")
    names = [name for name, _ in student.named_parameters()]
    Distillation(teacher, 2.0, 0.5).attach(student)
    assert [name for name, _ in student.named_parameters()] == names
    assert list(student.state_dict()) == names
    loss, _ = student(**small_models.batch(student, [3, 7, 5]))
    loss.backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not teacher.training


@pytest.mark.slow
@pytest.mark.launcher
def test_every_split_has_the_same_loss(trained: Path, tiny_data: Path, tmp_path: Path) -> None:
    """Stages, accumulation and recomputation, of a student of another shape."""
    student = [
        *SHAPE,
        *QUIET,
        f"data.path={tiny_data}",
        "run.steps=4",
        "model.hidden_size=64",
        f"distill.teacher={trained}",
    ]
    splits = {
        "zero0": ({"stage": 0}, 4, []),
        "zero1": ({"stage": 1}, 1, []),
        "zero2": ({"stage": 2}, 2, ["compute.recompute=full"]),
        "zero3": ({"stage": 3}, 4, []),
    }
    jobs = [
        [
            str(ds_json(tmp_path, zero_optimization=zero, train_micro_batch_size_per_gpu=micro)),
            *student,
            *more,
            f"run.name={name}",
        ]
        for name, (zero, micro, more) in splits.items()
    ]
    jobs.append([jobs[0][0], *student[:-1], "run.name=alone"])
    finished = rank_runner.train_all(jobs, tmp_path, 2)
    assert finished.codes == [0, 0], finished.output[-3000:]
    first = losses(tmp_path / "runs/zero0")
    for name in splits:
        assert losses(tmp_path / "runs" / name) == pytest.approx(first, abs=1e-5), name
    assert losses(tmp_path / "runs/alone")[0] != pytest.approx(first[0], abs=1e-2), "the control"


def last_loss(run: Path) -> float:
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["val_loss"]


@pytest.mark.slow
@pytest.mark.launcher
def test_a_student_learns_more_with_a_teacher_than_alone(
    trained: Path, tiny_data: Path, tmp_path: Path
) -> None:
    student = [str(ds_json(tmp_path)), *SHAPE, *QUIET, f"data.path={tiny_data}", "model.hidden_size=64"]
    student.append("run.steps=80")
    taught = [*student, "run.name=taught", f"distill.teacher={trained}"]
    finished = rank_runner.train_all([[*student, "run.name=alone"], taught], tmp_path, 1)
    assert finished.code == 0, finished.output[-3000:]
    assert last_loss(tmp_path / "runs/taught") < last_loss(tmp_path / "runs/alone") - 0.05


@pytest.mark.slow
@pytest.mark.launcher
def test_a_run_goes_on_with_its_own_teacher_alone(trained: Path, tiny_data: Path, tmp_path: Path) -> None:
    student = [str(ds_json(tmp_path)), *SHAPE, *QUIET, f"data.path={tiny_data}", "model.hidden_size=64"]
    taught = [*student, "run.name=taught", f"distill.teacher={trained}", "run.steps=2"]
    finished = rank_runner.train_all([taught], tmp_path, 1)
    assert finished.code == 0, finished.output[-3000:]
    again = ["train", "--deepspeed_config", *taught, "run.steps=3"]
    finished = rank_runner.run([*again, "distill.weight=0.75"], tmp_path)
    assert finished.code == 64
    assert "distill.weight was 0.9 when this run was saved and is 0.75 now" in finished.output
    assert rank_runner.run(again, tmp_path).code == 0


@pytest.mark.slow
@pytest.mark.launcher
def test_a_teacher_of_other_tokens_is_refused(
    trained: Path, tiny_data: Path, tmp_path: Path, corpus_lines: list[str], compress: Compress
) -> None:
    from bigtfm.data.prepare import prepare

    (tmp_path / "text.txt").write_text("\n\n".join(corpus_lines)[:60_000])
    prepare([str(tmp_path / "text.txt")], tmp_path / "other", vocab_size=400, workers=1, progress=False)
    begin = ["train", "--deepspeed_config", str(ds_json(tmp_path)), *SHAPE, *QUIET, "run.steps=1"]
    begin.append(f"data.path={tiny_data}")
    for overrides, said in (
        ([f"data.path={tmp_path / 'other'}", f"distill.teacher={trained}"], "the teacher's tokenizer is"),
        ([f"distill.teacher={trained}", "model.family=bert"], "the teacher's vocabulary is"),
        ([f"distill.teacher={trained}", "model.vocab_size=600"], "is 512 and the run's is 600"),
        (["distill.teacher=nowhere"], "nowhere: no checkpoint"),
        (["distill.temperature=3"], "do nothing without a teacher"),
    ):  # fmt: skip
        finished = rank_runner.run([*begin, *overrides], tmp_path)
        assert said in finished.output
        assert "Traceback" not in finished.output
        assert finished.code == (76 if "nowhere" in said else 64)
