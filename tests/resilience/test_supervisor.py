"""The supervisor over trainers that only count (tests/toy_rank.py): who is told and ended, what is said."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import toy_rank
from chaos import processes

from bigtfm.resilience.hub import Hub
from bigtfm.resilience.lines import Lines
from bigtfm.resilience.outcome import Outcome, verdict
from bigtfm.resilience.signals import Arrivals

RESUMES = "start the same command again: it resumes"
FROM_THERE = "start the same command again: it goes on from there"


class Job:
    """Toy ranks of one job, started by hand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ranks: list[subprocess.Popen[bytes]] = []

    def start(self, way: str, ranks: int = 1, world_size: int | None = None, out: str = "out-{rank}") -> Job:
        for rank in range(ranks):
            launcher = {"RANK": str(rank), "WORLD_SIZE": str(world_size or ranks), "LOCAL_RANK": str(rank)}
            environ = os.environ | launcher | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
            with (self.folder / out.format(rank=rank)).open("wb") as output:
                self.ranks.append(
                    subprocess.Popen(
                        [sys.executable, toy_rank.__file__, way],
                        **{"cwd": self.folder, "env": environ, "stdout": output, "stderr": output},
                        **{"start_new_session": True, "stdin": subprocess.DEVNULL},
                    )
                )
        return self

    def pids(self, rank: int) -> tuple[int, int]:
        """Of the supervisor and of the trainer."""
        path = self.folder / f"pids-{rank}"
        wait_for(path.exists)
        supervisor, trainer = map(int, path.read_text().split())
        return supervisor, trainer

    def until(self, step: int) -> Job:
        for rank in range(len(self.ranks)):
            path = self.folder / f"steps-{rank}"
            wait_for(lambda path=path: path.exists() and int(path.read_text()) >= step)
        return self

    def end(self, seconds: float = 10) -> tuple[list[int], list[str]]:
        """Exit codes and the lines of all, once no process is left."""
        pids = [pid for rank in range(len(self.ranks)) for pid in self.pids(rank)]
        codes = [rank.wait(seconds) for rank in self.ranks]
        wait_for(lambda: not any(lives(pid) for pid in pids), 1)
        said = [(self.folder / f"out-{rank}").read_text() for rank in range(len(self.ranks))]
        return codes, [line for text in said for line in text.splitlines()]


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_for(condition: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.005)


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    made = Job(tmp_path)
    yield made
    for rank in made.ranks:
        rank.kill()
        rank.wait()


def test_it_sleeps_while_a_trainer_takes_its_time_to_leave(job: Job) -> None:
    codes, [line] = job.start("slow-exit").end()
    assert codes == [0]
    assert int(line.removeprefix("turns ")) < 1000, "some twenty in those two seconds"


# --- how it ended


ENDS = {
    "disk": (74, "bigtfm: error: disk: is full. Fix: free space"),
    "exit": (
        79,
        "bigtfm: error: rank {}: left with exit code 0 in forward at step 5 (LINE). Fix: look for what calls "
        f"exit() there, then {RESUMES}",
    ),
    "segfault": (
        79,
        "bigtfm: error: rank {}: was killed by signal 11 (SIGSEGV) in forward at step 5 (LINE). Fix: a "
        "native library did wrong: see the "
        f"lines above, undo what was installed last, then {RESUMES}",
    ),
}


@pytest.mark.parametrize(("way", "ranks"), [("disk", 1), ("exit", 1), ("segfault", 2)])
def test_one_line_says_how_it_ended(way: str, ranks: int, job: Job) -> None:
    code, line = ENDS[way]
    codes, said = job.start(way, ranks).end()
    assert codes == [code] * ranks
    assert [re.sub(r"\(\S*toy_rank.py:\d+\)", "(LINE)", text) for text in said] == [line.format(ranks - 1)]
    failure = json.loads((job.folder / "run/failure.json").read_text())
    assert failure["exit_code"] == code
    assert said[0] == "bigtfm: error: {where}: {what}. Fix: {fix}".format(**failure)


def test_a_cause_goes_before_the_loss_of_a_peer(job: Job) -> None:
    """Rank 0 says first that it has lost rank 1, which says only later why."""
    codes, said = job.start("lost-peer", 2).end()
    assert (codes, said) == ([74, 74], ["bigtfm: error: disk: is full. Fix: free space"])


def test_what_is_not_understood_is_a_traceback(job: Job) -> None:
    codes, said = job.start("crash", 2).end()
    assert codes == [1, 1]
    assert said[-1] == "ZeroDivisionError: by zero"
    assert [line for line in said if line.startswith("bigtfm: ")] == []
    assert json.loads((job.folder / "run/failure.json").read_text())["what"] == "ZeroDivisionError: by zero"


def test_done_is_zero_and_silent(job: Job) -> None:
    assert job.start("done", 2).end() == ([0, 0], [])


def test_a_restart_starts_all_again_with_what_changes(job: Job) -> None:
    codes, said = job.start("restart", 2).end()
    assert (codes, said) == ([0, 0], ["restarted with {'attempt': 1}"] * 2)


# --- signals


@pytest.mark.parametrize(
    ("number", "to"),
    [
        (signal.SIGTERM, "supervisor"),
        (signal.SIGINT, "both"),
        (signal.SIGUSR1, "trainer"),
        (signal.SIGUSR2, "supervisor"),
        (signal.SIGHUP, "trainer"),
    ],
)
def test_a_signal_is_one_request_whoever_gets_it(number: int, to: str, job: Job) -> None:
    job.start("count").until(3)
    for pid in {"supervisor": job.pids(0)[:1], "trainer": job.pids(0)[1:], "both": job.pids(0)}[to]:
        os.kill(pid, number)
    codes, [line] = job.end()
    code, why = (130, "Ctrl-C") if number == signal.SIGINT else (75, "a signal")
    assert codes == [code]
    step = (job.folder / "steps-0").read_text()
    assert line == f"bigtfm: error: run: saved at step {step} and stopped by {why}. Fix: {FROM_THERE}"


def test_an_output_that_takes_nothing_changes_no_exit_code(job: Job) -> None:
    job.start("count", out="/dev/full").until(3)
    os.kill(job.pids(0)[0], signal.SIGTERM)
    assert job.ranks[0].wait(10) == 75


def test_a_second_interrupt_leaves_at_once(job: Job) -> None:
    """The trainer does not react; the terminal sends each Ctrl-C to both."""
    job.start("deaf").until(3)
    os.killpg(job.ranks[0].pid, signal.SIGINT)
    time.sleep(0.5)
    assert lives(job.pids(0)[1]), "one Ctrl-C reaches two processes, and is one"
    os.killpg(job.ranks[0].pid, signal.SIGINT)
    codes, [line] = job.end(2)
    assert codes == [130]
    assert line == (
        "bigtfm: error: run: stopped at once by a second Ctrl-C, without saving. Fix: start the same command "
        "again: it goes on from the last checkpoint"
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_before_the_first_step_nothing_is_waited_for(number: int, job: Job) -> None:
    job.start("silent-start", 1, world_size=2)
    os.kill(job.pids(0)[0], number)
    codes, [line] = job.end(2)
    assert codes == [130 if number == signal.SIGINT else 75]
    assert line == (
        "bigtfm: error: run: stopped before a step was done: there was nothing to save. Fix: start it again"
    )


# --- kills


def test_a_trainer_goes_with_its_supervisor_and_the_others_are_told(job: Job) -> None:
    job.start("count", 3).until(3)
    os.kill(job.pids(0)[0], signal.SIGKILL)
    codes, said = job.end()
    assert codes == [-9, 79, 79]
    [line] = said
    assert line.startswith(
        "bigtfm: error: rank 0: is gone: its processes were killed, or its machine failed."
    )


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A supervisor is lost after two seconds without a word."""
    monkeypatch.setenv("TOY_SILENT", "2")


@pytest.mark.usefixtures("impatient")
def test_a_stopped_supervisor_is_a_lost_rank(job: Job) -> None:
    """It can't end itself or its trainer: who notices does."""
    job.start("count", 2).until(3)
    os.kill(job.pids(1)[0], signal.SIGSTOP)
    codes, said = job.end()
    assert codes == [79, -9]
    assert len(said) == 1
    assert said[0].startswith("bigtfm: error: rank 1: is gone")


@pytest.mark.usefixtures("impatient")
def test_a_job_that_was_stopped_as_a_whole_goes_on(job: Job) -> None:
    """Ctrl-Z and fg: that nobody was heard of meanwhile says nothing."""
    job.start("count", 2).until(3)
    pids = [pid for rank in (0, 1) for pid in job.pids(rank)]
    processes.kill(pids, signal.SIGSTOP)
    time.sleep(3)
    before = (job.folder / "steps-0").read_text()
    processes.kill(pids, signal.SIGCONT)
    job.until(int(before) + 60)
    assert all(rank.poll() is None for rank in job.ranks)


# --- parts


def test_who_does_not_know_the_token_is_not_listened_to() -> None:
    hub = Hub("127.0.0.1")
    address, port, token = hub.address
    for hello in (
        {"token": "0" * 32, "rank": 1, "pid": 1},
        {"rank": 1, "pid": 1},
        {"token": token, "rank": "1"},
        {"token": "\ud800", "rank": 1, "pid": 1},
    ):
        stranger = Lines(socket.create_connection((address, port)))
        stranger.send(**hello)
        stranger.send(outcome=Outcome(74, "a lie").__dict__)
        while not stranger.closed:
            assert hub.read() == []
            stranger.read()
        assert hub.peers == []
        stranger.connection.close()
    friend = Lines(socket.create_connection((address, port)))
    friend.send(token=token, rank=1, pid=1, host="x")
    friend.send(outcome={"code": 0})
    heard: list[object] = []
    wait_for(lambda: heard.extend(hub.read()) or heard)
    assert heard == [(1, {"outcome": {"code": 0}})]
    friend.connection.close()
    hub.close()


def test_a_crowd_of_strangers_keeps_nobody_out() -> None:
    """Silent connections, more than are kept, before the rank and behind it."""
    hub = Hub("127.0.0.1")
    address, port, token = hub.address
    crowd = [socket.create_connection((address, port)) for _ in range(70)]
    hub.read()
    friend = Lines(socket.create_connection((address, port)))
    friend.send(token=token, rank=1, pid=1, host="x")
    friend.send(outcome={"code": 0})
    crowd += [socket.create_connection((address, port)) for _ in range(70)]
    heard: list[object] = []
    wait_for(lambda: heard.extend(hub.read()) or heard)
    assert heard == [(1, {"outcome": {"code": 0}})]
    for connection in (*crowd, friend.connection):
        connection.close()
    hub.close()


@pytest.mark.parametrize("rubbish", [b"[1]\n", b"\x80\x04}.\n", b"[" * 100_000 + b"\n", b"x" * 5_000_000])
def test_rubbish_closes_the_line(rubbish: bytes) -> None:
    ours, theirs = socket.socketpair()
    lines = Lines(ours)
    theirs.setblocking(False)
    sent = 0
    while not lines.closed and sent < len(rubbish):
        try:
            sent += theirs.send(rubbish[sent:])
        except (BlockingIOError, BrokenPipeError):
            pass
        lines.read()
    lines.read()
    assert lines.closed
    ours.close()
    theirs.close()


def test_the_verdict() -> None:
    lost, cause = Outcome(79, "lost", cause=False), Outcome(74, "full")
    assert verdict({1: lost, 0: Outcome(0), 2: cause}) == (2, cause)
    assert verdict({2: cause, 0: Outcome(70, "nan")}) == (2, cause), "the first to come"
    assert verdict({2: cause, 1: cause}) == (1, cause), "the first rank of those that say the same"
    assert verdict({1: lost, 0: lost}) == (0, lost)


def test_arrivals_count_a_signal_once_for_all_that_received_it() -> None:
    arrivals = Arrivals()
    for receiver in ("supervisor", "trainer", "supervisor"):
        arrivals.add(receiver, signal.SIGINT)
    arrivals.add("trainer", signal.SIGCHLD)
    assert (arrivals.count(signal.SIGINT), arrivals.asked) == (2, signal.SIGINT)
