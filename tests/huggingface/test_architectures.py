"""Tables of Hugging Face architectures: both ways to the bit, a word for all that can't be converted."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch
from safetensors.torch import load_file, save_file

from bigtfm.config.problems import ConfigProblem, DataProblem, Problem
from bigtfm.config.run import load_run_config
from bigtfm.config.sections import ModelSection
from bigtfm.huggingface import config as hf_config
from bigtfm.huggingface.architectures import ARCHITECTURES, LLAMA
from bigtfm.huggingface.files import Plan, TensorFiles, plan_import, read_json
from bigtfm.huggingface.mapping import Conversion, parameter_shapes
from bigtfm.model.layers import sinusoids

ROOT = Path(__file__).parents[2]


@pytest.fixture
def copied(models: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """The same with changes: keys of config.json, and a function of its tensors."""

    def copy(
        name: str,
        tensors: Callable[[dict[str, Any]], object] = lambda tensors: None,
        prefix: str = "",
        **config: Any,
    ) -> Path:
        values = json.loads((models(name) / "config.json").read_text()) | config
        (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))
        content = load_file(models(name) / "model.safetensors")
        tensors(content)
        save_file(
            {prefix + key: value.contiguous() for key, value in content.items()},
            tmp_path / "model.safetensors",
        )
        return tmp_path

    return copy


def planned(folder: Path) -> tuple[Plan, TensorFiles]:
    files, config = TensorFiles(folder), read_json(folder / "config.json")
    architecture, section = (
        hf_config.architecture_of(config),
        hf_config.to_model_section(config, files.shapes),
    )
    size = config["vocab_size"]
    conversion = Conversion(architecture, section, size, size, architecture.position_offset(config))
    return plan_import(files, config, conversion), files


@pytest.mark.parametrize("name", hf_models.MODELS)
def test_every_tensor_comes_back_to_the_bit(name: str, models: Callable[[str], Path]) -> None:
    plan, files = planned(models(name))
    back = {}
    for parameter, names in plan.sources.items():
        ours = plan.read(parameter, files)
        assert ours.shape == plan.shapes[parameter]
        assert ours.dtype == torch.float32
        back |= dict(zip(names, plan.conversion.to_theirs(parameter, ours).values(), strict=True))
    assert set(back) | set(plan.dropped) == set(files.shapes)
    for tensor, values in back.items():
        expected = files.read(tensor)
        if "position" in tensor and plan.conversion.position_offset:  # rows that no position reads
            assert not values[: plan.conversion.position_offset].any()
            expected, values = (part[plan.conversion.position_offset :] for part in (expected, values))
        assert torch.equal(values, expected), tensor


@pytest.mark.parametrize("name", hf_models.MODELS)
def test_config_comes_back(name: str, models: Callable[[str], Path]) -> None:
    config = read_json(models(name) / "config.json")
    files = TensorFiles(models(name))
    architecture, section = (
        hf_config.architecture_of(config),
        hf_config.to_model_section(config, files.shapes),
    )
    special = {key: config[key] for key in ("pad_token_id",) if config.get(key) is not None}
    written = hf_config.to_hf_config(section, config["vocab_size"], architecture, special)
    assert hf_config.resolved(hf_config.expressed(section, written)) == hf_config.resolved(section)
    # transformers reads the same out of it as we do, and writes it its own way.
    import transformers

    theirs = getattr(transformers, hf_models.MODELS[name][0]).from_dict(written).to_dict()
    assert hf_config.resolved(hf_config.expressed(section, theirs)) == hf_config.resolved(section)


def test_every_name_of_the_tables_is_one_of_ours() -> None:
    known = {"encoder.layers.{i}.mlp.up", "decoder.layers.{i}.mlp.up"}
    for section in (
        ModelSection(family="gpt", positions="learned", bias=True, norm="layernorm", tied_embeddings=False),
        ModelSection(
            family="bert",
            positions="learned",
            token_types=2,
            next_sentence=True,
            embedding_norm=True,
            head_bias=True,
            norm="layernorm",
            bias=True,
        ),
        ModelSection(family="encoder_decoder", positions="relative", tied_embeddings=False, head_bias=True),
        ModelSection(family="encoder_decoder", positions="learned", embedding_norm=True),
        ModelSection(family="encoder_decoder", embedding_norm=True),
    ):
        for name in parameter_shapes(section, 64):
            pattern = name.replace(".layers.0.", ".layers.{i}.")
            known |= {pattern, pattern.rpartition(".")[0]}
    for architecture in ARCHITECTURES.values():
        assert set(architecture.tensors) <= known, architecture.model_type


def test_names_without_the_prefix_and_of_tensorflow(copied: Callable[..., Path]) -> None:
    def old(tensors: dict[str, Any]) -> None:
        for name in list(tensors):
            new = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            )
            tensors[new] = tensors.pop(name)
        tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
        tensors["bert.embeddings.position_ids"] = torch.arange(64)

    plan, _ = planned(copied("bert", old))
    assert plan.sources["encoder.embed_norm.weight"] == ["bert.embeddings.LayerNorm.gamma"]
    assert not plan.dropped


def test_bare_model_with_and_without_its_prefix(copied: Callable[..., Path]) -> None:
    plan, _ = planned(copied("llama-bare"))
    assert plan.fresh == ["lm_head.weight"]
    plan, _ = planned(copied("llama-bare", prefix="model."))
    assert plan.fresh == ["lm_head.weight"]


def test_half_precision_becomes_fp32(copied: Callable[..., Path]) -> None:
    def halve(tensors: dict[str, Any]) -> None:
        tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})

    plan, files = planned(copied("qwen2", halve))
    ours = plan.read("decoder.layers.0.attention.qkv.weight", files)
    assert ours.dtype == torch.float32
    back = plan.conversion.to_theirs("decoder.layers.0.attention.qkv.weight", ours)
    assert all(torch.equal(tensor.bfloat16(), files.read(name)) for name, tensor in back.items())


def test_marian_stored_position_encodings(copied: Callable[..., Path]) -> None:
    name = "model.encoder.embed_positions.weight"
    table = sinusoids(torch.arange(64), 32)
    plan, _ = planned(copied("marian", lambda tensors: tensors.update({name: table})))
    assert name not in plan.dropped
    with pytest.raises(DataProblem, match=f"{name} are not the position encodings"):
        planned(copied("marian", lambda tensors: tensors.update({name: table.flip(1)})))


# What must be refused, and the word that its line has to hold.
CONFIGS = {
    "unknown model": ("llama", {"model_type": "falcon"}, "falcon"),
    "no model type": ("llama", {"model_type": ...}, "model_type"),
    "another head": ("bert", {"architectures": ["BertForTokenClassification"]}, "BertForTokenClassification"),
    "activation": ("llama", {"hidden_act": "relu2"}, "hidden_act"),
    "activation of BERT's head": ("bert", {"hidden_act": "relu"}, "hidden_act"),
    "activation of ModernBERT's head": ("modernbert", {"classifier_activation": "silu"}, "classifier_act"),
    "rope type": ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
    "rope type of old": ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
    "partial rotary": ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "relative positions": ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type"),
    "decoder of BERT": ("bert", {"is_decoder": True}, "is_decoder"),
    "scale by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    "cross attention": ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
    "some blocks slide": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2, "layer_types": None},
        "layer_types",
    ),
    "window of one token": ("mistral", {"sliding_window": 1}, "window"),
    "unequal heads": ("bart", {"decoder_attention_heads": 2}, "decoder_attention_heads"),
    "unequal widths": ("bart", {"decoder_ffn_dim": 64}, "decoder_ffn_dim"),
    "two vocabularies": ("marian", {"decoder_vocab_size": 90}, "decoder_vocab_size"),
    "two embeddings": ("marian", {"share_encoder_decoder_embeddings": False}, "share_encoder"),
    "quantised": ("llama", {"quantization_config": {"bits": 4}}, "quantised"),
    "no width": ("llama", {"hidden_size": ...}, "hidden_size"),
    "width of text": ("llama", {"hidden_size": "32"}, "hidden_size"),
    "heads that don't fit": ("llama", {"num_key_value_heads": 3}, "num_kv_heads"),
    "architectures is a number": ("gpt2", {"architectures": 5}, "architectures 5 is no list"),
    "architectures is a text": ("gpt2", {"architectures": "GPT2LMHeadModel"}, "is no list"),
    "architectures of numbers": ("gpt2", {"architectures": [5]}, "is no list"),
    "no features": ("t5", {"d_model": 0}, "wrong type or size"),
    "features of a fraction": ("gpt2", {"n_embd": 1e10}, "n_embd"),
    "no blocks": ("llama", {"num_hidden_layers": 0}, "num_hidden_layers"),
    "millions of blocks": ("mistral", {"num_hidden_layers": 10_000_000}, "num_hidden_layers 10000000 is too"),
    "more blocks than integers": ("modernbert", {"num_hidden_layers": 10**30}, "num_hidden_layers"),
    "too few kinds of blocks": ("mistral", {"layer_types": ["full_attention"]}, "layer_types has 1"),
    "unknown kind of block": ("mistral", {"layer_types": ["sliding", "full", "x"]}, "layer_types.*can't"),
    "kinds of blocks as text": ("modernbert", {"layer_types": "full_attention"}, "layer_types.*can't"),
    "every 0th block": (
        "modernbert",
        {"layer_types": ..., "global_attn_every_n_layers": 0},
        "global_attn_every",
    ),
    "scale of text": ("gpt2", {"scale_attn_weights": "false"}, 'scale_attn_weights "false"'),
    "bias of text": ("llama", {"attention_bias": "false"}, 'attention_bias "false"'),
    "norm bias of text": ("modernbert", {"norm_bias": "no"}, 'norm_bias "no"'),
    "tied by a number": ("t5", {"tie_word_embeddings": 1}, "tie_word_embeddings 1"),
    "sliding of text": ("qwen2", {"use_sliding_window": "false"}, 'use_sliding_window "false"'),
    "scaling without numbers": ("llama", {"rope_scaling": {"rope_type": "llama3"}}, "rotary_scaling"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_config_that_is_refused(case: str, copied: Callable[..., Path]) -> None:
    name, changes, word = CONFIGS[case]
    with pytest.raises(ConfigProblem, match=word) as refused:
        planned(copied(name, **changes))
    assert "\n" not in refused.value.line
    assert "Error" not in refused.value.line
    assert refused.value.exit_code == 64


def pop(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda tensors: tensors.pop(name)


TENSORS: dict[str, tuple[str, Callable[[dict[str, Any]], object], str]] = {
    "missing": ("llama", pop("model.layers.1.mlp.up_proj.weight"), r"has no model\.layers\.1\.mlp\.up_proj"),
    "missing part": ("llama", pop("model.layers.1.self_attn.k_proj.weight"), r"has no .*k_proj"),
    "missing bias": ("qwen2", pop("model.layers.0.self_attn.v_proj.bias"), r"has no .*v_proj\.bias"),
    "missing embedding": ("t5", pop("shared.weight"), r"has no shared\.weight"),
    "missing decoder block": ("t5", pop("decoder.block.2.layer.2.layer_norm.weight"), "has no decoder"),
    "unexpected": ("bert", lambda t: t.update({"classifier.weight": torch.ones(2, 32)}), "classifier.weight"),
    "more blocks": (
        "gpt2",
        lambda t: t.update({"transformer.h.3.ln_1.weight": torch.ones(32)}),
        r"transformer\.h\.3.*set n_layer",
    ),
    "misshapen": ("gpt2", lambda t: t.update({"transformer.ln_f.weight": torch.ones(31)}), r"\[31\].*\[32\]"),
    "wrong vocabulary": (
        "gpt2",
        lambda t: t.update({"transformer.wte.weight": torch.ones(90, 32)}),
        r"\[90, 32\].*\[101, 32\]",
    ),
    "quantised": (
        "gpt2",
        lambda t: t.update({"transformer.ln_f.weight": torch.ones(32, dtype=torch.int8)}),
        "I8",
    ),
    "more blocks of a decoder": (
        "bart",
        lambda t: t.update({"model.decoder.layers.3.fc1.bias": torch.ones(48)}),
        "set decoder_layers",
    ),
    "twice": ("gpt2", lambda t: t.update({"ln_f.weight": torch.ones(32)}), "are the same tensor"),
    "twice with its old name": (
        "bert",
        lambda t: t.update({"bert.embeddings.LayerNorm.gamma": torch.ones(32)}),
        "are the same tensor",
    ),
    "not tied": (
        "gpt2",
        lambda t: t.update({"lm_head.weight": torch.ones(101, 32)}),
        "lm_head.weight differs",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_are_refused(case: str, copied: Callable[..., Path]) -> None:
    name, change, words = TENSORS[case]
    with pytest.raises(DataProblem, match=words):
        planned(copied(name, change))


def test_a_tensor_in_two_files(copied: Callable[..., Path]) -> None:
    folder = copied("gpt2")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    save_file({"transformer.ln_f.weight": torch.ones(32)}, folder / "b.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}'
    )
    with pytest.raises(
        DataProblem, match=r"transformer\.ln_f\.weight stands in b\.safetensors and in another"
    ):
        TensorFiles(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "part.safetensors"])
def test_a_pipe_is_not_waited_for(name: str, tmp_path: Path) -> None:
    if name == "part.safetensors":
        (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"x": "part.safetensors"}}')
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataProblem):
        read_json(tmp_path / name) if name == "config.json" else TensorFiles(tmp_path)


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(DataProblem, match=r"pytorch_model\.bin.*nothing is unpickled"):
        TensorFiles(tmp_path)


def test_folder_without_weights_or_with_half_of_them(copied: Callable[..., Path]) -> None:
    folder = copied("gpt2")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(DataProblem, match="can't be read"):
        TensorFiles(folder)
    weights.unlink()
    with pytest.raises(DataProblem, match=r"has no model\.safetensors"):
        TensorFiles(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1-of-2.safetensors"}}')
    with pytest.raises(DataProblem, match="can't be read"):
        TensorFiles(folder)
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(DataProblem, match="holds no object"):
        TensorFiles(folder)


FIRST_FITS = {
    "configs/gpt_124m.toml": "gpt2",
    "configs/llama_8b.toml": "llama",
    "configs/quickstart.toml": "llama",
}


@pytest.mark.parametrize("path", FIRST_FITS)
def test_our_recipes_fit(path: str) -> None:
    assert hf_config.fitting(load_run_config(ROOT / path).model).model_type == FIRST_FITS[path]


def test_the_original_transformer_is_a_marian() -> None:
    original = ModelSection(
        family="encoder_decoder",
        positions="sinusoidal",
        norm="layernorm",
        norm_order="post",
        activation="relu",
        bias=True,
    )
    assert hf_config.fitting(original).model_type == "marian"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"positions": "sinusoidal"}, "model.positions"),
        ({"norm_order": "post"}, 'model.norm_order "post"'),
        ({"logit_scale": 0.5}, "model.logit_scale 0.5"),
        ({"head_bias": True}, "model.head_bias true"),
        ({"window": 7, "global_every": 2}, "model.global_every 2"),
        ({"family": "bert"}, "closest"),
        ({"family": "encoder_decoder", "positions": "relative"}, "model.attention_scale"),
    ],
)
def test_shape_that_no_architecture_has(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigProblem, match=words):
        hf_config.fitting(ModelSection(**changes))


def test_the_closest_of_a_task_s_model_has_its_head() -> None:
    default = ModelSection(family="bert")
    with pytest.raises(ConfigProblem, match="modernbert, the closest"):
        hf_config.fitting(default)
    with pytest.raises(ConfigProblem, match="bert, the closest") as caught:
        hf_config.fitting(default, "classification")
    assert "modernbert" not in caught.value.line


def test_unknown_architecture_is_guessed() -> None:
    with pytest.raises(ConfigProblem, match="did you mean 'llama'"):
        hf_config.architecture_named("lama")
    assert hf_config.architecture_named("LlamaForCausalLM") is LLAMA


def test_a_name_too_few_is_noticed(models: Callable[[str], Path]) -> None:
    """The plan is complete because it goes by our parameters, not by the table."""
    poorer = replace(LLAMA, tensors={k: v for k, v in LLAMA.tensors.items() if not k.endswith("mlp.down")})
    with pytest.raises(KeyError):
        Conversion(poorer, ModelSection(), 64, 64).stored("decoder.layers.0.mlp.down.weight", (8, 8))
    assert isinstance(Problem, type)
