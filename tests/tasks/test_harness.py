"""lm-evaluation-harness: the same scores as its own model of transformers has of the exported run."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import small_models

from bigtfm.huggingface.export_hf import export_hf

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # the harness's own
]
TEXT = "My fellow Americans, the state of our Union is strong. " * 6


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    folder = tmp_path_factory.mktemp("harness") / "run"
    folder.mkdir()
    small_models.save_run(folder, tiny_data / "tokenizer", "gpt", max_seq_len=32)
    return folder


@pytest.fixture(scope="module")
def ours(run: Path) -> Any:
    from bigtfm.tasks.harness import Bigtfm

    return Bigtfm(str(run))


@pytest.fixture(scope="module")
def exported(run: Path) -> str:
    export_hf(run, run.parent / "hf")
    return str(run.parent / "hf")


def theirs(exported: str, bos: bool) -> Any:
    """bos: put before each text; a whole text gets one anyway."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(exported, device="cpu", dtype="float32", add_bos_token=bos)


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=each) for each in arguments]


def test_continuations_score_as_with_transformers(ours: Any, exported: str) -> None:
    asked = requests(
        ("My fellow Americans,", " the state"), ("The state of the ", "Union"), ("", "We"),
        (TEXT, " is strong."), ("a", " b c d e"),
    )  # fmt: skip
    sides = (ours, theirs(exported, bos=True))
    found, wanted = (side.loglikelihood(asked, disable_tqdm=True) for side in sides)
    assert [p for p, _ in found] == pytest.approx([p for p, _ in wanted], rel=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]


def test_whole_texts_score_as_with_transformers(ours: Any, exported: str) -> None:
    asked, sides = requests((TEXT,), ("Short.",)), (ours, theirs(exported, bos=False))
    found, wanted = (side.loglikelihood_rolling(asked, disable_tqdm=True) for side in sides)
    assert found == pytest.approx(wanted, rel=1e-4)


def test_what_is_written_ends_at_a_stop(ours: Any) -> None:
    [free] = ours.generate_until(requests(("My fellow", {"max_gen_toks": 12})), disable_tqdm=True)
    assert free
    stop = free[len(free) // 2]
    [cut] = ours.generate_until(
        requests(("My fellow", {"max_gen_toks": 12, "until": [stop]})), disable_tqdm=True
    )
    assert cut == free.partition(stop)[0]


def test_a_local_task_by_the_harnesss_own_evaluator(run: Path, tmp_path: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from bigtfm.tasks.harness import Bigtfm

    rows = [{"question": f"Is {n} even?", "answer": n % 2} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "even", "dataset_path": "json", "output_type": "multiple_choice",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}}, "test_split": "test",
        "doc_to_text": "{{question}}", "doc_to_choice": [" yes", " no"], "doc_to_target": "answer",
    }  # fmt: skip
    found = simple_evaluate(
        Bigtfm(str(run)), tasks=[task], bootstrap_iters=0, task_manager=TaskManager(include_defaults=False)
    )
    assert 0 <= found["results"]["even"]["acc,none"] <= 1
    assert found["n-samples"]["even"]["effective"] == 8
