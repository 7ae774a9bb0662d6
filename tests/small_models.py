"""A small model of each kind and packed random batches for it, for tests of what all families promise."""

from __future__ import annotations

import shutil

import torch
import torch.nn.functional as F

from bigtfm.config.run import RunConfig
from bigtfm.config.sections import SUPERVISED, ComputeSection, DataSection, ModelSection, ObjectiveSection
from bigtfm.data.special import special_ids
from bigtfm.data.tokenizer import load_tokenizer
from bigtfm.engine.checkpoint import Progress
from bigtfm.engine.weights import save_weights
from bigtfm.model.families import make_model
from bigtfm.model.transformer import init_weights

VOCAB = 37
SMALL = {"hidden_size": 16, "num_layers": 3, "num_attention_heads": 4, "max_seq_len": 24, "init_std": 0.2}
ORIGINAL = {"norm": "layernorm", "norm_order": "post", "activation": "relu", "bias": True}
KINDS = {
    "gpt": {"family": "gpt", "num_kv_heads": 2},
    "gpt-window": {"family": "gpt", "window": 3, "qkv_bias": True},
    "bert": {**ORIGINAL, "family": "bert", "positions": "learned", "activation": "gelu",
             "embedding_norm": True, "token_types": 2, "next_sentence": True, "head_bias": True},
    "modern-bert": {"family": "bert", "norm": "layernorm", "activation": "geglu", "embedding_norm": True,
                    "window": 2, "global_every": 3, "local_rotary_base": 100.0},
    "transformer": {**ORIGINAL, "family": "encoder_decoder", "positions": "sinusoidal"},
    "t5": {"family": "encoder_decoder", "positions": "relative", "activation": "geglu_tanh", "head_dim": 6,
           "attention_scale": 1.0, "logit_scale": 0.25, "num_decoder_layers": 2, "relative_buckets": 8,
           "relative_max_distance": 12},
    "bart": {**ORIGINAL, "family": "encoder_decoder", "positions": "learned", "activation": "gelu",
             "embedding_norm": True, "head_bias": True, "tied_embeddings": False},
}  # fmt: skip


def make(kind, *, seed=0, recompute="none", attention="sdpa", loss="auto", objective=None, **shape):
    shape = {**SMALL, **KINDS[kind], **shape}
    if shape.get("positions") != "relative":
        shape = {name: value for name, value in shape.items() if not name.startswith("relative_")}
    config = ModelSection(**shape)
    objective = objective or ObjectiveSection(next_sentence=2.0 if config.next_sentence else 0.0)
    compute = ComputeSection(recompute=recompute, attention=attention, loss=loss)
    model = make_model(config, VOCAB, seed=seed, objective=objective, compute=compute)
    init_weights(model)
    return model


def save_run(folder, tokenizer_path, kind, objective=None, **shape):
    """A run directory of a random model, with a tokenizer and a checkpoint of step 0."""
    shutil.copytree(tokenizer_path, folder / "tokenizer")
    tokenizer = load_tokenizer(tokenizer_path)
    model = ModelSection(**{**SMALL, **KINDS[kind], "init_std": 0.5, **shape})
    packing = "best_fit" if objective in SUPERVISED else "windows"
    run = RunConfig(
        model=model, objective=ObjectiveSection(kind=objective), data=DataSection(packing=packing)
    )
    size = special_ids(tokenizer, run).vocab_size
    identity = {
        "model": {**run.model.model_dump(mode="json"), "vocab_size": size},
        "objective": {**run.objective.model_dump(mode="json"), "kind": run.objective_kind},
        "tokenizer": tokenizer.identity,
        "data": {"seq_len": run.seq_len, "packing": packing},
    }
    made = make_model(run.model, size, objective=run.objective)
    init_weights(made)
    weights = dict(made.named_parameters())
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    tensors = ((name, weight.detach()) for name, weight in weights.items())
    save_weights(folder / "checkpoints", shapes, tensors, Progress(identity=identity))


def packed(lengths, generator):
    total, ends = sum(lengths), torch.tensor(lengths).cumsum(0)
    return {
        "input_ids": torch.randint(VOCAB, (total,), generator=generator),
        "position_ids": torch.cat([torch.arange(n) for n in lengths]),
        "cu_seqlens": F.pad(ends, (1, 0)).to(torch.int32),
        "seq_lens": tuple(lengths),
    }


def batch(model, lengths, seed=0, written=None):
    """Random documents of these lengths; an encoder-decoder writes `written` (default: one token more)."""
    generator = torch.Generator().manual_seed(seed)
    inputs = packed(lengths, generator)
    inputs["token_keys"] = torch.arange(sum(lengths))
    labelled = lengths
    if model.config.family == "encoder_decoder":
        labelled = written or [length % 5 + 1 for length in lengths]
        decoder = packed(labelled, generator)
        inputs |= {f"decoder_{name}": value for name, value in decoder.items()}
        inputs["decoder_token_keys"] = 1000 + torch.arange(sum(labelled))
    labels = torch.randint(VOCAB, (sum(labelled),), generator=generator)
    labels[torch.rand(len(labels), generator=generator) < 0.3] = -100
    inputs["labels"] = labels
    if model.config.next_sentence:
        inputs["token_type_ids"] = torch.randint(2, (sum(lengths),), generator=generator)
        inputs["next_sentence_labels"] = torch.randint(2, (len(lengths),), generator=generator)
    return inputs


def documents(inputs):
    """The same batch as one batch a document."""
    parts = []
    for number, length in enumerate(inputs["seq_lens"]):
        one = {}
        for name, value in inputs.items():
            side = "decoder_" if name.startswith("decoder_") or name == "labels" else ""
            if f"{side}seq_lens" not in inputs:
                side = ""
            start, n = int(inputs[f"{side}cu_seqlens"][number]), inputs[f"{side}seq_lens"][number]
            if name.endswith("cu_seqlens"):
                one[name] = torch.tensor([0, n], dtype=torch.int32)
            elif name.endswith("seq_lens"):
                one[name] = (n,)
            elif name == "next_sentence_labels":
                one[name] = value[number : number + 1]
            else:
                one[name] = value[start : start + n]
        parts.append(one)
        assert length == one["seq_lens"][0]
    return parts


def gradients(model, *batches, **kwargs):
    model.zero_grad()
    losses = [model(**inputs, **kwargs)[0] for inputs in batches]
    torch.stack(losses).sum().backward()
    return sum(loss.item() for loss in losses), {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same(one, other, **tolerance):
    loss, grads = one
    assert abs(loss - other[0]) <= 1e-6 * max(1.0, abs(loss)) + tolerance.get("atol", 0)
    for name, gradient in grads.items():
        torch.testing.assert_close(
            gradient, other[1][name], msg=lambda text, name=name: f"{name}: {text}", **tolerance
        )
