"""What a trainer is doing, in memory that its supervisor reads: also while the trainer stands still."""

from __future__ import annotations

import mmap
import struct
import sys
import time
from dataclasses import dataclass

from bigtfm.resilience.stacks import shown

# In the order in which a run comes to them; the four of a step are a rank's own work, which stragglers are
# found by.
PHASES = (
    *("start", "meet", "build", "resume"),
    *("data", "forward", "backward", "update"),
    *("record", "evaluate", "save", "end"),
)
OWN_WORK = PHASES[4:8]
RECENT = (512, 16)  # collectives that are kept: the loop's, those of the thread that writes checkpoints

_HEAD = struct.Struct(
    "<QQQQB96s"
)  # changes, step, phases entered, when the last one was (ns), which, its line
_LANE = struct.Struct("<QQBQ")  # collectives begun, ns in them, whether in one now, since when (ns)
_PHASE = struct.Struct(
    "<QQQQ"
)  # step of its first end + 1, ns in all, longest ns, longest ns since that step
_COLLECTIVE = struct.Struct("<QQQQ16s24s24s96s96s")  # the fields of Collective

_LANES = _HEAD.size
_PHASE_ROWS = _LANES + len(RECENT) * _LANE.size
_RINGS = _PHASE_ROWS + len(PHASES) * _PHASE.size
_MOVES = _RINGS + sum(RECENT) * _COLLECTIVE.size  # of the writer, while the loop waits for it
_SIZE = _MOVES + 8


@dataclass(frozen=True)
class Collective:
    """One call of a collective. `number` counts from 1 in this process, on all ranks alike."""

    number: int
    entered: int  # phases entered before it
    step: int
    elements: int
    phase: str
    name: str  # as torch.distributed calls it
    group: str  # torch's name of the process group
    site: str  # file:line outside torch and DeepSpeed
    inner: str  # DeepSpeed's file:line; "": called from `site` itself

    @property
    def shown(self) -> str:
        """As messages name it."""
        return f"{self.name} ({self.site}{', from ' + self.inner if self.inner else ''})"


def when(phase: str, step: int) -> str:
    return f"in {phase} at step {step}" if step else f"in {phase}, before the first step"


@dataclass(frozen=True)
class PhaseTimes:
    """Seconds of a phase, without those in collectives."""

    known: bool  # it has been completed in an earlier step
    total: float
    longest: float
    usual: float  # the longest, without the first step's, which compiles


@dataclass(frozen=True)
class Reading:
    """A pulse at one moment."""

    changes: int  # grows with all that the trainer's main thread does, in a save also with the writer's
    step: int  # the one being computed; 0: before the first
    phase: str
    site: str  # file:line at which the phase began
    entered: int  # phases so far
    waiting: bool  # the loop is in a collective
    writer_waiting: bool  # the thread that writes checkpoints is in one
    times: dict[str, PhaseTimes]

    @property
    def waits(self) -> bool:
        """Whether this rank can only go on when others do. In a save the loop waits for the writer."""
        return self.waiting or (self.phase == "save" and self.writer_waiting)


class Pulse:
    """Written by the trainer, read by its supervisor; made before the fork. Phase: 5 us, collective: 20.

    memory: another pulse's, to go on in its place.
    """

    def __init__(self, memory: mmap.mmap | None = None) -> None:
        self._map = memory or mmap.mmap(-1, _SIZE)
        self._changes = self._step = self._entered = self._moves = 0
        self._phase, self._began, self._waited_before = 0, time.monotonic_ns(), 0
        self._site = b""
        self._lanes = [_Lane(), _Lane()]
        self._write_head()

    @property
    def memory(self) -> mmap.mmap:
        """What its readers look at."""
        return self._map

    @property
    def waited(self) -> float:
        """Seconds that the loop's thread has spent in collectives so far."""
        return self._lanes[0].waited / 1e9

    def enter(self, phase: str, *, step: int | None = None) -> None:
        """The trainer begins with something else, or again with the same: an end of the phase before.

        step: the one that is computed from here on.
        """
        caller = sys._getframe(1)
        self._enter(phase, step, f"{shown(caller.f_code.co_filename)}:{caller.f_lineno}")

    def _enter(self, phase: str, step: int | None, site: str) -> None:
        now, waited = time.monotonic_ns(), self._lanes[0].waited
        if PHASES[self._phase] != "save":  # its work is the writer's, who tells by `took`
            self._add(self._phase, now - self._began - (waited - self._waited_before))
        self._site = site.encode()
        self._phase, self._began, self._waited_before = PHASES.index(phase), now, waited
        self._entered += 1
        if step is not None:
            self._step = step
        self._write_head()

    def took(self, phase: str, seconds: float) -> None:
        """Work of a phase that another thread has done."""
        self._add(PHASES.index(phase), int(seconds * 1e9))

    def moves(self) -> None:
        """The thread that writes checkpoints has come a little further.

        It counts while the loop waits for it only: a loop that stands still beside it is a hang.
        """
        if PHASES[self._phase] == "save":
            self._moves += 1
            struct.pack_into("<Q", self._map, _MOVES, self._moves)

    def begin_collective(
        self, name: str, group: str, elements: int, sites: tuple[str, str], *, lane: int
    ) -> None:
        """A collective is called. lane: 0 the loop's thread, 1 the one that writes checkpoints."""
        state = self._lanes[lane]
        state.count += 1
        first = _RINGS + (sum(RECENT[:lane]) + state.count % RECENT[lane]) * _COLLECTIVE.size
        texts = PHASES[self._phase].encode(), name.encode(), group.encode()[:24]
        places = (site.encode()[-96:] for site in sites)
        now = state.count, self._entered, self._step, elements
        _COLLECTIVE.pack_into(self._map, first, *now, *texts, *places)

    def wait(self, *, lane: int) -> None:
        """From here on this thread may have to wait for other ranks, until `go_on`; they nest."""
        state = self._lanes[lane]
        state.depth += 1
        if state.depth == 1:
            state.since = time.monotonic_ns()
            self._write_lane(lane)

    def go_on(self, *, lane: int) -> None:
        state = self._lanes[lane]
        state.depth -= 1
        if state.depth == 0:
            state.waited += time.monotonic_ns() - state.since
            self._write_lane(lane)

    def read(self) -> Reading:
        """What the trainer is doing now."""
        for _ in range(3):  # it may be writing
            changes, step, entered, _, phase, site = _HEAD.unpack_from(self._map, 0)
            lanes = [_LANE.unpack_from(self._map, _LANES + n * _LANE.size) for n in range(len(RECENT))]
            if _HEAD.unpack_from(self._map, 0)[0] == changes:
                break
        times = {}
        for number, name in enumerate(PHASES):
            row = _PHASE.unpack_from(self._map, _PHASE_ROWS + number * _PHASE.size)
            times[name] = PhaseTimes(0 < row[0] <= step, *(ns / 1e9 for ns in row[1:]))
        waiting, writer_waiting = bool(lanes[0][2]), bool(lanes[1][2])
        changes += struct.unpack_from("<Q", self._map, _MOVES)[0]
        return Reading(changes, step, PHASES[phase], _text(site), entered, waiting, writer_waiting, times)

    def collectives(self, lane: int = 0) -> list[Collective]:
        """The last ones, oldest first."""
        first, found = _RINGS + sum(RECENT[:lane]) * _COLLECTIVE.size, []
        for place in range(RECENT[lane]):
            row = _COLLECTIVE.unpack_from(self._map, first + place * _COLLECTIVE.size)
            if row[0]:
                found.append(Collective(*row[:4], *map(_text, row[4:])))
        return sorted(found, key=lambda collective: collective.number)

    def _add(self, phase: int, ns: int) -> None:
        place = _PHASE_ROWS + phase * _PHASE.size
        first, total, longest, usual = _PHASE.unpack_from(self._map, place)
        known = 0 < first <= self._step
        usual = max(usual, ns) if known else usual
        _PHASE.pack_into(self._map, place, first or self._step + 1, total + ns, max(longest, ns), usual)

    def _write_head(self) -> None:
        self._changes += 1
        _HEAD.pack_into(
            *(
                self._map,
                0,
                self._changes,
                self._step,
                self._entered,
                self._began,
                self._phase,
                self._site[-96:],
            )
        )

    def _write_lane(self, lane: int) -> None:
        state = self._lanes[lane]
        place = _LANES + lane * _LANE.size
        _LANE.pack_into(self._map, place, state.count, state.waited, state.depth > 0, state.since)
        if lane == 0:
            self._changes += 1
            struct.pack_into("<Q", self._map, 0, self._changes)


@dataclass
class _Lane:
    """Collectives of one thread."""

    count: int = 0
    waited: int = 0  # ns
    depth: int = 0
    since: int = 0  # ns


def _text(field: bytes) -> str:
    return field.rstrip(b"\0").decode(errors="replace")
