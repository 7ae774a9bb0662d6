"""When a job is ended: the supervisor's watch over its own trainer, and the first one's over all ranks."""

from __future__ import annotations

import math
import socket
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from bigtfm.config.problems import Hang
from bigtfm.config.sections import GuardSection
from bigtfm.resilience import events, stacks
from bigtfm.resilience.diagnosis import Report, Verdict, diagnose
from bigtfm.resilience.processes import descendants, state
from bigtfm.resilience.pulse import OWN_WORK, PhaseTimes, Pulse, when

NOTICE, FIRST_NOTICE = 20.0, 60.0  # seconds after which a rank is named: usually, and in what it does first
TICK = 2.0  # most seconds that count between two looks: a suspended supervisor has seen nothing
AGAIN = 5.0  # seconds between two questions to all ranks
WINDOW, STEPS = 10.0, 3  # least seconds and steps by which stragglers are judged
STRAGGLER_EVERY = 60.0  # least seconds between two notes
STRAGGLER_FLOOR = 0.05  # seconds a step that a straggler must take more than the median


@dataclass(frozen=True)
class Beat:
    """A rank's state in a few numbers, sent about once a second."""

    rank: int
    step: int
    phase: str
    changes: int
    waits: bool
    seconds: float  # since it last did anything, as far as its supervisor was awake
    notice: float  # seconds after which it is named
    limit: float  # seconds after which it is a hang
    own: dict[str, float]  # seconds so far of its own work, by phase, without collectives

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Self:
        return cls(**row)


class Watch:
    """A supervisor's look at its own trainer."""

    def __init__(self, pulse: Pulse, rank: int, guard: GuardSection) -> None:
        self._pulse, self._rank, self._guard = pulse, rank, guard
        self._changes, self._seconds, self._looked = -1, 0.0, math.inf

    def beat(self, now: float) -> Beat:
        """now: seconds of a clock that does not jump. To be called about once a second."""
        reading = self._pulse.read()
        passed = max(0.0, min(now - self._looked, TICK))
        self._seconds = self._seconds + passed if reading.changes == self._changes else 0.0
        self._changes, self._looked = reading.changes, now
        notice, limit = self._patience(reading.times[reading.phase])
        own = {phase: reading.times[phase].total for phase in OWN_WORK}
        return Beat(
            *(self._rank, reading.step, reading.phase, reading.changes, reading.waits),
            *(self._seconds, notice, limit, own),
        )

    def report(self, pid: int) -> Report:
        """All about the trainer `pid`. Takes up to two seconds.

        A stopped one shows its stacks only when its time is over: its other threads go on for a moment then,
        and its time would begin anew.
        """
        reading, now = self._pulse.read(), state(pid)
        _, limit = self._patience(reading.times[reading.phase])
        text = "" if now == "T" and self._seconds < limit else stacks.of(pid)
        workers = {worker.pid: stacks.of(worker.pid, timeout=0.5) for worker in descendants(pid)}
        main_threads = (stacks.threads(said)[:1] for said in workers.values())
        calls = self._pulse.collectives()
        waits_in = (calls if reading.waiting else self._pulse.collectives(lane=1))[-1:]
        said = [f"process {worker}:\n{said}" for worker, said in workers.items() if said]
        return Report(
            *(self._rank, socket.gethostname(), pid, now, reading.step, reading.phase, reading.site),
            seconds=self._seconds,
            waits=reading.waits,
            collectives=tuple(calls),
            waits_in=waits_in[0] if waits_in and reading.waits else None,
            threads=stacks.threads(text),
            workers=tuple(frames for thread in main_threads for frames in thread),
            text="\n".join([text, *said]),
        )

    def last_seen(self) -> str:
        """Where the trainer is, or was when it ended: "in forward at step 7 (bigtfm/train.py:101)"."""
        reading = self._pulse.read()
        return f"{when(reading.phase, reading.step)} ({reading.site})"

    def _patience(self, times: PhaseTimes) -> tuple[float, float]:
        hang, start = self._guard.hang_seconds or math.inf, self._guard.start_seconds or math.inf
        if not times.known:
            return FIRST_NOTICE, start
        return max(NOTICE, 3 * times.usual), max(hang, 10 * times.longest)


class Doctor:
    """Looks at all ranks of a job, names who is slow, and says when it is to end.

    say: prints a line for the user.
    """

    def __init__(self, guard: GuardSection, run_dir: Path, say: Callable[[str], None]) -> None:
        self._guard, self._run_dir, self._say = guard, run_dir, say
        self._beats: dict[int, Beat] = {}
        self._asked, self._named = -math.inf, set[tuple[int, ...]]()
        self._stragglers = Stragglers(guard.straggler)

    def look(self, beats: Sequence[Beat | None], now: float) -> bool:
        """Whether the reports of all ranks are wanted, for `judge`. To be called about once a second.

        beats: by rank; None: none has come lately.
        """
        self._beats = {beat.rank: beat for beat in beats if beat is not None}
        straggler = self._stragglers.look(self._beats, now)
        if straggler is not None:
            events.note(self._run_dir, "straggler", **straggler.details)
            self._say(straggler.line)
        stands = self._standing()
        named = self._moment() in self._named
        if now - self._asked < AGAIN or not any(
            beat.seconds >= (beat.limit if named else min(beat.notice, beat.limit)) for beat in stands
        ):
            return False
        self._asked = now
        return True

    def judge(self, reports: Sequence[Report | None]) -> Hang | None:
        """The end of the job, or None: not yet; who is slow has been said."""
        verdict = diagnose(reports)
        if self._over(verdict):
            return self._end(verdict, reports)
        if self._moment() not in self._named:
            self._named.add(self._moment())
            events.note(self._run_dir, "slow rank", kind=verdict.kind, rank=verdict.rank, what=verdict.what)
            meanwhile = f"; {verdict.meanwhile}" if verdict.meanwhile else ""
            self._say(f"note: {verdict.where}: {verdict.what}{meanwhile}{self._until(verdict)}")
        return None

    def explain(self, reports: Sequence[Report | None]) -> Hang | None:
        """Why a collective may have failed or been aborted by gloo: a rank has left out another one."""
        verdict = diagnose(reports)
        return self._end(verdict, reports) if verdict.kind in ("skipped", "extra", "differ") else None

    def _end(self, verdict: Verdict, reports: Sequence[Report | None]) -> Hang:
        file = self._keep(reports)
        events.note(self._run_dir, "hang", kind=verdict.kind, rank=verdict.rank, what=verdict.what)
        return Hang(f"{verdict.what}; all stacks: {file}", where=verdict.where, fix=verdict.fix)

    def _standing(self) -> list[Beat]:
        """The ranks that are not waiting for others; all of them if all wait."""
        beats = list(self._beats.values())
        return [beat for beat in beats if not beat.waits] or [
            beat for beat in beats if beat.seconds == min(beat.seconds for beat in beats)
        ]

    def _moment(self) -> tuple[int, ...]:
        return tuple(beat.changes for beat in self._standing())

    def _over(self, verdict: Verdict) -> bool:
        """Whether the one who is to blame has had its time: of one that never joined, those who wait for it.

        Of one that has, the hub is usually the first to notice.
        """
        if not self._beats:
            return False
        beat = self._beats.get(-1 if verdict.rank is None else verdict.rank) or self._standing()[0]
        limit = beat.limit
        if verdict.proven:
            limit = min(limit, self._guard.hang_seconds or math.inf)
        return beat.seconds >= limit

    def _until(self, verdict: Verdict) -> str:
        beat = self._beats.get(-1 if verdict.rank is None else verdict.rank) or self._standing()[0]
        return f"; the job ends after {beat.limit:.0f} s" if math.isfinite(beat.limit) else ""

    def _keep(self, reports: Sequence[Report | None]) -> Path:
        """The stacks of all ranks, in a file below the run directory."""
        found = [report for report in reports if report is not None]
        path = self._run_dir / "logs" / f"hang-step-{max(report.step for report in found)}.txt"
        calls = {r.rank: "".join(f"  {vars(call)}\n" for call in r.collectives[-20:]) for r in found}
        parts = [
            f"{r.name}: {r.when} for {r.seconds:.0f} s, process state {r.state or 'gone'}\n{r.text}\n"
            f"last collectives:\n{calls[r.rank]}"
            for r in found
        ]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n\n".join(parts), encoding="utf-8")
        except OSError:
            pass  # the line says the most of it
        return path


@dataclass(frozen=True)
class Straggler:
    """A rank whose own work takes longer than the others'."""

    details: dict[str, Any]
    line: str


class Stragglers:
    """Compares the ranks' own work over some seconds.

    factor: how many times the median rank's is too much; 0: never.
    """

    def __init__(self, factor: float) -> None:
        self._factor, self._since, self._noted = factor, math.inf, -math.inf
        self._before: Mapping[int, Beat] = {}

    def look(self, beats: Mapping[int, Beat], now: float) -> Straggler | None:
        """The slowest rank of the last window, once a minute at most."""
        if beats.keys() != self._before.keys():
            self._before, self._since = dict(beats), now
            return None
        steps = {rank: beat.step - self._before[rank].step for rank, beat in beats.items()}
        if now - self._since < WINDOW or min(steps.values(), default=0) < STEPS:
            return None
        own = {
            rank: {p: (beat.own[p] - self._before[rank].own[p]) / steps[rank] for p in OWN_WORK}
            for rank, beat in beats.items()
        }
        self._before, self._since = dict(beats), now
        seconds = {rank: sum(phases.values()) for rank, phases in own.items()}
        slowest = max(seconds, key=lambda rank: seconds[rank])
        median = statistics.median_low(seconds.values())
        more = seconds[slowest] - median
        slow = self._factor and seconds[slowest] > self._factor * median and more > STRAGGLER_FLOOR
        if len(beats) < 2 or not slow or now - self._noted < STRAGGLER_EVERY:
            return None
        self._noted = now
        phase = max(own[slowest], key=lambda phase: own[slowest][phase])
        details = {
            **{"rank": slowest, "step": beats[slowest].step, "phase": phase},
            **{"seconds": round(seconds[slowest], 4), "median": round(median, 4)},
        }
        line = (
            f"note: rank {slowest} is slow: its own work takes {seconds[slowest]:.2f} s a step, "
            f"the median rank's {median:.2f} s; most of it in {phase}"
        )
        return Straggler(details, line)
