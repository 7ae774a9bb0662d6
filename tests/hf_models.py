"""Tiny random models of every Hugging Face architecture that is converted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bigtfm.config.run import load_run_config

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
ROPE = {"max_position_embeddings": 64, "num_key_value_heads": 2, "vocab_size": 101}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
BART = {
    "vocab_size": 101,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
}
T5 = {
    "vocab_size": 101,
    "d_model": 32,
    "d_kv": 12,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 24,
    "decoder_start_token_id": 0,
    "n_positions": 64,
}
BERT = SIZES | {"vocab_size": 101, "max_position_embeddings": 64}
GPT2 = {"vocab_size": 101, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}

# name -> (configuration class, its arguments, model class)
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "gpt2": ("GPT2Config", GPT2, "GPT2LMHeadModel"),
    "gpt2-bare": ("GPT2Config", GPT2, "GPT2Model"),
    "gpt2-unscaled": ("GPT2Config", GPT2 | {"scale_attn_weights": False, "n_inner": 40}, "GPT2LMHeadModel"),
    "llama": ("LlamaConfig", SIZES | ROPE, "LlamaForCausalLM"),
    "llama-bare": ("LlamaConfig", SIZES | ROPE, "LlamaModel"),
    "llama3": (
        "LlamaConfig",
        SIZES
        | ROPE
        | {"rope_theta": 5000.0, "rope_scaling": LLAMA3, "tie_word_embeddings": True, "head_dim": 12},
        "LlamaForCausalLM",
    ),
    "llama-attention-bias": ("LlamaConfig", SIZES | ROPE | {"attention_bias": True}, "LlamaForCausalLM"),
    "llama-bias": (
        "LlamaConfig",
        SIZES | ROPE | {"attention_bias": True, "mlp_bias": True},
        "LlamaForCausalLM",
    ),
    "mistral": ("MistralConfig", SIZES | ROPE | {"sliding_window": 9}, "MistralForCausalLM"),
    "mistral-wide": ("MistralConfig", SIZES | ROPE | {"sliding_window": None}, "MistralForCausalLM"),
    "qwen2": ("Qwen2Config", SIZES | ROPE, "Qwen2ForCausalLM"),
    "qwen2-sliding": (
        "Qwen2Config",
        SIZES | ROPE | {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0},
        "Qwen2ForCausalLM",
    ),
    "bert": ("BertConfig", BERT, "BertForMaskedLM"),
    "bert-pairs": ("BertConfig", BERT | {"type_vocab_size": 3}, "BertForPreTraining"),
    "bert-bare": ("BertConfig", BERT, "BertModel"),
    "roberta": ("RobertaConfig", BERT | {"type_vocab_size": 1}, "RobertaForMaskedLM"),
    "roberta-bare": (
        "RobertaConfig",
        BERT | {"type_vocab_size": 1, "hidden_act": "gelu_new"},
        "RobertaModel",
    ),
    "modernbert": (
        "ModernBertConfig",
        BERT | {"local_attention": 10, "num_hidden_layers": 5, "pad_token_id": 0},
        "ModernBertForMaskedLM",
    ),
    "modernbert-bare": (
        "ModernBertConfig",
        BERT | {"local_attention": 10, "pad_token_id": 0},
        "ModernBertModel",
    ),
    "modernbert-bias": (
        "ModernBertConfig",
        BERT | {"norm_bias": True, "pad_token_id": 0, "decoder_bias": False, "local_attention": 8},
        "ModernBertForMaskedLM",
    ),
    "t5": ("T5Config", T5, "T5ForConditionalGeneration"),
    "t5-gated": (
        "T5Config",
        T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        "T5ForConditionalGeneration",
    ),
    "t5-encoder": ("T5Config", T5, "T5EncoderModel"),
    "bart": ("BartConfig", BART, "BartForConditionalGeneration"),
    "bart-bare": ("BartConfig", BART | {"scale_embedding": True}, "BartModel"),
    "marian": (
        "MarianConfig",
        BART
        | {
            "activation_function": "swish",
            "scale_embedding": True,
            "pad_token_id": 100,
            "decoder_start_token_id": 100,
        },
        "MarianMTModel",
    ),
}


def overrides(run_toml: Path) -> list[str]:
    """What `--config run.toml` says, as key=value."""
    run = load_run_config(run_toml)
    found = []
    for table in ("model", "objective"):
        for key, value in getattr(run, table).model_dump(exclude_defaults=True).items():
            found.append(f"{table}.{key}={json.dumps(value)}")
    return found


def make(name: str, folder: Path) -> Path:
    """Saves the model to folder/name: every weight random, biases and norms included."""
    import torch
    import transformers

    config_class, arguments, model_class = MODELS[name]
    config = getattr(transformers, config_class)(**arguments)
    torch.manual_seed(sum(map(ord, name)))
    model = getattr(transformers, model_class)(config)
    if name == "t5-gated":  # version 1.1's output layer is its own; transformers 5 ties a new model's
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    randomise(model)
    model.save_pretrained(folder / name)
    return folder / name


def randomise(model: Any) -> None:
    """Weights that a mistake shows in."""
    import torch

    buffers = [buffer for name, buffer in model.named_buffers() if name == "final_logits_bias"]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for tensor in trained + buffers:
            around = 1.0 if tensor.dim() == 1 and bool((tensor == 1).all()) else 0.0  # a norm's weight
            tensor.copy_(torch.randn_like(tensor) * 0.2 + around)


def both(name: str, folder: Path, **loading: Any) -> tuple[Any, Any]:
    """The model as transformers has it, and as ours."""
    import torch
    import transformers

    from bigtfm.huggingface import config as hf_config
    from bigtfm.huggingface.files import TensorFiles, plan_import, read_json
    from bigtfm.huggingface.mapping import Conversion
    from bigtfm.model.families import make_model

    folder = make(name, folder)
    theirs = getattr(transformers, MODELS[name][2]).from_pretrained(folder, **loading).eval()
    theirs.generation_config = transformers.GenerationConfig()  # none of the architecture's own
    files, config = TensorFiles(folder), read_json(folder / "config.json")
    architecture, section = (
        hf_config.architecture_of(config),
        hf_config.to_model_section(config, files.shapes),
    )
    size = config["vocab_size"]
    conversion = Conversion(architecture, section, size, size, architecture.position_offset(config))
    plan, ours = plan_import(files, config, conversion), make_model(section, size)
    with torch.no_grad():
        for parameter_name, parameter in ours.named_parameters():
            parameter.copy_(plan.read(parameter_name, files))
    return theirs, ours
