"""`bigtfm evaluate`: a run's newest checkpoint on held-out rows or text; alone, or as several ranks."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bigtfm.config.launch import Launch
from bigtfm.config.problems import ConfigProblem, DataProblem, StorageProblem, counted
from bigtfm.console import progress_bar
from bigtfm.data.documents import Row, read_documents
from bigtfm.data.examples import Reader, TaskSetting, told
from bigtfm.data.indexed import TaskHeader
from bigtfm.data.sources import Reading, Span, find_sources, plan_units
from bigtfm.data.special import SpecialIds
from bigtfm.data.tokenizer import Tokenizer
from bigtfm.model.heads import LanguageModel
from bigtfm.run_directory import open_run, saved_task
from bigtfm.tasks import language_modelling, likelihood, masked
from bigtfm.tasks.known import setting_of, task_of
from bigtfm.tasks.likelihood import Foretold
from bigtfm.tasks.predictor import Predictor, Step
from bigtfm.tasks.task import Scores, Task, interval
from bigtfm.whole_files import write_whole

if TYPE_CHECKING:
    from rich.table import Table

UNIT_BYTES = 64 << 20
TEXT = {  # what a family that has learnt text is measured by
    "gpt": ("language_modelling", ("perplexity", "bits_per_byte", "loss")),
    "bert": ("masked_lm", ("accuracy", "perplexity", "loss")),
}


@dataclass(frozen=True)
class Options:
    """How to evaluate."""

    columns: tuple[str, ...] = ()  # NAME=COLUMN
    text_column: str = "text"
    num_beams: int = 4
    length_penalty: float = 1.0
    max_new_tokens: int = 128
    batch_tokens: int = 4096
    stride: int | None = None


@dataclass(frozen=True)
class Evaluation:
    """What `bigtfm evaluate` finds."""

    task: str
    examples: int
    metrics: Mapping[str, float]
    baseline: Mapping[str, float]  # the metrics of what would be said without a model
    baseline_is: str
    intervals: Mapping[str, tuple[float, float]]  # of 95 %
    baseline_intervals: Mapping[str, tuple[float, float]]
    predictions: str | None = None  # file of them

    def record(self) -> dict[str, Any]:
        return asdict(self)


def render(found: Evaluation) -> Table:
    """A table for people."""
    from rich.table import Table

    table = Table(title=f"{found.task}, {counted(found.examples, 'example')}", caption=found.predictions)
    table.add_column("metric")
    table.add_column("value", justify="right")
    table.add_column("95 % interval", justify="right")
    table.add_column(found.baseline_is, justify="right")
    for name, value in found.metrics.items():
        low, high = found.intervals.get(name, (value, value))
        table.add_row(name, f"{value:.4g}", f"{low:.4g} to {high:.4g}", f"{found.baseline[name]:.4g}")
    return table


def evaluate(
    run_dir: Path, data: Sequence[str], options: Options, predictions: Path | None = None
) -> Evaluation | None:
    """Evaluates; as one of several ranks each takes every n-th row, and None is returned but by the first.

    Raises:
        NoCheckpoint: the run has none.
        ConfigProblem, DataProblem: the data are none of the run's task, or empty.
    """
    from bigtfm.engine import distributed

    launch = Launch.from_environment(os.environ, None)
    ranks = distributed.start(launch) if launch.world_size > 1 else None
    rank, world_size = (ranks.rank, ranks.world_size) if ranks is not None else (0, 1)
    model, tokenizer, special = open_run(run_dir)
    model = model.to(ranks.device if ranks is not None else _device())
    header = saved_task(run_dir)
    if predictions is not None and rank == 0:
        _require_place(predictions, header)
    with progress_bar("evaluating", on=rank == 0) as step:
        predictor = _predictor(model, special, options, step)
        if header is None:
            found = _on_text(predictor, tokenizer, _spans(data), options, rank, world_size)
        else:
            found = _on_rows(predictor, tokenizer, header, _spans(data), options, rank, world_size)
    if ranks is not None:
        gathered = ranks.gather(found)
        ranks.close()
        if rank:
            return None
        found = [gathered[n % world_size][n // world_size] for n in range(sum(map(len, gathered)))]
    if not found:
        raise DataProblem("no examples", where=", ".join(data), fix="check --data and --column")
    if header is None:
        kind, names = TEXT[model.config.family]
        return _evaluation(kind, len(found), likelihood.FREQUENCY, [likelihood.both(found, *names)])
    task = task_of(header.name)
    said, right, rows, written = zip(*found, strict=True)
    if predictions is not None:
        _write(predictions, said, right)
    baseline_is, without = task.baseline
    scores = [(task.score(said, right), task.score(without(rows), right))]
    if model.task_head is None:
        scores.append(likelihood.both(written, "bits_per_byte"))
        baseline_is = f"{baseline_is}; of bits, {likelihood.FREQUENCY}"
    kept = None if predictions is None else str(predictions)
    return _evaluation(header.name, len(found), baseline_is, scores, kept)


def _evaluation(
    task: str,
    examples: int,
    baseline_is: str,
    scores: Sequence[tuple[Scores, Scores]],
    predictions: str | None = None,
) -> Evaluation:
    """Of several kinds of metrics, those of the model beside those of the baseline."""
    metrics, baseline = (
        {name: value for one in side for name, value in one.values.items()}
        for side in zip(*scores, strict=True)
    )
    intervals, without = (
        {name: ends for one in side for name, ends in interval(one).items()}
        for side in zip(*scores, strict=True)
    )
    return Evaluation(task, examples, metrics, baseline, baseline_is, intervals, without, predictions)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageProblem(
            f"can't be written: {error.strerror}", where=str(path), fix="pass another --predictions"
        ) from None


def _require_place(predictions: Path, header: TaskHeader | None) -> None:
    """Raises where there will be no predictions, or no place for them: before the work begins."""
    if header is None:
        what, fix = "the run has learnt text, and predicts no rows", "leave --predictions out"
        raise ConfigProblem(what, where="--predictions", fix=fix)
    with _writing(predictions):
        predictions.parent.mkdir(parents=True, exist_ok=True)
        if predictions.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not os.access(predictions.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _write(path: Path, said: Sequence[Any], right: Sequence[Any]) -> None:
    lines = (json.dumps({"predicted": a, "reference": b}) for a, b in zip(said, right, strict=True))
    with _writing(path):
        write_whole(path, "\n".join(lines) + "\n")


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _spans(data: Sequence[str]) -> list[Span]:
    units = plan_units(find_sources(data), Reading("", 1 << 62, UNIT_BYTES))
    return [span for unit in units for span in unit]


def _on_text(
    predictor: Predictor, tokenizer: Tokenizer, spans: Sequence[Span], options: Options, rank: int, of: int
) -> list[Foretold]:
    family = predictor.model.config.family
    if family not in TEXT:
        raise ConfigProblem(
            f"an {family} that has learnt text has no perplexity",
            where="bigtfm evaluate",
            fix="see val_loss in the run's metrics.jsonl, or fine-tune it on a task",
        )
    reading = Reading(options.text_column, 1 << 62, UNIT_BYTES)
    texts = [text for span in spans for text in read_documents(span, reading) if text]
    mine = range(rank, len(texts), of)
    if family == "bert":
        return masked.foretold(predictor, [texts[n] for n in mine], mine, tokenizer)
    return language_modelling.foretold(predictor, [texts[n] for n in mine], tokenizer, options.stride)


def reader_of(header: TaskHeader, tokenizer: Tokenizer) -> Reader:
    """What makes the run's examples of rows."""
    return Reader(tokenizer, header.max_tokens, header.labels, header.options)


def predict(run_dir: Path, data: Sequence[str], options: Options) -> Iterator[Any]:
    """What the run says of each row, whose label need not be there.

    Raises:
        NoCheckpoint, ConfigProblem, DataProblem: as `evaluate`; or the run has learnt text, no task.
    """
    model, tokenizer, special = open_run(run_dir)
    header = saved_task(run_dir)
    if header is None:
        raise ConfigProblem(
            "the run has learnt text, no task", where=str(run_dir), fix="let it write: bigtfm generate"
        )
    with progress_bar("predicting") as step:
        predictor = _predictor(model.to(_device()), special, options, step)
        setting = _setting(header, options)
        rows = [row for span in _spans(data) for row, _ in setting.rows(span, unlabelled=True)]
        if not rows:
            raise DataProblem("no rows", where=", ".join(data), fix="check --data")
        with told(lambda: ", ".join(data)):
            found = task_of(header.name).predict(predictor, rows, reader_of(header, tokenizer))
    yield from found


def _setting(header: TaskHeader, options: Options) -> TaskSetting:
    saved = [f"{name}={column}" for name, column in header.options.get("columns", {}).items()]
    return setting_of(header.name, [*saved, *options.columns], max_tokens=header.max_tokens)


def _predictor(model: LanguageModel, special: SpecialIds, options: Options, step: Step) -> Predictor:
    return Predictor(
        model, special, options.batch_tokens, options.num_beams, options.length_penalty,
        options.max_new_tokens, step,
    )  # fmt: skip


def _on_rows(
    predictor: Predictor,
    tokenizer: Tokenizer,
    header: TaskHeader,
    spans: Sequence[Span],
    options: Options,
    rank: int,
    of: int,
) -> list[Any]:
    """(predicted, reference, row, what is to be written) of each of this rank's rows."""
    task = task_of(header.name)
    reader = reader_of(header, tokenizer)
    rows, right = _rows(task, _setting(header, options), reader, spans, rank, of)
    if rows:
        _, without = task.baseline
        task.score(without(rows[:1]), right[:1])  # a library that it lacks is to be told before the work
    with told(lambda: "data"):
        said = task.predict(predictor, rows, reader)
    return list(zip(said, right, rows, _written(task, predictor, rows, reader), strict=True))


def _written(task: Task, predictor: Predictor, rows: Sequence[Row], reader: Reader) -> list[Foretold]:
    """Of each row what the model would have had to write, foretold; of a head's labels nothing."""
    if predictor.model.task_head is not None:
        return [likelihood.NOTHING] * len(rows)
    longest = min(reader.max_tokens, predictor.model.config.max_seq_len)
    made = [task.format.make(row, replace(reader, max_tokens=longest)) for row in rows]
    found = iter(likelihood.of_written(predictor, [one for (one,) in filter(None, made)], reader.tokenizer))
    return [next(found) if examples else likelihood.NOTHING for examples in made]


def _rows(
    task: Task, setting: TaskSetting, reader: Reader, spans: Sequence[Span], rank: int, of: int
) -> tuple[list[Row], list[Any]]:
    rows, right = [], []
    number = 0
    for span in spans:
        for row, where in setting.rows(span):
            if number % of == rank:
                with told(where):
                    right.append(task.reference(row))
                    for label in task.format.labels_of(row) if task.format.labels_of is not None else ():
                        reader.mark(label)  # the label is known
                rows.append(row)
            number += 1
    return rows, right
