"""`bigtfm prepare`: text of any kind and size into a token data set (format: see indexed.py).

The input is cut into units of work, a function of the input alone. Workers tokenise units into folders below
OUT/.prepare; at the end the units are joined in order. So the result is the same byte for byte whatever the
number of workers, and after a kill the same command goes on with the units that are missing. A shard of the
command tokenises every n-th unit and joins nothing: that is left to the command without --shard.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

from bigtfm.config.problems import ConfigProblem, DataProblem, counted, did_you_mean
from bigtfm.data.documents import read_documents
from bigtfm.data.examples import TaskSetting
from bigtfm.data.filtering import report as filters_report
from bigtfm.data.filtering.run import filter_units
from bigtfm.data.filtering.settings import load_filters, require_for_rows
from bigtfm.data.filtering.units import Filtering, cleaned_documents
from bigtfm.data.indexed import TOKENIZER_FOLDER, Header, TokenDataset
from bigtfm.data.labels import find_labels
from bigtfm.data.sources import EMBEDDED, Reading, Source, Span, Unit, find_sources, plan_units
from bigtfm.data.tokenizer import SentencePieceTokenizer, Tokenizer, load_tokenizer
from bigtfm.data.train_tokenizer import ModelType, sample_documents, train_sentencepiece
from bigtfm.data.units import (
    SPLITS,
    Counts,
    Job,
    Record,
    join_units,
    read_record,
    unit_folder,
    write_synced,
)
from bigtfm.data.work_folder import (
    LABELS,
    continue_or_start,
    is_finished,
    locked,
    one_at_a_time,
    publish,
    spool_stdin,
    storage_errors,
)
from bigtfm.data.workers import run_units
from bigtfm.sealed import seal

FILE_BYTES = 2**30

Report = Callable[[str, int, int], None]  # stage, done, total: in bytes of input


@dataclass(frozen=True)
class Summary:
    """What was prepared. `existing`: it was there already."""

    path: Path
    tokenizer: str  # kind
    vocab_size: int
    identity: str  # of the tokenizer
    splits: dict[str, Counts] = field(default_factory=dict)
    empty_documents: int = 0  # left out; of a task, also rows that became no example
    dropped: int = 0  # by filters
    longest: int = 0  # examples that take as many tokens as one may have
    seconds: float = 0.0
    existing: bool = False
    task: str | None = None
    labels: int = 0  # of it
    shard: str | None = None  # that all this is about

    @property
    def line(self) -> str:
        """One line for the user."""
        noun = "document" if self.task is None else "example"
        parts = [
            f"{name} {counted(counts.tokens, 'token')} of {counted(counts.documents, noun)} "
            f"({counts.bytes:,} bytes)"
            for name, counts in self.splits.items()
        ]
        if self.empty_documents:
            empty = counted(self.empty_documents, "empty document" if self.task is None else "row")
            parts.append(f"{empty}{'' if self.task is None else ' without an example'} left out")
        if self.dropped:
            parts.append(f"{counted(self.dropped, noun)} dropped, see {filters_report.NAMES[1]}")
        if self.longest:
            parts.append(f"{counted(self.longest, noun)} as long as --max-tokens allows")
        if self.labels:
            parts.append(counted(self.labels, "label"))
        done = "was there already" if self.existing else f"prepared in {self.seconds:.1f} s"
        if self.shard and not self.existing:
            done = f"shard {self.shard} done in {self.seconds:.1f} s; joined by the command without --shard"
        kind = f"{self.tokenizer}, {self.vocab_size:,} pieces"
        return f"{self.path}: {', '.join(parts)}; {kind}; {done}"


def prepare(
    inputs: Sequence[str] = (EMBEDDED,),
    out: str | Path = "data/quickstart",
    *,
    tokenizer: str | Path | None = None,
    vocab_size: int | None = None,
    model_type: ModelType = "bpe",
    text_column: str = "text",
    validation_fraction: float = 0.1,
    document_bytes: int | None = None,
    stdin_format: str = "txt",
    workers: int | None = None,
    shard: str | None = None,
    filters: str | Path | None = None,
    exclude: Sequence[str] = (),
    force: bool = False,
    progress: bool = True,
    unit_bytes: int | None = None,
    file_bytes: int = FILE_BYTES,
    task: TaskSetting | None = None,
) -> Summary:
    """Make the data set in folder `out` from `inputs`.

    Args:
        inputs: files (.txt .jsonl .csv .parquet, some .gz), folders, "-" (stdin), "embedded", a folder that
            `datasets` saved, or hf:NAME[#REVISION][@CONFIG][:SPLIT] (a hub name or local folder, loaded by
            `datasets`).
        out: folder to write; it is a data set once it holds dataset.json.
        tokenizer: a sentencepiece .model, a tokenizer.json or a folder; None: train a sentencepiece model.
        vocab_size: pieces to train; None: what suits the size of the text (2048 for the embedded corpus).
        model_type: bpe or unigram.
        text_column: column (of .parquet, .csv) or key (of .jsonl) that holds the text.
        validation_fraction: of the documents, chosen by their hash; at least one if above 0.
        document_bytes: least size of the documents a .txt is cut into; None: 1/100 of the text, 1 to 64 KiB.
        stdin_format: txt, jsonl or csv: what "-" is.
        workers: processes; None: one a core.
        shard: "3/16": tokenise the fourth of 16 parts only, beside the others, here or on other machines that
            share the folder. Afterwards the same call without it joins them, and does what is missing.
        filters: TOML file of filters (filters.py); what they dropped, and why, stands in OUT/filters.html.
        exclude: evaluation sets; documents that share 13 words in a row with them are dropped.
        force: replace a data set, or unfinished work, of another command.
        progress: show a bar on stderr if that is a terminal.
        unit_bytes: input bytes in a unit of work; None: 2 to 64 MiB, growing with the input.
        file_bytes: a token file ends with the unit at which it reaches this size.
        task: rows are examples of it, not text; its sequences are packed at once.

    Raises:
        ConfigProblem, DataProblem, StorageProblem: one line each.
    """
    started = time.monotonic()
    _check_options(
        inputs,
        out,
        tokenizer,
        vocab_size,
        model_type,
        validation_fraction,
        document_bytes,
        stdin_format,
        workers,
    )
    number, of = _parse_shard(shard, inputs, force) if shard is not None else (0, 1)
    if task is not None:
        needed = [name for name in task.columns if name not in task.format.optional]
        text_column = task.columns[needed[0]] if needed else ""
    wanted = load_filters(filters, exclude, text_column)
    if wanted is not None and task is not None:
        require_for_rows(wanted, task)
    if shard is not None and wanted is not None and wanted.compares:
        raise ConfigProblem(
            "--shard is given, and [duplicates] compares all documents with each other",
            where="bigtfm prepare",
            fix="leave --shard out: --workers share the work of one machine; or leave [duplicates] out",
        )
    out = Path(out)
    given = load_tokenizer(tokenizer) if tokenizer is not None else None
    with storage_errors(out), locked(out, shard) as work:
        sources = find_sources(inputs, spool_stdin(work, stdin_format) if "-" in inputs else None)
        reading = _reading(sources, text_column, document_bytes, unit_bytes)
        options = {
            "text_column": text_column,
            "document_bytes": reading.document_bytes,
            "validation_fraction": validation_fraction,
            "unit_bytes": reading.unit_bytes,
            "file_bytes": file_bytes,
            "tokenizer": given.identity if given else f"{model_type} {vocab_size or 'auto'}",
        }
        if task is not None:
            options["task"] = task.record()
        if wanted is not None:
            options["filters"] = wanted.identity
        plan = {"inputs": list(map(_name, inputs)), "sources": _fingerprint(sources), "options": options}
        plan = json.loads(json.dumps(plan))  # as it is read again: a tuple is a list
        if is_finished(out, plan, force):
            if shard is None:
                shutil.rmtree(work)
            return _describe(TokenDataset.open(out), started)
        with _reporting(progress) as report:
            units = plan_units(sources, reading)
            with one_at_a_time(work):
                continue_or_start(work, plan, force, alone=shard is None)
            workers = workers or _cores()
            documents = task.texts if task is not None else partial(read_documents, reading=reading)
            filtering, dropped = None, dict[str, Any](dropped={})
            if wanted is not None:
                filtering = Filtering(work / "filtered", wanted, reading, task)
                dropped = filter_units(filtering, units, range(number, len(units), of), workers, report)
                if shard is None:
                    filters_report.require_some(dropped)
                documents = partial(cleaned_documents, filtering)
            with one_at_a_time(work):
                if task is not None:
                    task = _with_labels(work, task, units, _names(inputs), report)
                model = _tokenizer(
                    work, given, units, documents, vocab_size, model_type, _names(inputs), report
                )
            dtype = "uint16" if model.vocab_size <= 65536 and task is None else "uint32"
            job = Job(
                work / "units", work / TOKENIZER_FOLDER, dtype, reading, validation_fraction, task, filtering
            )
            if shard is not None:
                records = _records(job, units, range(number, len(units), of), workers, report, None)
                return Summary(
                    out, model.kind, model.vocab_size, model.identity, _totals(records),
                    *_left_out(records, dropped), seconds=time.monotonic() - started,
                    task=task.format.name if task is not None else None, shard=shard,
                )  # fmt: skip
            records, folders = _tokenise(job, units, workers, _names(inputs), report)
            header = _join(
                job, records, folders, model, plan, sum(source.size for source in sources), file_bytes
            )
            if filtering is not None:
                filters_report.write(dropped, work / "final")
        publish(out, work, header, plan)
        return _describe(TokenDataset.open(out), started, _left_out(records, dropped))


def _check_options(
    inputs: Sequence[str],
    out: str | Path,
    tokenizer: str | Path | None,
    vocab_size: int | None,
    model_type: str,
    validation_fraction: float,
    document_bytes: int | None,
    stdin_format: str,
    workers: int | None,
) -> None:
    def check(fine: bool, what: str, fix: str) -> None:
        if not fine:
            raise ConfigProblem(what, where="bigtfm prepare", fix=fix)

    check(bool(inputs), "no input", "pass --input")
    check("" not in inputs, "an --input is empty", "pass a file, a folder or '-'")
    check(str(out) != "", "--out is empty", "pass a folder")
    types, formats = get_args(ModelType), ("txt", "jsonl", "csv")
    check(model_type in types, f"unknown --model-type '{model_type}'", did_you_mean(model_type, types))
    check(
        stdin_format in formats,
        f"unknown --stdin-format '{stdin_format}'",
        did_you_mean(stdin_format, formats),
    )
    # (comparisons with NaN are false)
    check(
        0 <= validation_fraction < 1,
        f"--validation-fraction is {validation_fraction}",
        "pass a number in [0, 1)",
    )
    check(
        vocab_size is None or tokenizer is None,
        "--vocab-size is given, but --tokenizer has its own",
        "drop one of them",
    )
    check(
        vocab_size is None or 259 < vocab_size <= 1_000_000,
        f"--vocab-size is {vocab_size}",
        "pass 260 to 1000000 pieces",
    )
    check(
        document_bytes is None or document_bytes > 0,
        f"--document-bytes is {document_bytes}",
        "pass a positive number",
    )
    check(workers is None or workers > 0, f"--workers is {workers}", "pass a positive number of processes")


def _parse_shard(shard: str, inputs: Sequence[str], force: bool) -> tuple[int, int]:
    """(which, of how many), counted from 0."""
    found = re.fullmatch(r"(\d+)/(\d+)", shard)
    if found is None or not int(found[1]) < int(found[2]):
        what, fix = f"--shard is {shard}", "of 16 shards the first is 0/16, the last 15/16"
    elif "-" in inputs:
        what, fix = "--shard is given, but stdin can be read only once", "write the text into a file"
    elif force:
        what, fix = (
            "--force would clear what other shards have done",
            "remove the folder, or pass another --out",
        )
    else:
        return int(found[1]), int(found[2])
    raise ConfigProblem(what, where="bigtfm prepare", fix=fix)


def _reading(
    sources: Sequence[Source], text_column: str, document_bytes: int | None, unit_bytes: int | None
) -> Reading:
    text = sum(source.size for source in sources if source.kind.startswith("txt"))
    total = sum(source.size for source in sources)
    return Reading(
        text_column,
        document_bytes or min(max(text // 100, 1024), 65536),
        unit_bytes or min(max(total // 2048, 2 << 20), 64 << 20),
    )


def _cores() -> int:
    """Cores that this process may use (a job's share of its node, where the system can tell)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _names(inputs: Sequence[str]) -> str:
    """The inputs, as a problem tells where it is."""
    more = f" and {len(inputs) - 3} more" if len(inputs) > 3 else ""
    return ", ".join(map(str, inputs[:3])) + more


def _name(given: str) -> str:
    return given if given in ("-", EMBEDDED) or given.startswith("hf:") else Path(given).resolve().name


def _fingerprint(sources: Sequence[Source]) -> str:
    digest = hashlib.sha256()
    for source in sources:
        digest.update(repr(source).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _tokenizer(
    work: Path,
    given: Tokenizer | None,
    units: Sequence[Unit],
    documents: Callable[[Span], Iterator[bytes]],
    vocab_size: int | None,
    model_type: ModelType,
    where: str,
    report: Report,
) -> Tokenizer:
    """The data set's tokenizer, in work/tokenizer: an interrupted run's, the given one, or a new one."""
    folder = work / TOKENIZER_FOLDER
    if folder.exists():
        return load_tokenizer(folder)
    if given is None:
        sample = sample_documents(units, documents, where, report)
        given = SentencePieceTokenizer(
            train_sentencepiece(sample, vocab_size=vocab_size, model_type=model_type)
        )
    unfinished = work / f"{TOKENIZER_FOLDER}.new"
    given.save(unfinished)
    unfinished.rename(folder)
    return given


def _with_labels(
    work: Path, task: TaskSetting, units: Sequence[Unit], where: str, report: Report
) -> TaskSetting:
    """With the labels of all rows, unless the user has stated them; kept for who goes on with it."""
    path = work / LABELS
    if task.labels or task.format.labels_of is None:
        return task
    if not path.exists():
        write_synced(path, json.dumps(find_labels(task, units, where, report)).encode())
    return replace(task, labels=tuple(json.loads(path.read_bytes())))


def _tokenise(
    job: Job, units: Sequence[Unit], workers: int, where: str, report: Report
) -> tuple[list[Record], list[Path]]:
    """The record and folder of every unit, those of an interrupted run kept."""
    numbers = range(len(units))
    records = _records(job, units, numbers, workers, report, None)
    folders = [unit_folder(job, number, None) for number in numbers]
    documents = sum(counts.documents for record in records for counts in record.splits.values())
    if not documents and job.task is not None:
        what, fix = "no row became an example", "check --input, --column and --max-tokens"
        if job.task.format.name == "chat":
            what = f"{what}: none has a turn of the assistant that fits"
            fix = "check --input, --column, --max-tokens and the roles: user, assistant, system, tool"
        shutil.rmtree(job.units, ignore_errors=True)  # nothing that a corrected command would have to respect
        raise DataProblem(what, where=where, fix=fix)
    if not documents:
        raise DataProblem("no text in the input", where=where, fix="check --input and --text-column")
    if job.validation_fraction and not any(record.splits["validation"].documents for record in records):
        chosen = min(record.smallest_hash for record in records)
        again = [number for number in numbers if records[number].smallest_hash == chosen]
        for number, record in zip(again, _records(job, units, again, workers, report, chosen), strict=True):
            records[number], folders[number] = record, unit_folder(job, number, chosen)
    if not any(record.splits["train"].documents for record in records):
        fix = "give more text, a smaller --document-bytes, or --validation-fraction 0"
        what = "every document went to validation, none is left to train on"
        raise DataProblem(what, where=where, fix=fix)
    return records, folders


def _records(
    job: Job, units: Sequence[Unit], numbers: Sequence[int], workers: int, report: Report, chosen: int | None
) -> list[Record]:
    records = {number: read_record(job, number, chosen) for number in numbers}
    pending = [number for number in numbers if records[number] is None]
    weight = {number: sum(span.weight for span in units[number]) for number in numbers}
    total = sum(weight.values())
    done = total - sum(weight[number] for number in pending)
    report("tokenising", done, total)
    for number, record in run_units(job, units, pending, workers, chosen):
        records[number] = record
        done += weight[number]
        report("tokenising", done, total)
    return [record for record in records.values() if record is not None]


def _totals(records: Sequence[Record]) -> dict[str, Counts]:
    totals = {name: Counts() for name in SPLITS}
    for record in records:
        for name, total in totals.items():
            total.add(record.splits[name])
    return totals


def _join(
    job: Job,
    records: Sequence[Record],
    folders: Sequence[Path],
    tokenizer: Tokenizer,
    plan: dict[str, Any],
    source_bytes: int,
    file_bytes: int,
) -> bytes:
    """Join the units into .prepare/final; returns the header's text."""
    final = job.units.parent / "final"
    shutil.rmtree(final, ignore_errors=True)
    final.mkdir()
    splits = {
        name: {**vars(total), "files": join_units(job, name, folders, final, file_bytes)}
        for name, total in _totals(records).items()
    }
    tokenizer.save(final / TOKENIZER_FOLDER)
    header = {
        "format": "bigtfm-tokens",
        "version": 1,
        "dtype": job.dtype,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": {
            "kind": tokenizer.kind,
            "identity": tokenizer.identity,
            "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id,
            "files": [
                {"name": name, "sha256": hashlib.sha256(data).hexdigest()}
                for name, data in tokenizer.files.items()
            ],
        },
        "splits": splits,
        **({"task": job.task.record()} if job.task is not None else {}),
        "source": {"inputs": plan["inputs"], "bytes": source_bytes},
        "options": plan["options"],
    }
    Header.model_validate(header)  # ours to get right: not a user's mistake
    return seal(header)


def _left_out(records: Sequence[Record], dropped: dict[str, Any]) -> tuple[int, int, int]:
    """What a summary says of it: empty documents, dropped ones, examples of the greatest length."""
    return (
        sum(record.empty_documents for record in records),
        sum(each["documents"] for each in dropped["dropped"].values()),
        sum(record.longest for record in records),
    )


def _describe(dataset: TokenDataset, started: float, left_out: tuple[int, int, int] | None = None) -> Summary:
    """left_out: None where the data set was there already."""
    header = dataset.header
    splits = {
        str(name): Counts(s.documents, s.tokens, s.bytes, s.max_id) for name, s in header.splits.items()
    }
    return Summary(
        dataset.path,
        header.tokenizer.kind,
        header.vocab_size,
        header.tokenizer.identity,
        splits,
        *(left_out or (0, 0, 0)),
        time.monotonic() - started,
        left_out is None,
        header.task.name if header.task is not None else None,
        len(header.task.labels) if header.task is not None else 0,
    )


@contextmanager
def _reporting(progress: bool) -> Iterator[Report]:
    """A bar on stderr, if that is a terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not (progress and console.is_terminal)
    ) as bar:
        task = bar.add_task("reading", total=None)

        def report(stage: str, done: int, total: int) -> None:
            bar.update(task, description=stage, completed=done, total=total or None)

        yield report
