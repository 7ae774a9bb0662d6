"""A rank without torch: the real supervisor over a trainer that only counts steps. `python toy_rank.py WAY`.

It meets the other ranks through a file, and writes who it is to pids-RANK and its steps to steps-RANK.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bigtfm.config.launch import Launch
from bigtfm.config.problems import Hang, StorageProblem
from bigtfm.config.sections import GuardSection
from bigtfm.resilience import hub
from bigtfm.resilience.lifeline import Lifeline, Restart
from bigtfm.resilience.signals import stopped
from bigtfm.resilience.supervisor import Supervisor, supervise

RUN = Path("run")


def write(path: Path, text: str) -> None:
    path.with_suffix(".tmp").write_text(text)
    path.with_suffix(".tmp").rename(path)


def wait_for(condition: Callable[[], Any]) -> None:
    while not condition():
        time.sleep(0.005)


def trainer(way: str, launch: Launch, lifeline: Lifeline, changes: dict[str, Any]) -> None:
    write(Path(f"pids-{launch.rank}"), f"{os.getppid()} {os.getpid()}")
    if way == "silent-start":
        signal.pause()
    meeting = Path(f"meeting-{changes.get('attempt', 0)}")
    if launch.world_size > 1:
        lifeline.meet(lambda address: from_first(launch, meeting, address))
    step = 0
    with lifeline.heeded():
        while step < 1000:
            step += 1
            assert lifeline.pulse is not None
            lifeline.pulse.enter("forward", step=step)
            write(Path(f"steps-{launch.rank}"), str(step))
            time.sleep(0.02)
            if step == 5 and launch.rank == launch.world_size - 1 and not changes:
                misbehave(way)
            if way == "lost-peer" and step >= 5 and launch.rank == 0:
                raise Hang("another rank has ended: connection closed", where="communication", fix="see it")
            if way == "done" and step == 10:
                return
            if way == "slow-exit" and step == 10:
                lifeline.report(None)
                assert lifeline._lines is not None
                lifeline._lines.connection.close()  # as the interpreter's end does, which may take its time
                time.sleep(2)
                return
            if changes and step == 10:
                print("restarted with", changes)
                return
            if way == "deaf":
                step = max(1, step % 100)
            elif lifeline.stop.signal:
                _, interrupted, orphaned = lifeline.stop.flags
                raise stopped(step, RUN, interrupted, orphaned)
            lifeline.stepped()


def from_first(launch: Launch, meeting: Path, value: Any) -> Any:
    import json

    if launch.rank == 0:
        write(meeting, json.dumps(value))
    wait_for(meeting.exists)
    return json.loads(meeting.read_text())


def misbehave(way: str) -> None:
    if way in ("lost-peer", "disk"):
        time.sleep(0.3 if way == "lost-peer" else 0)
        raise StorageProblem("is full", where="disk", fix="free space")
    if way == "crash":
        raise ZeroDivisionError("by zero")
    if way == "exit":
        os._exit(0)
    if way == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if way == "restart":
        raise Restart(attempt=1)


def count_turns() -> None:
    """The supervisor says in the end how often it has looked around."""
    turns, listen, supervisor = [0], Supervisor._listen, os.getpid()

    def counted(self: Supervisor) -> None:
        turns[0] += 1
        listen(self)

    Supervisor._listen = counted  # type: ignore[method-assign]
    atexit.register(lambda: print("turns", turns[0]) if os.getpid() == supervisor else None)


def main() -> int:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may have been started by nohup
    RUN.mkdir(exist_ok=True)
    if sys.argv[-1] == "slow-exit":
        count_turns()
    hub.SILENT = float(os.environ.get("TOY_SILENT", hub.SILENT))
    launch = Launch.from_environment(os.environ)
    way = sys.argv[-1]
    return supervise(launch, RUN, GuardSection(), lambda *args: trainer(way, launch, *args))


if __name__ == "__main__":
    sys.exit(main())
