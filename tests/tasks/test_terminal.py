"""`bigtfm chat`: a conversation over standard input."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import rank_runner
from conftest import TINY

from bigtfm.config.problems import ConfigProblem
from bigtfm.data.best_fit import pack
from bigtfm.data.prepare import prepare
from bigtfm.tasks.known import setting_of
from bigtfm.tasks.terminal import talk

ASKED = {"ping": "pong", "day": "night", "black": "white", "up": "down"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """A run that has learnt four answers by heart."""
    folder = tmp_path_factory.mktemp("chat")
    rows = [
        {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}
        for a, b in ASKED.items()
    ]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 50))
    prepare([str(folder / "chat.jsonl")], folder / "data", tokenizer=tiny_data / "tokenizer", workers=1,
            task=setting_of("chat", max_tokens=32), validation_fraction=0, progress=False)  # fmt: skip
    pack(folder / "data", 32)
    content = {
        "train_batch_size": 8, "train_micro_batch_size_per_gpu": 8,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}}, "zero_optimization": {"stage": 0},
    }  # fmt: skip
    (folder / "ds.json").write_text(json.dumps(content))
    args = ["train", "--deepspeed_config", "ds.json", *TINY, "objective.kind=completion", "run.steps=40"]
    more = [f"data.path={folder / 'data'}", "data.packing=best_fit", "run.name=chat"]
    finished = rank_runner.run([*args, *more], folder)
    assert finished.code == 0, finished.output
    return folder / "runs" / "chat"


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
