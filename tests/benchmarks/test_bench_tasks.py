"""docs/tasks.md has the figures that were measured; each task beats what is reached without a model."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import bench_tasks
import pytest
import task_data

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results/xeon-2-cores-2026-11/tasks.jsonl"
ROWS = [json.loads(line) for line in RESULTS.read_text().splitlines()]
BY_TASK = {row["task"]: row for row in ROWS}
LESS_IS_BETTER = ("bits_per_byte", "perplexity")


def test_the_document_has_the_measured_figures() -> None:
    text = (ROOT / "docs/tasks.md").read_text(encoding="utf-8")
    assert "\n".join(bench_tasks.table(ROWS)) in text


@pytest.mark.parametrize("task", [task for task in BY_TASK if task != "pretraining"])
def test_a_task_beats_its_baseline_in_time(task: str) -> None:
    """By the first metric, with intervals that do not overlap."""
    row = BY_TASK[task]
    name = row["shown"][0]
    model, without = row["intervals"][name], row["baseline_intervals"][name]
    assert model[1] < without[0] if name in LESS_IS_BETTER else model[0] > without[1]
    assert row["cpu_seconds"] < 2 * 180


def test_pretraining_pays_for_every_seed() -> None:
    row = BY_TASK["pretraining"]
    assert len(row["scratch"]) == len(row["pretrained"]) >= 3
    assert min(row["pretrained"]) > max(row["scratch"])


def test_a_new_row_takes_the_place_of_its_tasks_old_one(tmp_path: Path) -> None:
    path = tmp_path / "new" / "tasks.jsonl"
    for task, value in (("a", 1), ("b", 2), ("a", 3)):
        bench_tasks.keep(path, {"task": task, "value": value})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"task": "a", "value": 3}, {"task": "b", "value": 2},
    ]  # fmt: skip


def test_what_is_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[str] = []

    def train(folder: Path, recipe: Any, name: str, *overrides: str) -> dict[str, float]:
        trained.append(name)
        return {"seconds": 1.0, "cpu_seconds": 2.0}

    monkeypatch.setattr(bench_tasks, "train", train)
    monkeypatch.setattr(bench_tasks, "bigtfm", lambda *arguments, folder: '{"metrics": {"f1": 0.5}}')
    recipe = bench_tasks.RECIPES["tagging"]
    for name in ("one", "one", "two"):
        found = bench_tasks.learn(tmp_path, recipe, name, tmp_path / "rows")
        assert (found["metrics"], found["cpu_seconds"]) == ({"f1": 0.5}, 2.0)
    assert trained == ["one", "two"]


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


def test_a_catalogue_of_messages() -> None:
    pairs = [
        (b"", b"header"),
        (b"menu\x04_Open <b>file</b>", b"_M\xe1\xbb\x9f t\xe1\xba\xadp tin"),
        (b"%d page\0%d pages", b"%d trang"),
    ]
    place, tables, text = 28 + 16 * len(pairs), [b"", b""], b""
    for pair in pairs:
        for side, value in enumerate(pair):
            tables[side] += struct.pack("<2I", len(value), place + len(text))
            text += value + b"\0"
    head = struct.pack("<7I", 0x950412DE, 0, len(pairs), 28, 28 + 8 * len(pairs), 0, 0)
    found = list(task_data._messages(head + tables[0] + tables[1] + text))
    assert found == [("Open file", "Mở tập tin"), ("%d page", "%d trang")]


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
