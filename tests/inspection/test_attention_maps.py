"""Attention maps are what a computation of its own makes of the same weights, by the definitions.

For every family, every kind of positions, grouped heads, windows and scales; and, for the architectures that
are converted, what transformers' eager attention returns.
"""

from __future__ import annotations

import math

import hf_models
import pytest
import torch
from small_models import KINDS, make

from bigtfm.inspection.capture import capture, forward, stacks
from bigtfm.inspection.reading import Reading
from bigtfm.model.transformer import AttentionMaps

TOLERANCE = 1e-6
TEXT, WRITTEN = (3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9), (3, 2, 3, 8, 4, 6, 2)
VARIANTS = {
    **{kind: (kind, {}) for kind in KINDS},
    "gpt-learned": ("gpt", {"positions": "learned"}),
    "gpt-sinusoidal": ("gpt", {"positions": "sinusoidal"}),
    "gpt-relative": ("gpt", {"positions": "relative", "window": 4}),
    "gpt-one-kv-head": ("gpt", {"num_kv_heads": 1, "attention_scale": 0.3}),
    "gpt-llama3": ("gpt", {"rotary_scaling": (4.0, 1.0, 4.0, 8.0), "head_dim": 6}),
    "bert-relative": ("bert", {"positions": "relative", "num_kv_heads": 2}),
    "encoder-decoder-rotary": ("transformer", {"positions": "rotary", "num_kv_heads": 2, "window": 3}),
}


def reading_for(model):
    family = model.config.family
    if family == "gpt":
        return Reading(decoder=TEXT, labels=(*TEXT[1:], None))
    if family == "bert":
        return Reading(TEXT, hidden=tuple(range(len(TEXT))))
    return Reading(TEXT, WRITTEN, (*WRITTEN[1:], 1))


def inputs_of_attention(model, reading):
    """What each attention layer reads, in order: (module, features of queries, of keys, causal)."""
    seen = []

    def note(module, args, kwargs, causal):
        memory = kwargs["packed"].memory
        keys = memory.features if causal is None else args[0]
        seen.append((module, args[0].double(), keys.double(), causal))

    handles = []
    for stack in stacks(model).values():
        for block in stack.layers:
            for module, causal in ((block.attention, stack.causal), (block.cross_attention, None)):
                if module is not None:
                    handles.append(
                        module.register_forward_pre_hook(
                            lambda m, a, k, causal=causal: note(m, a, k, causal), with_kwargs=True
                        )
                    )
    with torch.no_grad():
        forward(model, reading)
    for handle in handles:
        handle.remove()
    return seen


def turned(x, position, config, base):
    """A head's vector [D] as D/2 complex numbers, turned by the position's angles."""
    half = len(x) // 2
    out = []
    for i in range(half):
        frequency = base ** (-2 * i / (2 * half))
        if config.rotary_scaling is not None:
            factor, low, high, length = config.rotary_scaling
            wave = 2 * math.pi / frequency
            smooth = (length / wave - low) / (high - low)
            if wave > length / low:
                frequency /= factor
            elif wave >= length / high:
                frequency = (1 - smooth) * frequency / factor + smooth * frequency
        out.append(
            complex(x[i], x[half + i])
            * complex(math.cos(position * frequency), math.sin(position * frequency))
        )
    return out


def bucket(distance, causal, config):
    """Raffel et al. 2020: one bucket a distance, then logarithmic ranges; an encoder has them twice."""
    count = config.relative_buckets if causal else config.relative_buckets // 2
    first = 0 if causal or distance <= 0 else count
    far = max(-distance, 0) if causal else abs(distance)
    exact = count // 2
    if far < exact:
        return first + far
    share = math.log(far / exact) / math.log(config.relative_max_distance / exact)
    return first + min(count - 1, exact + int(share * (count - exact)))


def eager(model, module, queries, keys, causal, mistake=None):
    """The weights [H, Q, S] of one layer, in fp64, head by head and pair by pair."""
    config = model.config
    heads, groups, size = config.num_attention_heads, config.kv_heads, config.head_size

    def product(linear, x, rows):
        bias = 0 if linear.bias is None else linear.bias.double()[rows]
        return x @ linear.weight.double()[rows].T + bias

    if causal is None:
        q = product(module.q, queries, slice(None))
        k = product(module.kv, keys, slice(0, groups * size))
        window, bias = None, None
    else:
        q = product(module.qkv, queries, slice(0, heads * size))
        k = product(module.qkv, keys, slice(heads * size, (heads + groups) * size))
        is_global = config.global_every and module.index % config.global_every == 0
        window = None if is_global else config.window
        stack = next(
            stack for stack in stacks(model).values() if stack.layers[module.index].attention is module
        )
        bias = stack.relative_bias and stack.relative_bias.weight.double()
    base = (window and config.local_rotary_base) or config.rotary_base
    scale = 1 / math.sqrt(size) if config.attention_scale is None else config.attention_scale
    if mistake == "scale":
        scale *= 1.01
    if mistake == "window" and window is not None:
        window += 1
    weights = torch.zeros(heads, len(q), len(k), dtype=torch.float64)
    for head in range(heads):
        group = head % groups if mistake == "groups" else head // (heads // groups)
        for i in range(len(q)):
            row = {}
            for j in range(len(k)):
                if causal and j > i:
                    continue
                if window is not None and abs(i - j) > window:
                    continue
                one = q[i, head * size : (head + 1) * size].tolist()
                other = k[j, group * size : (group + 1) * size].tolist()
                if causal is not None and config.positions == "rotary":
                    pairs = zip(turned(one, i, config, base), turned(other, j, config, base), strict=True)
                    row[j] = scale * sum((a * b.conjugate()).real for a, b in pairs)
                else:
                    row[j] = scale * sum(a * b for a, b in zip(one, other, strict=True))
                if bias is not None:
                    row[j] += bias[bucket(j - i, causal, config), head].item()
            most = max(row.values())
            total = sum(math.exp(score - most) for score in row.values())
            for j, score in row.items():
                weights[head, i, j] = math.exp(score - most) / total
    return weights


def maps_of(model, reading):
    """In the order of `inputs_of_attention`."""
    found = []
    for insides in capture(model, reading).values():
        for layer, own in enumerate(insides.self_attention):
            found += [own, *insides.cross_attention[layer : layer + 1]]
    return found


@pytest.mark.parametrize("name", VARIANTS)
def test_maps_are_those_of_the_definitions(name):
    kind, shape = VARIANTS[name]
    model = make(kind, **shape).eval()
    reading = reading_for(model)
    inputs, maps = inputs_of_attention(model, reading), maps_of(model, reading)
    assert len(inputs) == len(maps) == (9 if name in ("transformer", "bart", "encoder-decoder-rotary") else
                                        7 if name == "t5" else 3)  # fmt: skip
    with torch.no_grad():
        for (module, queries, keys, causal), found in zip(inputs, maps, strict=True):
            expected = eager(model, module, queries, keys, causal)
            assert (found - expected).abs().max() < TOLERANCE
            assert (found.sum(-1) - 1).abs().max() < TOLERANCE
            assert (found >= 0).all()


@pytest.mark.parametrize(
    ("kind", "mistake"),
    [("gpt", "groups"), ("gpt-window", "window"), ("modern-bert", "window"), ("t5", "scale")],
)
def test_a_mistake_would_be_seen(kind, mistake):
    """The control."""
    model = make(kind).eval()
    reading = reading_for(model)
    with torch.no_grad():
        differences = [
            (found - eager(model, *inputs, mistake=mistake)).abs().max().item()
            for inputs, found in zip(
                inputs_of_attention(model, reading), maps_of(model, reading), strict=True
            )
        ]
    assert max(differences) > 1000 * TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_looking_changes_nothing(kind):
    """The features with maps are those of training's kernels, and a forward without maps keeps none."""
    model = make(kind).eval()
    reading = reading_for(model)
    with torch.no_grad():
        plain = forward(model, reading)
        looked = forward(model, reading, {side: AttentionMaps() for side in stacks(model)})
    torch.testing.assert_close(plain, looked, atol=1e-5, rtol=1e-5)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


HF_TEXT, HF_WRITTEN = tuple(range(5, 37)), tuple(range(50, 71))  # longer than windows and exact distances
HF_MODELS = ["gpt2", "gpt2-unscaled", "llama", "llama3", "mistral", "qwen2", "bert", "roberta", "modernbert",
             "t5", "t5-gated", "bart", "marian"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", HF_MODELS)
def test_maps_are_those_of_transformers(name, tmp_path):
    theirs, ours = hf_models.both(name, tmp_path, attn_implementation="eager")
    inputs = {"input_ids": torch.tensor([HF_TEXT])}
    family = ours.config.family
    if family == "encoder_decoder":
        inputs["decoder_input_ids"] = torch.tensor([HF_WRITTEN])
    with torch.no_grad():
        answer = theirs(**inputs, output_attentions=True, use_cache=False)
    expected = {"decoder": answer.attentions} if family == "gpt" else {"encoder": answer.get("attentions")}
    if family == "encoder_decoder":
        expected = {
            "encoder": answer.encoder_attentions,
            "decoder": answer.decoder_attentions,
            "cross": answer.cross_attentions,
        }
    reading = Reading(
        () if family == "gpt" else HF_TEXT,
        {"gpt": HF_TEXT, "bert": (), "encoder_decoder": HF_WRITTEN}[family],
    )
    insides = capture(ours, reading)
    found = {side: one.self_attention for side, one in insides.items()}
    if family == "encoder_decoder":
        found["cross"] = insides["decoder"].cross_attention
    assert found.keys() == expected.keys()
    for side, maps in found.items():
        assert len(maps) == len(expected[side])
        for one, other in zip(maps, expected[side], strict=True):
            assert (
                one - other[0]
            ).abs().max() < 5 * TOLERANCE  # two fp32 models: rounding from block to block
