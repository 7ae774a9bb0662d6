"""Matrices of a few bits a weight, and the layers that compute with them.

W[i, j] ~ q[i, j] * s[i, j // group]: symmetric, round to nearest, one scale s for each row or each group of a
row. `int8` and `int4` are weight-only: a forward expands one matrix at a time to the features' type.
`int8_dynamic` also rounds the features, with one scale a token, and multiplies integers (Dettmers et al.
2022, section 3.1, without its outliers). A token's result depends on no other token of its batch.

T tokens, R rows, C columns, G groups of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigtfm.model.layers import Embedding, Linear, OutputLoss

Kind = Literal["int8", "int8_dynamic", "int4"]
KINDS: tuple[Kind, ...] = get_args(Kind)
CLIPS = torch.linspace(1.0, 0.6, 9).tolist()  # shares of a group's largest |w| that are tried as its range


@dataclass(frozen=True)
class Quantized:
    """A matrix [R, C]."""

    kind: Kind
    values: Tensor  # int8 [R, C]; of int4 uint8 [R, ceil(C / 2)], the even column in the low half
    scales: Tensor  # fp32 [R, G]; a group has C / G columns
    columns: int  # C

    def dequantized(self) -> Tensor:
        """fp32 [R, C]."""
        values, groups = _unpacked(self), self.scales.shape[1]
        return (values.float().unflatten(1, (groups, -1)) * self.scales[..., None]).flatten(1)

    def __getitem__(self, rows: Tensor) -> Quantized:
        """The same rows [T] of the matrix, as a matrix."""
        return Quantized(self.kind, self.values[rows], self.scales[rows], self.columns)


def quantize(weight: Tensor, kind: Kind, group: int | None = None) -> Quantized:
    """The nearest such matrix to `weight` [R, C], by squared error among several ranges for each group.

    group: columns that share a scale, of int4; None, or where it does not divide C: all of a row. Otherwise
    always all of a row: then the product of integers comes first, and its rows are scaled.
    """
    columns = weight.shape[1]
    size = group if group and kind == "int4" and columns % group == 0 else columns
    most = 7 if kind == "int4" else 127
    groups = weight.detach().float().unflatten(1, (-1, size))  # [R, G, size]
    largest = groups.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny * most)
    values, scales, least = torch.zeros_like(groups), largest / most, torch.full_like(largest, torch.inf)
    for clip in CLIPS:
        scale = largest * (clip / most)
        rounded = (groups / scale).round().clamp(-most, most)
        error = (rounded * scale - groups).square().sum(-1, keepdim=True)
        better = error < least
        values, scales = torch.where(better, rounded, values), torch.where(better, scale, scales)
        least = torch.minimum(error, least)
    return Quantized(kind, _packed(values.flatten(1).to(torch.int8), kind), scales[..., 0], columns)


def _packed(values: Tensor, kind: Kind) -> Tensor:
    """int8 [R, C], of int4 two to a byte: each plus 8, from 1 to 15."""
    if kind != "int4":
        return values
    halves = F.pad(values + 8, (0, values.shape[1] % 2)).to(torch.uint8)
    return halves[:, ::2] | (halves[:, 1::2] << 4)


def _unpacked(matrix: Quantized) -> Tensor:
    """int8 [R, C]."""
    if matrix.kind != "int4":
        return matrix.values
    halves = torch.stack((matrix.values & 15, matrix.values >> 4), -1).flatten(1)
    return halves[:, : matrix.columns].to(torch.int8) - 8


def rounded_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Features [T, C] as int8 [T, C] and the tokens' scales, fp32 [T, 1]."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=torch.finfo(torch.float32).tiny * 127) / 127
    return (x / scale).round().to(torch.int8), scale


class QuantizedMatrix(nn.Module):
    """What replaces a layer's parameter: integers and scales; `weight` is made of them."""

    values: Tensor
    scales: Tensor

    def __init__(self, matrix: Quantized) -> None:
        nn.Module.__init__(self)
        self.kind, self.columns = matrix.kind, matrix.columns
        self.register_buffer("values", matrix.values)
        self.register_buffer("scales", matrix.scales)

    @property
    def matrix(self) -> Quantized:
        return Quantized(self.kind, self.values, self.scales, self.columns)

    @property
    def weight(self) -> Tensor:
        return self.matrix.dequantized()

    def product(self, x: Tensor) -> Tensor:
        """x W^T [T, R] of features [T, C]."""
        if self.kind == "int4":
            return F.linear(x, self.weight.to(x.dtype))
        if self.kind == "int8":  # bf16 holds these integers, too: the scales may come after the sum
            return F.linear(x, self.values.to(x.dtype)) * self.scales[:, 0].to(x.dtype)
        values, scale = rounded_tokens(x)
        if x.device.type == "cpu":  # elsewhere the product of integers has conditions on its shapes
            return (torch._int_mm(values, self.values.t()).float() * (scale * self.scales[:, 0])).to(x.dtype)
        return F.linear(values * scale, self.weight).to(x.dtype)

    def loss(self, x: Tensor, loss: OutputLoss, bias: Tensor | None) -> Tensor:
        """The loss of features [T, C] under this output layer."""
        if self.kind == "int8_dynamic":
            values, scale = rounded_tokens(x)
            x = (values * scale).to(x.dtype)
        return loss(x, self.weight.to(x.dtype), bias)


class QuantizedLinear(QuantizedMatrix, Linear):  # type: ignore[misc]  # a weight that is computed
    """As `Linear`, of a quantised matrix."""

    def __init__(self, matrix: Quantized, bias: nn.Parameter | None) -> None:
        super().__init__(matrix)
        self.bias = bias

    def forward(self, x: Tensor | None, loss: OutputLoss | None = None) -> Tensor:
        if x is None:
            return super().forward(x)
        if loss is not None:
            return self.loss(x, loss, self.bias)
        return self.product(x) if self.bias is None else self.product(x) + self.bias


class QuantizedEmbedding(QuantizedMatrix, Embedding):  # type: ignore[misc]
    """As `Embedding`, of a quantised table."""

    def __init__(self, matrix: Quantized) -> None:
        super().__init__(matrix)

    def forward(self, x: Tensor | None, project: bool = False, loss: OutputLoss | None = None) -> Tensor:
        if x is None:
            return super().forward(x)
        if loss is not None:
            return self.loss(x, loss, None)
        return self.product(x) if project else self.matrix[x].dequantized()


def put(model: nn.Module, name: str, matrix: Quantized) -> None:
    """Puts a quantised matrix in the place of parameter `name`, a Linear's or an Embedding's weight."""
    path = name.removesuffix(".weight")
    layer, (parent, _, attribute) = model.get_submodule(path), path.rpartition(".")
    new: nn.Module
    if isinstance(layer, Linear):
        new = QuantizedLinear(matrix, layer.bias)
    else:
        assert isinstance(layer, Embedding), f"{name} is no matrix of a layer"
        new = QuantizedEmbedding(matrix)
    setattr(model.get_submodule(parent), attribute, new.train(layer.training))
