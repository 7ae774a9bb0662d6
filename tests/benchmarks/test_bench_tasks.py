"""docs/tasks.md has the figures that were measured; each task beats what is reached without a model."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import bench_tasks
import pytest
import task_data

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results/xeon-2-cores-2026-11/tasks.jsonl"
ROWS = [json.loads(line) for line in RESULTS.read_text().splitlines()]
BY_TASK = {row["task"]: row for row in ROWS}
NOT_BETTER = {("question_answering", "f1"), ("summarisation", "rougeLsum")}
LESS_IS_BETTER = ("bits_per_byte", "perplexity")


def test_the_document_has_the_measured_figures() -> None:
    text = (ROOT / "docs/tasks.md").read_text(encoding="utf-8")
    assert "\n".join(bench_tasks.table(ROWS)) in text


@pytest.mark.parametrize("task", [row["task"] for row in ROWS if "metrics" in row])
def test_a_task_beats_its_baseline_in_time(task: str) -> None:
    """By every metric that is shown, with intervals that do not overlap."""
    row = BY_TASK[task]
    for name in row["shown"]:
        model, without = row["intervals"][name], row["baseline_intervals"][name]
        better = model[1] < without[0] if name in LESS_IS_BETTER else model[0] > without[1]
        assert better or (task, name) in NOT_BETTER
    assert row["cpu_seconds"] < 2 * 180


def test_an_imported_model_pays_for_every_seed() -> None:
    scratch, after = (start["accuracy"] for start in BY_TASK["imported"]["starts"].values())
    small = BY_TASK["pretraining"]["starts"]["from scratch"]["accuracy"]
    assert len(scratch) == len(after) >= 3
    assert min(after) > max(*scratch, *small)


def test_other_labels_and_texts_without_labels_do_no_harm() -> None:
    """docs/tasks.md says that what they gain is within the noise."""
    scratch, *others = (start["accuracy"] for start in BY_TASK["pretraining"]["starts"].values())
    assert len(others) == 2
    assert all(len(accuracy) == len(scratch) >= 3 and mean(accuracy) > mean(scratch) for accuracy in others)


def test_each_start_has_the_lr_that_is_best_on_validation_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the average over seeds; the rows that measure it have no say."""
    asked: list[tuple[float, str]] = []

    def learn(folder: Path, recipe: Any, name: str, rows: Path, *overrides: str) -> dict[str, Any]:
        asked.append((recipe.lr, rows.stem))
        best = 0.2 if "run.init_from=runs/a" in overrides else 0.1
        lucky = recipe.lr == 0.3 and "run.seed=0" in overrides
        fine = 0.9 if lucky else 0.8 if recipe.lr == best else 0.1
        accuracy = fine if rows.stem == "validation" else recipe.lr
        return {"metrics": {"accuracy": accuracy}, "baseline": {"accuracy": 0.5}, "cpu_seconds": 1.0}

    monkeypatch.setattr(bench_tasks, "learn", learn)
    monkeypatch.setattr(
        bench_tasks,
        "labelled",
        lambda folder: [Path(f"{name}.jsonl") for name in ("few", "validation", "test")],
    )
    starts = {"from scratch": (), "after a": ("run.init_from=runs/a",)}
    row = bench_tasks.tuned(tmp_path, "pretraining", "few", bench_tasks.TUNED, starts, (0.1, 0.2, 0.3), 2)
    assert {start: one["lr"] for start, one in row["starts"].items()} == {"from scratch": 0.1, "after a": 0.2}
    assert [one["accuracy"] for one in row["starts"].values()] == [[0.1, 0.1], [0.2, 0.2]]
    assert [lr for lr, rows in asked if rows == "test"] == [0.1, 0.1, 0.2, 0.2]


def test_few_validation_and_test_rows_are_apart(tmp_path: Path) -> None:
    folder = tmp_path / "rows/classification"
    folder.mkdir(parents=True)
    for split, begin in (("train", 0), ("test", 9000)):
        lines = [json.dumps({"text": f"review {begin + n}", "label": "positive"}) for n in range(1200)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    sides = [set(path.read_text().splitlines()) for path in bench_tasks.labelled(tmp_path)]
    assert [len(side) for side in sides] == [bench_tasks.LABELLED, bench_tasks.LABELLED, 1200]
    assert not sides[0] & sides[1]
    assert not (sides[0] | sides[1]) & sides[2]


def test_a_new_row_takes_the_place_of_its_tasks_old_one(tmp_path: Path) -> None:
    path = tmp_path / "new" / "tasks.jsonl"
    for task, value in (("a", 1), ("b", 2), ("a", 3)):
        bench_tasks.keep(path, {"task": task, "value": value})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"task": "a", "value": 3}, {"task": "b", "value": 2},
    ]  # fmt: skip


def test_runs_beside_each_other_keep_their_own_lr(tmp_path: Path) -> None:
    paths = []
    for lr in (0.1, 0.2):
        recipe = replace(bench_tasks.TUNED, lr=lr)
        paths.append(Path(bench_tasks.deepspeed_json(tmp_path, recipe, f"run-{lr:g}")))
    assert [json.loads(path.read_text())["optimizer"]["params"]["lr"] for path in paths] == [0.1, 0.2]


def test_what_is_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def bigtfm(command: str, *arguments: str, folder: Path) -> str:
        [name] = [
            text.rpartition("=")[2].rpartition("/")[2]
            for text in arguments
            if text.startswith(("run.name=", "runs/"))
        ]
        calls.append(f"{command} {name}")
        return '{"metrics": {"f1": 0.5}}'

    monkeypatch.setattr(bench_tasks, "bigtfm", bigtfm)
    monkeypatch.setattr(bench_tasks, "environment_row", lambda: {"commit": "abc"})
    recipe = bench_tasks.RECIPES["tagging"]
    for name, rows in (("one", "test"), ("one", "test"), ("one", "validation"), ("two", "test")):
        found = bench_tasks.learn(tmp_path, recipe, name, tmp_path / rows)
        assert (found["metrics"], found["commit"]) == ({"f1": 0.5}, "abc")
    assert calls == ["train one", "evaluate one", "evaluate one", "train two", "evaluate two"]


def test_a_glosss_nouns_and_their_links() -> None:
    lines = [
        "00000001 03 n 02 dog 0 domestic_dog 0 002 @ 00000002 n 0000 #m 00000003 n 0000 | a canine of the "
        'pack that guards a house; "the dog barked"',
        "00000002 03 n 01 canine 0 000 | a carnivore",
        "00000003 03 n 01 pack 0 000 | a group",
    ]
    synsets = dict(task_data._synset(line) for line in lines)
    dog = synsets["00000001"]
    assert dog.words == ["dog", "domestic dog"]
    assert dog.gloss == "a canine of the pack that guards a house"
    found = [(match.group(), kind) for match, kind in task_data._tails(dog, synsets, {"canine", "house"})]
    assert found == [("canine", "hypernym"), ("pack", "member_of"), ("house", "no_relation")]


def test_names_that_differ_in_colours_of_skin_are_on_one_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {
        ":woman_pilot_dark_skin_tone:": ":pilote_femme_peau_foncée:",
        ":women_medium-light_skin_tone_medium_skin_tone:": ":femmes_peau_moyennement_claire_et_peau_mate:",
        ":women:": ":femmes:",
        ":woman_pilot:": ":pilote_femme:",
        ":medium_skin_tone:": ":peau_légèrement_mate:",
    }
    english = {str(n): {"en": name} for n, name in enumerate([*names, ":it_has_no_French_name:"])}
    with zipfile.ZipFile(tmp_path / "package.whl", "w") as package:
        package.writestr("emoji/unicode_codes/emoji.json", json.dumps(english))
        french = json.dumps({str(n): name for n, name in enumerate(names.values())})
        package.writestr("emoji/unicode_codes/emoji_fr.json", french)
    monkeypatch.setattr(task_data, "fetched", lambda package, folder: tmp_path / "package.whl")
    monkeypatch.setattr(task_data, "held_out", lambda key, task: key == "women")
    rows = list(task_data.translation(tmp_path))
    assert sorted(key for key, _ in rows) == ["medium skin tone", "woman pilot", "woman pilot", "women"]
    assert {"source": "woman pilot", "target": "pilote femme"} in [row for _, row in rows]


def test_what_asks_alike_is_on_one_side_and_each_held_out_answer_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [
        "I would like to know the tip on 50 dollars",
        "Play music",
        "Hi! I would like to know the tip on 7",
    ]
    others = [("function_call", "{}"), ("observation", "10"), ("gpt", "10 dollars."), ("human", "Thanks!")]
    conversations = [
        {"conversations": [{"from": kind, "value": text} for kind, text in [("human", first), *others]]}
        for first in asked
    ]
    data = json.dumps(conversations).encode()
    with tarfile.open(tmp_path / "package.tar.gz", "w:gz") as package:
        member = tarfile.TarInfo("llamafactory/data/glaive_toolcall_en_demo.json")
        member.size = len(data)
        package.addfile(member, io.BytesIO(data))
    monkeypatch.setattr(task_data, "fetched", lambda package, folder, source: tmp_path / "package.tar.gz")
    monkeypatch.setattr(task_data, "held_out", lambda key, task: key == asked[1])
    rows = list(task_data.chat(tmp_path))
    assert [key for key, _ in rows] == [asked[0], asked[1], asked[1], asked[0]]
    assert [len(row["messages"]) for _, row in rows] == [4, 2, 4, 4]
    assert all(row["messages"][-1]["from"] == "gpt" for _, row in rows)


def test_rows_of_one_key_are_on_one_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(str(n // 5), {"text": str(n)}) for n in range(2000)]
    monkeypatch.setitem(task_data.SOURCES, "chat", lambda folder: iter(rows))
    counts = task_data.write("chat", tmp_path)
    assert counts["train"] + counts["test"] == 2000
    assert 0.05 < counts["test"] / 2000 < 0.15
    sides = [
        {
            int(json.loads(line)["text"]) // 5
            for line in (tmp_path / f"chat/{split}.jsonl").read_text().splitlines()
        }
        for split in ("train", "test")
    ]
    assert not sides[0] & sides[1]
