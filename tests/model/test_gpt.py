from __future__ import annotations

import itertools
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F

from bigtfm.config.sections import ComputeSection, ModelSection, ObjectiveSection
from bigtfm.model.attention import Documents
from bigtfm.model.gpt import GPT
from bigtfm.model.transformer import init_weights, initial_value
from bigtfm.planner.parameters import count_parameters

VOCAB = 37
SMALL = {"hidden_size": 16, "num_layers": 3, "num_attention_heads": 4, "max_seq_len": 16, "init_std": 0.2}


def make(*, vocab_size=VOCAB, seed=0, label_smoothing=0.0, l1=0.0, recompute="none", **shape):
    model = GPT(
        ModelSection(**{**SMALL, **shape}),
        vocab_size,
        seed=seed,
        objective=ObjectiveSection(label_smoothing=label_smoothing, l1=l1),
        compute=ComputeSection(recompute=recompute),
    )
    init_weights(model)
    return model


def batch(seq_lens, seed=0, first_key=0):
    """Packed random documents; the last token of each has no label."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(seq_lens)
    ends = torch.tensor(seq_lens).cumsum(0)
    labels = torch.randint(VOCAB, (total,), generator=generator)
    labels[ends - 1] = -100
    return {
        "input_ids": torch.randint(VOCAB, (total,), generator=generator),
        "labels": labels,
        "position_ids": torch.cat([torch.arange(n) for n in seq_lens]),
        "cu_seqlens": F.pad(ends, (1, 0)).to(torch.int32),
        "seq_lens": tuple(seq_lens),
        "token_keys": torch.arange(first_key, first_key + total),
    }


def logits_of(model, inputs):
    return model.logits(
        inputs["input_ids"], inputs["position_ids"], Documents(inputs["cu_seqlens"], inputs["seq_lens"])
    )


def documents(inputs):
    """The same batch as one batch a document."""
    tensors = ("input_ids", "labels", "position_ids", "token_keys")
    for start, length in zip(inputs["cu_seqlens"].tolist(), inputs["seq_lens"], strict=False):
        one = {name: inputs[name][start : start + length] for name in tensors}
        yield {**one, "cu_seqlens": torch.tensor([0, length], dtype=torch.int32), "seq_lens": (length,)}


def gradients(model, *batches, **kwargs):
    model.zero_grad()
    losses = [model(**inputs, **kwargs)[0] for inputs in batches]
    torch.stack(losses).sum().backward()
    return sum(loss.item() for loss in losses), {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same(one, other, **tolerance):
    assert one[0] == pytest.approx(other[0], abs=1e-4, rel=1e-6)
    for name, gradient in one[1].items():
        torch.testing.assert_close(
            gradient, other[1][name], msg=lambda text, name=name: f"{name}: {text}", **tolerance
        )


COMBINATIONS = list(
    itertools.product(
        ["learned", "sinusoidal", "rotary"],
        ["layernorm", "rmsnorm"],
        ["gelu_tanh", "relu", "swiglu"],
        [1, 2, 4],
        [True, False],
    )
)


@pytest.mark.parametrize(("positions", "norm", "activation", "kv_heads", "flag"), COMBINATIONS)
def test_every_combination_trains(positions, norm, activation, kv_heads, flag):
    model = make(
        num_layers=2,
        positions=positions,
        norm=norm,
        activation=activation,
        num_kv_heads=kv_heads,
        bias=flag,
        tied_embeddings=not flag,
        dropout=0.1 * flag,
    )
    assert sum(p.numel() for p in model.parameters()) == count_parameters(model.config, VOCAB)
    loss_sum, num_tokens = model(**batch((5, 1, 9)))
    assert (loss_sum.dtype, loss_sum.shape) == (torch.float32, ())
    assert num_tokens.item() == 5 + 1 + 9 - 3
    loss_sum.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_parameter_names_are_the_fields():
    names = [
        name for name, _ in make(num_layers=1, tied_embeddings=False, positions="learned").named_parameters()
    ]
    assert names == [
        "embed_tokens.weight",
        "decoder.embed_positions.weight",
        "decoder.layers.0.attention_norm.weight",
        "decoder.layers.0.attention.qkv.weight",
        "decoder.layers.0.attention.out.weight",
        "decoder.layers.0.mlp_norm.weight",
        "decoder.layers.0.mlp.gate_up.weight",
        "decoder.layers.0.mlp.down.weight",
        "decoder.norm.weight",
        "lm_head.weight",
    ]
    assert "lm_head.weight" not in dict(make(tied_embeddings=True).named_parameters())


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rotary"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_packed_equals_documents_one_by_one(positions, dropout):
    model = make(positions=positions, dropout=dropout, num_kv_heads=2)
    inputs = batch((5, 1, 9, 5, 16))
    assert_same(gradients(model, inputs), gradients(model, *documents(inputs)), atol=2e-5, rtol=1e-4)


def test_dropout_does_not_depend_on_packing_or_split():
    model = make(dropout=0.5)
    inputs = batch((4, 7, 4))
    shuffled = [list(documents(inputs))[i] for i in (2, 0, 1)]
    whole = model(**inputs)[0].item()
    assert sum(model(**one)[0].item() for one in shuffled) == pytest.approx(whole, rel=1e-6)
    assert model(**batch((4, 7, 4), first_key=100))[0].item() != pytest.approx(
        whole, rel=1e-3
    )  # other samples
    assert make(dropout=0.5).eval()(**inputs)[0].item() == pytest.approx(
        make().eval()(**inputs)[0].item(), rel=1e-6
    )


def test_documents_do_not_leak():
    model = make().eval()
    captured = []
    model.embed_tokens.register_forward_hook(
        lambda _, args, out: captured.append(out) if len(args) == 1 else None
    )
    inputs = batch((5, 6, 5))
    x = model.hidden(
        inputs["input_ids"], inputs["position_ids"], Documents(inputs["cu_seqlens"], inputs["seq_lens"])
    )
    x[5:11].square().sum().backward(inputs=captured)
    touched = captured[0].grad.abs().sum(-1) > 0
    assert touched.nonzero().flatten().tolist() == list(range(5, 11))

    changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][:5] = (changed["input_ids"][:5] + 1) % VOCAB
    before, after = (logits_of(model, b) for b in (inputs, changed))
    assert torch.equal(before[5:], after[5:])
    assert not torch.equal(before[:5], after[:5])

    one = {"cu_seqlens": torch.tensor([0, 16], dtype=torch.int32), "seq_lens": (16,)}  # negative control
    joined = [logits_of(model, {**b, **one}) for b in (inputs, changed)]
    assert not torch.equal(joined[0][5:], joined[1][5:])


@pytest.mark.parametrize("recompute", ["full", 1, 2, "selective"])
@pytest.mark.parametrize("bias", [True, False])
def test_recompute_changes_nothing(recompute, bias):
    shape = {"dropout": 0.2, "bias": bias}
    inputs = batch((5, 1, 9))
    loss, plain = gradients(make(**shape), inputs)
    other_loss, recomputed = gradients(make(**shape, recompute=recompute), inputs)
    assert loss == other_loss
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


def test_recompute_runs_what_it_promises(monkeypatch):
    """How often each block's products and norms run in a step, forward and recomputation together."""
    counts: dict[str, int] = {}

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.name().partition(".")[0]
            counts[name] = counts.get(name, 0) + 1
            return func(*args, **(kwargs or {}))

    def run(recompute):
        counts.clear()
        model = make(recompute=recompute, activation="swiglu", norm="layernorm")
        with Count():
            model(**batch((8, 8)))[0].backward()
        return (
            counts["aten::mm"] + counts["aten::addmm_"],
            counts["aten::silu"],
            counts["aten::_scaled_dot_product_flash_attention_for_cpu"],
        )

    layers = 3
    products = layers * 4 + 1  # of one forward; twice as many in the backward pass
    assert run("none") == (3 * products, layers, layers)
    assert run("selective") == (3 * products, 2 * layers, layers)  # nothing but the cheap operations again
    mm, silu, attention = run("full")
    assert (silu, attention) == (2 * layers, 2 * layers)
    assert (
        3 * products + 3 * layers <= mm <= 3 * products + 4 * layers
    )  # a block's last product may be spared
    assert run(2)[1:] == (layers + 2, layers + 2)  # blocks 0 and 2


@pytest.mark.parametrize("tied", [True, False])
def test_vocabulary_padding_is_invisible(tied):
    runs = []
    for multiple in (1, 64):
        model = make(vocab_multiple=multiple, tied_embeddings=tied, label_smoothing=0.1, l1=0.01)
        loss, grads = gradients(model, batch((5, 9)), l1_scale=12.0)
        assert model.embed_tokens.weight.shape[0] == (VOCAB if multiple == 1 else 64)
        for name in ("embed_tokens.weight", "lm_head.weight"):
            if name in grads:
                assert not grads[name][VOCAB:].any()
                grads[name] = grads[name][:VOCAB]
        runs.append((loss, grads))
    assert_same(*runs, atol=1e-6, rtol=1e-5)


def test_initial_weights_are_a_function_of_seed_and_name():
    one, same, other = (dict(make(seed=seed, tied_embeddings=False).named_parameters()) for seed in (0, 0, 1))
    config = ModelSection(**SMALL)
    for name, parameter in one.items():
        assert torch.equal(parameter, same[name])
        if parameter.dim() == 2:
            assert not torch.equal(parameter, other[name])
            assert torch.equal(
                parameter[:VOCAB], initial_value(name, tuple(parameter.shape), config, 0)[:VOCAB]
            )
    deeper = dict(make(num_layers=5).named_parameters())
    assert torch.equal(
        deeper["decoder.layers.1.attention.qkv.weight"], one["decoder.layers.1.attention.qkv.weight"]
    )
    assert not torch.equal(
        one["decoder.layers.0.attention.qkv.weight"], one["decoder.layers.1.attention.qkv.weight"]
    )
    state = torch.get_rng_state()
    make()
    assert torch.equal(state, torch.get_rng_state())


def test_initial_weights_have_the_stated_spread():
    config = ModelSection(**{**SMALL, "init_std": 0.02, "num_layers": 8})
    plain = initial_value("decoder.layers.0.attention.qkv.weight", (256, 256), config, 0)
    assert plain.std().item() == pytest.approx(0.02, rel=0.02)
    for name in ("decoder.layers.0.attention.out.weight", "decoder.layers.7.mlp.down.weight"):
        assert initial_value(name, (256, 256), config, 0).std().item() == pytest.approx(0.02 / 4, rel=0.02)
    assert initial_value("decoder.layers.0.attention.out.bias", (4,), config, 0).tolist() == [0] * 4
    assert initial_value("decoder.norm.weight", (4,), config, 0).tolist() == [1] * 4


def test_init_weights_gathers_each_parameter_by_itself():
    gathered, model = [], GPT(ModelSection(**SMALL), VOCAB)

    @contextmanager
    def gather(parameter):
        gathered.append(parameter)
        yield

    init_weights(model, gather)
    assert [id(p) for p in gathered] == [id(p) for p in model.parameters()]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_torchs_cross_entropy(smoothing):
    model = make(label_smoothing=smoothing)
    inputs = batch((6, 3, 6))
    logits = logits_of(model, inputs)
    assert logits.shape == (15, VOCAB)
    expected = F.cross_entropy(logits, inputs["labels"], reduction="sum", label_smoothing=smoothing)
    torch.testing.assert_close(model(**inputs)[0], expected)
    log_p = logits.log_softmax(-1)[inputs["labels"] != -100]
    target = (
        F.one_hot(inputs["labels"][inputs["labels"] != -100], VOCAB) * (1 - smoothing) + smoothing / VOCAB
    )
    torch.testing.assert_close(expected, -(target * log_p).sum())
    plain = F.cross_entropy(logits, inputs["labels"], reduction="sum")
    torch.testing.assert_close(model.eval()(**inputs)[0], plain)  # evaluation is never smoothed


def test_a_batch_without_labels_has_no_loss_and_no_gradient():
    model = make()
    inputs = {**batch((3, 4)), "labels": torch.full((7,), -100)}
    loss_sum, num_tokens = model(**inputs)
    loss_sum.backward()
    assert (loss_sum.item(), num_tokens.item()) == (0.0, 0)
    assert not any(p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_l1_gradient_is_exact_for_any_accumulation(tied):
    """A step over F forwards with n labels, divided by n, has the gradient of mean loss + l1 * sum |w|."""
    inputs = batch((5, 9, 2))
    n = (inputs["labels"] != -100).sum().item()
    l1 = 0.01
    _, plain = gradients(make(tied_embeddings=tied), inputs)
    model = make(tied_embeddings=tied, l1=l1)
    for batches in ([inputs], list(documents(inputs))):
        loss, grads = gradients(model, *batches, l1_scale=n / len(batches))
        assert loss == pytest.approx(
            gradients(make(tied_embeddings=tied), inputs)[0], rel=1e-6
        )  # value untouched
        for name, weight in model.named_parameters():
            penalty = l1 * weight.detach().sign() if weight.dim() == 2 else torch.zeros_like(weight)
            torch.testing.assert_close(grads[name] / n, plain[name] / n + penalty, atol=1e-6, rtol=1e-5)
    with pytest.raises(AssertionError, match="l1"):
        model(**inputs)
    model.eval()(**inputs)


@pytest.mark.parametrize(
    "shape", [{}, {"positions": "learned", "norm": "layernorm", "activation": "gelu_tanh", "bias": True}]
)
def test_overfits_one_batch(shape):
    model = make(hidden_size=32, **shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    inputs = batch((16, 12, 3))
    for _ in range(80):
        loss_sum, num_tokens = model(**inputs)
        optimizer.zero_grad()
        (loss_sum / num_tokens).backward()
        optimizer.step()
    assert (loss_sum / num_tokens).item() < 0.05


def test_bf16_model_keeps_an_fp32_loss():
    model = make()
    exact = model(**batch((5, 9)))[0].item()
    loss_sum, _ = model.bfloat16()(**batch((5, 9)))
    assert loss_sum.dtype == torch.float32
    assert loss_sum.item() == pytest.approx(exact, rel=0.05)
    loss_sum.backward()
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in model.parameters())


def test_no_random_state_is_touched_by_a_step():
    model = make(dropout=0.5, recompute="full")
    state = torch.get_rng_state()
    model(**batch((5, 9)))[0].backward()
    assert torch.equal(state, torch.get_rng_state())


def test_equals_gpt2_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=VOCAB,
        n_positions=16,
        n_embd=16,
        n_layer=3,
        n_head=4,
        attn_pdrop=0,
        embd_pdrop=0,
        resid_pdrop=0,
    )
    theirs = transformers.GPT2LMHeadModel(config).train()
    ours = make(vocab_multiple=1, positions="learned", norm="layernorm", activation="gelu_tanh", bias=True)
    state = {
        "embed_tokens.weight": theirs.transformer.wte.weight,
        "decoder.embed_positions.weight": theirs.transformer.wpe.weight,
        "decoder.norm.weight": theirs.transformer.ln_f.weight,
        "decoder.norm.bias": theirs.transformer.ln_f.bias,
    }
    for i, block in enumerate(theirs.transformer.h):
        parts = {"attention_norm": block.ln_1, "mlp_norm": block.ln_2, "attention.qkv": block.attn.c_attn}
        parts |= {"attention.out": block.attn.c_proj, "mlp.up": block.mlp.c_fc, "mlp.down": block.mlp.c_proj}
        for name, part in parts.items():
            weight = part.weight.T if part.weight.dim() == 2 else part.weight  # Conv1D keeps [in, out]
            state |= {
                f"decoder.layers.{i}.{name}.weight": weight,
                f"decoder.layers.{i}.{name}.bias": part.bias,
            }
    ours.load_state_dict({name: value.detach() for name, value in state.items()})
    assert_same_as_transformers(ours, theirs, theirs.transformer.wte.weight)


def test_equals_llama_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    theirs = transformers.LlamaForCausalLM(config).train()
    ours = make(vocab_multiple=1, num_kv_heads=2, ffn_hidden_size=24, tied_embeddings=False)
    state = {
        "embed_tokens.weight": theirs.model.embed_tokens.weight,
        "decoder.norm.weight": theirs.model.norm.weight,
        "lm_head.weight": theirs.lm_head.weight,
    }
    for i, layer in enumerate(theirs.model.layers):
        attn, mlp = layer.self_attn, layer.mlp
        state |= {
            f"decoder.layers.{i}.attention_norm.weight": layer.input_layernorm.weight,
            f"decoder.layers.{i}.mlp_norm.weight": layer.post_attention_layernorm.weight,
            f"decoder.layers.{i}.attention.qkv.weight": torch.cat(
                [p.weight for p in (attn.q_proj, attn.k_proj, attn.v_proj)]
            ),
            f"decoder.layers.{i}.attention.out.weight": attn.o_proj.weight,
            f"decoder.layers.{i}.mlp.gate_up.weight": torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
            f"decoder.layers.{i}.mlp.down.weight": mlp.down_proj.weight,
        }
    ours.load_state_dict({name: value.detach() for name, value in state.items()})
    assert_same_as_transformers(ours, theirs, theirs.model.embed_tokens.weight)


def assert_same_as_transformers(ours, theirs, their_embedding):
    """Same logits, loss and embedding gradient on packed documents as on one document at a time."""
    inputs = batch((5, 16, 5))
    loss_sum, num_tokens = ours(**inputs)
    loss_sum.backward()
    logits = logits_of(ours, inputs)
    their_logits = torch.cat([theirs(one["input_ids"][None]).logits[0] for one in documents(inputs)])
    torch.testing.assert_close(logits, their_logits, atol=1e-5, rtol=1e-5)
    loss = F.cross_entropy(their_logits, inputs["labels"], reduction="sum")
    loss.backward()
    torch.testing.assert_close(loss_sum, loss, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(ours.embed_tokens.weight.grad, their_embedding.grad, atol=1e-5, rtol=1e-4)
    assert num_tokens == 23
