"""Head pruning: the attention heads that matter least go, and with them their part of every matrix.

Importance of a head (Michel et al. 2019, section 2.2 and equation 2): the mean over samples of |dL/dg|, where
g = 1 multiplies the head's output. Every attention layer loses equally many, so what stays is an ordinary,
smaller model: it needs no mask, trains on at any ZeRO stage and exports like any other.

T tokens, C features, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bigtfm.compression.result import Compressed
from bigtfm.config.problems import ConfigProblem
from bigtfm.data.loader import Loader
from bigtfm.model.heads import LanguageModel
from bigtfm.model.transformer import CrossAttention, SelfAttention

SAMPLES = 64  # sequences of training text that importance is the mean over


def without_heads(model: LanguageModel, share: float, train: Loader) -> Compressed:
    """`share` of each attention layer's heads removed; with grouped queries, of its groups.

    Raises:
        ConfigProblem: not one whole head would go, or none would stay; or heads share a bias.
    """
    config = model.config
    removed = round(share * config.kv_heads)
    if not 0 < removed < config.kv_heads:
        raise ConfigProblem(
            f"--share {share} of {config.kv_heads} heads (or groups of heads) removes {removed} of them",
            where="command line",
            fix=f"pass a share that removes 1 to {config.kv_heads - 1}"
            if config.kv_heads > 1
            else "choose another method",
        )
    if config.positions == "relative":
        raise ConfigProblem(
            "with relative positions each head has a bias that all layers share",
            where="--method heads",
            fix="choose another method",
        )
    importance = head_importance(model, train)
    kept = {
        path: scores.unflatten(0, (config.kv_heads, -1))
        .sum(1)
        .argsort(descending=True, stable=True)[:-removed]
        for path, scores in importance.items()
    }
    groups = {path: heads.sort().values for path, heads in kept.items()}
    parameters = {
        name: _kept(name, parameter.detach(), groups, model) for name, parameter in model.named_parameters()
    }
    left = config.kv_heads - removed
    section = config.model_copy(
        update={
            "num_attention_heads": left * (config.num_attention_heads // config.kv_heads),
            "num_kv_heads": left if config.num_kv_heads is not None else None,
            "head_dim": config.head_size,
        }
    )
    return Compressed(
        section, parameters, {"share": share, "groups": {p: g.tolist() for p, g in groups.items()}}
    )


def head_importance(model: LanguageModel, train: Loader) -> dict[str, Tensor]:
    """Importance [H] of the heads of each attention layer, by the names of the modules."""
    totals = {path: torch.zeros(model.config.num_attention_heads) for path, _ in _attentions(model)}
    for sample in range(min(SAMPLES, train.num_samples)):
        batch = train.batch(sample, 1)
        if not batch.num_labels:
            continue
        with _gated(model) as gates:
            loss, count = model(**batch.model_inputs())
            gradients = torch.autograd.grad(loss / count, list(gates.values()))
        for path, gradient in zip(gates, gradients, strict=True):
            totals[path] += gradient.abs()
    return totals


def _attentions(model: nn.Module) -> list[tuple[str, SelfAttention | CrossAttention]]:
    return [(path, m) for path, m in model.named_modules() if isinstance(m, SelfAttention | CrossAttention)]


@contextmanager
def _gated(model: LanguageModel) -> Iterator[dict[str, Tensor]]:
    """A factor of 1 on each head's output: gates [H] by the attention layers' names."""
    gates = {
        path: torch.ones(model.config.num_attention_heads, requires_grad=True)
        for path, _ in _attentions(model)
    }
    hooks = [
        layer.out.register_forward_pre_hook(partial(_scale, gates[path]))
        for path, layer in _attentions(model)
    ]
    try:
        yield gates
    finally:
        for hook in hooks:
            hook.remove()


def _scale(gate: Tensor, module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
    (x,) = args  # [T, H D]
    return ((x.unflatten(1, (len(gate), -1)) * gate[:, None]).flatten(1),)


def _kept(name: str, weight: Tensor, groups: dict[str, Tensor], model: LanguageModel) -> Tensor:
    """What stays of a parameter: of an attention layer's, the rows or columns of its heads."""
    path, _, part = name.rpartition(".")
    path, _, matrix = path.rpartition(".")
    if path not in groups or (matrix == "out" and part == "bias"):
        return weight
    config, kept = model.config, groups[path]
    size, kv_heads = config.head_size, config.kv_heads
    of_query = config.num_attention_heads // kv_heads
    if matrix == "out":
        return weight.unflatten(1, (kv_heads, of_query * size))[:, kept].flatten(1)
    pieces = {"qkv": (of_query, 1, 1), "q": (of_query,), "kv": (1, 1)}[
        matrix
    ]  # heads of a group, in each part
    parts = weight.split([kv_heads * piece * size for piece in pieces])
    return torch.cat(
        [
            p.unflatten(0, (kv_heads, piece * size))[kept].flatten(0, 1)
            for p, piece in zip(parts, pieces, strict=True)
        ]
    )
