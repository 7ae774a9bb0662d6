"""How a rank's trainer ended, and which of all ranks' ends is the one that the job's line is about."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from bigtfm.config.problems import Hang, Occupied, Problem
from bigtfm.resilience.events import note

FAILURE = "failure.json"
RESUMES = "then start the same command again: it resumes"
_KILLERS = {
    signal.SIGKILL: "most often the kernel does that when memory runs out (see dmesg): lower the micro batch "
    "or data.workers, ",
    signal.SIGSEGV: "a native library did wrong: see the lines above, undo what was installed last, ",
    signal.SIGBUS: "most often /dev/shm or a disk under a mapped file is full: free space there, ",
}


@dataclass(frozen=True)
class Outcome:
    """The end of a trainer; code 0: it is done."""

    code: int
    what: str = ""
    where: str = ""
    fix: str = ""
    cause: bool = True  # False: it only lost another rank
    said: bool = False  # a traceback shows it
    foreign: bool = False  # the run directory is another training's: nothing may be written there
    restart: dict[str, Any] | None = None  # start all trainers again, with these changes

    @classmethod
    def of(cls, problem: Problem, *, cause: bool = True) -> Self:
        foreign = isinstance(problem, Occupied)
        return cls(problem.exit_code, problem.what, problem.where, problem.fix, cause, foreign=foreign)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def line(self) -> str:
        return Problem(self.what, where=self.where, fix=self.fix).line

    def write(self, run_dir: Path, *, only_first: bool = False) -> bool:
        """failure.json. only_first: not where there is one. Returns whether it was written."""
        if self.foreign or not run_dir.is_dir():
            return False
        values = {"exit_code": self.code, "what": self.what, "where": self.where, "fix": self.fix}
        try:
            with (run_dir / FAILURE).open("x" if only_first else "w", encoding="utf-8") as file:
                file.write(json.dumps(values, indent=1) + "\n")
        except OSError:  # the line on stderr has said it
            return False
        note(run_dir, "end", code=self.code, what=self.what, where=self.where)
        return True


def of_silent_end(rank: int, status: int, last_seen: str) -> Outcome:
    """A trainer that ended without a word.

    status: as waitstatus_to_exitcode has it. last_seen: what it was doing, such as "in forward at step 7".
    """
    where = f"rank {rank}"
    if status >= 0:
        return Outcome.of(
            Hang(f"left with exit code {status} {last_seen}", where=where,
                 fix=f"look for what calls exit() there, {RESUMES}")
        )  # fmt: skip
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = "unknown"
    fix = _KILLERS.get(-status, "see who sent it, ")  # type: ignore[call-overload]
    return Outcome.of(
        Hang(f"was killed by signal {-status} ({name}) {last_seen}", where=where, fix=fix + RESUMES)
    )


def lost(rank: int, how: str) -> Outcome:
    """A rank whose supervisor is gone, too."""
    fix = f"see whether its machine runs, and whether memory ran out there (dmesg), {RESUMES}"
    return Outcome.of(Hang(how, where=f"rank {rank}", fix=fix))


def verdict(outcomes: Mapping[int, Outcome]) -> tuple[int, Outcome]:
    """(rank, its outcome) that the job's line is about; `outcomes` are in the order in which they came.

    A cause goes before the loss of a peer; of ranks that say the same, the first speaks.
    """
    _, chosen = min(outcomes.items(), key=lambda item: (item[1].code == 0, not item[1].cause))
    return min(rank for rank, outcome in outcomes.items() if outcome == chosen), chosen
