"""Size, loss and speed of a model before and after, measured side by side in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from bigtfm.data.loader import Loader
from bigtfm.data.special import SpecialIds
from bigtfm.evaluate import num_windows
from bigtfm.generation.sampling import generate
from bigtfm.model.bert import BERT
from bigtfm.model.encoder_decoder import EncoderDecoder
from bigtfm.model.gpt import GPT
from bigtfm.model.heads import LanguageModel
from bigtfm.model.quantized import QuantizedMatrix
from bigtfm.model.transformer import block_linears

MICRO_BATCH = 8  # windows of a forward
ROUNDS = 9  # in each of which every model is timed once, in turns
NEW_TOKENS = 32  # written by one decoding
PROMPT = 8  # tokens


@dataclass(frozen=True)
class Speed:
    """Tokens a second: median and quartiles of the rounds."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Side:
    """One model, measured."""

    bytes: int  # of its weights on the disk
    parameters: int
    zeros: float  # share of the blocks' matrices
    val_loss: float  # nats a token
    read: Speed  # tokens of a forward over validation text
    write: Speed | None  # tokens generated, one sequence alone; None: an encoder writes none


def size_of(run_dir: Path) -> int:
    """Bytes of a run directory's checkpoint."""
    return sum(path.stat().st_size for path in (run_dir / "checkpoints").rglob("*") if path.is_file())


def measured(
    models: list[LanguageModel], sizes: list[int], validation: Loader, special: SpecialIds, tokens: int
) -> tuple[Side, Side]:
    """Both models' figures; sizes: bytes on the disk; tokens: of validation."""
    rates = speeds(models, validation, special)
    before, after = (
        Side(size, *_counts(model), mean_loss(model, validation, tokens), *rate)
        for model, size, rate in zip(models, sizes, rates, strict=True)
    )
    return before, after


def _counts(model: LanguageModel) -> tuple[int, float]:
    """How many weights a model has, and the share of zeros in the matrices of its blocks."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    parameters += sum(len(m.values) * m.columns for m in model.modules() if isinstance(m, QuantizedMatrix))
    matrices = [layer.weight for _, layer in block_linears(model)]
    zeros = sum(int((matrix == 0).sum()) for matrix in matrices)
    return parameters, zeros / sum(matrix.numel() for matrix in matrices)


def mean_loss(model: LanguageModel, loader: Loader, max_tokens: int) -> float:
    """Mean loss in nats a token over the first windows of a split, as training's evaluation has it."""
    windows = num_windows(loader, max_tokens)
    loss_sum = tokens = 0.0
    with torch.no_grad():
        for start in range(0, windows, MICRO_BATCH):
            batch = loader.batch(start, min(MICRO_BATCH, windows - start))
            loss, count = model(**batch.model_inputs())
            loss_sum, tokens = loss_sum + float(loss), tokens + float(count)
    return loss_sum / tokens


def speeds(
    models: list[LanguageModel], loader: Loader, special: SpecialIds
) -> list[tuple[Speed, Speed | None]]:
    """How fast each model reads and writes, interleaved: what slows the machine slows them all."""
    read = _rates([partial(_read, model, loader) for model in models])
    writers = [partial(_write, model, loader, special) for model in models if _writes(model)]
    written: list[Speed | None] = [*_rates(writers)] or [None] * len(models)
    return list(zip(read, written, strict=True))


def _writes(model: LanguageModel) -> bool:
    return not isinstance(model, BERT) and model.task_head is None


def _rates(sides: Sequence[Callable[[], int]]) -> list[Speed]:
    rates: list[list[float]] = [[] for _ in sides]
    for number in range(ROUNDS + 1):
        turns = list(zip(sides, rates, strict=True))
        for side, found in turns[:: 1 if number % 2 else -1]:
            began = time.perf_counter()
            tokens = side()
            if number:  # the first round warms up
                found.append(tokens / (time.perf_counter() - began))
    return [Speed(median, low, high) for low, median, high in map(_quartiles, rates)]


def _quartiles(rates: list[float]) -> tuple[float, float, float]:
    low, median, high = statistics.quantiles(rates, n=4, method="inclusive")
    return low, median, high


def _read(model: LanguageModel, loader: Loader) -> int:
    """A forward; returns its number of tokens."""
    batch = loader.batch(0, min(MICRO_BATCH, loader.num_samples))
    with torch.no_grad():
        model(**batch.model_inputs())
    return len(batch.input_ids)


def _write(model: LanguageModel, loader: Loader, special: SpecialIds) -> int:
    """A greedy decoding; returns how many tokens it has written."""
    assert isinstance(model, GPT | EncoderDecoder)
    prompt = loader.stream.read(0, min(PROMPT, model.config.max_seq_len - 1, loader.stream.num_tokens))
    start = [] if isinstance(model, GPT) else [special.start]
    room = model.config.max_seq_len - (len(prompt) if isinstance(model, GPT) else 1)
    new = min(NEW_TOKENS, max(room, 1))
    answers = generate(model, [prompt.tolist()], max_new_tokens=new, temperature=0, start=start)
    return len(answers[0])
