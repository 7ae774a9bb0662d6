"""Post-training quantisation: every matrix of a model in integers, without data."""

from __future__ import annotations

from torch import Tensor

from bigtfm.compression.result import Compressed
from bigtfm.model.heads import LanguageModel
from bigtfm.model.layers import Embedding, Linear
from bigtfm.model.quantized import Kind, Quantized, quantize
from bigtfm.model.transformer import block_linears


def quantized(model: LanguageModel, kind: Kind, group_size: int) -> Compressed:
    """int8 and int8_dynamic: all matrices, a scale a row. int4: those of the blocks, a scale for each
    `group_size` columns; embeddings and output layer int8, since every token meets them. Norms and biases
    stay fp32.
    """
    layers = {f"{path}.weight" for path, m in model.named_modules() if isinstance(m, Linear | Embedding)}
    in_blocks = {f"{path}.weight" for path, _ in block_linears(model)}
    parameters: dict[str, Tensor | Quantized] = {}
    for name, parameter in model.named_parameters():
        if name not in layers:
            parameters[name] = parameter
        elif kind == "int4" and name in in_blocks:
            parameters[name] = quantize(parameter, "int4", group_size)
        else:
            parameters[name] = quantize(parameter, "int8" if kind == "int4" else kind)
    return Compressed(model.config, parameters, {"group_size": group_size} if kind == "int4" else {})
