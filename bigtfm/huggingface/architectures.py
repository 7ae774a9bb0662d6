"""The Hugging Face architectures that are converted: their tensors and their keys of config.json.

Read from transformers' modelling and configuration code, 5.24; what 4.50 wrote is understood too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from bigtfm.config.problems import ConfigProblem, shown
from bigtfm.config.sections import HEADED, ModelSection
from bigtfm.huggingface.mapping import Architecture, Config, Head, Key

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
_GATED = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu": "geglu",
    "gelu_new": "geglu_tanh",
    "gelu_pytorch_tanh": "geglu_tanh",
}
_T5_ACTIVATIONS = {**_ACTIVATIONS, "gated-gelu": "geglu_tanh", "gated-silu": "swiglu"}


def _table(modules: Mapping[str, str], **stacks: tuple[str, Mapping[str, str]]) -> dict[str, tuple[str, ...]]:
    """Our modules -> theirs, split at blanks; of each stack: the name of a block, and the modules in it."""
    table = {ours: tuple(theirs.split()) for ours, theirs in modules.items()}
    for side, (block, parts) in stacks.items():
        for ours, theirs in parts.items():
            table[f"{side}.layers.{{i}}.{ours}"] = tuple(f"{block}.{part}" for part in theirs.split())
    return table


def _problem(what: str, fix: str) -> ConfigProblem:
    return ConfigProblem(what, where="config.json", fix=fix)


def _flag(config: Config, name: str, default: bool = False) -> bool:
    value = config.get(name, default)
    if not isinstance(value, bool):
        raise _problem(f"{name} {shown(value)} can't be converted", "it must be true or false")
    return value


def _classes(module: str) -> dict[str, str]:
    return {"task_head.classifier": module}


# --- decoders -----------------------------------------------------------------------------------------------

GPT2 = Architecture(
    model_type="gpt2",
    classes=("GPT2LMHeadModel", "GPT2Model"),
    prefix="transformer.",
    tensors=_table(
        {
            "embed_tokens": "transformer.wte",
            "decoder.embed_positions": "transformer.wpe",
            "decoder.norm": "transformer.ln_f",
            "lm_head": "lm_head",
        },
        decoder=(
            "transformer.h.{i}",
            {
                "attention_norm": "ln_1",
                "attention.qkv": "attn.c_attn",
                "attention.out": "attn.c_proj",
                "mlp_norm": "ln_2",
                "mlp.up": "mlp.c_fc",
                "mlp.down": "mlp.c_proj",
            },
        ),
    ),
    keys={
        "hidden_size": Key("n_embd"),
        "num_layers": Key("n_layer"),
        "num_attention_heads": Key("n_head"),
        "ffn_hidden_size": Key("n_inner", None),
        "max_seq_len": Key("n_positions"),
        "activation": Key("activation_function", "gelu_new", _ACTIVATIONS),
        "norm_eps": Key("layer_norm_epsilon", 1e-5),
        "tied_embeddings": Key("tie_word_embeddings", True),
        "dropout": Key("resid_pdrop", 0.1),
        "attention_dropout": Key("attn_pdrop", 0.1),
        "init_std": Key("initializer_range", 0.02),
    },
    fixed={"family": "gpt", "positions": "learned", "norm": "layernorm", "bias": True},
    required={"scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    read=lambda config, _: {} if _flag(config, "scale_attn_weights", True) else {"attention_scale": 1.0},
    write=lambda section, _: {
        "scale_attn_weights": section.attention_scale != 1.0,
        "embd_pdrop": section.dropout,
    },
    transposed=True,  # its Conv1D computes x W
    heads={
        "classification": Head(
            "GPT2ForSequenceClassification", _classes("score"), folded="decoder.norm.bias"
        ),
        "tagging": Head("GPT2ForTokenClassification", _classes("classifier")),
    },
    ignored=r"\.attn\.(masked_)?bias$",  # the causal mask
)

_LLAMA_TENSORS = _table(
    {"embed_tokens": "model.embed_tokens", "decoder.norm": "model.norm", "lm_head": "lm_head"},
    decoder=(
        "model.layers.{i}",
        {
            "attention_norm": "input_layernorm",
            "attention.qkv": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
            "attention.out": "self_attn.o_proj",
            "mlp_norm": "post_attention_layernorm",
            "mlp.gate_up": "mlp.gate_proj mlp.up_proj",
            "mlp.down": "mlp.down_proj",
        },
    ),
)
_LLAMA_KEYS = {
    "hidden_size": Key("hidden_size"),
    "num_layers": Key("num_hidden_layers"),
    "num_attention_heads": Key("num_attention_heads"),
    "num_kv_heads": Key("num_key_value_heads", None),
    "head_dim": Key("head_dim", None),
    "ffn_hidden_size": Key("intermediate_size"),
    "max_seq_len": Key("max_position_embeddings"),
    "activation": Key("hidden_act", "silu", _GATED),
    "norm_eps": Key("rms_norm_eps", 1e-6),
    "tied_embeddings": Key("tie_word_embeddings", False),
    "attention_dropout": Key("attention_dropout", 0.0),
    "init_std": Key("initializer_range", 0.02),
}
_LLAMA_FIXED = {"family": "gpt", "positions": "rotary", "norm": "rmsnorm"}


def _llama_heads(name: str) -> dict[str, Head | str]:
    return {
        "classification": f"{name}ForSequenceClassification's classes have no bias, and no norm before "
        "them has one that could take it",
        "tagging": Head(f"{name}ForTokenClassification", _classes("score")),
    }


def _rotary(config: Config) -> Config:
    """`rope_theta` and `rope_scaling` (4.50), or `rope_parameters` (5)."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise _problem(f"rope_type {shown(kind)} can't be converted", "only default and llama3 can")
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise _problem("partial_rotary_factor can't be converted", "only models that rotate whole heads can")
    fields: Config = {"rotary_base": rope.get("rope_theta", config.get("rope_theta", 10000.0))}
    if kind == "llama3":
        length = rope.get("original_max_position_embeddings", config.get("max_position_embeddings"))
        factors = [rope.get(name) for name in ("factor", "low_freq_factor", "high_freq_factor")]
        fields["rotary_scaling"] = (*factors, length)
    return fields


def _write_rotary(section: ModelSection) -> Config:
    if section.rotary_scaling is None:
        return {"rope_theta": section.rotary_base, "rope_scaling": None}
    factor, low, high, length = section.rotary_scaling
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": int(length),
    }
    return {"rope_theta": section.rotary_base, "rope_scaling": scaling}


def _layer_types(config: Config) -> list[str]:
    """What kind each block is; []: the config does not say."""
    kinds, known = config.get("layer_types"), ("sliding_attention", "full_attention")
    if kinds is None:
        return []
    if not isinstance(kinds, list) or any(kind not in known for kind in kinds):
        raise _problem(f"layer_types {shown(kinds)} can't be converted", f"each must be {' or '.join(known)}")
    if len(kinds) != (blocks := config["num_hidden_layers"]):
        raise _problem(f"layer_types has {len(kinds)} entries for {blocks} num_hidden_layers", "restore it")
    return kinds


def _windows(layer_types: list[str], window: int | None) -> Config:
    """`window` and `global_every` of blocks that are sliding_attention or full_attention each."""
    wide = [kind == "full_attention" for kind in layer_types]
    if window is None or all(wide):
        return {}
    for every in range(len(wide) + 1):
        if wide == [every > 0 and index % every == 0 for index in range(len(wide))]:
            return {"window": window, "global_every": every}
    raise _problem(
        f"layer_types {shown(layer_types)} can't be converted: not every n-th block has full attention",
        "convert a model whose blocks all slide, or all but every n-th from the first on",
    )


def _llama_bias(config: Config) -> Config:
    return {"bias": any([_flag(config, name) for name in ("attention_bias", "mlp_bias")])}


LLAMA = Architecture(
    model_type="llama",
    classes=("LlamaForCausalLM", "LlamaModel"),
    prefix="model.",
    tensors=_LLAMA_TENSORS,
    keys=_LLAMA_KEYS,
    heads=_llama_heads("Llama"),
    fixed=_LLAMA_FIXED,
    read=lambda config, _: {**_rotary(config), **_llama_bias(config)},
    # Queries' biases alone are Qwen2's, but its tokenizer would come with it (docs/huggingface.md).
    write=lambda section, _: {
        **_write_rotary(section),
        "attention_bias": section.bias or bool(section.qkv_bias),
        "mlp_bias": section.bias or bool(section.qkv_bias),
    },
    zeros=lambda config: _without(
        config, attention_bias=r"attention\.(qkv|out)\.bias", mlp_bias=r"mlp\.(gate_up|down)\.bias"
    ),
)

MISTRAL = Architecture(
    model_type="mistral",
    classes=("MistralForCausalLM", "MistralModel"),
    prefix="model.",
    tensors=_LLAMA_TENSORS,
    keys=_LLAMA_KEYS | {"num_kv_heads": Key("num_key_value_heads", 8)},
    heads=_llama_heads("Mistral"),
    fixed=_LLAMA_FIXED,
    read=lambda config, _: {
        **_rotary(config),
        **_windows(
            _layer_types(config) or ["sliding_attention"] * config["num_hidden_layers"],
            _reach(config.get("sliding_window", 4096)),
        ),
    },
    write=lambda section, _: {
        **_write_rotary(section),
        "sliding_window": section.window + 1 if section.window else None,
    },
)


def _reach(sliding_window: int | None) -> int | None:
    """Tokens back of a causal window, which counts the token itself."""
    return None if sliding_window is None else sliding_window - 1


def _qwen2_windows(config: Config) -> Config:
    if not _flag(config, "use_sliding_window"):
        return {}
    first = config.get("max_window_layers", 28)
    kinds = _layer_types(config) or [
        "sliding_attention" if index >= first else "full_attention"
        for index in range(config["num_hidden_layers"])
    ]
    return _windows(kinds, _reach(config.get("sliding_window", 4096)))


QWEN2 = Architecture(
    model_type="qwen2",
    classes=("Qwen2ForCausalLM", "Qwen2Model"),
    prefix="model.",
    tensors=_LLAMA_TENSORS,
    keys=_LLAMA_KEYS,
    heads=_llama_heads("Qwen2"),
    fixed=_LLAMA_FIXED | {"qkv_bias": True},
    read=lambda config, _: {**_rotary(config), **_qwen2_windows(config)},
    write=lambda section, _: {
        **_write_rotary(section),
        "use_sliding_window": section.window is not None,
        "sliding_window": section.window + 1 if section.window else None,
        "max_window_layers": 0 if section.window else section.num_layers,
    },
)


def _without(config: Config, **patterns: str) -> str:
    """The patterns whose keys the config leaves out, as one; "" where it has no bias at all, or all."""
    absent = [pattern for key, pattern in patterns.items() if not config.get(key)]
    return "|".join(absent) if len(absent) < len(patterns) else ""


# --- encoders -----------------------------------------------------------------------------------------------


def _bert_block(prefix: str) -> tuple[str, Mapping[str, str]]:
    return (
        f"{prefix}.encoder.layer.{{i}}",
        {
            "attention.qkv": "attention.self.query attention.self.key attention.self.value",
            "attention.out": "attention.output.dense",
            "attention_norm": "attention.output.LayerNorm",
            "mlp.up": "intermediate.dense",
            "mlp.down": "output.dense",
            "mlp_norm": "output.LayerNorm",
        },
    )


def _bert_embeddings(prefix: str) -> dict[str, str]:
    return {
        "embed_tokens": f"{prefix}.embeddings.word_embeddings",
        "encoder.embed_positions": f"{prefix}.embeddings.position_embeddings",
        "encoder.embed_token_types": f"{prefix}.embeddings.token_type_embeddings",
        "encoder.embed_norm": f"{prefix}.embeddings.LayerNorm",
    }


_BERT_KEYS = {
    "hidden_size": Key("hidden_size"),
    "num_layers": Key("num_hidden_layers"),
    "num_attention_heads": Key("num_attention_heads"),
    "ffn_hidden_size": Key("intermediate_size"),
    "max_seq_len": Key("max_position_embeddings"),
    "token_types": Key("type_vocab_size", 2),
    "activation": Key("hidden_act", "gelu", _ACTIVATIONS),
    "norm_eps": Key("layer_norm_eps", 1e-12),
    "tied_embeddings": Key("tie_word_embeddings", True),
    "dropout": Key("hidden_dropout_prob", 0.1),
    "attention_dropout": Key("attention_probs_dropout_prob", 0.1),
    "init_std": Key("initializer_range", 0.02),
}
_BERT_FIXED = {
    "family": "bert",
    "positions": "learned",
    "norm": "layernorm",
    "norm_order": "post",
    "embedding_norm": True,
    "bias": True,
    "head_bias": True,
}
_BERT_REQUIRED = {"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False}


def _bert_heads(name: str, pooler: str, classes: str) -> dict[str, Head | str]:
    pooled = {"task_head.pooler": pooler, **_classes(classes)}
    return {
        "classification": Head(f"{name}ForSequenceClassification", pooled),
        "tagging": Head(f"{name}ForTokenClassification", _classes("classifier")),
        "question_answering": Head(f"{name}ForQuestionAnswering", {"task_head.borders": "qa_outputs"}),
    }


def _has_pooler(tensors: Collection[str]) -> bool:
    return any(name.endswith("pooler.dense.weight") for name in tensors)


BERT = Architecture(
    model_type="bert",
    classes=("BertForMaskedLM", "BertModel", "BertForPreTraining"),
    prefix="bert.",
    tensors=_table(
        {
            **_bert_embeddings("bert"),
            "mlm_head.dense": "cls.predictions.transform.dense",
            "mlm_head.norm": "cls.predictions.transform.LayerNorm",
            "lm_head": "cls.predictions.decoder",
            "lm_head.bias": "cls.predictions.bias",
            "next_sentence.pooler": "bert.pooler.dense",
            "next_sentence.classifier": "cls.seq_relationship",
        },
        encoder=_bert_block("bert"),
    ),
    # Its masked-token head has the activation of the blocks, ours (and RoBERTa's) is always exact GELU.
    keys=_BERT_KEYS | {"activation": Key("hidden_act", "gelu", {"gelu": "gelu"})},
    fixed=_BERT_FIXED,
    required=_BERT_REQUIRED,
    # The pooler lives on in the head that it was trained for.
    read=lambda config, tensors: {
        "next_sentence": _has_pooler(tensors) and config.get("type_vocab_size", 2) > 1
    },
    write=lambda section, _: {
        "type_vocab_size": section.token_types or 2,
        **({"architectures": ["BertForPreTraining"]} if section.next_sentence else {}),
    },
    heads=_bert_heads("Bert", "bert.pooler.dense", "classifier"),
    aliases={"cls.predictions.decoder.bias": "cls.predictions.bias"},
    dropped=r"pooler\.dense\.",
)


def _roberta_offset(config: Config) -> int:
    """Its positions count from the padding token's id + 1."""
    return int(config.get("pad_token_id", 1)) + 1


ROBERTA = Architecture(
    model_type="roberta",
    classes=("RobertaForMaskedLM", "RobertaModel"),
    prefix="roberta.",
    tensors=_table(
        {
            **_bert_embeddings("roberta"),
            "mlm_head.dense": "lm_head.dense",
            "mlm_head.norm": "lm_head.layer_norm",
            "lm_head": "lm_head.decoder",
            "lm_head.bias": "lm_head.bias",
        },
        encoder=_bert_block("roberta"),
    ),
    keys={field: key for field, key in _BERT_KEYS.items() if field != "max_seq_len"},
    fixed=_BERT_FIXED,
    required=_BERT_REQUIRED,
    read=lambda config, _: {
        "max_seq_len": config.get("max_position_embeddings", 512) - _roberta_offset(config)
    },
    write=lambda section, config: {
        "max_position_embeddings": section.max_seq_len + _roberta_offset(config),
        "type_vocab_size": section.token_types or 1,
    },
    position_offset=_roberta_offset,
    heads=_bert_heads("Roberta", "classifier.dense", "classifier.out_proj"),
    aliases={"lm_head.decoder.bias": "lm_head.bias"},
    dropped=r"pooler\.dense\.",
)


def _modernbert_read(config: Config, _: Collection[str]) -> Config:
    rope = config.get("rope_parameters") or {}
    wide, local = ({**(rope.get(kind) or {})} for kind in ("full_attention", "sliding_attention"))
    for part in (wide, local, config.get("rope_scaling") or {}):
        if part.get("rope_type", "default") != "default":
            raise _problem(f"rope_type {shown(part['rope_type'])} can't be converted", "only default can")
    every = config.get("global_attn_every_n_layers", 3)
    if not isinstance(every, int) or every < 1:
        raise _problem(
            f"global_attn_every_n_layers {shown(every)} can't be converted", "it must be 1 or more"
        )
    kinds = _layer_types(config) or [
        "sliding_attention" if index % every else "full_attention"
        for index in range(config["num_hidden_layers"])
    ]
    fields = {
        "rotary_base": wide.get("rope_theta", config.get("global_rope_theta", 160_000.0)),
        "bias": any([_flag(config, name) for name in _MODERNBERT_BIASES]),
        **_windows(kinds, config.get("local_attention", 128) // 2),
    }
    if "window" in fields:
        fields["local_rotary_base"] = local.get("rope_theta", config.get("local_rope_theta", 10_000.0))
    return fields


_MODERNBERT_BIASES = {
    "norm_bias": r"norm\.bias",
    "attention_bias": r"attention\.(qkv|out)\.bias",
    "mlp_bias": r"mlp\.(gate_up|down)\.bias",
    "classifier_bias": r"mlm_head\.dense\.bias",
}

MODERNBERT = Architecture(
    model_type="modernbert",
    classes=("ModernBertForMaskedLM", "ModernBertModel"),
    prefix="model.",
    tensors=_table(
        {
            "embed_tokens": "model.embeddings.tok_embeddings",
            "encoder.embed_norm": "model.embeddings.norm",
            "encoder.norm": "model.final_norm",
            "mlm_head.dense": "head.dense",
            "mlm_head.norm": "head.norm",
            "lm_head": "decoder",
        },
        encoder=(
            "model.layers.{i}",
            {
                "attention_norm": "attn_norm",
                "attention.qkv": "attn.Wqkv",
                "attention.out": "attn.Wo",
                "mlp_norm": "mlp_norm",
                "mlp.gate_up": "mlp.Wi",
                "mlp.down": "mlp.Wo",
            },
        ),
    ),
    keys={
        "hidden_size": Key("hidden_size"),
        "num_layers": Key("num_hidden_layers"),
        "num_attention_heads": Key("num_attention_heads"),
        "ffn_hidden_size": Key("intermediate_size"),
        "max_seq_len": Key("max_position_embeddings"),
        "activation": Key("hidden_activation", "gelu", _GATED),
        "norm_eps": Key("norm_eps", 1e-5),
        "tied_embeddings": Key("tie_word_embeddings", True),
        "head_bias": Key("decoder_bias", True),
        "dropout": Key("mlp_dropout", 0.0),
        "attention_dropout": Key("attention_dropout", 0.0),
        "init_std": Key("initializer_range", 0.02),
    },
    fixed={"family": "bert", "positions": "rotary", "norm": "layernorm", "embedding_norm": True},
    required={"classifier_activation": "gelu"},  # of the masked-token head
    heads=dict.fromkeys(HEADED, "ModernBert's classes read a layer with a norm (ModernBertPredictionHead)"),
    read=_modernbert_read,
    write=lambda section, _: {
        "global_rope_theta": section.rotary_base,
        "local_rope_theta": section.local_rotary_base or section.rotary_base,
        "local_attention": 2 * (section.window or 64),
        "global_attn_every_n_layers": (section.global_every or section.num_layers + 1)
        if section.window
        else 1,
        "embedding_dropout": section.dropout,
        **dict.fromkeys(_MODERNBERT_BIASES, section.bias),
    },
    zeros=lambda config: _without(config, **_MODERNBERT_BIASES),
)

# --- encoder-decoders ---------------------------------------------------------------------------------------


_T5_CROSS = {
    "cross_norm": "layer.1.layer_norm",
    "cross_attention.q": "layer.1.EncDecAttention.q",
    "cross_attention.kv": "layer.1.EncDecAttention.k layer.1.EncDecAttention.v",
    "cross_attention.out": "layer.1.EncDecAttention.o",
}


def _t5_block(side: str, mlp: int, cross: Mapping[str, str]) -> tuple[str, Mapping[str, str]]:
    parts = {
        **cross,
        "attention_norm": "layer.0.layer_norm",
        "attention.qkv": "layer.0.SelfAttention.q layer.0.SelfAttention.k layer.0.SelfAttention.v",
        "attention.out": "layer.0.SelfAttention.o",
        "mlp_norm": f"layer.{mlp}.layer_norm",
        "mlp.up": f"layer.{mlp}.DenseReluDense.wi",
        "mlp.gate_up": f"layer.{mlp}.DenseReluDense.wi_0 layer.{mlp}.DenseReluDense.wi_1",
        "mlp.down": f"layer.{mlp}.DenseReluDense.wo",
    }
    return f"{side}.block.{{i}}", parts


def _decoder_start(config: Config, default: int | None) -> Config:
    start = config.get("decoder_start_token_id")
    return {"decoder_start_id": default if start is None else start}


def _t5_read(config: Config, tensors: Collection[str]) -> Config:
    """Version 1.0 ties the output layer and scales what goes into it, 1.1 does neither.

    transformers 5 writes tie_word_embeddings true for both, and scale_decoder_outputs besides.
    """
    tied = _flag(config, "tie_word_embeddings", True)
    scaled = _flag(config, "scale_decoder_outputs", tied)
    return {
        "tied_embeddings": tied and (scaled or "lm_head.weight" not in tensors),
        "logit_scale": config["d_model"] ** -0.5 if scaled else 1.0,
        **_decoder_start(config, config.get("pad_token_id", 0)),
    }


T5 = Architecture(
    model_type="t5",
    classes=("T5ForConditionalGeneration", "T5Model", "T5EncoderModel"),
    prefix="",
    tensors=_table(
        {
            "embed_tokens": "shared",
            "encoder.norm": "encoder.final_layer_norm",
            "decoder.norm": "decoder.final_layer_norm",
            **{
                f"{side}.relative_bias": f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias"
                for side in ("encoder", "decoder")
            },
            "lm_head": "lm_head",
        },
        encoder=_t5_block("encoder", mlp=1, cross={}),
        decoder=_t5_block("decoder", mlp=2, cross=_T5_CROSS),
    ),
    keys={
        "hidden_size": Key("d_model"),
        "head_dim": Key("d_kv"),
        "ffn_hidden_size": Key("d_ff"),
        "num_layers": Key("num_layers"),
        "num_decoder_layers": Key("num_decoder_layers", None),
        "num_attention_heads": Key("num_heads"),
        "max_seq_len": Key("n_positions", 512),  # no weight depends on it: what it was trained with
        "relative_buckets": Key("relative_attention_num_buckets", 32),
        "relative_max_distance": Key("relative_attention_max_distance", 128),
        "activation": Key("feed_forward_proj", "relu", _T5_ACTIVATIONS),
        "norm_eps": Key("layer_norm_epsilon", 1e-6),
        "dropout": Key("dropout_rate", 0.1),
    },
    fixed={
        "family": "encoder_decoder",
        "positions": "relative",
        "norm": "rmsnorm",
        "attention_scale": 1.0,
    },
    read=_t5_read,
    write=lambda section, _: {
        "tie_word_embeddings": section.tied_embeddings,
        "scale_decoder_outputs": section.logit_scale != 1.0,
    },
    aliases={f"{side}.embed_tokens.weight": "shared.weight" for side in ("encoder", "decoder")},
    ignored=r"EncDecAttention\.relative_attention_bias",  # in old files; transformers ignores it too
)


_BART_CROSS = {
    "cross_attention.q": "encoder_attn.q_proj",
    "cross_attention.kv": "encoder_attn.k_proj encoder_attn.v_proj",
    "cross_attention.out": "encoder_attn.out_proj",
    "cross_norm": "encoder_attn_layer_norm",
}


def _bart_block(side: str, cross: Mapping[str, str]) -> tuple[str, Mapping[str, str]]:
    parts = {
        **cross,
        "attention.qkv": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
        "attention.out": "self_attn.out_proj",
        "attention_norm": "self_attn_layer_norm",
        "mlp.up": "fc1",
        "mlp.down": "fc2",
        "mlp_norm": "final_layer_norm",
    }
    return f"model.{side}.layers.{{i}}", parts


_BART_TENSORS = _table(
    {
        "embed_tokens": "model.shared",
        "encoder.embed_positions": "model.encoder.embed_positions",
        "decoder.embed_positions": "model.decoder.embed_positions",
        "encoder.embed_norm": "model.encoder.layernorm_embedding",
        "decoder.embed_norm": "model.decoder.layernorm_embedding",
        "lm_head": "lm_head",
        "lm_head.bias": "final_logits_bias",
    },
    encoder=_bart_block("encoder", cross={}),
    decoder=_bart_block("decoder", cross=_BART_CROSS),
)
_BART_KEYS = {
    "hidden_size": Key("d_model"),
    "num_layers": Key("encoder_layers"),
    "num_decoder_layers": Key("decoder_layers"),
    "num_attention_heads": Key("encoder_attention_heads"),
    "ffn_hidden_size": Key("encoder_ffn_dim"),
    "max_seq_len": Key("max_position_embeddings", 1024),
    "activation": Key("activation_function", "gelu", _ACTIVATIONS),
    "scale_embeddings": Key("scale_embedding", False),
    "tied_embeddings": Key("tie_word_embeddings", True),
    "dropout": Key("dropout", 0.1),
    "attention_dropout": Key("attention_dropout", 0.0),
    "init_std": Key("init_std", 0.02),
}
_BART_FIXED = {
    "family": "encoder_decoder",
    "norm": "layernorm",
    "norm_order": "post",
    "bias": True,
    "head_bias": True,
}
_BART_ALIASES = {
    f"model.{side}.embed_tokens.weight": "model.shared.weight" for side in ("encoder", "decoder")
}


def _bart_read(config: Config, _: Collection[str]) -> Config:
    for what in ("attention_heads", "ffn_dim"):
        encoder, decoder = (config.get(f"{side}_{what}") for side in ("encoder", "decoder"))
        if encoder != decoder:
            raise _problem(
                f"encoder_{what} {encoder} and decoder_{what} {decoder} can't be converted",
                "only equal ones can",
            )
    return _decoder_start(config, config.get("eos_token_id", 2))


def _bart_write(section: ModelSection, _: Config) -> Config:
    return {"decoder_attention_heads": section.num_attention_heads, "decoder_ffn_dim": section.ffn_size}


BART = Architecture(
    model_type="bart",
    classes=("BartForConditionalGeneration", "BartModel"),
    prefix="model.",
    tensors=_BART_TENSORS,
    keys=_BART_KEYS,
    fixed=_BART_FIXED | {"positions": "learned", "embedding_norm": True},
    objective="infilling",
    read=_bart_read,
    write=_bart_write,
    position_offset=lambda config: 2,
    aliases=_BART_ALIASES,
    ignored=r"(en|de)coder\.version$",
)


def _marian_read(config: Config, tensors: Collection[str]) -> Config:
    decoder_vocabulary = config.get("decoder_vocab_size")
    if decoder_vocabulary not in (None, config.get("vocab_size")):
        raise _problem(
            f"decoder_vocab_size {decoder_vocabulary} besides vocab_size {config.get('vocab_size')} can't be "
            "converted",
            "only models with one vocabulary can",
        )
    return {**_bart_read(config, tensors), **_decoder_start(config, config.get("pad_token_id"))}


MARIAN = Architecture(
    model_type="marian",
    classes=("MarianMTModel", "MarianModel"),
    prefix="model.",
    tensors=_BART_TENSORS,
    keys=_BART_KEYS,
    fixed=_BART_FIXED | {"positions": "sinusoidal"},
    objective="infilling",  # of those that need no pairs of sentences
    required={"share_encoder_decoder_embeddings": True},
    read=_marian_read,
    write=_bart_write,
    aliases=_BART_ALIASES,
    sinusoids=r"embed_positions\.weight$",
)

ARCHITECTURES = {
    architecture.model_type: architecture
    for architecture in (LLAMA, MISTRAL, QWEN2, GPT2, BERT, MODERNBERT, ROBERTA, T5, BART, MARIAN)
}
