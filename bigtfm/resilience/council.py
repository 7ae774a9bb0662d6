"""The supervisors of all ranks as one: whether the job goes on, how it has ended, who prints its line."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from selectors import EVENT_READ, BaseSelector
from typing import Any

from bigtfm.config.launch import Launch
from bigtfm.config.problems import Hang, RequeueRequested, say
from bigtfm.config.sections import GuardSection
from bigtfm.resilience.diagnosis import Report
from bigtfm.resilience.events import note
from bigtfm.resilience.hub import Hub, Peer, join
from bigtfm.resilience.outcome import Outcome, lost, verdict
from bigtfm.resilience.pulse import Pulse
from bigtfm.resilience.watch import Beat, Doctor, Watch

SILENCE = 5.0  # seconds; launchers notice an end within one
_TOLD = 3.0  # seconds for all ranks to say how they ended, once one has
_BEAT = 1.0  # seconds between two signs of life
_STALE = 5.0  # seconds after which a sign of life says nothing any more
_REPORTS = 6.0  # seconds for the reports of all ranks
_GONE = "is gone: its processes were killed, or its machine failed"


class Council:
    """A rank's seat. Until its trainer has met the others', each supervisor decides for itself.

    `verdict`: how the job ended; None: it goes on. `speaks`: whether this rank prints the line.
    """

    def __init__(
        self, launch: Launch, run_dir: Path, guard: GuardSection, pulse: Pulse, selector: BaseSelector
    ) -> None:
        self._rank, self._world_size, self._local_rank = launch.rank, launch.world_size, launch.local_rank
        self._run_dir, self._selector = run_dir, selector
        self._watch = Watch(pulse, launch.rank, guard)
        self._doctor = Doctor(guard, run_dir, self._say)
        self._hub: Hub | None = None
        self._peer: Peer | None = None  # another rank's connection to the hub
        self._met = False
        self._ends: dict[int, Outcome] = {}  # how each rank's trainer has ended, in the order of the news
        self._beats: dict[int, tuple[float, Beat]] = {}
        self._reports: dict[int, Report] | None = None  # None: not asked for
        self._due = {"beat": 0.0, "told": math.inf, "reports": math.inf, "silence": math.inf}
        self.verdict: Outcome | None = None
        self.speaks = False
        if launch.rank == 0 and launch.world_size > 1:
            try:
                self._hub = Hub(os.environ.get("MASTER_ADDR", "127.0.0.1"))
                selector.register(self._hub, EVENT_READ)
            except (OSError, UnicodeError):
                pass  # the trainer says what is wrong with that address

    @property
    def address(self) -> list[Any] | None:
        """Where the others find rank 0's, for the trainers to hand round."""
        return self._hub.address if self._hub is not None else None

    def meet(self, address: list[Any]) -> None:
        """The trainers have met: from here on the supervisors are one, if they can reach each other."""
        self._met = True
        if self._rank:
            try:
                self._peer = join(address, self._rank)
                self._selector.register(self._peer.lines, EVENT_READ)
            except OSError as error:
                note(self._run_dir, "no hub", rank=self._rank, error=str(error))

    def attend(self, now: float, pid: int, own: Outcome | None, *, told: bool) -> None:
        """Reads what has come, says what is new. To be called at least every half second.

        own: how this rank's trainer, `pid`, has ended; None: it runs. told: it was asked to stop.
        """
        self._listen(now, pid)
        if own is not None and self._rank not in self._ends:
            self._ends[self._rank] = own
            self._tell_hub(outcome=own.to_json())
        if now >= self._due["beat"] and self.verdict is None:
            self._due["beat"] = now + _BEAT
            self._beat(now, pid)
        if self.verdict is None:
            if self._hub is not None and self._met:
                self._lead(now, pid)
            elif self._peer is not None:
                self._follow(now)
            elif own is not None:
                self._decide_alone(now, own, told)

    def woke(self, now: float) -> None:
        """This process was stopped (Ctrl-Z): that it heard nothing meanwhile says nothing of the others."""
        self._beats.clear()
        for peer in self._hub.peers if self._hub is not None else [self._peer] if self._peer else []:
            peer.heard = now

    def leave(self) -> None:
        if self._peer is not None:
            self._part()
        if self._hub is not None:
            self._hub.close()

    # --- hearing and saying

    def _listen(self, now: float, pid: int) -> None:
        if self._hub is not None:
            for rank, message in self._hub.read():
                if "outcome" in message:
                    self._ends.setdefault(rank, Outcome(**message["outcome"]))
                elif "beat" in message:
                    self._beats[rank] = now, Beat.from_json(message["beat"])
                elif "report" in message and self._reports is not None:
                    self._reports[rank] = Report.from_json(message["report"])
        if self._peer is not None:
            for message in self._peer.lines.read():
                self._peer.heard = now
                if "wanted" in message:
                    self._tell_hub(report=self._watch.report(pid).to_json())
                elif "verdict" in message:
                    self.verdict = Outcome(**message["verdict"])
                    self.speaks = message["speaker"] == self._rank
                if "verdict" in message or "done" in message:
                    self._part()
                    break

    def _tell_hub(self, **message: Any) -> None:
        if self._peer is not None:
            self._peer.lines.send(**message)

    def _part(self) -> None:
        """Leaves the hub: what comes now is this rank's alone."""
        assert self._peer is not None
        self._selector.unregister(self._peer.lines)
        self._peer.lines.close()
        self._peer = None

    def _say(self, line: str) -> None:
        if self._rank == 0 or self._met:
            say(line)

    def _beat(self, now: float, pid: int) -> None:
        """The second's news of this rank, and what the doctor makes of those of all."""
        beat = self._watch.beat(now)
        self._beats[self._rank] = now, beat
        if self._peer is not None:
            self._tell_hub(beat=beat.to_json())
            return
        if self._hub is not None:
            self._hub.tell(alive=True)
        if self._ends:
            return
        fresh = {rank: beat for rank, (when, beat) in self._beats.items() if now - when < _STALE}
        if self._reports is None and self._doctor.look([fresh.get(rank) for rank in self._ranks], now):
            self._due["reports"] = now + _REPORTS
            self._ask(pid)
        if self._reports is not None and (
            len(self._reports) == len(self._ranks) or now >= self._due["reports"]
        ):
            hang = self._doctor.judge(self._answers)
            self._reports = None
            if hang is not None:
                self._pronounce(self._rank, Outcome.of(hang))

    def _ask(self, pid: int) -> None:
        """All ranks for a report."""
        self._reports = {}
        if self._hub is not None and self._met:
            self._hub.tell(wanted="report")
        self._reports[self._rank] = self._watch.report(pid)

    @property
    def _answers(self) -> list[Report | None]:
        reports = self._reports or {}
        return [reports.get(rank) for rank in self._ranks]

    @property
    def last_seen(self) -> str:
        """Where this rank's trainer is, or was when it ended."""
        return self._watch.last_seen()

    @property
    def _ranks(self) -> Sequence[int]:
        """Those that this supervisor hears of."""
        return range(self._world_size) if self._hub is not None and self._met else [self._rank]

    # --- deciding

    def _lead(self, now: float, pid: int) -> None:
        assert self._hub is not None
        for peer in self._hub.peers:
            if peer.rank not in self._ends and peer.gone(now):
                self._ends[peer.rank] = lost(peer.rank, _GONE)
                peer.kill()
        if any(end.code for end in self._ends.values()):
            self._due["told"] = min(self._due["told"], now + _TOLD)
            speaker, end = verdict(self._ends)
            lost_one = end.code == Hang.exit_code
            if lost_one and self._reports is None:
                self._ask(pid)  # who has called what: also a trainer that is gone has left that behind
            heard = not lost_one or self._reachable <= (self._reports or {}).keys()
            if (len(self._ends) == self._world_size and heard) or now > self._due["told"]:
                hang = self._doctor.explain(self._answers) if lost_one else None
                self._pronounce(*((self._rank, Outcome.of(hang)) if hang is not None else (speaker, end)))
        elif self._rank in self._ends:
            self._hub.tell(done=True)
            self.verdict = self._ends[self._rank]

    def _pronounce(self, speaker: int, outcome: Outcome) -> None:
        """Ends the job. Who was heard of last speaks for a rank that can't any more."""
        self.verdict, self.speaks = outcome, True
        if self._hub is not None and self._met:
            self._hub.tell(verdict=outcome.to_json(), speaker=speaker)
            self.speaks = speaker not in self._reachable - {self._rank}
        if outcome.code and outcome.restart is None:
            outcome.write(self._run_dir)

    @property
    def _reachable(self) -> set[int]:
        """The ranks whose supervisors are there."""
        assert self._hub is not None
        return {self._rank, *(peer.rank for peer in self._hub.peers if not peer.lines.closed)}

    def _follow(self, now: float) -> None:
        assert self._peer is not None
        own = self._ends.get(self._rank)
        if own is not None and own.code == 0:
            self.verdict = own
        elif self._peer.gone(now):
            self._peer.kill()
            self._part()
            self.verdict = own if own is not None and own.cause else lost(0, _GONE)
            first = self.verdict.write(self._run_dir, only_first=True)
            self.speaks = first or not self._run_dir.is_dir()

    def _decide_alone(self, now: float, own: Outcome, told: bool) -> None:
        """The first rank of a machine speaks first; its end makes the launcher end the others meanwhile."""
        waits = self._local_rank > 0 and not self._met and own.code not in (0, RequeueRequested.exit_code)
        if waits and not told:
            self._due["silence"] = min(self._due["silence"], now + SILENCE)
            if now < self._due["silence"]:
                return
        self._pronounce(self._rank, own)
        self.speaks = not (waits and told)
