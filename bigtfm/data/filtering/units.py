"""The filters at work, a unit at a time: every document is judged once, and the verdicts lie on the disk.

A judged unit is a folder  filtered/00000012/  with verdicts.npy (a number a document), sizes.npy, hashes.npy
and signatures.npy (of those that stay so far), and record.json. Judging depends on the document alone; what
compares documents comes after all units (duplicates.py); tokenising then reads both.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from bigtfm.config.problems import DataProblem
from bigtfm.data.documents import document_hash, read_documents
from bigtfm.data.examples import TaskSetting
from bigtfm.data.filtering.rules import Ngrams, broken_rule, masked, ngrams, words_of
from bigtfm.data.filtering.settings import Filters, language_identifier, needed
from bigtfm.data.sources import Reading, Span, Unit, find_sources, plan_units

KEPT, MASKED, EMPTY = 0, 1, 255  # verdicts; MASKED: kept, and something in it is to be masked
REASONS = (
    *("too few words", "too many words", "mean word length", "symbols", "bullets", "ellipses"),
    *("words without a letter", "stop words", "language", "contamination"),
)  # of verdict 2 and so on
EXACT, NEAR = "exact duplicate", "near duplicate"
EXAMPLES, SNIPPET = 5, 400  # of each reason, in the report; characters of each
_SEED = 1  # of the signatures
D = TypeVar("D")


@dataclass(frozen=True)
class Filtering:
    """What every unit's filtering shares."""

    folder: Path  # holds judged units, and what comparing them has found
    filters: Filters
    reading: Reading
    task: TaskSetting | None = field(
        default=None, compare=False
    )  # whose rows are the documents, by their text

    def documents(self, span: Span) -> Iterator[bytes]:
        """The span's documents; of a task's rows what a tokenizer is trained on."""
        return read_documents(span, self.reading) if self.task is None else self.task.texts(span)

    def evaluation_texts(self) -> Iterator[str]:
        """The texts that are to be kept out; those of a task's rows, whose labels need not be there."""
        assert self.filters.contamination is not None
        read = Reading(self.filters.text_column, self.reading.document_bytes, self.reading.unit_bytes)
        for unit in plan_units(find_sources(self.filters.contamination.files), read):
            for span in unit:
                if self.task is None or span.kind.startswith("txt"):
                    yield from map(decoded, read_documents(span, read))
                else:
                    yield from map(decoded, self.task.texts(span, unlabelled=True))


@dataclass(frozen=True)
class Judged:
    """What judging a unit has counted. examples: reason -> (hash, text) of those with the least hashes."""

    documents: int
    bytes: int
    dropped: dict[str, tuple[int, int]]  # reason -> documents, bytes
    masked: dict[str, int]
    examples: dict[str, list[tuple[int, str]]]


def judged_folder(filtering: Filtering, number: int) -> Path:
    """Where what was found of unit `number` lies."""
    return filtering.folder / f"{number:08d}"


def read_judged(filtering: Filtering, number: int) -> Judged | None:
    """The record of a judged unit; None: it is not there, or not whole."""
    folder = judged_folder(filtering, number)
    try:
        values = json.loads((folder / "record.json").read_bytes())
        if any((folder / name).stat().st_size != size for name, size in values.pop("files").items()):
            return None
        dropped = {reason: (counts[0], counts[1]) for reason, counts in values.pop("dropped").items()}
        examples = {
            reason: [(number, text) for number, text in found]
            for reason, found in values.pop("examples").items()
        }
        return Judged(**values, dropped=dropped, examples=examples)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def judge_unit(filtering: Filtering, number: int, spans: Unit) -> Judged:
    """Judges the documents of `spans` into the unit's folder."""
    folder = judged_folder(filtering, number)
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    judged, arrays = _judge_all(filtering, spans)
    for name, values in arrays.items():
        with (unfinished / name).open("wb") as file:
            np.save(file, values)
            file.flush()
            os.fsync(file.fileno())
    files = {name: (unfinished / name).stat().st_size for name in arrays}
    with (unfinished / "record.json").open("wb") as file:
        file.write(json.dumps(vars(judged) | {"files": files}).encode())
        file.flush()
        os.fsync(file.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    return judged


def _judge_all(filtering: Filtering, spans: Unit) -> tuple[Judged, dict[str, NDArray[Any]]]:
    judge = _judge_of(filtering)
    verdicts, sizes, hashes, signatures = bytearray(), list[int](), list[int](), list[NDArray[Any]]()
    dropped: dict[str, tuple[int, int]] = {}
    examples: dict[str, list[tuple[int, str]]] = {}
    masks: Counter[str] = Counter()
    for document in (document for span in spans for document in filtering.documents(span)):
        found = judge(document)
        verdicts.append(found.verdict)
        sizes.append(len(document))
        if found.verdict in (KEPT, MASKED):
            masks += found.masks
            hashes.append(document_hash(document))
            if found.signature is not None:
                signatures.append(found.signature)
            continue
        if found.verdict == EMPTY:
            continue
        reason, place = REASONS[found.verdict - 2], document_hash(document)
        documents, size = dropped.get(reason, (0, 0))
        dropped[reason] = documents + 1, size + len(document)
        examples[reason] = sorted([*examples.get(reason, []), (place, snippet(document))])[:EXAMPLES]
    arrays: dict[str, NDArray[Any]] = {
        "verdicts.npy": np.frombuffer(bytes(verdicts), dtype=np.uint8),
        "sizes.npy": np.array(sizes, dtype=np.int64),
        "hashes.npy": np.array(hashes, dtype=np.uint64),
    }
    if signatures:
        arrays["signatures.npy"] = np.stack(signatures, axis=1)  # [permutations, documents]
    return Judged(len(verdicts) - verdicts.count(EMPTY), sum(sizes), dropped, dict(masks), examples), arrays


@dataclass(frozen=True)
class _Found:
    verdict: int
    masks: Counter[str]
    signature: NDArray[np.uint32] | None = None


_EMPTY = _Found(EMPTY, Counter())


class Judge:
    """Judges documents, as `Filters` say. Depends on nothing but the document."""

    def __init__(self, filtering: Filtering) -> None:
        self._filters = filters = filtering.filters
        near = filters.duplicates is not None and filters.duplicates.near > 0
        self._identifier = language_identifier() if filters.language is not None else None
        self._ngrams, self._whole = None, set[str]()
        if filters.contamination is not None:
            texts = list(filtering.evaluation_texts())
            if not texts:
                raise DataProblem(
                    "has nothing to keep out of the data",
                    where=", ".join(filters.contamination.files),
                    fix="name the evaluation sets in --exclude, or leave it out",
                )
            self._ngrams = Ngrams(texts, filters.contamination.ngram)
            if filtering.task is not None:  # rows may have few words
                self._whole = {" ".join(words_of(text)) for text in texts}
        self._sign: Callable[[list[str]], NDArray[np.uint32]] | None = (
            _signer(filters.duplicates.permutations) if filters.duplicates is not None and near else None
        )

    def __call__(self, document: bytes) -> _Found:
        """Verdict, number of masks and MinHash signature [permutations]."""
        if not document:
            return _EMPTY
        text, words = decoded(document), list[str]()
        if self._sign is not None or self._ngrams is not None:
            words = words_of(text)
        reason = self._reason(text, words)
        if reason is not None:
            return _Found(2 + REASONS.index(reason), Counter())
        counts: Counter[str] = Counter()
        if self._filters.mask is not None:
            _, counts = masked(text, self._filters.mask.kinds)
        signature = None
        if self._sign is not None:
            assert self._filters.duplicates is not None
            signature = self._sign(ngrams(words, self._filters.duplicates.shingle))
        return _Found(MASKED if counts else KEPT, counts, signature)

    def clean(self, document: bytes) -> bytes | None:
        """The document as it is tokenised; None: it is dropped, by what can be told of it alone."""
        text = decoded(document)
        if document and self._reason(text, words_of(text)) is not None:
            return None
        return mask(self._filters, document)

    def _reason(self, text: str, words: list[str]) -> str | None:
        filters = self._filters
        if filters.gopher is not None and (reason := broken_rule(text, filters.gopher)) is not None:
            return reason
        if filters.language is not None and self._identifier is not None:
            language, _ = self._identifier.classify(text[: filters.language.characters])
            if language not in filters.language.keep:
                return "language"
        if self._ngrams is not None and (self._ngrams.in_text(words) or " ".join(words) in self._whole):
            return "contamination"
        return None


@lru_cache(maxsize=1)
def _judge_of(filtering: Filtering) -> Judge:
    """A process loads models and evaluation sets once."""
    return Judge(filtering)


def _signer(permutations: int) -> Callable[[list[str]], NDArray[np.uint32]]:
    minhash = needed("rensa", "near duplicates").RMinHash

    def sign(pieces: list[str]) -> NDArray[np.uint32]:
        signature = minhash(num_perm=permutations, seed=_SEED)
        signature.update(pieces)
        return np.array(signature.digest(), dtype=np.uint32)

    return sign


def kept(filtering: Filtering, number: int, documents: Iterable[D]) -> Iterator[tuple[D, bool]]:
    """Of a unit's documents, or what stands for them, those that stay, and whether something is to be masked.

    Raises:
        DataProblem: they are not those that were judged.
    """
    verdicts = np.load(judged_folder(filtering, number) / "verdicts.npy")
    dropped = duplicates_of(filtering, number, verdicts)
    seen = 0
    for seen, document in enumerate(documents, 1):
        if seen > len(verdicts):
            break
        verdict = verdicts[seen - 1]
        if not ((verdict > MASKED and verdict != EMPTY) or dropped[seen - 1]):
            yield document, verdict == MASKED
    if seen != len(verdicts):
        fix = "run the same command again"
        raise DataProblem("the input has changed meanwhile", where=f"unit {number}", fix=fix)


def kept_documents(filtering: Filtering, number: int, documents: Iterable[bytes]) -> Iterator[bytes]:
    """Of a unit's documents those that stay, masked."""
    for document, to_mask in kept(filtering, number, documents):
        yield mask(filtering.filters, document) if to_mask else document


def duplicates_of(filtering: Filtering, number: int, verdicts: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which of a unit's documents an earlier one is like."""
    found = np.zeros(len(verdicts), dtype=bool)
    if filtering.filters.compares:
        folder = filtering.folder / "compared"
        start, stop = np.load(folder / "offsets.npy", mmap_mode="r")[number : number + 2]
        earlier = np.load(folder / "earlier.npy", mmap_mode="r")[start:stop]
        found[np.flatnonzero(verdicts <= MASKED)] = earlier >= 0
    return found


def mask(filters: Filters, document: bytes) -> bytes:
    """The document with its personal data masked, if that is asked for."""
    if filters.mask is None:
        return document
    text, counts = masked(decoded(document), filters.mask.kinds)
    return text.encode("utf-8", "surrogateescape") if counts else document


def decoded(document: bytes) -> str:
    """Bytes that are no UTF-8 come through."""
    return document.decode("utf-8", "surrogateescape")


def cleaned_documents(filtering: Filtering, span: Span) -> Iterator[bytes]:
    """A span's documents for a tokenizer's training: as they are tokenised, but for what comparing finds."""
    judge = _judge_of(filtering)
    for document in filtering.documents(span):
        cleaned = judge.clean(document)
        if cleaned is not None:
            yield cleaned


def snippet(document: bytes) -> str:
    """The beginning, as an example shows it."""
    return document[: 4 * SNIPPET].decode("utf-8", "replace")[:SNIPPET]
