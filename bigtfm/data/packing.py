"""From padded batches, as Hugging Face's collators make them, to packed ones and back.

B rows of S slots each; T tokens of the N rows that are not all padding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bigtfm.config.marks import IGNORE
from bigtfm.config.problems import DataProblem


def unpad(
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor | None = None,
    *,
    shift: bool = False,
    first_row: int = 0,
) -> dict[str, Any]:
    """A model's inputs of a padded batch, padded on either side; rows of nothing but padding are dropped.

    Args:
        input_ids, attention_mask, labels: [B, S] ids, 1 or 0 (padding), and what each position has to predict
            (-100: nothing).
        shift: the labels are those of a Hugging Face causal model, which moves them itself: the label of a
            position is the next one's.
        first_row: how many rows the step has before this batch, on other ranks and in other micro-batches; so
            that no two tokens of a step drop the same features.

    Returns:
        input_ids [T], labels [T] if given, position_ids [T], cu_seqlens [N + 1], seq_lens, token_keys [T].

    Raises:
        DataProblem: a row has padding between tokens, there are no tokens, or shapes differ.
    """
    for name, tensor in {"attention_mask": attention_mask, "labels": labels}.items():
        if tensor is not None and tensor.shape != input_ids.shape:
            raise _problem(
                f"{name} is {list(tensor.shape)}, but input_ids {list(input_ids.shape)}",
                fix="pass one value for each token",
            )
    present = attention_mask.bool()  # [B, S]
    lengths = present.sum(1)  # [B]
    blocks = (F.pad(present, (1, 0))[:, :-1] < present).sum(1)  # runs of tokens in each row
    if (blocks > 1).any():
        row = int((blocks > 1).nonzero()[0])
        raise _problem(f"row {row} has padding between tokens", fix="pad rows at one end alone")
    lengths = lengths[lengths > 0]  # [N]
    if not len(lengths):
        raise _problem("no token in the batch", fix="pass an attention_mask that is 1 where a token stands")
    ends = lengths.cumsum(0)
    positions = torch.arange(int(ends[-1]), device=input_ids.device)
    inputs = {
        "input_ids": input_ids[present].long(),
        "position_ids": positions - (ends - lengths).repeat_interleave(lengths),
        "cu_seqlens": F.pad(ends, (1, 0)).int(),
        "seq_lens": tuple(lengths.tolist()),
        "token_keys": first_row * present.shape[1] + present.reshape(-1).nonzero()[:, 0],
    }
    if labels is not None:
        if shift:
            labels = F.pad(labels.masked_fill(~present, IGNORE)[:, 1:], (0, 1), value=IGNORE)
        inputs["labels"] = labels[present].long()
    return inputs


def unpad_pairs(
    input_ids: Tensor,
    attention_mask: Tensor,
    decoder_input_ids: Tensor,
    decoder_attention_mask: Tensor,
    labels: Tensor | None = None,
    *,
    first_row: int = 0,
) -> dict[str, Any]:
    """The same for an encoder-decoder; row n of the decoder, [B, S'], belongs to row n of the encoder.

    Raises:
        DataProblem: as `unpad`, or of a pair one side alone has tokens.
    """
    if len(attention_mask) != len(decoder_attention_mask):
        raise _problem(
            f"{len(attention_mask)} rows for the encoder, but {len(decoder_attention_mask)} for the decoder",
            fix="pass pairs",
        )
    alone = attention_mask.bool().any(1) != decoder_attention_mask.bool().any(1)
    if alone.any():
        raise _problem(
            f"row {int(alone.nonzero()[0])} has tokens for the encoder or the decoder alone",
            fix="give both at least one token, or none",
        )
    inputs = unpad(input_ids, attention_mask, first_row=first_row)
    decoder = unpad(decoder_input_ids, decoder_attention_mask, labels, first_row=first_row)
    for name, value in decoder.items():
        inputs[name if name == "labels" else f"decoder_{name}"] = value
    return inputs


def pad(packed: Tensor, attention_mask: Tensor, fill: float = 0) -> Tensor:
    """The way back: [T, ...] of the tokens -> [B, S, ...], with `fill` where attention_mask [B, S] is 0."""
    out = packed.new_full((*attention_mask.shape, *packed.shape[1:]), fill)
    out[attention_mask.bool()] = packed
    return out


def _problem(what: str, fix: str) -> DataProblem:
    return DataProblem(what, where="padded batch", fix=fix)
