"""What can't be evaluated, predicted or exported: one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from task_runs import learnt

from bigtfm.config.problems import ConfigProblem, DataProblem, StorageProblem
from bigtfm.huggingface.export_hf import export_hf
from bigtfm.tasks.evaluate import Options, evaluate, predict

pytestmark = [pytest.mark.launcher, pytest.mark.slow]
GOOD = {"text": "a fine film", "label": "good"}
BAD = {"text": "dull and long", "label": "bad"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """A classifier that has seen two rows very often."""
    folder, films = tmp_path_factory.mktemp("films"), (GOOD, BAD) * 40
    overrides = ("model.family=bert", "objective.kind=classification", "run.steps=20")
    return learnt(folder, tiny_data / "tokenizer", "classification", films, *overrides, batch=4)


def rows(folder: Path, *found: object) -> list[str]:
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in found))
    return [str(folder / "rows.jsonl")]


def test_predictions_are_kept_and_labels_need_not_be_there(run: Path, tmp_path: Path) -> None:
    kept = tmp_path / "new" / "said.jsonl"
    found = evaluate(run, rows(tmp_path, GOOD, BAD, GOOD), Options(), kept)
    assert found is not None
    assert found.metrics == {"accuracy": 1.0, "f1": 1.0}
    assert found.baseline["accuracy"] == pytest.approx(2 / 3)
    lines = [json.loads(line) for line in kept.read_text().splitlines()]
    assert lines[1] == {"predicted": "bad", "reference": "bad"}
    unlabelled = [{"text": BAD["text"], "label": "?"}, {"text": ""}, {"text": GOOD["text"]}]
    assert list(predict(run, rows(tmp_path, *unlabelled), Options())) == ["bad", None, "good"]


@pytest.mark.parametrize(
    ("found", "columns", "what"),
    [
        ([], (), "no examples"),
        ([GOOD, {"text": "x", "label": "meh"}], (), r"rows.jsonl:2: unknown label 'meh'.*bad, good"),
        ([{"text": "x"}], (), r"rows.jsonl:1: no column 'label'"),
        ([GOOD], ("label=stars",), r"no column 'stars'.*--column"),
        ([{"text": ["x"], "label": "bad"}], (), "'text' is of type list"),
    ],
)
def test_rows_that_are_none(
    found: list[object], columns: tuple[str, ...], what: str, run: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataProblem) as caught:
        evaluate(run, rows(tmp_path, *found), Options(columns=columns))
    assert caught.match(what)


def test_a_column_that_the_task_does_not_read(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigProblem, match="reads no 'txt'"):
        evaluate(run, rows(tmp_path, GOOD), Options(columns=("txt=text",)))


def test_predictions_that_have_no_place_are_told_before_the_work(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path, tmp_path / "file" / "said.jsonl"):
        with pytest.raises(StorageProblem, match=r"can't be written.*another --predictions"):
            evaluate(run, ["nowhere"], Options(), place)


def test_no_rows_are_no_prediction(run: Path, tmp_path: Path) -> None:
    with pytest.raises(DataProblem, match=r"rows\.jsonl: no rows"):
        list(predict(run, rows(tmp_path), Options()))
    with pytest.raises(DataProblem, match=r"rows\.jsonl:2: no column 'text'. Fix: name it with --column"):
        list(predict(run, rows(tmp_path, {"text": "x"}, {"txt": "x"}), Options()))


def test_a_damaged_task(run: Path, tmp_path: Path) -> None:
    path = run / "task.json"
    whole = path.read_text()
    try:
        path.write_text(whole.replace('"classification"', "5"))
        with pytest.raises(DataProblem, match=r"task.json: damaged"):
            evaluate(run, rows(tmp_path, GOOD), Options())
    finally:
        path.write_text(whole)


def test_its_shape_is_none_of_transformers(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigProblem, match="no Hugging Face architecture has this shape"):
        export_hf(run, tmp_path / "hf")
