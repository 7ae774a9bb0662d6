"""MLflow as a mirror of metrics.jsonl that training never waits for.

`start` puts a second process beside rank 0. It follows metrics.jsonl and sends what is new; a server that is
dead, slow or broken keeps only that process waiting. What has been sent stands in RUN_DIR/mlflow.json, so a
resumed run goes on in the same MLflow run, and `sync` sends later what could not be sent. A row sent twice
(its answer was lost) has the same timestamp, step and value, which MLflow stores once.

Two files, each with one writer: tracking.json says what to send where (written here, in training),
mlflow.json what has been sent (written in `bigtfm.mlflow_sender`, by whichever process holds the lock).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from bigtfm.config.problems import DataProblem, StorageProblem
from bigtfm.mlflow_sender import BUSY, read_json, write_json

# One retry inside a request; the sender itself tries again for as long as training lasts.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "GIT_PYTHON_REFRESH": "quiet",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
}


class Mirror:
    """The process that sends a run to MLflow. It ends by itself soon after the process that started it."""

    def __init__(self, run_dir: Path, process: subprocess.Popen[bytes], seconds: float) -> None:
        self._run_dir = run_dir
        self._process = process
        self._seconds = seconds

    def finish(self, status: str = "FINISHED", timeout: float | None = None) -> str | None:
        """Let it send the rest, for at most `timeout` seconds (default: 30 to a local store, 10 to a server).

        `status` is MLflow's: FINISHED, FAILED or KILLED. Returns the MLflow run id if everything has arrived,
        else None: `sync` sends the rest later.
        """
        target = self._run_dir / "tracking.json"
        with suppress(OSError):  # a disk that is full or gone has been told
            write_json(target, read_json(target) | {"status": status})
        return self.run_id() if self.wait(self._seconds if timeout is None else timeout) == 0 else None

    def wait(self, timeout: float) -> int:
        """Tell it that no more rows come, and return its exit status; past `timeout` seconds it is ended."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def run_id(self) -> str | None:
        """The MLflow run, once there is one."""
        return read_json(self._run_dir / "mlflow.json").get("run_id")


def start(
    run_dir: Path,
    *,
    uri: str,
    experiment: str,
    name: str,
    params: Mapping[str, Any],
    artifacts: Sequence[str] = (),
    children: Sequence[str] = (),
) -> Mirror:
    """Start mirroring a run; takes milliseconds whatever the state of the server.

    Args:
        run_dir: the run directory; metrics.jsonl in it is followed.
        uri: MLflow tracking URI; a relative sqlite path is taken from the working directory, now.
        experiment, name: MLflow experiment and run name.
        params: nested mappings; their leaves become MLflow params with dotted names.
        artifacts: names of files in `run_dir` to upload (those that exist) besides metrics.jsonl, curve.png.
        children: ids of MLflow runs of the same experiment that are shown below this one.
    """
    uri = _absolute(uri)
    before = read_json(run_dir / "tracking.json")
    same = before.get("uri") == uri and before.get("experiment") == experiment
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    target = {
        "uri": uri,
        "experiment": experiment,
        "name": name,
        "key": before["key"]
        if same
        else uuid.uuid4().hex,  # finds the MLflow run again if its id was never heard of
        "started": before["started"] if same else round(time.time(), 3),
        "status": "RUNNING",
        "artifacts": list(artifacts),
        "children": list(children),
        "params": _flat(params),
    }
    write_json(run_dir / "tracking.json", target)
    seconds = 30.0 if uri.startswith("sqlite:") else 10.0
    return Mirror(run_dir, _launch(run_dir, seconds), seconds)


def sync(run_dir: Path, timeout: float = 600) -> str:
    """Send to MLflow what has not been sent yet and return the run id (`bigtfm sync RUN`).

    Raises:
        DataProblem: the directory is not that of a run with MLflow on.
        StorageProblem: the store does not take it within `timeout` seconds.
    """
    target = read_json(run_dir / "tracking.json")
    if not target:
        raise DataProblem(
            "there is no run here that was started with track.mlflow=true",
            where=str(run_dir),
            fix="pass a run directory, for example runs/quickstart",
        )
    mirror = Mirror(run_dir, _launch(run_dir, timeout), timeout)
    code, run_id = mirror.wait(timeout), mirror.run_id()
    if code == 0 and run_id is not None:
        return run_id
    if code == BUSY:
        what, fix = "another process is sending this run", "wait until that run has ended"
    else:
        what = read_json(run_dir / "mlflow.json").get("error") or f"no answer within {timeout:.0f} s"
        mend = "start or mend the MLflow server"
        if "_alembic_tmp" in what:
            mend = "move that database away: MLflow was killed while it made its tables, and can't go on"
        fix = f"{mend}, then repeat this; details: {run_dir / 'logs' / 'mlflow.log'}"
    raise StorageProblem(what, where=f"MLflow at {target['uri']}", fix=fix)


def _launch(run_dir: Path, seconds: float) -> subprocess.Popen[bytes]:
    """The sender, in its own session (a Ctrl-C is not meant for it); its standard input ends when we do."""
    with (run_dir / "logs" / "mlflow.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "bigtfm.mlflow_sender", str(run_dir), str(seconds)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | _ENVIRONMENT,
            start_new_session=True,
        )


def _absolute(uri: str) -> str:
    scheme, separator, path = uri.partition("sqlite:///")
    return uri if scheme or not separator else separator + str(Path(path).absolute())


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """{"zero": {"stage": 2}} -> {"zero.stage": "2"}."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat
