"""Word vectors in every format, as a run's token embedding."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import gensim
import numpy as np
import pytest
import rank_runner
import torch
from conftest import TINY, losses
from safetensors.torch import load_file

from bigtfm.config.problems import ConfigProblem, DataProblem
from bigtfm.config.run import load_run_config
from bigtfm.config.sections import ModelSection
from bigtfm.data.tokenizer import load_tokenizer
from bigtfm.data.vectors import load_vectors
from bigtfm.export import export
from bigtfm.job import check_job
from bigtfm.word_vectors import projected, rows_of

THEIRS = Path(gensim.__file__).parent / "test" / "test_data"
WORDS = {"the": [1.0, 0, 0, 2], "people": [0, 1.0, 0, 0], "and": [0, 0, 3.0, 0], "our": [-1, 0, 0, 1.0]}
MODEL = ModelSection(hidden_size=4, num_attention_heads=2)


def written(folder: Path, header: bool) -> Path:
    lines = [f"{word} {' '.join(map(str, vector))}" for word, vector in WORDS.items()]
    path = folder / ("vectors.vec" if header else "glove.txt")
    path.write_text("\n".join([f"{len(WORDS)} 4"] * header + lines) + "\n")
    return path


@pytest.mark.parametrize("header", [True, False])
def test_text_with_and_without_a_header(header: bool, tmp_path: Path) -> None:
    vectors = load_vectors(written(tmp_path, header))
    assert vectors.vector_size == 4
    assert vectors["people"].tolist() == [0, 1, 0, 0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("test_glove.txt", 50),
        ("lee_fasttext.vec", 10),
        ("lee_fasttext_new.bin", 10),
        ("euclidean_vectors.bin", 10),
    ],
)
def test_files_of_others(name: str, size: int) -> None:
    """GloVe's text, word2vec's text and binary, fastText's own."""
    vectors = load_vectors(THEIRS / name)
    assert vectors.vector_size == size
    assert len(vectors.key_to_index) > 3


@pytest.mark.parametrize(
    "content", [b"", b"hello world\n", b"3 4\nthe 1 2\n", b"\x80\x04}.", b"the 1 2 x\n", os.urandom(300)]
)
def test_what_is_none_is_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "vectors.txt"
    path.write_bytes(content)
    with pytest.raises(DataProblem, match="holds no word vectors"):
        load_vectors(path)
    with pytest.raises(DataProblem, match="no such file"):
        load_vectors(tmp_path / "gone")


NONE = {"empty": b"", "prose": b"Call me Ishmael.\n", "another": b'{"the": [1, 2]}\n', "alone": b"the\n"}


@pytest.mark.parametrize("name", [*NONE, "gone", "a folder"])
def test_a_job_is_refused_before_it_starts(
    name: str, tmp_path: Path, tiny_data: Path, deepspeed_json: Callable[..., Path]
) -> None:
    path, files = tmp_path / "vectors.txt", [None, deepspeed_json()]
    if name in NONE:
        path.write_bytes(NONE[name])
    elif name == "a folder":
        path.mkdir()
    args = [*TINY, f"data.path={tiny_data}", f"run.dir={tmp_path}", f"run.vectors={path}", "run.steps=1"]
    with pytest.raises(DataProblem, match=r"vectors\.txt: (holds no word vectors|no such file)"):
        check_job(*files, args, 1)
    (tmp_path / load_run_config(None, args).run.name / "checkpoints" / "step-00000001").mkdir(parents=True)
    check_job(*files, args, 1)  # it has begun: nobody reads them any more


def test_the_tokens_that_begin_a_word_get_theirs(tmp_path: Path, tiny_data: Path) -> None:
    tokenizer = load_tokenizer(tiny_data / "tokenizer")
    rows, values, coverage = rows_of(load_vectors(written(tmp_path, True)), tokenizer, MODEL, 0)
    names = [tokenizer.decode([int(row)]).strip().lower() for row in rows]
    assert set(names) <= set(WORDS)
    assert {"the", "and"} <= set(names)
    assert coverage.found == len(rows) < coverage.words
    assert values.std() == pytest.approx(MODEL.init_std)
    assert values.mean(0) == pytest.approx(0, abs=1e-6)
    theirs = np.array([WORDS[name] for name in names])
    theirs -= theirs.mean(0)
    assert values == pytest.approx(theirs * MODEL.init_std / theirs.std(), abs=1e-6)
    assert f"{len(rows)} of" in coverage.line("x", 4)


@pytest.mark.parametrize("size", [3, 10, 24])
def test_a_projection_keeps_what_it_can(size: int) -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((50, 3)) @ rng.standard_normal((3, 10))  # of rank 3
    found = projected(values, size, 0)
    assert found.shape == (50, size)
    assert found @ found.T == pytest.approx(values @ values.T), "all angles and distances"


def test_settings_that_can_not_be_are_refused() -> None:
    for wrong in (["run.vectors=a", "run.init_from=b"], ["tune.embeddings=false"]):
        with pytest.raises(ConfigProblem):
            load_run_config(None, wrong)


@pytest.mark.launcher
@pytest.mark.slow
def test_a_run_begins_with_them_at_every_stage_and_may_leave_them_alone(
    tmp_path: Path, tiny_data: Path
) -> None:
    path = written(tmp_path, True)
    jobs = []
    for stage in (0, 1, 3):
        content = {
            "train_batch_size": 8, "train_micro_batch_size_per_gpu": 2,
            "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "weight_decay": 0.1}},
            "zero_optimization": {"stage": stage},
        }  # fmt: skip
        (tmp_path / f"{stage}.json").write_text(json.dumps(content))
        jobs.append(
            [f"{stage}.json", *TINY, f"data.path={tiny_data}", f"run.vectors={path}", "tune.embeddings=false",
             "model.tied_embeddings=false", f"run.name=vectors-{stage}", "run.steps=4"]
        )  # fmt: skip
    finished = rank_runner.train_all(jobs, tmp_path, world_size=2)
    assert finished.codes == [0, 0], finished.output[-3000:]
    assert "projected from 4 to 32" in finished.output
    reference = losses(tmp_path / "runs" / "vectors-0")
    model = load_run_config(None, [*TINY]).model
    tokenizer = load_tokenizer(tiny_data / "tokenizer")
    rows, values, _ = rows_of(load_vectors(path), tokenizer, model, load_run_config(None).run.seed)
    for stage in (0, 1, 3):
        assert losses(tmp_path / "runs" / f"vectors-{stage}") == pytest.approx(reference, abs=1e-5)
        out = tmp_path / f"{stage}.safetensors"
        export(tmp_path / "runs" / f"vectors-{stage}", out, dtype="fp32", step=None, best=False, force=False)
        embedding = load_file(out)["embed_tokens.weight"]
        assert torch.equal(embedding[torch.from_numpy(rows)], torch.from_numpy(values)), "to the bit"
