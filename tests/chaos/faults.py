"""The table of faults: each met by bigtfm and by raw DeepSpeed, and told in the words of what was seen."""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import shutil
import signal
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from chaos import job, processes
from chaos.sides import Ended, Options, Side

CAP = 60.0  # seconds after which nobody waits any longer for raw DeepSpeed to notice
KILLS = 40  # while saving


@dataclass(frozen=True)
class Seen:
    """well: whether it did what bigtfm promises. line: what it said of it. code: the exit codes."""

    well: bool
    what: str
    line: str = ""
    code: str = ""


@dataclass(frozen=True)
class Fault:
    """meet: has a side meet it."""

    title: str
    meet: Callable[[Side], Seen]


def _codes(ended: Ended) -> str:
    return "/".join("still running" if code is None else str(code) for code in dict.fromkeys(ended.codes))


def _line(ended: Ended) -> str:
    """bigtfm's line; else the last line that names an exception."""
    if ended.lines:
        return ended.lines[0]
    raised = re.findall(
        r"^(?:\[rank\d\]: ?)?((?:\w+\.)*\w*(?:Error|Exception)\b.*)$", ended.output, re.MULTILINE
    )
    return str(raised[-1])[:160] if raised else ""


def _whole(side: Side, options: Options) -> dict[int, str]:
    """The losses of the run that nothing happens to; trained once for each set of options."""
    folder = _root(side) / f"whole-{side.name}-{options.steps}-{options.save_every}-{options.stage}"
    whole = Side(side.name, folder)
    if whole.reached() < options.steps:
        ended = whole.run(options)
        assert ended.codes == [0, 0], ended.output[-3000:]
    return whole.losses()


def _root(side: Side) -> Path:
    return next(folder for folder in side.folder.parents if folder.name == "faults")


def _differing(side: Side, whole: Mapping[int, str]) -> int:
    return sum(whole.get(step) != loss for step, loss in side.losses().items())


def _after_a_resume(side: Side, before: int, ended: Ended, whole: Mapping[int, str]) -> Seen:
    """What a resume came to: from where it went on, and whether its losses are the uninterrupted run's."""
    line, code = _line(ended), _codes(ended)
    if any(ended.codes):
        how = "ends with a line" if ended.lines else "does not resume: a traceback"
        return Seen(bool(ended.lines), f"{how}; nothing was trained on", line, code)
    start = _went_on_from(ended)
    notes = [text for text in ended.output.splitlines() if "note: passed over" in text]
    differ = _differing(side, whole)
    what = f"goes on from step {start} of {before}"
    what += (
        ", losses equal to the bit" if not differ else f", {differ} of {len(whole)} losses differ, in silence"
    )
    if start == 0:
        what = f"starts anew at step 0 of {before}, in silence"
    return Seen(not differ and start > 0, what, notes[0] if notes else line, code)


def _went_on_from(ended: Ended) -> int:
    found = re.findall(r"(?:goes on from|resuming .* after) step (\d+)", ended.output)
    return int(found[-1]) if found else 0


# --- kills


def kill_while_saving(side: Side) -> Seen:
    """A save at every step; a rank, or both, are killed at a random moment of a step, again and again."""
    draw, reached, failed, from_zero = random.Random(7), 0, 0, 0
    options = Options(steps=400, save_every=1)
    whole = _whole(side, options)
    line = ""
    for turn in range(KILLS):
        file = side.saved / "latest"
        latest = file.stat().st_size if file.exists() else -1
        ranks = side.start(options)
        came = side.wait_for_rows(2, reached, ranks)
        time.sleep(draw.uniform(0, 0.05))
        victims = draw.choice((ranks[:1], ranks[1:], ranks))
        processes.kill([process for rank in victims for process in _of_rank(rank.pid or 0)])
        ended = side.finish(ranks, 10)
        if not came:
            failed += 1
            line = _line(ended) or ended.output.strip().rpartition("\n")[2][:200]
            _repair(side)
        elif turn and _went_on_from(ended) == 0:
            from_zero += 1
            line = f"`latest` had {latest} bytes" if side.name == "raw" else line
            _repair(side)
        reached = min(max(side.newest(), 0), options.steps - 10)
    differ = _differing(side, whole)
    resumes = f"{failed} resumes fail, {from_zero} start at step 0"
    what = f"{KILLS} kills: {resumes}, {differ} of {side.reached()} losses differ"
    return Seen(not failed and not from_zero and not differ, what, line)


def _of_rank(pid: int) -> list[int]:
    """A rank's supervisor, where it has one, and its trainer."""
    return [pid, *(process.pid for process in processes.children(pid))]


def _repair(side: Side) -> None:
    """What a user does by hand: `latest` names the newest checkpoint but the one that it named in vain."""
    named = side.saved / f"global_step{side.newest()}"
    tags = [path for path in side.saved.glob("global_step*") if path != named]
    if side.name == "raw" and tags:
        newest = max(tags, key=lambda path: int(path.name[11:]))
        (side.saved / "latest").write_text(newest.name)


def kill_one_rank(side: Side) -> Seen:
    """kill -9 of rank 1."""
    ranks = side.start(Options(steps=100_000))
    side.wait_for_step(12, ranks)
    processes.kill([process.pid for process in processes.children(ranks[1].pid or 0)] or [ranks[1].pid or 0])
    ended = side.finish(ranks, CAP)
    told = (
        "one line" if len(ended.lines) == 1 else f"{len(ended.lines)} lines" if ended.lines else "a traceback"
    )
    what = f"all gone after {ended.seconds:.1f} s, {told}"
    return Seen(len(ended.lines) == 1 and not ended.left, what, _line(ended), _codes(ended))


def _signal_to_launcher(number: int) -> Callable[[Side], Seen]:
    def meet(side: Side) -> Seen:
        launcher = side.launch(Options(steps=100_000))
        if not side.wait_for_step(12, [launcher]):
            end_output = (side.folder / "launcher.out").read_text(errors="replace")
            raise AssertionError(f"it did not start: {end_output[-2000:]}")
        at = side.reached()
        os.kill(launcher.pid, number)
        began = time.monotonic()
        left = processes.wait_until_gone(job.servers(), 20.0)
        seconds, trained = time.monotonic() - began, side.reached() - at
        output = (side.folder / "launcher.out").read_text(errors="replace")
        ended = side.finish([], 0.0)
        ended.output, ended.codes = output, [launcher.wait()]
        code = "killed" if ended.codes[0] == -9 else _codes(ended)
        if left:
            kind = "launcher is gone, " if launcher.poll() is not None else ""
            what = f"{kind}{len(left)} processes train on as orphans: {trained} more steps in 20 s"
            return Seen(False, what, _line(ended), code)
        saved = side.newest()
        what = f"all gone after {seconds:.1f} s; the last step is {'' if saved == side.reached() else 'not '}"
        what += "saved"
        return Seen(saved == side.reached(), what, _line(ended), code)

    return meet


# --- what was saved is damaged


def _damaged(damage: Callable[[Side], None]) -> Callable[[Side], Seen]:
    """Six steps, saved at 2, 4 and 6; what is saved is damaged; then on to step 10."""

    def meet(side: Side) -> Seen:
        options = Options(steps=10, save_every=2)
        whole = _whole(side, options)
        first = side.run(Options(steps=6, save_every=2))
        assert first.codes == [0, 0], first.output[-3000:]
        damage(side)
        return _after_a_resume(side, 6, side.run(options), whole)

    return meet


def _shard(side: Side) -> Path:
    """The newest checkpoint's file of rank 1's moments."""
    if side.name == "raw":
        return next((side.saved / f"global_step{side.newest()}").glob("*zero_pp_rank_1_*optim_states.pt"))
    return side.saved / f"step-{side.newest():08d}/shard-00001.safetensors"


def flip_bit(side: Side) -> None:
    content = bytearray(_shard(side).read_bytes())
    content[len(content) // 2 | 3] ^= 0x40  # of a float's exponent
    _shard(side).write_bytes(content)


def truncate_shard(side: Side) -> None:
    os.truncate(_shard(side), _shard(side).stat().st_size // 2)


def delete_shard(side: Side) -> None:
    _shard(side).unlink()


def garbage_in_latest(side: Side) -> None:
    (side.saved / "latest").write_bytes(b"\0\xff\0garbage")


def no_latest(side: Side) -> None:
    (side.saved / "latest").unlink(missing_ok=True)


class _Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def crafted_pickle(side: Side) -> Seen:
    """Files of the checkpoint are replaced by a pickle that runs code; bigtfm's manifest is signed anew."""
    options = Options(steps=10, save_every=2)
    whole = _whole(side, options)
    first = side.run(Options(steps=6, save_every=2))
    assert first.codes == [0, 0], first.output[-3000:]
    proof = side.folder / "code-has-run"
    bomb = pickle.dumps(_Bomb(proof))
    if side.name == "raw":
        folder = side.saved / f"global_step{side.newest()}"
        next(folder.glob("*model_states.pt")).write_bytes(bomb)
    else:
        import hashlib

        folder = side.saved / f"step-{side.newest():08d}"
        _shard(side).write_bytes(bomb)
        manifest = json.loads((folder / "manifest.json").read_text())
        row = {"bytes": len(bomb), "sha256": hashlib.sha256(bomb).hexdigest()}
        manifest["files"][_shard(side).name] = row
        (folder / "manifest.json").write_text(json.dumps(manifest))
    ended = side.run(options)
    if proof.exists():
        return Seen(False, "the code in it runs", _line(ended), _codes(ended))
    seen = _after_a_resume(side, 6, ended, whole)
    return Seen(seen.well, f"no code runs; {seen.what}", seen.line, seen.code)


# --- numerics


def _nan(mode: str, stage: int, bf16: bool) -> Callable[[Side], Seen]:
    """Rank 1 has NaN in one gradient, in step 6 or from it on; 12 steps are asked for, a save every 2."""

    def meet(side: Side) -> Seen:
        options = Options(steps=12, save_every=2, stage=stage, bf16=bf16)
        ended = side.run(options, f"nan-{mode}")
        finite = [float.fromhex(loss) == float.fromhex(loss) for loss in side.losses().values()]
        what = f"{len(finite)} steps logged"
        if not all(finite):
            what += f", {len(finite) - sum(finite)} with loss NaN"
        what += f", saved up to step {side.newest()}"
        well = any(ended.codes) and all(finite) and bool(ended.lines)
        return Seen(well, what, _line(ended), _codes(ended))

    return meet


# --- hangs, disks, servers


def stopped_rank(side: Side) -> Seen:
    """SIGSTOP of rank 1: who says what, and when."""
    options = Options(steps=100_000, overrides=("guard.hang_seconds=20", "guard.start_seconds=120"))
    ranks = side.start(options)
    side.wait_for_step(30, ranks)
    victim = [process.pid for process in processes.children(ranks[1].pid or 0)] or [ranks[1].pid or 0]
    processes.kill(victim[:1], signal.SIGSTOP)
    ended = side.finish(ranks, CAP)
    if ended.left:
        return Seen(False, f"silence for {CAP:.0f} s; ended by hand", _line(ended), _codes(ended))
    named = "rank 1" in " ".join(ended.lines)
    what = (
        f"all gone after {ended.seconds:.0f} s (guard.hang_seconds=20), rank 1 {'' if named else 'not '}named"
    )
    return Seen(named and len(ended.lines) == 1, what, _line(ended), _codes(ended))


def full_disk(side: Side) -> Seen:
    """Files can't grow any more while a checkpoint is written; then the disk has room again."""
    options = Options(steps=10, save_every=2)
    whole = _whole(side, options)
    first = side.run(Options(steps=4, save_every=2))
    assert first.codes == [0, 0], first.output[-3000:]
    ended = side.run(options, "small-files", seconds=CAP)
    again = _after_a_resume(side, 4, side.run(options), whole)
    how = "still running" if ended.left else f"ends after {ended.seconds:.0f} s"
    what = f"{how}; with room again it {again.what}"
    return Seen(again.well and bool(ended.lines), what, _line(ended), _codes(ended))


def dead_mlflow(side: Side) -> Seen:
    """A tracking server that refuses: what a step takes, against none at all."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    steps = 60
    began = time.monotonic()
    plain = Side(side.name, side.folder / "without").run(Options(steps=steps, save_every=1000))
    without, began = time.monotonic() - began, time.monotonic()
    tracked = Side(side.name, side.folder / "with")
    ended = tracked.run(Options(steps=steps, save_every=1000, mlflow=f"http://127.0.0.1:{port}"), seconds=CAP)
    took = time.monotonic() - began
    assert plain.codes == [0, 0], plain.output[-3000:]
    reached = tracked.reached()
    what = f"{reached} of {steps} steps in {took:.0f} s (without a server {without:.0f} s)"
    if side.name == "bigtfm":
        a, b = (_pace(Side(side.name, side.folder / name)) for name in ("without", "with"))
        what += f"; median step {1e3 * b:.1f} ms against {1e3 * a:.1f} ms"
    return Seen(reached == steps and ended.codes == [0, 0], what, _line(ended), _codes(ended))


def _pace(side: Side) -> float:
    rows = [json.loads(line) for line in (side.run_dir / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(row["seconds"] for row in rows[5:])


def second_start(side: Side) -> Seen:
    """The same command a second time while the first one trains."""
    options = Options(steps=100_000)
    ranks = side.start(options)
    side.wait_for_step(12, ranks)
    output = [(side.folder / f"rank-{rank}.out") for rank in range(len(ranks))]
    before = [path.read_text(errors="replace") for path in output]
    twin = side.start(options)  # writes to the same files of output
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and any(rank.exitcode is None for rank in twin):
        time.sleep(0.05)
    refused = all(rank.exitcode is not None for rank in twin)
    codes = [rank.exitcode for rank in twin]
    first_lives = all(rank.exitcode is None for rank in ranks)
    text = "".join(path.read_text(errors="replace") for path in output)
    del before
    processes.kill([rank.pid or 0 for rank in ranks])
    ended = side.finish(ranks, 5.0)
    ended.codes, ended.output = list(codes), text
    if not refused:
        return Seen(
            False, "both train and write the same checkpoints, in silence", _line(ended), _codes(ended)
        )
    return Seen(
        first_lives and bool(ended.lines), "refused; the first one trains on", _line(ended), _codes(ended)
    )


@contextmanager
def _nothing_left() -> Iterator[None]:
    from chaos.sides import end_all

    try:
        yield
    finally:
        end_all()


FAULTS: dict[str, Fault] = {
    "kill-saving": Fault(
        f"`kill -9` of a rank or of both while every step is saved, {KILLS} times", kill_while_saving
    ),
    "kill-rank": Fault("`kill -9` of one rank", kill_one_rank),
    "term-launcher": Fault("SIGTERM to the `deepspeed` launcher", _signal_to_launcher(signal.SIGTERM)),
    "usr1-launcher": Fault("SIGUSR1 to the `deepspeed` launcher", _signal_to_launcher(signal.SIGUSR1)),
    "kill-launcher": Fault("`kill -9` of the `deepspeed` launcher", _signal_to_launcher(signal.SIGKILL)),
    "stop-rank": Fault("SIGSTOP of one rank", stopped_rank),
    "bit-flip": Fault("a bit flipped in a file of moments", _damaged(flip_bit)),
    "truncated": Fault("that file cut in half", _damaged(truncate_shard)),
    "shard-gone": Fault("that file deleted", _damaged(delete_shard)),
    "latest-garbage": Fault("garbage in the file `latest`", _damaged(garbage_in_latest)),
    "latest-gone": Fault("`latest` deleted", _damaged(no_latest)),
    "pickle": Fault("a crafted pickle in a checkpoint (bigtfm's manifest signed anew)", crafted_pickle),
    "full-disk": Fault("no room while saving (files may not grow beyond 40,000 bytes)", full_disk),
    "mlflow": Fault("MLflow refuses connections", dead_mlflow),
    "second-start": Fault("the same command started twice", second_start),
    **{
        f"nan-{mode}-zero{stage}-{'bf16' if bf16 else 'fp32'}": Fault(
            f"NaN in a gradient of one rank, {mode}, stage {stage}, {'bf16' if bf16 else 'fp32'}",
            _nan(mode, stage, bf16),
        )
        for mode in ("once", "always")
        for bf16 in (False, True)
        for stage in range(4)
    },
}


def meet(out: Path, names: list[str], sides: list[str]) -> Iterator[tuple[str, str, Seen]]:
    """Has sides meet faults; yields and adds to out/faults.json what was seen, a row at a time."""
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    processes.adopt()
    job.warm_up()
    for name in names:
        for side in sides:
            folder = out / "faults" / f"{name}-{side}"
            shutil.rmtree(folder, ignore_errors=True)
            with _nothing_left():
                try:
                    seen = FAULTS[name].meet(Side(side, folder))
                except Exception as error:  # one that can't be measured is no reason to leave out the rest
                    seen = Seen(False, f"not measured: {type(error).__name__}: {error}"[:2000])
            rows = read(out)
            rows.setdefault(name, {})[side] = asdict(seen)
            (out / "faults.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
            yield name, side, seen


def read(out: Path) -> dict[str, dict[str, Any]]:
    """faults.json: by fault and side."""
    path = out / "faults.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
