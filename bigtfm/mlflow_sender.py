"""The process that follows metrics.jsonl and sends it: `python -m bigtfm.mlflow_sender RUN_DIR SECONDS`.

It lives until its standard input ends (training has ended or died), sends what is left within SECONDS, and
exits: 0 if everything has arrived, 1 if not, 2 if another process is sending the same run.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigtfm.environment import environment
from bigtfm.resilience.lifeline import wake_when_parent_ends
from bigtfm.tracking import parse_row

if TYPE_CHECKING:
    from mlflow import MlflowClient

DONE, NOT_DONE, BUSY = 0, 1, 2
_POLL = 2.0  # seconds between looks at metrics.jsonl
_LONGEST_WAIT = 60.0  # seconds between two tries to reach the server
_ROWS = 40  # a batch; MLflow takes 1000 metrics in one request
_PARAMS = 100  # in one request, MLflow's limit
_LAST_ARTIFACTS = ("metrics.jsonl", "curve.png", "failure.json")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is none."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Replace a JSON file; a reader sees the old or the new one, never a part."""
    new = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    new.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(new, path)


class Rows:
    """The rows of metrics.jsonl from where the last look ended; from the start where a resume replaced it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode = -1
        self._offset = 0

    def new(self, limit: int) -> list[dict[str, Any]]:
        """At most `limit` further whole rows."""
        rows: list[dict[str, Any]] = []
        if not self._path.exists():
            return rows
        with self._path.open("rb") as lines:
            inode = os.fstat(lines.fileno()).st_ino
            if inode != self._inode or self._offset > os.fstat(lines.fileno()).st_size:
                self._inode, self._offset = inode, 0
            lines.seek(self._offset)
            while len(rows) < limit and (line := lines.readline()).endswith(b"\n"):
                rows.append(parse_row(line))
                self._offset += len(line)
        return rows


class Sender:
    """One run on its way to MLflow. A method may raise what MLflow raises, and be called again then."""

    def __init__(self, run_dir: Path) -> None:
        from mlflow import MlflowClient

        self._run_dir = run_dir
        self._target = read_json(run_dir / "tracking.json")
        self._rows = Rows(run_dir / "metrics.jsonl")
        self._waiting: list[dict[str, Any]] = []  # read, not yet sent
        create_store(self._target["uri"])
        self._client = MlflowClient(tracking_uri=self._target["uri"])
        self._progress = self._open()
        self._describe()

    def send(self) -> None:
        """Send every row there is."""
        from mlflow.entities import Metric

        while self._waiting or self._read():
            metrics = [
                Metric(key, float(value), int(row["time"] * 1000), row["step"])
                for row in self._waiting
                for key, value in row.items()
                if isinstance(value, int | float) and key not in ("step", "time", "rewinds")
            ]
            self._client.log_batch(self._progress["run_id"], metrics=metrics)
            rewinds, step = _place(self._waiting[-1])
            self._note(sent_step=step, sent_rewinds=rewinds)
            self._waiting = []

    def close(self) -> None:
        """Send what stands at the end of a run only, and say how it ended."""
        self._upload((*self._target["artifacts"], *_LAST_ARTIFACTS))
        for child in self._target.get("children", ()):
            self._client.set_tag(child, "mlflow.parentRunId", self._progress["run_id"])
        status = read_json(self._run_dir / "tracking.json")["status"]
        written = [self._run_dir / name for name in ("tracking.json", "metrics.jsonl")]
        ended = max(path.stat().st_mtime for path in written if path.exists())  # a sync may come days later
        # Still RUNNING: whoever trained died without a word.
        self._client.set_terminated(
            self._progress["run_id"], "FAILED" if status == "RUNNING" else status, int(ended * 1000)
        )

    def _read(self) -> bool:
        """Fill `_waiting` with rows past the last one sent; False when there are no more."""
        sent = (self._progress.get("sent_rewinds", 0), self._progress["sent_step"])
        while rows := self._rows.new(_ROWS):
            self._waiting = [row for row in rows if _place(row) > sent]
            if self._waiting:
                return True
        return False

    def _open(self) -> dict[str, Any]:
        """Go on in the MLflow run that mlflow.json names, or in the one that has our key, or in a new one."""
        place = {name: self._target[name] for name in ("uri", "experiment", "key")}
        progress = read_json(self._run_dir / "mlflow.json")
        if place.items() <= progress.items() and _is_active(self._client, progress.get("run_id")):
            self._client.update_run(progress["run_id"], status="RUNNING")
            return progress
        experiment_id = self._experiment_id()
        found = self._client.search_runs([experiment_id], f"tags.`bigtfm.key` = '{self._target['key']}'")
        run = (
            found[0]
            if found
            else self._client.create_run(
                experiment_id,
                start_time=int(self._target["started"] * 1000),
                run_name=self._target["name"],
                tags={"bigtfm.key": self._target["key"]},
            )
        )
        self._progress = place | {"run_id": run.info.run_id, "sent_step": -1}
        self._note()
        return self._progress

    def _experiment_id(self) -> str:
        name, uri = self._target["experiment"], self._target["uri"]
        experiment = self._client.get_experiment_by_name(name)
        if experiment is not None:
            return str(experiment.experiment_id)
        beside = (
            str(Path(uri.removeprefix("sqlite:///")).parent / "mlruns")
            if uri.startswith("sqlite:///")
            else None
        )
        return str(self._client.create_experiment(name, artifact_location=beside))

    def _describe(self) -> None:
        """Params, tags and the files that are there from the start."""
        from mlflow.entities import Param, RunTag

        run_id, wanted = self._progress["run_id"], self._target["params"]
        known = self._client.get_run(run_id).data.params
        # MLflow never changes a param: what a resumed run changed is told by a tag.
        changed = {
            f"resumed.{key}": text for key, text in wanted.items() if known.get(key, text[:500]) != text[:500]
        }
        tags = {f"env.{key}": text for key, text in environment().items()} | changed
        new = [Param(key, text[:500]) for key, text in wanted.items() if key not in known]
        self._client.log_batch(run_id, tags=[RunTag(key, text[:500]) for key, text in tags.items()])
        for first in range(0, len(new), _PARAMS):
            self._client.log_batch(run_id, params=new[first : first + _PARAMS])
        try:
            self._upload(self._target["artifacts"])
        except Exception as error:  # no reason to hold the metrics back; `close` sends them again
            print(f"artifacts: {_one_line(error)}", flush=True)

    def _upload(self, names: tuple[str, ...] | list[str]) -> None:
        for name in names:
            if (self._run_dir / name).exists():
                self._client.log_artifact(self._progress["run_id"], str(self._run_dir / name))

    def _note(self, **news: Any) -> None:
        self._progress |= news
        write_json(self._run_dir / "mlflow.json", self._progress | {"error": None})


def create_store(uri: str) -> None:
    """A database file that is not there yet gets its name when MLflow has made all of its tables.

    MLflow can't go on where it was killed in between: nothing could ever be sent to such a file.
    """
    from mlflow import MlflowClient

    scheme, found, name = uri.partition("sqlite:///")
    path = Path(name)
    if scheme or not found or path.exists():
        return
    new = path.with_name(f"{path.name}.{platform.node()}-{os.getpid()}.new")
    MlflowClient(tracking_uri=f"sqlite:///{new}").search_experiments()
    try:
        os.link(new, path)
    except FileExistsError:
        pass  # another run was first
    except OSError:  # a file system without hard links
        os.replace(new, path)
    new.unlink(missing_ok=True)


def _place(row: dict[str, Any]) -> tuple[int, int]:
    """Rows come in this order, also where a run has gone back to an earlier step."""
    return row.get("rewinds", 0), row["step"]


def _is_active(client: MlflowClient, run_id: str | None) -> bool:
    """False where the run, or the whole store, has been deleted since."""
    from mlflow.exceptions import MlflowException

    if run_id is None:
        return False
    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "active")
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise


def follow(run_dir: Path, ended: threading.Event) -> int:
    """Send rows as they come until `ended`, then the rest; try again what fails, at growing intervals."""
    sender: Sender | None = None
    told, wait = "", 1.0
    while True:
        last = ended.is_set()  # asked before reading: all rows were written before the end
        try:
            sender = sender or Sender(run_dir)
            sender.send()
            if last:
                sender.close()
                return DONE
            pause, wait = _POLL, 1.0
        except Exception as error:  # MLflow's stores raise what they like; none of it may stop the mirror
            line = _one_line(error)
            if line != told:
                told = line
                with suppress(OSError):
                    print(f"{time.strftime('%F %T')} {line}", flush=True)
                    write_json(run_dir / "mlflow.json", read_json(run_dir / "mlflow.json") | {"error": line})
            if last:
                return NOT_DONE
            pause, wait = wait, min(2 * wait, _LONGEST_WAIT)
        ended.wait(pause)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _until_end_of_input(ended: threading.Event, seconds: float) -> None:
    """Note the end of training; `seconds` later this process ends, whatever it is waiting for."""
    sys.stdin.buffer.read()
    ended.set()
    time.sleep(seconds)
    os._exit(NOT_DONE)


def _lock(run_dir: Path, ended: threading.Event) -> Any | None:
    """An open file that keeps other senders away; None if training has ended and one is still at work."""
    file = (run_dir / "logs" / "mlflow.lock").open("w")
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # the sender of the run before this resume, for some seconds
            if ended.wait(1.0):
                return None
            continue
        except OSError:
            pass  # a file system without locks
        return file


def main() -> int:
    """Entry point of the process."""
    run_dir, seconds = Path(sys.argv[1]), float(sys.argv[2])
    os.nice(10)
    wake_when_parent_ends()  # a sender that stands still would never end
    ended = threading.Event()
    threading.Thread(target=_until_end_of_input, args=(ended, seconds), daemon=True).start()
    lock = _lock(run_dir, ended)
    return BUSY if lock is None else follow(run_dir, ended)


if __name__ == "__main__":
    sys.exit(main())
