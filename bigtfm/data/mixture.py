"""Several data sets by weight: which of them a sample comes from is computed, never drawn.

Weights become whole numbers of parts out of a period, in which the sources take turns by earliest deadline
first: the j-th sample of a source with share s comes from the place floor((j - 1) / s) + 1 on, and at
ceil(j / s) at the latest. Such a schedule exists (Tijdeman 1980, "The chairman assignment problem"), and
earliest deadline first finds it (Steiner & Yeomans 1993, "Level schedules for mixed-model, just-in-time
processes"): after any n samples each source has had n times its share, to within less than one sample.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from bigtfm.config.problems import DataProblem
from bigtfm.config.sections import DataSection, SourceSection
from bigtfm.data.best_fit import Packed
from bigtfm.data.indexed import TokenDataset
from bigtfm.data.order import MAX_SIZE, Pieces, Source, Windows, shuffled, stream_key

MAX_PERIOD = 65_536  # parts; finer weights are rounded to this many
BLOCK = 4096  # samples whose order is computed at once, which spreads the cost of many numpy calls

Ints = NDArray[np.int64]


def parts_of(weights: Sequence[float]) -> list[int]:
    """How many samples of a period each source has, by the decimals of the weights as they are written.

    Where exact shares need more than MAX_PERIOD parts they are rounded to that many by largest remainders,
    none to less than one.
    """
    exact = [Fraction(repr(weight)) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    period = min(math.lcm(*(share.denominator for share in shares)), MAX_PERIOD)
    quotas = [share * period for share in shares]
    parts = [max(1, math.floor(quota)) for quota in quotas]
    by_remainder = sorted(range(len(parts)), key=lambda i: parts[i] - quotas[i])
    for i in by_remainder[: max(0, period - sum(parts))]:
        parts[i] += 1
    while sum(parts) > period:  # many sources had less than one part
        parts[parts.index(max(parts))] -= 1
    return parts


def turns(parts: Sequence[int]) -> Ints:
    """The source of each sample of a period: int64 [sum of parts], earliest deadline first."""
    period = sum(parts)
    waiting = [(1, source) for source in range(len(parts))]  # (from which turn on, source), a heap
    ready: list[tuple[int, int]] = []  # (deadline, source), a heap
    taken = [0] * len(parts)
    order = np.empty(period, np.int64)
    for turn in range(1, period + 1):
        while waiting and waiting[0][0] <= turn:
            source = heapq.heappop(waiting)[1]
            heapq.heappush(ready, (-(-(taken[source] + 1) * period // parts[source]), source))
        deadline, source = heapq.heappop(ready)
        assert deadline >= turn
        order[turn - 1] = source
        taken[source] += 1
        if taken[source] < parts[source]:
            heapq.heappush(waiting, (taken[source] * period // parts[source] + 1, source))
    return order


@dataclass(frozen=True, eq=False)
class _Phase:
    """Samples begin .. end - 1 of a mixture, of the sources that are not used up."""

    begin: int
    end: int  # MAX_SIZE: no end
    before: Ints  # [sources]: samples of each before this phase
    parts: Ints  # [sources]: samples of each in a period; 0: used up
    source: Ints  # [period]
    rank: Ints  # [period]: how many samples of the same source the period has before this one

    def at(self, numbers: Ints) -> tuple[Ints, Ints]:
        """Source, and number within the source, of samples of this phase: [n] -> [n], [n]."""
        places = numbers - self.begin
        turn = places % len(self.source)
        source = self.source[turn]
        rounds = places // len(self.source)
        return source, self.before[source] + rounds * self.parts[source] + self.rank[turn]

    def counts(self, number: int) -> Ints:
        """How many of the samples before `number` came from each source: [sources]."""
        rounds, turn = divmod(number - self.begin, len(self.source))
        rest = np.bincount(self.source[:turn], minlength=len(self.parts))
        return self.before + rounds * self.parts + rest


class Mixture:
    """The order of one or more sources in fixed proportions; each of their epochs is shuffled by itself.

    A source that has been through `limits` samples is left out from then on: a new phase, in which the others
    share its place in proportion. Phases are computed when a sample asks for them; none is kept on disk.

    sources: cut from one stream. weights: relative; None: equal ones. limits: samples of each source at most;
    MAX_SIZE: no limit.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        seed: int,
        weights: Sequence[float] | None = None,
        limits: Sequence[int] | None = None,
    ) -> None:
        assert all(source.size for source in sources), "a source without samples"
        self.sources, self._weights = sources, weights or [1.0] * len(sources)
        self._limits = limits or [MAX_SIZE] * len(sources)
        self.num_samples = min(sum(self._limits), MAX_SIZE)
        self._first_ids = np.cumsum([0, *(source.size for source in sources)])[:-1]
        self._seeds = [seed, *(stream_key(seed, f"source {n}") for n in range(1, len(sources)))]
        self._phases: tuple[_Phase, ...] = (self._phase(0, np.zeros(len(sources), np.int64)),)
        self._block = (-1, np.empty(0, np.int64), np.empty(0, np.int64))  # a memo; it only saves time

    def pieces(self, first: int, count: int) -> Pieces:
        """The samples first .. first + count - 1. Ids are indices, counted through all sources."""
        assert first + count <= self.num_samples, "the sources are used up: bigtfm.check refuses such a run"
        sources, indices = self._indices(first, count)
        if len(self.sources) == 1:
            return self.sources[0].pieces(indices)
        parts = []
        for source in set(sources.tolist()):
            here = np.flatnonzero(sources == source)
            _, samples, starts, stops = self.sources[source].pieces(indices[here])
            parts.append((here[samples], starts, stops))
        samples, starts, stops = map(np.concatenate, zip(*parts, strict=True))
        order = np.argsort(samples, kind="stable")
        return Pieces(indices + self._first_ids[sources], samples[order], starts[order], stops[order])

    def counts(self, number: int) -> Ints:
        """How many of the samples before `number` come from each source: [sources]."""
        return self._phase_of(number).counts(number)

    def _indices(self, first: int, count: int) -> tuple[Ints, Ints]:
        """Source, and index within the source, of consecutive samples: [count], [count]."""
        block, place = divmod(first, BLOCK)
        if place + count > BLOCK:
            return self._compute(first, count)
        memo = self._block  # read once: another thread may replace it
        if memo[0] != block:
            length = min(BLOCK, self.num_samples - block * BLOCK)
            memo = self._block = (block, *self._compute(block * BLOCK, length))
        return memo[1][place : place + count], memo[2][place : place + count]

    def _compute(self, first: int, count: int) -> tuple[Ints, Ints]:
        source, numbers = np.empty(count, np.int64), np.empty(count, np.int64)
        done = 0
        while done < count:
            phase = self._phase_of(first + done)
            end = min(count, phase.end - first)
            source[done:end], numbers[done:end] = phase.at(np.arange(first + done, first + end))
            done = end
        indices = np.empty(count, np.int64)
        for n in set(source.tolist()):
            here = source == n
            indices[here] = shuffled(numbers[here], self.sources[n].size, self._seeds[n])
        return source, indices

    def _phase_of(self, number: int) -> _Phase:
        """The phase that sample `number` belongs to."""
        phases = self._phases
        while number >= phases[-1].end and phases[-1].end < self.num_samples:
            last = phases[-1]
            phases = self._phases = (*phases, self._phase(last.end, last.counts(last.end)))
        return next((phase for phase in phases if number < phase.end), phases[-1])

    def _phase(self, begin: int, before: Ints) -> _Phase:
        """The phase that begins when each source has given `before` samples."""
        left = [limit - given for limit, given in zip(self._limits, before.tolist(), strict=True)]
        active = [n for n, rest in enumerate(left) if rest > 0]
        parts = np.zeros(len(left), np.int64)
        parts[active] = parts_of([self._weights[n] for n in active])
        source = np.array(active)[turns(parts[active].tolist())]
        rank = np.empty(len(source), np.int64)
        end = MAX_SIZE
        for n in active:
            places = np.flatnonzero(source == n)
            rank[places] = np.arange(len(places))
            if self._limits[n] < MAX_SIZE:
                rounds, last = divmod(left[n] - 1, len(places))
                end = min(end, begin + rounds * len(source) + int(places[last]) + 1)
        return _Phase(begin, end, before, parts, source, rank)


def training_order(datasets: Sequence[TokenDataset], data: DataSection, seq_len: int, seed: int) -> Mixture:
    """The order of a run's training samples, on the training splits one behind the other (Split.join).

    Raises:
        DataProblem: a data set is too small for one sequence, of another tokenizer than the first, or lacks
            the plan that data.packing needs.
    """
    sections = data.sources or (SourceSection(path=data.path),)
    packed, sources, start = data.packing == "best_fit", list[Source](), 0
    for other in datasets[1:]:
        _share_tokenizer(datasets[0], other)
    for dataset in datasets:
        tokens = dataset.split("train").num_tokens
        cut = Packed.open(dataset, seq_len, start) if packed else Windows(tokens, seq_len, start=start)
        sources.append(cut)
        if not sources[-1].size:
            raise DataProblem(
                f"the training split has {tokens} tokens, too few for a sequence of {seq_len}",
                where=str(dataset.path),
                fix="prepare more text, or set a smaller data.seq_len",
            )
        start += tokens
    limits = [
        MAX_SIZE if section.max_epochs is None else _passes(section.max_epochs, source.size)
        for section, source in zip(sections, sources, strict=True)
    ]
    return Mixture(sources, seed, [section.weight for section in sections], limits)


def _passes(epochs: float, size: int) -> int:
    """Samples in so many passes over `size` of them; one at least."""
    return max(1, math.floor(Fraction(repr(epochs)) * size))


def _share_tokenizer(first: TokenDataset, other: TokenDataset) -> None:
    if first.header.tokenizer.identity != other.header.tokenizer.identity:
        raise DataProblem(
            f"its tokenizer is not that of {first.path}, and the data sets of a mixture need the same",
            where=str(other.path),
            fix=f"prepare it again with --tokenizer {first.tokenizer_path}",
        )
