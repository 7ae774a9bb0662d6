"""Who stopped a job: a small model of the loop, run on 2, 4 and 8 ranks until it stands still, diagnosed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest

from bigtfm.resilience.diagnosis import Report, diagnose, place
from bigtfm.resilience.pulse import Collective
from bigtfm.resilience.stacks import Frame


@dataclass(frozen=True)
class Op:
    """What a rank does next: begin a phase, call a collective, or wait for what it has begun on a GPU."""

    kind: str  # enter, call, sync
    name: str  # of the phase or the collective
    line: int = 0  # of train.py
    group: str = ""
    elements: int = 0


SUM = Op("call", "all_reduce", 88, "1", 3)  # over gloo, also on a GPU
REDUCE = Op("call", "all_reduce", 111, "0", 49312)  # DeepSpeed's, of gradients
NORM = Op("call", "all_reduce", 116, "0", 1)
LOSS = Op("call", "all_reduce", 123, "1", 1)
EVALUATED = Op("call", "all_reduce", 131, "1", 2)
PROBE = Op("call", "broadcast_object_list", 140, "1")  # its source does not wait
ACCUMULATION = 2


def program(steps: int = 8) -> list[Op]:
    """The loop of train.py: every third step evaluates and saves."""
    ops = [Op("enter", "build"), Op("call", "all_gather_object", 60, "1"), Op("enter", "resume")]
    for step in range(1, steps + 1):
        ops += [Op("enter", "data"), SUM]
        for _ in range(ACCUMULATION):
            ops += [Op("enter", "forward", 100), Op("enter", "backward", 111), REDUCE]
        ops += [Op("enter", "update", 116), NORM, Op("sync", "item", 122), LOSS, Op("enter", "record", 128)]
        if step % 3 == 0:
            ops += [Op("enter", "evaluate", 131), EVALUATED, Op("enter", "save", 140), PROBE]
    return ops


def index_of(op: Op, step: int, turn: int = 0) -> int:
    """The place in the program of the turn-th such operation of a step."""
    ops, seen, current = program(), 0, 0
    for index, candidate in enumerate(ops):
        current += candidate == Op("enter", "data")
        if current == step and candidate == op:
            if seen == turn:
                return index
            seen += 1
    raise AssertionError((op, step))


def stand_still(
    programs: Sequence[Sequence[Op]], *, gpu: bool = False, stopped: int = -1, at: int = 0
) -> Any:
    """Runs the programs until no rank can go on; `stopped` does not go on from place `at`.

    Collectives of a group meet by their order in it. On a GPU those of group 0 are NCCL's: they return at
    once, and meet whatever they are; gloo's meet only what is the same.
    """
    world = len(programs)
    made: list[dict[str, list[Op]]] = [{"": [], "0": [], "1": []} for _ in range(world)]
    states = [_Rank() for _ in range(world)]

    def met(rank: int, group: str) -> bool:
        number = len(made[rank][group])
        if not all(len(others[group]) >= number for others in made):
            return False
        same = {(o[group][number - 1].name, o[group][number - 1].elements) for o in made if number}
        return not number or (gpu and group == "0") or len(same) == 1

    moved = True
    while moved:
        moved = False
        for rank, state in enumerate(states):
            if state.at == len(programs[rank]) or (rank == stopped and state.at == at):
                continue
            op = programs[rank][state.at]
            if op.kind == "enter":
                state.entered, state.phase, state.line = state.entered + 1, op.name, op.line
                state.step += op.name == "data"
            elif op.kind == "call":
                if not state.waits:
                    made[rank][op.group].append(op)
                    number = len(state.calls) + 1
                    line = f"bigtfm/train.py:{op.line}"
                    now = (number, state.entered, state.step, op.elements, state.phase)
                    state.calls.append(Collective(*now, op.name, op.group, line, ""))
                    state.waits = moved = True
                at_once = (gpu and op.group == "0") or (op.name.startswith("broadcast") and rank == 0)
                if not (at_once or met(rank, op.group)):
                    continue
                state.waits = False
            elif gpu and not met(rank, "0"):
                continue
            state.at, moved = state.at + 1, True
    return [_report(rank, state) for rank, state in enumerate(states)]


@dataclass
class _Rank:
    at: int = 0
    entered: int = 0
    phase: str = "start"
    line: int = 0
    step: int = 0
    waits: bool = False

    def __post_init__(self) -> None:
        self.calls: list[Collective] = []


def _report(rank: int, state: _Rank) -> Report:
    line = int(state.calls[-1].site.rpartition(":")[2]) if state.waits else state.line
    main = (Frame("bigtfm/train.py", line, "train", True), Frame("bigtfm/cli.py", 137, "train", True))
    return Report(
        *(
            rank,
            f"n{rank // 4 + 1}",
            4711 + rank,
            "S",
            state.step,
            state.phase,
            f"bigtfm/train.py:{state.line}",
        ),
        seconds=12.0,
        waits=state.waits,
        collectives=tuple(state.calls[-512:]),
        waits_in=state.calls[-1] if state.waits else None,
        threads=(main,),
        workers=(),
        text="",
    )


def without(index: int) -> list[Op]:
    ops = program()
    return ops[:index] + ops[index + 1 :]


def with_another(index: int, op: Op) -> list[Op]:
    ops = program()
    return [*ops[:index], op, *ops[index:]]


WORLDS = [(2, 0), (2, 1), (4, 0), (4, 2), (8, 7)]  # ranks, the one with the fault
CALLS = {
    "labels": (SUM, 7, 0),
    "reduction": (REDUCE, 7, 0),
    "reduction of the last micro-batch": (REDUCE, 7, 1),
    "norm": (NORM, 7, 0),
    "loss": (LOSS, 7, 0),
    "evaluation": (EVALUATED, 6, 0),
    "probe": (PROBE, 6, 0),
    "labels of the first step": (SUM, 1, 0),
}


@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("world", "victim"), WORLDS)
def test_a_rank_that_leaves_out_a_collective(world: int, victim: int, call: str, gpu: bool) -> None:
    op, step, turn = CALLS[call]
    programs = [program()] * world
    programs[victim] = without(index_of(op, step, turn))
    verdict = diagnose(stand_still(programs, gpu=gpu))
    assert (verdict.kind, verdict.rank) == ("skipped", victim), verdict
    assert f"has left out {op.name} (bigtfm/train.py:{op.line})" in verdict.what
    assert f"at step {step}" in verdict.what


@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize(("world", "victim"), [(4, 0), (4, 2), (8, 7)])
def test_a_rank_that_calls_a_collective_of_its_own(world: int, victim: int, gpu: bool) -> None:
    own = Op("call", "barrier", 99, "1")
    programs = [program()] * world
    programs[victim] = with_another(index_of(Op("enter", "forward", 100), 7), own)
    verdict = diagnose(stand_still(programs, gpu=gpu))
    assert (verdict.kind, verdict.rank) == ("extra", victim), verdict
    assert "barrier (bigtfm/train.py:99)" in verdict.what


PHASES = {
    "data": (Op("enter", "data"), 7),
    "forward": (Op("enter", "forward", 100), 7),
    "backward": (Op("enter", "backward", 111), 7),
    "update": (Op("enter", "update", 116), 7),
    "record": (Op("enter", "record", 128), 7),
    "evaluate": (Op("enter", "evaluate", 131), 6),
    "save": (Op("enter", "save", 140), 6),
}


@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(("world", "victim"), WORLDS)
def test_a_rank_that_is_busy(world: int, victim: int, phase: str, gpu: bool) -> None:
    op, step = PHASES[phase]
    reports = stand_still([program()] * world, gpu=gpu, stopped=victim, at=index_of(op, step) + 1)
    if phase == "save" and victim:
        reports = [replace(r, waits=False, waits_in=None) if r.rank == victim else r for r in reports]
    verdict = diagnose(reports)
    assert (verdict.kind, verdict.rank) == ("busy", victim), verdict
    assert (
        f"no progress for 12 s in {phase} at step {step} (bigtfm/train.py:{op.line}, in train)"
        in verdict.what
    )
    assert verdict.where == f"rank {victim} (host n{victim // 4 + 1}, pid {4711 + victim})"


@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize(("world", "victim"), WORLDS)
def test_a_rank_that_is_stopped_goes_before_those_who_are_busy(world: int, victim: int, gpu: bool) -> None:
    """It may be stopped in a collective, and the others stand somewhere before they notice."""
    reports = stand_still([program()] * world, gpu=gpu, stopped=victim, at=index_of(NORM, 7) + 1)
    reports[victim] = replace(reports[victim], state="T")
    verdict = diagnose(reports)
    assert (verdict.kind, verdict.rank) == ("stopped", victim)
    assert verdict.what.startswith(
        "stopped by a signal (SIGSTOP) for 12 s in update at step 7 (bigtfm/train.py:"
    )


def test_lines_word_for_word() -> None:
    busy = stand_still([program()] * 2, stopped=1, at=index_of(Op("enter", "data"), 7) + 1)
    assert diagnose(busy).what == (
        "no progress for 12 s in data at step 7 (bigtfm/train.py:0, in train); rank 0 waits in all_reduce "
        "(bigtfm/train.py:88)"
    )
    early = stand_still([program()] * 2, stopped=1, at=1)
    assert diagnose(early).what == (
        "no progress for 12 s in build, before the first step (bigtfm/train.py:0, in train); rank 0 waits in "
        "all_gather_object (bigtfm/train.py:60)"
    )
    skipped = stand_still([program(), program(), without(index_of(SUM, 7))])
    assert diagnose(skipped).what == (
        "has left out all_reduce (bigtfm/train.py:88) in data at step 7; the other ranks wait in all_reduce "
        "(bigtfm/train.py:88); it is in all_reduce (bigtfm/train.py:111)"
    )
    assert diagnose(skipped).fix == (
        "all ranks must call the same collectives in the same order: look at that line; start the same "
        "command again: it resumes from the last checkpoint"
    )
    stopped = [busy[0], replace(busy[1], state="T")]
    assert diagnose(stopped).fix == (
        "find out who stops it (Ctrl-Z, a suspended job); start the same command again: it resumes from the "
        "last checkpoint"
    )
    assert diagnose(stopped).meanwhile == "kill -CONT 4712 lets it go on"
    debugged = diagnose([busy[0], replace(busy[1], state="t")])
    assert debugged.what.startswith(
        "held by a debugger for 12 s in data at step 7 (bigtfm/train.py:0, in train)"
    )
    deaf = diagnose([busy[0], replace(busy[1], state="D")])
    assert deaf.what.startswith(
        "no progress for 12 s and deaf, waiting for a disk or network file system, in data"
    )
    gone = diagnose([busy[0], replace(busy[1], state="", threads=(), site="bigtfm/train.py:85")])
    assert (gone.kind, gone.where) == ("gone", "rank 1 (host n1, pid 4712)")
    assert gone.what == (
        "has ended in data at step 7 (bigtfm/train.py:85); rank 0 waits in all_reduce (bigtfm/train.py:88)"
    )
    silent = diagnose([busy[0], None])
    assert (silent.kind, silent.where) == ("silent", "rank 1")
    assert silent.what == (
        "neither it nor its supervisor answers; rank 0 waits in all_reduce (bigtfm/train.py:88)"
    )
    alone = diagnose([replace(busy[1], rank=0)])
    assert alone.what == "no progress for 12 s in data at step 7 (bigtfm/train.py:0, in train)"


def test_a_network_that_does_not_deliver() -> None:
    """All are in the same collective: no rank is to blame."""
    ops = program()[: index_of(SUM, 7) + 1]
    reports = stand_still([ops, ops, program()[: index_of(SUM, 7)]])
    stuck = [replace(reports[0], rank=rank) for rank in range(3)]
    verdict = diagnose(stuck)
    assert (verdict.kind, verdict.rank, verdict.where) == ("network", None, "all 3 ranks")
    assert (
        verdict.what == "wait in all_reduce (bigtfm/train.py:88) in data at step 7 for 12 s, none is missing"
    )
    through = replace(
        stuck[0], collectives=(*stuck[0].collectives, replace(stuck[0].collectives[-1], number=99))
    )
    verdict = diagnose([through, stuck[1], through])
    assert (verdict.kind, verdict.rank) == ("late", 1)


def test_a_rank_may_call_by_way_of_another_line() -> None:
    """A wrapper of its own: what it calls, and when, is the same."""
    reports = stand_still([program()] * 2, stopped=1, at=index_of(Op("enter", "forward", 100), 7) + 1)
    elsewhere = tuple(replace(call, site="my_hooks.py:3") for call in reports[1].collectives)
    assert diagnose([reports[0], replace(reports[1], collectives=elsewhere)]).kind == "busy"


def test_simple_rules_would_name_the_wrong_rank() -> None:
    """The controls: who has called least, who is alone, who is in the earliest phase."""
    reports = stand_still([program(), without(index_of(SUM, 7))])
    assert diagnose(reports).rank == 1
    assert len(reports[0].collectives) == len(reports[1].collectives)  # not who has called least
    assert min(reports, key=lambda report: report.collectives[-1].entered).rank == 0  # not the one behind
    reports = stand_still([program(), without(index_of(REDUCE, 7, 1))], gpu=True)
    assert diagnose(reports).rank == 1
    assert [report.rank for report in reports if not report.waits] == [0]  # not who looks busy


# --- the line that a rank stands in


def frames(*rows: tuple[str, str]) -> tuple[Frame, ...]:
    return tuple(Frame(file, 10 + n, name, file.startswith("bigtfm/")) for n, (file, name) in enumerate(rows))


LOOP = ("bigtfm/train.py", "train")
RESULT = [("threading.py", "wait"), ("concurrent/futures/_base.py", "result")]
MAIN_READS = frames(*RESULT, ("bigtfm/data/prefetch.py", "step"), LOOP)
ASKS = frames(("multiprocessing/connection.py", "recv"), ("bigtfm/data/prefetch.py", "_ask"))
IDLE = frames(("concurrent/futures/thread.py", "_worker"), ("threading.py", "run"))
IDLE_WORKER = frames(("multiprocessing/connection.py", "_recv"), ("bigtfm/data/prefetch.py", "_serve"))
BUSY_WORKER = frames(("bigtfm/data/indexed.py", "read"), ("bigtfm/data/prefetch.py", "_serve"))


@pytest.mark.parametrize(
    ("threads", "workers", "line"),
    [
        ((frames(LOOP),), (), "bigtfm/train.py:10, in train"),
        ((frames(("numpy/core.py", "dot"), LOOP),), (), "bigtfm/train.py:11, in train"),
        (
            (frames(("torch/nn/linear.py", "forward"), ("bigtfm/model/layers.py", "forward"), LOOP),),
            (),
            "bigtfm/model/layers.py:11, in forward, within it torch/nn/linear.py:10",
        ),
        # reading ahead, in a thread and in a process of its own
        (
            (MAIN_READS, IDLE, frames(("bigtfm/data/indexed.py", "read"))),
            (),
            "bigtfm/data/indexed.py:10, in read",
        ),
        ((MAIN_READS, ASKS), (IDLE_WORKER, BUSY_WORKER), "bigtfm/data/indexed.py:10, in read"),
        ((MAIN_READS, ASKS), (IDLE_WORKER,), "bigtfm/data/prefetch.py:11, in _ask"),
        ((MAIN_READS, IDLE), (), "bigtfm/data/prefetch.py:12, in step"),
        # a save that waits for its writer
        (
            (
                frames(*RESULT, ("bigtfm/engine/saver.py", "wait"), LOOP),
                IDLE,
                frames(("bigtfm/engine/saver.py", "_write_shard")),
            ),
            (),
            "bigtfm/engine/saver.py:10, in _write_shard",
        ),
        # no stack: a system without memfd, or a debugger
        ((), (), "since bigtfm/train.py:85"),
        ((frames(("threading.py", "wait")),), (), "threading.py:10, in wait"),
    ],
)
def test_the_line_is_that_of_who_works(threads: Any, workers: Any, line: str) -> None:
    report = stand_still([program()], stopped=0, at=5)[0]
    assert place(replace(report, threads=threads, workers=workers, site="bigtfm/train.py:85")) == line
