"""What every family promises: packing, padding, recomputation change nothing; nothing leaks; it learns."""

from __future__ import annotations

import itertools

import pytest
import torch
from small_models import KINDS, VOCAB, assert_same, batch, documents, gradients, make

from bigtfm.config.sections import ObjectiveSection
from bigtfm.model.attention import Documents
from bigtfm.model.transformer import Block, compile_blocks
from bigtfm.planner.parameters import count_parameters

RAGGED = [5, 1, 9, 24, 1, 5]  # length 1, and the longest that the model reads


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_packed_equals_documents_one_by_one(kind, dropout):
    model = make(kind, dropout=dropout)
    inputs = batch(model, RAGGED)
    whole, alone = gradients(model, inputs), gradients(model, *documents(inputs))
    assert_same(whole, alone, atol=1e-5, rtol=1e-4)
    assert whole[0] > 1


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_as_many_as_foreseen(kind):
    for shape in ({}, {"tied_embeddings": False, "bias": True, "vocab_multiple": 8}):
        model = make(kind, **shape)
        assert sum(p.numel() for p in model.parameters()) == count_parameters(model.config, VOCAB)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient(kind):
    model = make(kind)
    _, grads = gradients(model, batch(model, RAGGED))
    for name, gradient in grads.items():
        assert gradient.isfinite().all(), name
        assert gradient.any(), name


def test_the_control_of_packing_goes_red():
    """The same tokens as one document have another loss: the comparison above can fail."""
    model = make("gpt")
    inputs = batch(model, [5, 9])
    joined = {**inputs, "cu_seqlens": torch.tensor([0, 14], dtype=torch.int32), "seq_lens": (14,)}
    with pytest.raises(AssertionError):
        assert_same(gradients(model, inputs), gradients(model, joined), atol=1e-3, rtol=1e-3)


def padded(inputs, side=""):
    """Each document filled up to the longest with tokens that are a document of their own, without labels."""
    longest = max(inputs[f"{side}seq_lens"]) + 1
    lens = [n for length in inputs[f"{side}seq_lens"] for n in (length, longest - length)]
    starts = inputs[f"{side}cu_seqlens"].tolist()
    rows = {}
    for name in ("input_ids", "position_ids", "token_keys"):
        value, filler = inputs[side + name], torch.arange(longest)
        rows[side + name] = torch.cat(
            [
                part
                for a, b in itertools.pairwise(starts)
                for part in (value[a:b], filler[: longest - (b - a)])
            ]
        )
    rows[f"{side}cu_seqlens"] = torch.tensor([0, *lens]).cumsum(0).to(torch.int32)
    rows[f"{side}seq_lens"] = tuple(lens)
    return rows, longest


@pytest.mark.parametrize("kind", KINDS)
def test_packed_equals_padded(kind):
    """Loss and gradients of the token-weighted mean within 1e-6."""
    model = make(kind, init_std=0.05)
    inputs = batch(model, RAGGED)
    sides = ["", "decoder_"] if "decoder_input_ids" in inputs else [""]
    rows = dict(inputs)
    for side in sides:
        filled, longest = padded(inputs, side)
        rows |= filled
    side = sides[-1]
    labels = torch.full((len(rows[f"{side}input_ids"]),), -100)
    starts = inputs[f"{side}cu_seqlens"].tolist()
    for number, (a, b) in enumerate(itertools.pairwise(starts)):
        labels[number * longest : number * longest + b - a] = inputs["labels"][a:b]
    rows["labels"] = labels
    if "token_type_ids" in inputs:
        kinds = torch.zeros(len(labels), dtype=torch.int64)
        for number, (a, b) in enumerate(itertools.pairwise(starts)):
            kinds[number * longest : number * longest + b - a] = inputs["token_type_ids"][a:b]
        pairs = torch.full((2 * len(RAGGED),), -100)
        pairs[::2] = inputs["next_sentence_labels"]
        rows |= {"token_type_ids": kinds, "next_sentence_labels": pairs}
    count = (labels != -100).sum()
    means = []
    for one in (inputs, rows):
        model.zero_grad()
        loss = model(**one)[0] / count
        loss.backward()
        means.append((loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}))
    assert_same(*means, atol=1e-6, rtol=1e-5)
    assert sum(len(rows[f"{side}input_ids"]) for side in sides) > 1.5 * sum(
        len(inputs[f"{side}input_ids"]) for side in sides
    )


@pytest.mark.parametrize("kind", KINDS)
def test_documents_do_not_leak(kind):
    """Document A is perturbed: B's loss stays bit for bit, and its gradient with respect to A is zero."""
    model = make(kind).eval()
    lengths, written = [5, 9, 4], [3, 6, 2]
    inputs = batch(model, lengths, written=written)
    decoder = "decoder_input_ids" in inputs
    of_b = slice(3, 9) if decoder else slice(5, 14)
    inputs["labels"][: of_b.start] = inputs["labels"][of_b.stop :] = -100
    if "next_sentence_labels" in inputs:
        inputs["next_sentence_labels"][[0, 2]] = -100
    seen = []
    hook = model.embed_tokens.register_forward_hook(
        lambda _, args, out: seen.append(out) if args[0].dtype == torch.int64 else None
    )
    loss, _ = model(**inputs)
    loss.backward(inputs=seen)
    hook.remove()
    lengths_of = [inputs["seq_lens"], inputs["decoder_seq_lens"]] if decoder else [inputs["seq_lens"]]
    for embedded, lens in zip(seen, lengths_of, strict=True):
        touched = [bool(part.any()) for part in embedded.grad.split(lens)]
        assert touched == [False, True, False]

    changed = dict(inputs)
    for name, a, c in [("input_ids", 5, 14)] + [("decoder_input_ids", 3, 9)] * decoder:
        changed[name] = inputs[name].clone()
        changed[name][:a] = (changed[name][:a] + 1) % VOCAB
        changed[name][c:] = (changed[name][c:] + 1) % VOCAB
    with torch.no_grad():
        assert model(**changed)[0].item() == loss.item()
        changed["input_ids"][6] = (changed["input_ids"][6] + 1) % VOCAB  # the control: B itself
        assert model(**changed)[0].item() != loss.item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recompute", ["full", 2, "selective"])
def test_recompute_changes_nothing(kind, recompute):
    inputs = batch(make(kind), [5, 1, 9])
    plain = gradients(make(kind, dropout=0.2), inputs)
    other = gradients(make(kind, dropout=0.2, recompute=recompute), inputs)
    assert plain[0] == other[0]
    assert all(torch.equal(plain[1][name], other[1][name]) for name in plain[1])


@pytest.mark.parametrize("kind", KINDS)
def test_attention_dropout_does_not_depend_on_packing(kind):
    model = make(kind, attention_dropout=0.3, attention="reference")
    inputs = batch(model, RAGGED)
    assert_same(gradients(model, inputs), gradients(model, *documents(inputs)), atol=1e-5, rtol=1e-4)
    plain = make(kind, attention="reference")
    assert abs(model(**inputs)[0].item() - plain(**inputs)[0].item()) > 1e-2
    assert model.eval()(**inputs)[0].item() == pytest.approx(plain.eval()(**inputs)[0].item(), rel=1e-6)


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_blocks_are_compiled_and_parameters_keep_their_names():
    model = make("t5")
    names = [name for name, _ in model.named_parameters()]
    compile_blocks(model)
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    assert len(blocks) == 5
    assert all(block._compiled_call_impl is not None for block in blocks)
    assert [name for name, _ in model.named_parameters()] == names


def test_dropout_differs_between_the_stacks():
    model = make("t5", dropout=0.5)
    keys = torch.arange(8)
    assert not torch.equal(model.encoder.words(keys), model.decoder.words(keys))


def test_a_pair_weighs_as_much_as_its_weight_says():
    losses = []
    for weight in (0.0, 1.0, 3.0):
        model = make("bert", objective=ObjectiveSection(next_sentence=weight))
        losses.append(model(**batch(model, [5, 9]))[0].item())
    assert losses[2] - losses[0] == pytest.approx(3 * (losses[1] - losses[0]), rel=1e-5)
    assert losses[1] > losses[0]


def test_the_window_is_as_wide_as_it_says():
    """A gpt of one block with window w sees itself and w tokens back; an encoder as many ahead."""
    for kind, window, expected in (("gpt", 3, range(7, 11)), ("modern-bert", 2, range(8, 13))):
        shape = {"window": window, "num_layers": 1, "embedding_norm": False, "local_rotary_base": None}
        shape |= {"global_every": 0} if kind == "modern-bert" else {}
        model = make(kind, **shape).eval()
        inputs = batch(model, [20])
        documents = Documents(inputs["cu_seqlens"], inputs["seq_lens"])
        seen = []
        model.embed_tokens.register_forward_hook(lambda _, args, out, seen=seen: seen.append(out))
        x = model.hidden(inputs["input_ids"], inputs["position_ids"], documents)
        (x[10] * torch.linspace(-1, 2, len(x[10]))).sum().backward(inputs=seen[:1])
        assert seen[0].grad.abs().sum(-1).nonzero().flatten().tolist() == list(expected)


def test_global_blocks_see_everything():
    model = make("modern-bert").eval()
    windows = [block.attention.window for block in model.encoder.layers]
    assert windows == [None, 2, 2]
    assert model.encoder.layers[0].attention_norm is None
    assert model.encoder.layers[1].attention_norm is not None


@pytest.mark.parametrize("kind", KINDS)
def test_overfits_one_batch(kind):
    model = make(kind, hidden_size=32, num_layers=2, init_std=0.05)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    inputs = batch(model, [16, 12, 3])
    inputs.pop("next_sentence_labels", None)
    for _ in range(150):
        loss_sum, count = model(**inputs)
        optimizer.zero_grad()
        (loss_sum / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert (loss_sum / count).item() < 0.05
