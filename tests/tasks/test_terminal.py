"""`bigtfm chat`: a conversation over standard input."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from task_runs import learnt

from bigtfm.config.problems import ConfigProblem
from bigtfm.tasks.evaluate import Options, evaluate
from bigtfm.tasks.terminal import talk

ASKED = {"ping": "pong", "day": "night", "black": "white", "up": "down"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """A run that has learnt four answers by heart."""
    rows = [
        {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}
        for a, b in ASKED.items()
    ]
    folder, overrides = tmp_path_factory.mktemp("chat"), ("objective.kind=completion", "run.steps=40")
    return learnt(folder, tiny_data / "tokenizer", "chat", rows * 50, *overrides)


@pytest.mark.slow
@pytest.mark.launcher
def test_it_answers_line_by_line_until_an_empty_one(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("ping\n/new\nblack\n\nup\n"))
    talk(run, None, max_new_tokens=8, temperature=0.0, top_p=1.0, seed=0)
    assert capsys.readouterr().out.splitlines() == ["pong", "white"]


def test_a_run_of_text_does_not_chat(tmp_path: Path) -> None:
    with pytest.raises(ConfigProblem, match="not learnt to chat"):
        talk(tmp_path, None, max_new_tokens=8, temperature=0.0, top_p=1.0, seed=0)


@pytest.mark.slow
@pytest.mark.launcher
def test_its_answers_have_bits_per_byte(run: Path, tmp_path: Path) -> None:
    learnt_well = {asked: ASKED[asked] for asked in ("ping", "black")}
    for name, answers in (("right", learnt_well), ("wrong", {"ping": "white", "black": "pong"})):
        rows = [{"instruction": asked, "output": answer} for asked, answer in answers.items()]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    right, wrong = (
        evaluate(run, [str(tmp_path / f"{name}.jsonl")], Options(num_beams=1, max_new_tokens=8))
        for name in ("right", "wrong")
    )
    assert right is not None
    assert wrong is not None
    assert right.metrics["exact_match"] == 100
    assert right.metrics["bits_per_byte"] < 0.5 < right.baseline["bits_per_byte"]
    assert wrong.metrics["bits_per_byte"] > right.metrics["bits_per_byte"] + 1
    low, high = right.intervals["bits_per_byte"]
    assert low <= right.metrics["bits_per_byte"] <= high
    low, high = right.baseline_intervals["chrf"]
    assert low <= right.baseline["chrf"] <= high
