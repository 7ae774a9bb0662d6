"""Tasks' heads as models of transformers: the same logits, labels and texts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from bigtfm.cli import app
from bigtfm.config.problems import ConfigProblem, NumericsProblem
from bigtfm.config.run import RunConfig
from bigtfm.config.sections import ModelSection, ObjectiveSection
from bigtfm.data.examples import Reader
from bigtfm.data.tokenizer import SentencePieceTokenizer, load_tokenizer
from bigtfm.data.train_tokenizer import train_sentencepiece
from bigtfm.engine import weights
from bigtfm.engine.checkpoint import Progress
from bigtfm.huggingface import export_hf as export_module
from bigtfm.huggingface.export_hf import export_hf
from bigtfm.huggingface.import_hf import identity_of
from bigtfm.model.families import make_model
from bigtfm.model.transformer import init_weights
from bigtfm.run_directory import open_run
from bigtfm.tasks.known import TASKS
from bigtfm.tasks.predictor import Predictor

SIZE = {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 4, "max_seq_len": 40}
LABELS = ["bad", "good", "so, so"]
BERT = {
    "family": "bert", "positions": "learned", "norm": "layernorm", "norm_order": "post", "bias": True,
    "embedding_norm": True, "activation": "gelu",
}  # fmt: skip
GPT2 = {"positions": "learned", "norm": "layernorm", "activation": "gelu_tanh"}
MODERN = {"family": "bert", "norm": "layernorm", "embedding_norm": True, "activation": "geglu"}
EXPORTED = {
    ("bert", "classification"): "BertForSequenceClassification",
    ("bert", "tagging"): "BertForTokenClassification",
    ("bert", "question_answering"): "BertForQuestionAnswering",
    ("roberta", "classification"): "RobertaForSequenceClassification",
    ("roberta", "tagging"): "RobertaForTokenClassification",
    ("roberta", "question_answering"): "RobertaForQuestionAnswering",
    ("gpt2", "classification"): "GPT2ForSequenceClassification",
    ("gpt2", "tagging"): "GPT2ForTokenClassification",
    ("llama", "tagging"): "LlamaForTokenClassification",
    ("mistral", "tagging"): "MistralForTokenClassification",
}
SHAPES: dict[str, dict[str, Any]] = {
    "bert": BERT | {"token_types": 2, "next_sentence": True}, "roberta": BERT | {"activation": "relu"},
    "gpt2": GPT2, "llama": {}, "mistral": {"window": 5}, "modernbert": MODERN,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(corpus_lines: list[str]) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(train_sentencepiece([corpus_lines[0].encode()], vocab_size=320))


@pytest.fixture
def tuned(tmp_path: Path, tokenizer: SentencePieceTokenizer) -> Callable[[str, str], Path]:
    """A run directory as a task's training leaves it, of random weights."""

    def make(shape: str, kind: str) -> Path:
        labels = [] if kind == "question_answering" else LABELS
        model = ModelSection(**(SIZE | SHAPES[shape]), num_labels=len(labels) or None)
        run = RunConfig(
            model=model,
            objective=ObjectiveSection.model_validate({"kind": kind}),
            data={"packing": "best_fit"},  # type: ignore[arg-type]
        )
        module = make_model(run.model, 320, seed=3, objective=run.objective)
        init_weights(module)
        generator = torch.Generator().manual_seed(1)
        tensors = {
            name: (value.detach() + 0.1 * torch.randn(value.shape, generator=generator))
            for name, value in module.named_parameters()
        }
        tensors["embed_tokens.weight"][320:] = 0
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        identity = identity_of(run, 320, tokenizer)
        identity["data"]["packing"] = "best_fit"
        folder, progress = tmp_path / "run", Progress(7, identity=identity)
        weights.save_weights(folder / "checkpoints", shapes, tensors.items(), progress)
        tokenizer.save(folder / "tokenizer")
        task = {"name": kind, "kinds": [kind], "labels": labels, "max_tokens": 40}
        (folder / "task.json").write_text(json.dumps(task))
        return folder

    return make


@pytest.mark.parametrize(("shape", "kind"), EXPORTED)
def test_a_head_gives_the_same_logits(
    shape: str, kind: str, tuned: Callable[[str, str], Path], tmp_path: Path
) -> None:
    name = EXPORTED[shape, kind]
    told = "\n".join(export_hf(tuned(shape, kind), tmp_path / "out", architecture=shape))
    assert f"with {name} of transformers" in told
    assert f"AutoModelFor{name.partition('For')[2]}" in told
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == [name]
    if kind != "question_answering":
        assert config["id2label"] == {"0": "bad", "1": "good", "2": "so, so"}


def test_what_was_imported_keeps_its_config(tuned: Callable[[str, str], Path], tmp_path: Path) -> None:
    """But for its class and labels; its tokenizer tells sentences apart, which our examples don't."""
    folder = tuned("bert", "classification")
    original = {
        "model_type": "bert",
        "architectures": ["BertForPreTraining"],
        "own": 1,
        "id2label": {"0": "x"},
    }
    (folder / "huggingface").mkdir()
    (folder / "huggingface" / "config.json").write_text(json.dumps(original))
    (folder / "huggingface" / "imported.json").write_text(json.dumps({"tokenizer": "any"}))
    export_hf(folder, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["own"], config["architectures"]) == (1, ["BertForSequenceClassification"])
    assert list(config["id2label"].values()) == LABELS
    tokens = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert tokens["model_input_names"] == ["input_ids", "attention_mask"]


@pytest.mark.parametrize("shape", ["bert", "gpt2"])
def test_transformers_labels_texts_as_predict_does(
    shape: str, tuned: Callable[[str, str], Path], tmp_path: Path
) -> None:
    """Pairs too, and padded: the tokenizer puts around them what our examples have."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    run = tuned(shape, "classification")
    export_hf(run, tmp_path / "out")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = ["The people.", "A", "We shall not."]
    inputs = theirs(texts, ["Yes.", "No one.", "B"], return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = model(**inputs).logits
    ours, tokenizer, special = open_run(run)
    reader = Reader(tokenizer, 40, tuple(LABELS))
    rows = [{"text": a, "second": b} for a, b in zip(texts, ["Yes.", "No one.", "B"], strict=True)]
    made = [TASKS["classification"].format.make(row, reader)[0] for row in rows]
    place = -1 if shape == "gpt2" else 0
    expected = torch.stack([torch.from_numpy(s[place]) for s in Predictor(ours, special).scores(made)])
    assert logits == pytest.approx(expected, abs=1e-5)
    assert [model.config.id2label[n] for n in logits.argmax(-1).tolist()] == TASKS["classification"].predict(
        Predictor(ours, special), rows, reader
    )
    assert theirs.model_max_length == 40


def test_a_decoder_whose_only_padding_would_be_its_end_reads_one_text_at_a_time(
    tuned: Callable[[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_module.hf_tokenizer, "pad_id", lambda tokenizer: tokenizer.eos_id)
    export_hf(tuned("gpt2", "classification"), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["pad_token_id"] is None
    assert "pad_token" not in json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())


@pytest.mark.parametrize(
    ("shape", "kind", "why"),
    [
        ("llama", "classification", "LlamaForSequenceClassification's classes have no bias"),
        ("modernbert", "classification", "ModernBertPredictionHead"),
        ("modernbert", "tagging", "ModernBertPredictionHead"),
    ],
)
def test_a_head_that_is_none_of_theirs(
    shape: str, kind: str, why: str, tuned: Callable[[str, str], Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigProblem, match=rf"{why}.*Fix: use it with bigtfm predict"):
        export_hf(tuned(shape, kind), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_bias_that_is_lost_is_noticed(
    tuned: Callable[[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the comparison."""
    monkeypatch.setattr(export_module, "_folded", lambda *_: {"decoder.norm.bias": torch.zeros(32)})
    with pytest.raises(NumericsProblem, match="disagree"):
        export_hf(tuned("gpt2", "classification"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "auto"),
    [
        ("GPT2LMHeadModel", "AutoModelForCausalLM"),
        ("LlamaForCausalLM", "AutoModelForCausalLM"),
        ("BertForMaskedLM", "AutoModelForMaskedLM"),
        ("BertForPreTraining", "AutoModelForPreTraining"),
        ("T5ForConditionalGeneration", "AutoModelForSeq2SeqLM"),
        ("MarianMTModel", "AutoModelForSeq2SeqLM"),
        ("BertForTokenClassification", "AutoModelForTokenClassification"),
        ("BertModel", "AutoModel"),
    ],
)
def test_the_class_that_loads_it_with_its_head(name: str, auto: str) -> None:
    import transformers

    assert export_module._auto_class(name) == auto
    assert hasattr(transformers, auto)


def test_a_model_with_a_head_is_refused_by_import(tuned: Callable[[str, str], Path], tmp_path: Path) -> None:
    export_hf(tuned("bert", "tagging"), tmp_path / "out")
    assert load_tokenizer(tmp_path / "out").vocab_size == 320
    finished = CliRunner().invoke(app, ["import-hf", str(tmp_path / "out"), str(tmp_path / "again")])
    assert isinstance(finished.exception, ConfigProblem)
    assert "BertForTokenClassification can't be converted" in finished.exception.line
