"""Who stopped a job: from a report of each rank to one verdict. Pure functions.

A rank that others wait for is not in a collective itself: it is gone, stopped, or busy with its own work.
Where all are in collectives, one has taken another way through the program: what each rank has called, in
order, says which.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from bigtfm.resilience.pulse import Collective, when
from bigtfm.resilience.stacks import Frame

Kind = Literal["gone", "stopped", "silent", "skipped", "extra", "differ", "busy", "late", "network"]
# All ranks must give these the same number of elements.
_EVEN = ("all_reduce", "broadcast", "all_gather_into_tensor", "reduce_scatter_tensor")
_RESUMES = "start the same command again: it resumes from the last checkpoint"


@dataclass(frozen=True)
class Report:
    """A rank as its supervisor sees it."""

    rank: int
    host: str
    pid: int
    state: str  # see processes.Process
    step: int
    phase: str
    site: str  # file:line at which the phase began
    seconds: float  # since it last did anything
    waits: bool  # in a collective
    collectives: tuple[Collective, ...]  # of the loop, oldest first
    waits_in: Collective | None
    threads: tuple[tuple[Frame, ...], ...]  # the main one first; each from its innermost frame outwards
    workers: tuple[tuple[Frame, ...], ...]  # main threads of the processes below it
    text: str  # faulthandler's, of all of them

    @property
    def name(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"

    @property
    def when(self) -> str:
        return when(self.phase, self.step)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Self:
        many = {key: tuple(_frames(frames) for frames in row[key]) for key in ("threads", "workers")}
        calls = tuple(Collective(**call) for call in row["collectives"])
        waits_in = Collective(**row["waits_in"]) if row["waits_in"] else None
        return cls(**row | many | {"collectives": calls, "waits_in": waits_in})


def _frames(rows: Iterable[dict[str, Any]]) -> tuple[Frame, ...]:
    return tuple(Frame(**row) for row in rows)


@dataclass(frozen=True)
class Verdict:
    """What stopped the job. `where`, `what` and `fix` are a Problem's."""

    kind: Kind
    rank: int | None  # None: all alike
    where: str
    what: str
    fix: str
    meanwhile: str = ""  # what helps as long as the job runs

    @property
    def proven(self) -> bool:
        """Whether it can't come right by itself."""
        return self.kind in ("gone", "skipped", "extra", "differ")


def diagnose(reports: Sequence[Report | None]) -> Verdict:
    """The rank that the others wait for, and why. reports: by rank; None: its supervisor does not answer."""
    found = [report for report in reports if report is not None]
    divided = _divided(found)
    if divided is not None:
        return _strayed(found, *divided)
    for report in found:
        if report.state in ("", "Z", "X"):
            return _gone(report, found)
    for report in found:
        if report.state in ("T", "t"):
            return _stopped(report, found)
    for rank, answer in enumerate(reports):
        if answer is None:
            what = f"neither it nor its supervisor answers; {_others(found, but=rank)}"
            fix = f"look at its machine and the network; then {_RESUMES}"
            return Verdict("silent", rank, f"rank {rank}", what.removesuffix("; "), fix)
    busy = [report for report in found if not report.waits]
    if busy:
        return _busy(min(busy, key=lambda report: (_last(report), -report.seconds)), found)
    return _all_wait(found)


def _gone(report: Report, found: Sequence[Report]) -> Verdict:
    what = f"has ended {report.when} ({report.site})"
    fix = f"see what it said last; then {_RESUMES}"
    return Verdict("gone", report.rank, report.name, _joined(what, _others(found, but=report.rank)), fix)


def _stopped(report: Report, found: Sequence[Report]) -> Verdict:
    how = "stopped by a signal (SIGSTOP)" if report.state == "T" else "held by a debugger"
    what = f"{how} for {report.seconds:.0f} s {report.when} ({place(report)})"
    return Verdict(
        *("stopped", report.rank, report.name, _joined(what, _others(found, but=report.rank))),
        fix=f"find out who stops it (Ctrl-Z, a suspended job); {_RESUMES}",
        meanwhile=f"kill -CONT {report.pid} lets it go on" if report.state == "T" else "",
    )


def _busy(report: Report, found: Sequence[Report]) -> Verdict:
    deaf = " and deaf, waiting for a disk or network file system," if report.state == "D" else ""
    what = f"no progress for {report.seconds:.0f} s{deaf} {report.when} ({place(report)})"
    look = {
        "meet": "see whether all ranks were started and reach MASTER_ADDR:MASTER_PORT",
        "data": "look at that line and at the disk or network that the data come from",
        "record": "look at the disk of the run directory, and at the terminal or pipe that reads the output",
        "save": "look at the disk of the run directory",
    }.get(report.phase, "look at that line")
    fix = f"{look}, or allow more time (guard.hang_seconds, guard.start_seconds); {_RESUMES}"
    return Verdict("busy", report.rank, report.name, _joined(what, _others(found, but=report.rank)), fix)


def _divided(found: Sequence[Report]) -> tuple[int, dict[tuple[Any, ...], list[int]]] | None:
    """The first collective, by number, that is not the same on all ranks: who has called what instead."""
    calls = [{call.number: call for call in report.collectives} for report in found]
    if not all(calls):
        return None
    for number in range(max(min(rank) for rank in calls), min(max(rank) for rank in calls) + 1):
        groups: dict[tuple[Any, ...], list[int]] = {}
        for index, rank in enumerate(calls):
            groups.setdefault(_key(rank[number]), []).append(index)
        if len(groups) > 1:
            return number, groups
    return None


def _key(call: Collective) -> tuple[Any, ...]:
    return call.entered, *_way(call)


def _way(call: Collective) -> tuple[Any, ...]:
    """What is the same on all ranks. Not the line: a rank may call by way of a wrapper of its own."""
    return call.name, call.group, call.elements if call.name in _EVEN else 0


def _strayed(found: Sequence[Report], number: int, groups: dict[tuple[Any, ...], list[int]]) -> Verdict:
    """Which of the groups has left the program that the others follow, at the collective of this number."""
    odd = _odd(found, number, groups)
    if odd is None:
        sides = [
            f"rank {found[members[0]].rank} {_call(found[members[0]], number)}" for members in groups.values()
        ]
        return Verdict(
            *(
                "differ",
                found[next(iter(groups.values()))[0]].rank,
                "ranks",
                _joined(*sides, by=" but "),
                _SAME_WAY,
            )
        )
    stray = found[groups[odd][0]]
    usual = next(found[members[0]] for key, members in groups.items() if key != odd)
    missed, own = _numbered(usual, number), _numbered(stray, number)
    if own.entered < missed.entered:
        what = f"waits in {own.shown} {when(own.phase, own.step)}, which the other ranks do not call"
        kind: Kind = "extra"
    else:
        what = f"has left out {missed.shown} {when(missed.phase, missed.step)}"
        kind = "skipped"
    return Verdict(
        kind, stray.rank, stray.name, _joined(what, _others(found, but=stray.rank), _now(stray)), _SAME_WAY
    )


_SAME_WAY = f"all ranks must call the same collectives in the same order: look at that line; {_RESUMES}"


def _odd(
    found: Sequence[Report], number: int, groups: dict[tuple[Any, ...], list[int]]
) -> tuple[Any, ...] | None:
    """The group that is wrong: the smaller one; of equal ones that which is ahead, or does not as before."""
    sizes = sorted(groups.values(), key=len)
    if len(sizes[-1]) > len(sizes[-2]):
        return next(key for key, members in groups.items() if members is sizes[0])
    ahead = max(groups, key=lambda key: key[0])
    if any(key[0] < ahead[0] for key in groups):
        return ahead
    wrong = [key for key, members in groups.items() if not _as_before(found[members[0]], number)]
    return wrong[0] if len(wrong) == len(groups) - 1 else None


def _as_before(report: Report, number: int, context: int = 3) -> bool:
    """Whether a rank calls what it called the last time after the same collectives."""
    ways = [_way(call) for call in report.collectives if call.number <= number]
    now = ways.pop()
    for length in range(context, 0, -1):
        for start in range(len(ways) - length - 1, -1, -1):
            if ways[start : start + length] == ways[-length:]:
                return ways[start + length] == now
    return False


def _all_wait(found: Sequence[Report]) -> Verdict:
    """All ranks have called the same, and all are in it, or some have come through."""
    first, last = (pick(found, key=_last) for pick in (min, max))
    fix = (
        "look at the network between the machines (NCCL_DEBUG=INFO shows NCCL's part, NCCL_SOCKET_IFNAME and "
        f"GLOO_SOCKET_IFNAME choose the interface); {_RESUMES}"
    )
    if _last(first) < _last(last):
        what = f"still waits in {_shown(first.waits_in)} {first.when}, which others have come through"
        return Verdict(*("late", first.rank, first.name, _joined(what, _others(found, but=first.rank)), fix))
    seconds = min(report.seconds for report in found)
    what = f"wait in {_shown(first.waits_in)} {first.when} for {seconds:.0f} s, none is missing"
    return Verdict("network", None, f"all {len(found)} ranks", what, fix)


def place(report: Report) -> str:
    """file:line and function that the rank stands in; where its phase began if no stack is known."""
    frames = _standing(report)
    ours = next((frame for frame in frames if frame.ours), None)
    if ours is None:
        return f"{frames[0].place}, in {frames[0].function}" if frames else f"since {report.site}"
    inside = frames[0] if frames[0].file.startswith(("torch/", "deepspeed/")) else None
    within = f", within it {inside.place}" if inside is not None else ""
    return f"{ours.place}, in {ours.function}{within}"


def _standing(report: Report) -> tuple[Frame, ...]:
    """The stack of who works: the main thread, the thread that it waits for, or that thread's process."""
    if not report.threads:
        return ()
    main, *rest = report.threads
    if not _hands_over(main):
        return main
    working = [thread for thread in rest if any(frame.ours for frame in thread)]
    thread = next((thread for thread in working if not _hands_over(thread)), main)
    if thread[0].file != "multiprocessing/connection.py":
        return thread
    return next((worker for worker in report.workers if _works(worker)), thread)


def _hands_over(frames: Sequence[Frame]) -> bool:
    """Whether this thread waits for another one."""
    return frames[0].file in ("threading.py", "queue.py", "concurrent/futures/_base.py")


def _works(frames: Sequence[Frame]) -> bool:
    """Whether a worker process has something to do, and is not between two requests."""
    return any(frame.ours and frame.function != "_serve" for frame in frames) and (
        frames[0].file != "multiprocessing/connection.py"
    )


def _others(found: Sequence[Report], but: int | None) -> str:
    """What the other ranks wait for."""
    others = [report for report in found if report.rank != but]
    if not others:
        return ""
    waits = Counter(_shown(report.waits_in) for report in others if report.waits)
    if not waits:  # on a GPU collectives return at once; what waits is the next look at a result
        waits = Counter(f"{report.phase} ({place(report)})" for report in others)
    where = waits.most_common(1)[0][0]
    return (
        f"rank {others[0].rank} waits in {where}" if len(others) == 1 else f"the other ranks wait in {where}"
    )


def _now(report: Report) -> str:
    return f"it is in {report.waits_in.shown}" if report.waits_in is not None else f"it is at {place(report)}"


def _call(report: Report, number: int) -> str:
    return f"calls {_numbered(report, number).shown}"


def _numbered(report: Report, number: int) -> Collective:
    return next(call for call in report.collectives if call.number == number)


def _shown(call: Collective | None) -> str:
    if call is None:
        return "a collective"
    return call.shown


def _last(report: Report) -> int:
    return report.collectives[-1].number if report.collectives else 0


def _joined(*parts: str, by: str = "; ") -> str:
    return by.join(part for part in parts if part)
