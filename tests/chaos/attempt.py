"""One start of a job and what is killed of it."""

from __future__ import annotations

import random
import re
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

from chaos import job, processes
from chaos.job import RANKS

PATIENCE = 120.0  # seconds in which a moment must come, or a job end
PHASES = {"resume": 0.1, "save": 0.006, "write": 0.03, "evaluate": 0.06}  # marks.py; seconds that they take
VICTIMS = {
    "all": 2,
    "rank 0": 2,
    "rank 1": 2,
    "trainer": 2,
    "supervisor": 2,
    "data worker": 1,
}  # with weights
MOMENTS = {"any": 5, "resume": 1, "save": 1, "write": 1, "evaluate": 1}
LAUNCHER_EVERY = 40  # one kill of so many is of the deepspeed launcher: it takes ten times as long to start
ORPHANED = 30.0  # seconds that ranks without their launcher may take to save (docs/reliability.md)
STARTING = 60.0  # seconds that what it leaves behind may take to start the ranks, which then look for it


@dataclass(frozen=True)
class Plan:
    """What is killed, and when."""

    moment: str  # of MOMENTS, or "launcher"
    victim: str  # of VICTIMS, or "launcher"
    after: float  # 0 to 1: "any": how far into the life of a start; else how far into the phase
    turn: int  # which evaluation or save after the start
    rank: int  # whose trainer, supervisor or data worker, and whose phase


def plan(seed: int, number: int) -> Plan:
    """A function of the campaign's seed and the kill's number."""
    draw = random.Random(f"{seed} {number}")
    moment, victim = (draw.choices(list(table), list(table.values()))[0] for table in (MOMENTS, VICTIMS))
    if number % LAUNCHER_EVERY == LAUNCHER_EVERY // 2:
        moment = victim = "launcher"
    turn = 1 if moment == "resume" else draw.randint(1, 3)
    return Plan(moment, victim, draw.random(), turn, draw.randrange(RANKS))


@dataclass
class Attempt:
    """What came of a start. seconds: until the kill; gone: from the kill until no process was left."""

    seconds: float
    killed: list[int] = field(default_factory=list)  # process ids; none: it came to its end by itself
    inside: list[str] = field(default_factory=list)  # phases that a rank was in at the end
    met: bool = False  # whether its ranks had found each other: before, only a launcher sees one end
    resumed: int | None = None  # the step that it went on from; None: it did not get that far
    gone: float = 0.0
    orphans: list[str] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)  # of the ranks, or of the launcher
    output: str = ""

    @property
    def lines(self) -> list[str]:
        """What the job said of its end."""
        return [line for line in self.output.splitlines() if line.startswith("bigtfm: error: ")]


def attempt(
    out: Path,
    args: Sequence[str],
    plan: Plan | None,
    life: float,
    gone: float,
    environ: Mapping[str, str] | None = None,
) -> Attempt:
    """Starts `bigtfm ARGS` on all ranks and kills what is planned; nothing of it is left behind.

    plan: None lets it come to its end. life: seconds over which "any" moment is spread. gone: seconds that
        all its processes have to be gone in.
    """
    if plan is not None and plan.victim == "launcher":
        return _through_launcher(out, args, plan, gone)
    servers = job.servers()
    began = time.monotonic()
    ranks = job.start(args, out, environ)
    pids = [rank.pid or 0 for rank in ranks]

    def alive() -> bool:
        return all(rank.exitcode is None for rank in ranks)

    done = Attempt(0.0)
    if plan is None:
        _wait(lambda: not alive(), lambda: True, PATIENCE)
    elif _moment(plan, out, began + plan.after * life, alive) and alive():
        done.killed = _victims(plan, pids, servers, alive)
    random.Random(str(plan)).shuffle(done.killed)
    processes.kill(done.killed)
    done.seconds = time.monotonic() - began
    done.met = all("-resume" in (out / f"marks-{rank}.txt").read_text() for rank in range(RANKS))
    if done.killed and not done.met:
        _as_a_launcher(ranks)
    _end(done, servers, gone)
    for rank in ranks:
        rank.join()
    done.codes = [rank.exitcode or 0 for rank in ranks]
    done.output = "".join((out / f"rank-{rank}.out").read_text(errors="replace") for rank in range(RANKS))
    for rank in range(RANKS):
        _read_marks(done, (out / f"marks-{rank}.txt").read_text())
    return done


def _as_a_launcher(ranks: Sequence[BaseProcess]) -> None:
    """When one rank has ended, the others get SIGTERM a second later, as from deepspeed and torchrun."""
    if _wait(lambda: any(rank.exitcode is not None for rank in ranks), lambda: True, 10.0):
        time.sleep(1.0)
        processes.kill([rank.pid or 0 for rank in ranks if rank.exitcode is None], signal.SIGTERM)


def _moment(plan: Plan, out: Path, at: float, alive: Callable[[], bool]) -> bool:
    """Waits for it; False: the job has ended before."""
    if plan.moment == "any":
        return _wait(lambda: time.monotonic() >= at, alive, PATIENCE)
    marks, wanted = out / f"marks-{plan.rank}.txt", f"+{plan.moment}\n"
    if not _wait(lambda: marks.read_text().count(wanted) >= plan.turn, alive, PATIENCE):
        return False
    time.sleep(plan.after * PHASES[plan.moment])
    return True


def _wait(condition: Callable[[], bool], alive: Callable[[], bool], seconds: float) -> bool:
    """Whether it came about while `alive`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if not alive() or time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True


def _victims(plan: Plan, ranks: Sequence[int], servers: set[int], alive: Callable[[], bool]) -> list[int]:
    """A rank is a supervisor whose child is the trainer; or, where nobody supervises, the trainer itself."""
    if plan.victim == "all":
        return [process.pid for process in processes.living(servers)]
    if plan.victim == "data worker":
        workers: list[int] = []

        def born() -> bool:
            workers[:] = _data_workers(servers)
            return bool(workers)

        _wait(born, alive, PATIENCE)
        return workers[:1]
    if plan.victim in ("rank 0", "rank 1"):
        rank = ranks[int(plan.victim[-1])]
        return [rank, *(process.pid for process in processes.children(rank))]
    rank = ranks[plan.rank]
    trainer = [process.pid for process in processes.children(rank)]
    return trainer[:1] if plan.victim == "trainer" and trainer else [rank]


def _data_workers(servers: set[int]) -> list[int]:
    """Forks of the fork servers that trainers have started."""
    forks = {p.pid: p for p in processes.living(servers) if "bigtfm.data.prefetch" in p.command}
    return [process.pid for process in forks.values() if process.parent in forks]


def _end(done: Attempt, servers: set[int], seconds: float) -> None:
    """Waits until no process of the job is left; ends and names those that are left then."""
    killed_at = time.monotonic()
    left = processes.wait_until_gone(servers, seconds)
    done.gone = time.monotonic() - killed_at
    done.orphans = [f"{process.pid} ({process.state}) {process.command}" for process in left]
    while left:
        processes.kill([process.pid for process in left])
        left = processes.wait_until_gone(servers, 1.0)


def _read_marks(done: Attempt, text: str) -> None:
    open_phases: list[str] = []
    for line in text.splitlines():
        if line.startswith("+"):
            open_phases.append(line[1:])
        elif line.startswith("-") and line[1:] in open_phases:
            open_phases.remove(line[1:])
        elif line.startswith("resumed "):
            done.resumed = int(line.split()[1])
    done.inside += [phase for phase in open_phases if phase not in done.inside]


def _through_launcher(out: Path, args: Sequence[str], plan: Plan, gone: float) -> Attempt:
    """The `deepspeed` process is killed: one third of the times when ranks start, else while they train."""
    servers = job.servers()
    began = time.monotonic()
    rows = out / "runs" / next(arg for arg in args if arg.startswith("run.name="))[9:] / "metrics.jsonl"
    before = rows.stat().st_mtime if rows.exists() else 0.0
    launcher = job.launch(args, out)

    def alive() -> bool:
        return launcher.poll() is None

    def trains() -> bool:
        return rows.exists() and rows.stat().st_mtime > before

    def launched() -> bool:
        return any("deepspeed.launcher.launch" in p.command for p in processes.living(servers))

    done = Attempt(0.0)
    starting = plan.turn == 1
    if _wait(launched if starting else trains, alive, PATIENCE):
        time.sleep((12.0 if starting else 1.0) * plan.after)
        done.killed = [launcher.pid] if alive() else []
    processes.kill(done.killed)
    done.seconds = time.monotonic() - began
    _end(done, servers, gone + (STARTING if starting else ORPHANED))
    done.codes = [launcher.wait()]
    done.output = (out / "launcher.out").read_text(errors="replace")
    if found := re.findall(r"resuming .* after step (\d+)", done.output):
        done.resumed = int(found[-1])
    return done
