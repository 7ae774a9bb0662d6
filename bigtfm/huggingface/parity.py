"""Parity with transformers: the same tokens through our model, packed, and through theirs, padded.

N texts of different lengths, T tokens of them all, S of the longest, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigtfm.config.optional import quietly
from bigtfm.config.problems import DataProblem, NumericsProblem
from bigtfm.console import at_work
from bigtfm.huggingface.files import read_json, said
from bigtfm.model.attention import Documents
from bigtfm.model.bert import BERT
from bigtfm.model.encoder_decoder import EncoderDecoder
from bigtfm.model.gpt import GPT
from bigtfm.model.heads import LanguageModel

TOLERANCE = 1e-5  # of the largest value, or of 1 where that is less
LONGEST = 512  # tokens of the probe's longest text
SEED = 0


@dataclass(frozen=True)
class Parity:
    """How far two models are apart on the probe."""

    what: str  # logits or features
    difference: float  # the largest, absolute
    largest: float  # absolute value of theirs

    @property
    def allowed(self) -> float:
        return TOLERANCE * max(1.0, self.largest)

    def __str__(self) -> str:
        return (
            f"largest difference {self.difference:.1e} of {self.what} up to {self.largest:.3g} "
            f"(at most {self.allowed:.1e})"
        )


@dataclass(frozen=True)
class Probe:
    """Texts that one stack reads: packed for us, padded for them."""

    lengths: tuple[int, ...]  # N
    input_ids: Tensor  # [N, S] int64
    token_types: Tensor  # [N, S] int64: 1 in each text's second half
    mask: Tensor  # [N, S] bool: no padding

    @property
    def packed(self) -> tuple[Tensor, Tensor, Documents]:
        """input_ids [T], position_ids [T] and where the documents stand."""
        starts = torch.tensor([0, *self.lengths]).cumsum(0).int()
        positions = torch.cat([torch.arange(length) for length in self.lengths])
        return self.input_ids[self.mask], positions, Documents(starts, self.lengths)


def require_parity(model: LanguageModel, folder: Path, name: str) -> Parity:
    """Compares our model with transformers' of class `name` in `folder`, both in fp32 on the CPU.

    Raises:
        DataProblem: transformers can't load or run it.
        NumericsProblem: an output differs by more than 1e-5 x max(1, the largest of theirs).
    """
    with at_work("comparing with transformers"):
        parity = measure(model, folder, name)
    if not parity.difference <= parity.allowed:  # NaN is no parity
        raise NumericsProblem(
            f"our model and transformers' disagree: {parity}",
            where=str(folder),
            fix="report it with the model's config.json; nothing was written",
        )
    return parity


@torch.inference_mode()
def measure(model: LanguageModel, folder: Path, name: str) -> Parity:
    """The largest difference between the outputs of our model and of the one in `folder`."""
    config = read_json(folder / "config.json")
    longest = min(LONGEST, model.config.max_seq_len)
    vocab_size = min(model.vocab_size, config["vocab_size"])
    # No padding token stands in the texts: RoBERTa's positions skip it.
    padding = config.get("pad_token_id")
    padding = padding if padding in range(vocab_size) else None
    ids = torch.tensor([i for i in range(vocab_size) if i != padding])
    read = _probe((longest, longest // 3 + 1, min(7, longest), 1), ids, padding, seed=0)
    written = None
    if isinstance(model, EncoderDecoder) and not name.endswith("EncoderModel"):
        written = _probe((min(5, longest), longest, 1, longest // 2 + 1), ids, padding, seed=1)
    with _theirs(folder):
        theirs = _their_outputs(_load(name, folder), read, written, types=model.config.token_types > 1)
    ours = _our_outputs(model, read, written)
    differences = []
    for output, expected in theirs.items():
        width = min(expected.shape[1], ours[output].shape[1])  # --vocab-size may have changed ours
        differences.append(float((expected[:, :width] - ours[output][:, :width]).abs().max()))
    return Parity(
        "features" if "last_hidden_state" in theirs else "logits",
        difference=max(differences),
        largest=max(float(expected.abs().max()) for expected in theirs.values()),
    )


@contextmanager
def _theirs(folder: Path) -> Iterator[None]:
    """Turns whatever transformers raises into one line."""
    try:
        yield
    except Exception as error:
        raise DataProblem(
            f"transformers can't load or run it: {said(error)}",
            where=str(folder),
            fix="check config.json and the weights with transformers itself, or pass --no-compare",
        ) from None


def _probe(lengths: tuple[int, ...], ids: Tensor, padding: int | None, seed: int) -> Probe:
    """Random texts of these lengths; padding: what stands behind the shorter ones, None: any token."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.arange(max(lengths))
    ends = torch.tensor(lengths)[:, None]
    mask = places < ends  # [N, S]
    drawn = ids[torch.randint(len(ids), mask.shape, generator=generator)]
    behind = ids[0] if padding is None else torch.tensor(padding)
    return Probe(lengths, torch.where(mask, drawn, behind), (2 * places >= ends).long(), mask)


def _load(name: str, folder: Path) -> Any:
    """The model of class `name`, fp32, evaluation mode; quietly."""
    with quietly():
        import transformers
        from transformers.utils import logging

        bars = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            model = getattr(transformers, name).from_pretrained(
                folder,
                torch_dtype=torch.float32,
                attn_implementation="eager",  # the formula as it is written
                local_files_only=True,
                use_safetensors=True,
            )
        finally:
            if bars:
                logging.enable_progress_bar()
    return model.eval()


def _their_outputs(model: Any, read: Probe, written: Probe | None, *, types: bool) -> dict[str, Tensor]:
    """Their outputs by their names, [T, ...] without the padding; of whole texts and of pairs [N, ...]."""
    inputs = {"input_ids": read.input_ids, "attention_mask": read.mask.long()}
    if types:
        inputs["token_type_ids"] = read.token_types
    if written is not None:
        inputs |= {"decoder_input_ids": written.input_ids, "decoder_attention_mask": written.mask.long()}
    if model.config.pad_token_id is None and type(model).__name__.endswith("ForSequenceClassification"):
        texts = zip(read.input_ids, read.lengths, strict=True)  # it reads one at a time
        return {"logits": torch.cat([model(ids[None, :length])["logits"] for ids, length in texts])}
    outputs = model(**inputs)
    mask = (written or read).mask
    if "start_logits" in outputs:
        return {"logits": torch.stack([outputs["start_logits"], outputs["end_logits"]], -1)[mask]}
    if (logits := outputs.get("logits")) is not None and logits.dim() == 2:  # of whole texts
        return {"logits": logits}
    found = {name: outputs[name][mask] for name in _OUTPUTS if name in outputs}
    if "seq_relationship_logits" in outputs:
        found["seq_relationship_logits"] = outputs["seq_relationship_logits"]
    return found


_OUTPUTS = ("logits", "prediction_logits", "last_hidden_state")


def _our_outputs(model: LanguageModel, read: Probe, written: Probe | None) -> dict[str, Tensor]:
    """The same of our model."""
    if isinstance(model, BERT):
        types = read.token_types[read.mask] if model.config.token_types > 1 else None
        x = model.hidden(*read.packed, token_type_ids=types)
        if model.task_head is not None:
            return {"logits": _task_logits(model, x, read)}
        logits = model.vocabulary(x)
        outputs = {"last_hidden_state": x, "logits": logits, "prediction_logits": logits}
        if model.next_sentence is not None:
            outputs["seq_relationship_logits"] = model.next_sentence(x[read.packed[2].cu_seqlens[:-1].long()])
        return outputs
    if isinstance(model, GPT):
        x = model.hidden(*read.packed)
        if model.task_head is not None:
            return {"logits": _task_logits(model, x, read)}
    else:
        assert isinstance(model, EncoderDecoder)
        memory = model.encode(*read.packed)
        x = memory.features if written is None else model.hidden(*written.packed, memory=memory)
    return {"last_hidden_state": x, "logits": model.project(x)}


def _task_logits(model: LanguageModel, x: Tensor, read: Probe) -> Tensor:
    """[N, L] where texts are classified, else [T, L] of each token; x [T, C]."""
    assert model.task_head is not None
    if model.objective.kind == "classification":
        ends = read.packed[2].cu_seqlens.long()
        x = x[ends[1:] - 1 if isinstance(model, GPT) else ends[:-1]]
    logits: Tensor = model.task_head(x)
    return logits
