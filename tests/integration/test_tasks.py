"""Tasks through the loop: ranks and ZeRO stage change nothing; evaluation, too, as one rank or as two."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import rank_runner
from conftest import TINY, losses

from bigtfm.data.best_fit import pack
from bigtfm.data.prepare import prepare
from bigtfm.tasks.known import setting_of

pytestmark = [pytest.mark.launcher, pytest.mark.slow]

SEQ_LEN, MARKS = 32, ".,;:?!"
KINDS = {  # task, objective and family
    "classification": ("classification", "bert"),
    "last-token": ("classification", "gpt"),
    "tagging": ("tagging", "gpt"),
    "question_answering": ("question_answering", "bert"),
    "translation": ("sequence_to_sequence", "encoder_decoder"),
    "chat": ("completion", "gpt"),
}
CELLS = {(1, 0): (8, 1), (2, 1): (4, 1), (2, 3): (2, 2)}  # ranks and stage: micro batch and accumulation


def row_of(task: str, sentence: str) -> dict[str, Any]:
    words = sentence.split()
    if task == "tagging":
        return {
            "words": [w.lower() for w in words],
            "tags": ["B-UP" if w[0].isupper() else "O" for w in words],
        }
    return {
        "classification": {"text": sentence, "label": "long" if len(words) > 7 else "short"},
        "question_answering": {"question": words[0], "context": sentence, "answers": words[-1].strip(MARKS)},
        "translation": {"source": sentence, "target": " ".join(words[:3])},
        "chat": {"messages": [{"role": "user", "content": words[0]},
                              {"role": "assistant", "content": " ".join(words[1:4])}]},
    }[task]  # fmt: skip


@pytest.fixture(scope="module")
def rows(corpus_lines: list[str]) -> list[str]:
    """Parts of sentences, of 4 to 12 words."""
    generator = random.Random(3)
    words = " ".join(corpus_lines)[:60_000].split()
    parts = []
    while len(words) > 12:
        count = generator.randint(4, 12)
        parts.append(" ".join(words[:count]))
        del words[:count]
    return [part for part in parts if part.split()[-1].strip(MARKS).isalpha()]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, rows: list[str]) -> Path:
    """A folder for each task: its data set, and held-out rows of unequal lengths."""
    folder = tmp_path_factory.mktemp("tasks")
    for task in ("classification", "tagging", "question_answering", "translation", "chat"):
        lines = [json.dumps(row_of(task, sentence)) for sentence in rows]
        (folder / f"{task}.jsonl").write_text("\n".join(lines[50:]) + "\n")
        (folder / f"{task}-held-out.jsonl").write_text("\n".join(sorted(lines[:9], key=len)) + "\n")
        prepare([str(folder / f"{task}.jsonl")], folder / task, tokenizer=tiny_data / "tokenizer", workers=1,
                task=setting_of(task, max_tokens=SEQ_LEN), progress=False)  # fmt: skip
        pack(folder / task, SEQ_LEN)
    return folder


def task_of(kind: str) -> str:
    return "classification" if kind == "last-token" else kind


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """Every kind in every cell, six steps each."""
    folder = tmp_path_factory.mktemp("task-runs")
    for ranks in (1, 2):
        jobs = []
        for (of, stage), (micro_batch, accumulation) in CELLS.items():
            content = {
                "train_batch_size": 8, "train_micro_batch_size_per_gpu": micro_batch,
                "gradient_accumulation_steps": accumulation, "gradient_clipping": 1.0,
                "optimizer": {"type": "AdamW", "params": {"lr": 3e-3}}, "zero_optimization": {"stage": stage},
            }  # fmt: skip
            (folder / f"{of}-{stage}.json").write_text(json.dumps(content))
            for kind, (objective, family) in KINDS.items() if of == ranks else ():
                jobs.append(
                    [f"{of}-{stage}.json", *TINY, f"run.name={kind}-{of}-{stage}", f"model.family={family}",
                     f"objective.kind={objective}", f"data.path={data / task_of(kind)}", "model.dropout=0.1",
                     "data.packing=best_fit", "run.steps=6"]
                )  # fmt: skip
        finished = rank_runner.train_all(jobs, folder, world_size=ranks)
        assert finished.codes == [0] * ranks, finished.output[-3000:]
    return folder / "runs"


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_stage_and_accumulation_change_nothing(kind: str, runs: Path) -> None:
    reference, *others = (losses(runs / f"{kind}-{ranks}-{stage}") for ranks, stage in CELLS)
    assert len(reference) == 6
    assert min(reference[1:]) < reference[0] - 0.02, "it learns, so equal curves mean something"
    for other in others:
        assert other == pytest.approx(reference, abs=1e-5)


def evaluated(run: Path, held_out: Path, folder: Path, ranks: int) -> dict[str, Any]:
    args = ["evaluate", "--run", str(run), "--data", str(held_out), "--json", "--num-beams", "1"]
    finished = rank_runner.run([*args, "--max-new-tokens", "8"], folder / str(ranks), ranks)
    assert finished.codes == [0] * ranks, finished.output[-2000:]
    assert all("{" not in output for output in finished.outputs[1:]), "one rank speaks"
    return dict(json.loads(next(line for line in finished.output.splitlines() if line.startswith("{"))))


@pytest.mark.parametrize("kind", ["last-token", "tagging", "question_answering", "translation"])
def test_as_good_by_one_rank_as_by_two_and_from_any_stage(
    kind: str, runs: Path, data: Path, tmp_path: Path
) -> None:
    held_out = data / f"{task_of(kind)}-held-out.jsonl"
    alone = evaluated(runs / f"{kind}-1-0", held_out, tmp_path, 1)
    assert (alone["task"], alone["examples"]) == (task_of(kind), 9)
    together = evaluated(runs / f"{kind}-2-3", held_out, tmp_path, 2)
    assert together["metrics"] == pytest.approx(alone["metrics"], rel=1e-4)
    assert together["baseline"] == pytest.approx(alone["baseline"])
