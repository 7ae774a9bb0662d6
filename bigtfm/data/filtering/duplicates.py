"""Exact and near duplicates over the whole input, in bounded memory: of those that are alike the first stays.

Exact: by a hash of 64 bits. Near: MinHash (Broder 1997) with banding (Leskovec, Rajaraman and Ullman,
"Mining of massive datasets", 3.4). Documents that agree in a band are compared, by their signatures, with the
first of them, and go if the estimated Jaccard similarity of their word shingles reaches the threshold. So a
document goes if an earlier one is like it, whether that one stays or not: no order of the work matters.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from bigtfm.data.filtering.units import MASKED, Filtering, judged_folder

AT_A_TIME = (
    16_000_000  # documents whose keys are sorted together: 16 bytes each, and as much again for sorting
)
RECALL = 0.99  # least probability that documents of the threshold's similarity meet in a band
_ODD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: Fibonacci hashing, Knuth 1973, section 6.4


def compare(
    filtering: Filtering, units: int, report: Callable[[str, int, int], None], at_a_time: int = AT_A_TIME
) -> None:
    """Writes filtered/compared/ once all units are judged.

    Documents are those that passed the rules, numbered over all units. earlier.npy: of each the number of
    an earlier one that it is like, or -1; exact.npy: whether it is the same; offsets.npy: each unit's first.
    """
    folder, settings = filtering.folder / "compared", filtering.filters.duplicates
    if folder.exists() or settings is None:
        return
    unfinished = folder.with_name("compared.new")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    counts = [len(np.load(judged_folder(filtering, n) / "hashes.npy", mmap_mode="r")) for n in range(units)]
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    total = int(offsets[-1])
    earlier = np.lib.format.open_memmap(unfinished / "earlier.npy", "w+", np.int64, (total,))
    exact = np.lib.format.open_memmap(unfinished / "exact.npy", "w+", np.bool_, (total,))
    earlier[:] = -1
    bands, rows = banding(settings.near, settings.permutations) if settings.near else (0, 0)
    stages = 1 + bands
    if settings.exact:
        _mark_exact(filtering, offsets, earlier, at_a_time)
        exact[:] = earlier >= 0
    report("comparing documents", 1, stages)
    signatures = [_signatures(filtering, number) if bands else None for number in range(units)]
    for band in range(bands):
        _mark_near(
            signatures, offsets, earlier, slice(band * rows, (band + 1) * rows), settings.near, at_a_time
        )
        report("comparing documents", 2 + band, stages)
    for array in (earlier, exact):
        array.flush()
    np.save(unfinished / "offsets.npy", offsets)
    for path in unfinished.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    unfinished.rename(folder)


def banding(threshold: float, permutations: int) -> tuple[int, int]:
    """(bands, rows): the most rows with which documents of this similarity meet with probability RECALL."""
    for rows in range(permutations, 0, -1):
        bands = permutations // rows
        if 1 - (1 - threshold**rows) ** bands >= RECALL:
            return bands, rows
    return permutations, 1


def _signatures(filtering: Filtering, number: int) -> NDArray[np.uint32] | None:
    """[permutations, documents] of a unit, on the disk; None: no document of it passed the rules."""
    path = judged_folder(filtering, number) / "signatures.npy"
    return np.load(path, mmap_mode="r") if path.exists() else None


def _mark_exact(
    filtering: Filtering, offsets: NDArray[np.int64], earlier: NDArray[np.int64], at_a_time: int
) -> None:
    def keys() -> Iterator[NDArray[np.uint64]]:
        for number in range(len(offsets) - 1):
            yield np.load(judged_folder(filtering, number) / "hashes.npy")

    for later, first in _groups(keys, offsets, at_a_time):
        earlier[later] = first


def _mark_near(
    signatures: Sequence[NDArray[np.uint32] | None],
    offsets: NDArray[np.int64],
    earlier: NDArray[np.int64],
    band: slice,
    threshold: float,
    at_a_time: int,
) -> None:
    def keys() -> Iterator[NDArray[np.uint64]]:
        for signature in signatures:
            yield _mixed(signature[band]) if signature is not None else np.empty(0, np.uint64)

    def of(document: int) -> NDArray[np.uint32]:
        number = int(np.searchsorted(offsets, document, side="right")) - 1
        found = signatures[number]
        assert found is not None
        return found[:, document - offsets[number]]

    for later, first in _groups(keys, offsets, at_a_time):
        open_ = earlier[later] < 0
        before, sign = -1, np.empty(0, np.uint32)
        for document, start in zip(later[open_].tolist(), first[open_].tolist(), strict=True):
            if start != before:
                before, sign = start, of(start)
            if np.mean(sign == of(document)) >= threshold:
                earlier[document] = start


def _groups(
    keys: Callable[[], Iterator[NDArray[np.uint64]]], offsets: NDArray[np.int64], at_a_time: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """(documents, the first with the same key) of all that are not the first themselves.

    keys: of the units' documents, unit by unit. The keys are gone through in parts, by their first bits.
    """
    parts = 1
    while offsets[-1] / parts > at_a_time:
        parts *= 2
    for part in range(parts):
        chosen, numbers = list[NDArray[np.uint64]](), list[NDArray[np.int64]]()
        for start, values in zip(offsets, keys(), strict=False):
            if parts == 1:
                there = np.arange(len(values))
            else:
                there = np.flatnonzero(values >> np.uint64(65 - parts.bit_length()) == part)
            chosen.append(values[there])
            numbers.append(start + there)
        if not chosen:
            return
        key, number = np.concatenate(chosen), np.concatenate(numbers)
        order = np.argsort(key, kind="stable")  # the first in the input comes first among equals
        key, number = key[order], number[order]
        begins = np.concatenate([[True], key[1:] != key[:-1]]) if len(key) else np.empty(0, bool)
        first = (
            number[np.maximum.accumulate(np.where(begins, np.arange(len(key)), 0))] if len(key) else number
        )
        yield number[~begins], first[~begins]


def _mixed(rows: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """[rows, documents] -> [documents]: the rows of a band as one number."""
    key = np.zeros(rows.shape[1], dtype=np.uint64)
    for row in rows:
        key = (key ^ row.astype(np.uint64)) * _ODD
        key ^= key >> np.uint64(29)
    return key


def compared(filtering: Filtering) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """earlier, offsets and, of each, whether it was found as an exact duplicate; all on the disk."""
    folder = filtering.folder / "compared"
    names = ("earlier.npy", "offsets.npy", "exact.npy")
    earlier, offsets, exact = (np.load(folder / name, mmap_mode="r") for name in names)
    return earlier, offsets, exact


def places(filtering: Filtering, offsets: NDArray[np.int64], document: int) -> tuple[int, int]:
    """(unit, which of its documents) of one that passed the rules."""
    number = int(np.searchsorted(offsets, document, side="right")) - 1
    verdicts = np.load(judged_folder(filtering, number) / "verdicts.npy")
    return number, int(np.flatnonzero(verdicts <= MASKED)[document - offsets[number]])
