"""Who stopped a job: a small model of the loop, run on 2, 4 and 8 ranks until it stands still, diagnosed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest

from bigtfm.resilience.diagnosis import Report, diagnose
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
        ops += [Op("enter", "step", 116), NORM, Op("sync", "item", 122), LOSS, Op("enter", "record", 128)]
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
    "step": (Op("enter", "step", 116), 7),
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
