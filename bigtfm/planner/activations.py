"""What a forward pass keeps for its backward pass, and what that takes besides: a model as operations.

An operation keeps tensors until its own backward. That one is given the gradient of its output, makes that of
its input, and both are there at a time. The sizes are those of the code in bigtfm/model as torch runs it;
tests compare them with the tensors of real models. Korthikanti et al. 2022, "Reducing Activation
Recomputation", count the same way: 34 bytes x hidden size a token and block in 16 bits, which
`block` gives for their block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from bigtfm.config.loss_path import GPU_LOGITS_BYTES, LOGITS_BYTES, LossPath
from bigtfm.config.sections import HEADED, ModelSection, ObjectiveSection, TuneSection
from bigtfm.planner.parameters import Parameter, block_parameters, parameters_of, with_adapters


@dataclass(frozen=True)
class Op:
    """One operation; all numbers are bytes of a rank."""

    name: str
    keeps: int = 0  # from its forward to the end of its backward
    products: int = 0  # the part of `keeps` that selective recomputation keeps, too
    needs: int = 0  # what its backward allocates beside what is there
    leaves: int = 0  # gradients of activations that are there afterwards, the residual stream's included
    owns: tuple[str, ...] = ()  # parts of the names of the weights whose gradients its backward makes


@dataclass(frozen=True)
class Segment:
    """A block, or what stands before or behind the blocks, in the order of the forward."""

    name: str
    ops: tuple[Op, ...]
    input: int = 0  # bytes of its input, which recomputation keeps
    recompute: Literal["none", "full", "selective"] = "none"
    weights: tuple[Parameter, ...] = ()

    @property
    def whole(self) -> int:
        """Kept without recomputation."""
        return sum(op.keeps for op in self.ops)

    @property
    def kept(self) -> int:
        """Kept between its forward and its backward."""
        if self.recompute == "none":
            return self.whole
        return self.input + (sum(op.products for op in self.ops) if self.recompute == "selective" else 0)


@dataclass(frozen=True)
class Batch:
    """The tokens of a micro batch on one rank."""

    tokens: int  # of the decoder, or of the only stack
    read: int  # of the encoder of an encoder_decoder
    labelled: int  # that the output layer is asked about
    longest: int  # tokens of the longest document
    runs: (
        int  # runs of documents of equal length; kernels that take one at a time copy the results of several
    )

    @property
    def ragged(self) -> bool:
        return self.runs > 1


def batch_of(model: ModelSection, objective: ObjectiveSection, tokens: int, seq_len: int, runs: int) -> Batch:
    """What the objective makes of `tokens` of text in sequences of seq_len at most."""
    if model.family == "gpt":
        return Batch(tokens, 0, tokens, seq_len, runs)
    if model.family == "bert":
        return Batch(tokens, 0, round(tokens * objective.mask_fraction), seq_len, runs)
    if objective.kind == "sequence_to_sequence":  # that source and target are equally long is a guess
        return Batch(tokens // 2, tokens - tokens // 2, tokens // 2, seq_len, runs)
    hidden, spans = objective.mask_fraction, objective.mask_fraction / objective.span_length
    written = 1.0 if objective.kind == "infilling" else hidden + spans
    read = round(tokens * (1 - hidden + spans))
    return Batch(round(tokens * written), read, round(tokens * written), seq_len, runs)


@dataclass(frozen=True)
class Shapes:
    """How a model is computed: what decides which tensors there are."""

    model: ModelSection
    vocab_size: int
    value_bytes: int  # 4, in 16 bits 2
    on_cpu: bool
    groups_by_length: bool  # attention: torch's SDPA, a call for each run of documents of equal length
    recompute: str | int
    objective: ObjectiveSection = field(default_factory=ObjectiveSection)
    loss: LossPath = "whole"
    tune: TuneSection = field(default_factory=TuneSection)


def segments(shapes: Shapes, batch: Batch) -> list[Segment]:
    """The whole model: embeddings and blocks of each stack, the head; not the loss over the vocabulary."""
    found: list[Segment] = []
    model = shapes.model
    if model.family != "gpt":
        tokens = batch.read if model.family == "encoder_decoder" else batch.tokens
        found += _stack(shapes, batch, "encoder", tokens, model.num_layers)
    if model.family != "bert":
        layers = model.decoder_layers if model.family == "encoder_decoder" else model.num_layers
        found += _stack(shapes, batch, "decoder", batch.tokens, layers)
    if model.family == "bert" and shapes.objective.kind not in HEADED:
        found.append(_masked_head(shapes, batch))
    return [_adapted(shapes, batch, segment) for segment in found] if shapes.tune.lora_rank else found


def loss_bytes(shapes: Shapes, batch: Batch) -> tuple[int, int]:
    """(kept between forward and backward, the most at a time) of logits and cross-entropy.

    Whole: fp32 log-probabilities are kept; beside them stand, in the forward, the logits (in 16 bits in both
    types), in the backward the gradients of log-probabilities and of logits. Compiled: the logits are kept as
    the product made them, with two fp32 numbers a row, and get their gradient beside them. In chunks: the
    gradients of features and of the output layer are kept, the latter in fp32
    (bigtfm/model/cross_entropy.py), few logits made at a time.
    """
    if shapes.objective.kind in HEADED:  # of every token at most, and to all of it its gradient
        kept = 4 * batch.tokens * (shapes.model.num_labels or 2)
        return kept, 2 * kept
    if shapes.loss == "chunked":
        bias = 4 * shapes.vocab_size * shapes.model.head_bias
        hidden, vocab, size = shapes.model.hidden_size, shapes.vocab_size, shapes.value_bytes
        learns = shapes.tune.learns(
            "embed_tokens.weight" if shapes.model.tied_embeddings else "lm_head.weight"
        )
        kept = (size * batch.labelled + 4 * vocab * learns) * hidden + bias
        chunk = min(4 * batch.labelled * vocab, LOGITS_BYTES if shapes.on_cpu else GPU_LOGITS_BYTES)
        if size == 2:  # the chunk in both types, and its share of the output layer's gradient
            chunk += chunk // 2 + size * vocab * hidden * learns
        return kept, kept + chunk
    rows = batch.labelled
    one, padded = 4 * rows * shapes.vocab_size, rows * shapes.model.padded_vocab_size(shapes.vocab_size)
    if shapes.loss == "compiled":
        kept = padded * shapes.value_bytes + 8 * rows
        return kept, kept + padded * shapes.value_bytes
    forward = one + padded * shapes.value_bytes + (one if shapes.value_bytes == 2 else 0)
    if shapes.model.head_bias:
        forward += padded * shapes.value_bytes
    return one, max(forward, 3 * one)


def _stack(shapes: Shapes, batch: Batch, side: str, tokens: int, layers: int) -> Iterator[Segment]:
    model = shapes.model
    stream = tokens * model.hidden_size * shapes.value_bytes
    every = parameters_of(model, shapes.vocab_size)
    embedding = [p for p in every if p.name.startswith((f"{side}.embed", f"{side}.relative"))]
    tables = (".embed_positions.", ".embed_token_types.")
    ops = [Op("embedding", keeps=8 * tokens, owns=tables)]
    if model.embedding_norm:
        ops.append(_norm(shapes, "embed norm", tokens, stream))
    if model.positions == "rotary":
        angles = 4 * tokens * model.head_size * (2 if model.window else 1)
        ops.append(Op("rotary angles", keeps=angles, leaves=stream))
    if model.positions == "relative":
        bias = model.num_attention_heads * batch.longest**2 * shapes.value_bytes
        held = 0 if shapes.recompute == "none" else bias  # an argument of blocks that are computed again
        ops.append(
            Op(
                "relative bias",
                keeps=8 * batch.longest**2 + held,
                needs=2 * bias,
                leaves=stream,
                owns=(".relative",),
            )
        )
    yield Segment(f"{side} embedding", tuple(ops), weights=tuple(embedding))
    for index in range(layers):
        yield block(shapes, batch, side, tokens, index)
    weights = tuple(p for p in every if p.name.startswith(f"{side}.norm."))
    ops = [_norm(shapes, "norm", tokens, stream)] if model.norm_order == "pre" else []
    # A bert's head takes the labelled rows out; else the product with the vocabulary, or a decoder, keeps it.
    spared = model.family == "bert" or (side == "decoder" and shapes.loss == "chunked")
    ops.append(Op("output", keeps=0 if spared else stream, needs=stream, leaves=stream))
    yield Segment(f"{side} output", tuple(ops), weights=weights)


def block(shapes: Shapes, batch: Batch, side: str, tokens: int, index: int) -> Segment:
    """One block of a stack over `tokens` tokens."""
    model = shapes.model
    stream = tokens * model.hidden_size * shapes.value_bytes
    pre, crossed = model.norm_order == "pre", model.family == "encoder_decoder" and side == "decoder"
    first = index == 0 and pre and model.embedding_norm  # no norm: transformer.Block
    sublayers = [("attention", _attention(shapes, batch, side, tokens, index))]
    if crossed:
        sublayers.append(("cross", _cross_attention(shapes, batch, tokens)))
    sublayers.append(("mlp", _feed_forward(shapes, tokens)))
    ops: list[Op] = []
    for name, inner in sublayers:
        norm = _norm(shapes, f"{name} norm", tokens, stream)
        dropped = [_dropout(shapes, tokens, stream)] if model.dropout else []
        if pre:
            ops += ([] if name == "attention" and first else [norm]) + inner + dropped
        else:
            ops += [*inner, *dropped, norm]
    recompute = shapes.recompute
    if isinstance(recompute, int):
        recompute = "none" if index % recompute else "full"
    weights = tuple(block_parameters(model, side, index))
    return Segment(f"{side} block {index}", tuple(ops), stream, recompute, weights)  # type: ignore[arg-type]


def _adapted(shapes: Shapes, batch: Batch, segment: Segment) -> Segment:
    """A segment whose own weights stay as they are, with the adapters of its matrices.

    No gradient goes into an embedding, nor through the first norm. A frozen matrix keeps no input; an adapter
    keeps it, and its product with A. On a CPU a frozen RMSNorm does not keep what its weight multiplies.
    """
    model, tune, size = shapes.model, shapes.tune, shapes.value_bytes
    side = segment.name.partition(" ")[0]
    tokens = batch.read if model.family == "encoder_decoder" and side == "encoder" else batch.tokens
    unkept = {"embedding", "embed norm", "labelled"}
    if side == "decoder":  # an encoder's is kept by what attends to it
        unkept.add("output")
    if segment.name.endswith("block 0") and model.norm_order == "pre":
        unkept.add("attention norm")

    def adapted(op: Op) -> Op:
        if op.name in unkept:
            return replace(op, keeps=0)
        if op.name == "relative bias":
            return replace(op, keeps=model.num_attention_heads * batch.longest**2 * size)
        if op.name.endswith("norm"):
            rows = batch.labelled if segment.name == "masked-token head" else tokens
            composed = model.norm == "rmsnorm" and shapes.on_cpu
            return replace(op, keeps=op.keeps - 4 * rows * model.hidden_size * composed)
        matrix = next(
            (w for w in segment.weights if len(w.shape) > 1 and w.name[:-6].endswith(op.owns)), None
        )
        if matrix is None or not op.owns or ".layers." not in matrix.name:
            return op
        if not tune.adapts(matrix.name):
            relu = op.name == "mlp.down" and model.activation == "relu"  # which looks at its output
            return replace(op, keeps=op.keeps * relu)
        low, out = (tokens * count * size for count in (tune.lora_rank, matrix.shape[0]))
        return replace(op, keeps=op.keeps + low, products=op.products + low + out, needs=op.needs + out)

    return replace(
        segment,
        ops=tuple(map(adapted, segment.ops)),
        weights=tuple(with_adapters(list(segment.weights), tune)),
    )


def _norm(shapes: Shapes, name: str, tokens: int, stream: int) -> Op:
    """The input of a norm is kept by it, its output by what follows.

    On a CPU torch composes RMSNorm of products, which are kept, in fp32; on a GPU it is one kernel, as
    LayerNorm is everywhere.
    """
    owns = f".{name.replace(' ', '_')}."
    if shapes.model.norm == "rmsnorm" and shapes.on_cpu:
        full = (
            4 * tokens * shapes.model.hidden_size
        )  # the fp32 input, which is the stream's where that is fp32
        needs = 2 * full if stream == full else 4 * full
        return Op(name, 2 * full + 4 * tokens, needs=needs, leaves=stream, owns=(owns,))
    return Op(name, stream + 8 * tokens, needs=2 * stream, leaves=stream, owns=(owns,))


def _linear(name: str, stream: int, input_: int, kept: int, product: int = 0) -> Op:
    """A product; kept: bytes of its input, 0 where another operation keeps the same tensor."""
    return Op(name, kept, product, needs=input_, leaves=stream + input_, owns=(f".{name}.",))


def _attention(shapes: Shapes, batch: Batch, side: str, tokens: int, index: int) -> list[Op]:
    model, size = shapes.model, shapes.value_bytes
    stream = tokens * model.hidden_size * size
    width = tokens * model.num_attention_heads * model.head_size * size
    keys = tokens * model.kv_heads * model.head_size * size
    qkv, heads = width + 2 * keys, 4 * tokens * model.num_attention_heads
    ops = [_linear("attention.qkv", stream, stream, kept=stream)]
    ops.append(Op("split", needs=qkv, leaves=stream + qkv))
    turned = width + keys if model.positions == "rotary" else 0
    if turned:
        ops.append(Op("rotary", keeps=0, needs=3 * turned * (4 // size), leaves=stream + qkv))
    if model.positions == "relative" and shapes.groups_by_length and not shapes.tune.lora_rank:
        scores = tokens * model.num_attention_heads * batch.longest * 4  # no fused kernel takes it on a CPU
        products = qkv + scores + width
        ops.append(Op("attention", products, products, needs=2 * scores + qkv, leaves=stream + qkv))
    else:
        mask = 0
        if model.window and model.window < batch.longest - 1 and shapes.groups_by_length:
            mask = size * batch.longest**2 * batch.runs
        kept = qkv + turned + width + heads
        products = qkv + width + heads
        ops.append(Op("attention", kept + mask, products, needs=qkv, leaves=stream + qkv))
    copied = width if batch.ragged and shapes.groups_by_length else 0
    ops.append(_linear("attention.out", stream, width, kept=copied, product=stream))
    return ops


def _cross_attention(shapes: Shapes, batch: Batch, tokens: int) -> list[Op]:
    model, size = shapes.model, shapes.value_bytes
    stream = tokens * model.hidden_size * size
    width = tokens * model.num_attention_heads * model.head_size * size
    keys = 2 * batch.read * model.kv_heads * model.head_size * size
    memory = batch.read * model.hidden_size * size
    heads = 4 * tokens * model.num_attention_heads
    kept = 2 * width + keys + heads
    copied = width if batch.ragged and shapes.groups_by_length else 0
    return [
        _linear("cross_attention.q", stream, stream, kept=stream),
        Op("cross kv", needs=memory, leaves=stream + memory + width, owns=(".cross_attention.kv.",)),
        Op("cross attention", kept, products=kept, needs=width + keys, leaves=stream + memory + width + keys),
        _linear("cross_attention.out", stream + memory, width, kept=copied, product=stream),
    ]


def _feed_forward(shapes: Shapes, tokens: int) -> list[Op]:
    model = shapes.model
    stream = tokens * model.hidden_size * shapes.value_bytes
    wide = tokens * model.ffn_size * shapes.value_bytes
    up = 2 * wide if model.gated else wide
    ops = [_linear("mlp.gate_up" if model.gated else "mlp.up", stream, stream, kept=stream)]
    if model.gated:
        ops.append(Op("chunk", needs=2 * wide, leaves=stream + 2 * wide))
        ops.append(Op("activation", keeps=up, products=up, needs=wide, leaves=stream + 2 * wide))
        ops.append(Op("gate", keeps=wide, needs=2 * wide, leaves=stream + 2 * wide))
    else:
        kept = 0 if model.activation == "relu" else up  # relu's backward looks at its output
        ops.append(Op("activation", keeps=kept, products=up, needs=wide, leaves=stream + wide))
    ops.append(_linear("mlp.down", stream, wide, kept=wide, product=stream))
    return ops


def _dropout(shapes: Shapes, tokens: int, stream: int) -> Op:
    return Op("dropout", keeps=tokens * shapes.model.hidden_size, needs=2 * stream, leaves=2 * stream)


def _masked_head(shapes: Shapes, batch: Batch) -> Segment:
    """BERT's head over the labelled tokens."""
    model = shapes.model
    rows = batch.labelled * model.hidden_size * shapes.value_bytes
    stream = batch.tokens * model.hidden_size * shapes.value_bytes
    weights = tuple(p for p in parameters_of(model, shapes.vocab_size) if p.name.startswith("mlm_head."))
    output = 0 if shapes.loss == "chunked" or shapes.tune.lora_rank else rows
    ops = (
        Op("labelled", keeps=rows, needs=stream, leaves=stream),
        Op("dense", needs=rows, leaves=rows, owns=(".dense.",)),
        Op("gelu", keeps=rows, needs=rows, leaves=rows),
        Op("norm", keeps=rows + output, needs=2 * rows, leaves=rows, owns=(".norm.",)),
    )
    return Segment("masked-token head", ops, weights=weights)
