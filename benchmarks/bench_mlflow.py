"""What a dead MLflow server costs a step, at most: the processor time of the sender beside the training.

    python benchmarks/bench_mlflow.py [--json] [--data data/quickstart] [--fault refused] [--steps 400]

A small GPT trains on two ranks, as `bigtfm train` starts it. Training itself calls nothing of MLflow, so a
step can lose no more than what the sender takes of the machine; that it is imported, once, is told apart.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median
from typing import Any

from bench_guard import RECIPE, SMALL, processor_seconds

from bigtfm.resilience.processes import descendants

RANKS = 2
GOAL = 0.001  # seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a sentence")
    parser.add_argument("--data", type=Path, default=Path("data/quickstart"), help="what `prepare` wrote")
    parser.add_argument("--fault", default="refused", choices=("refused", "silent", "500"))
    parser.add_argument("--steps", type=int, default=400, help="default 400")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, broken_server(arguments.fault) as address:
        seen = train(arguments, Path(name), address)
        rows = [json.loads(line) for line in (Path(name) / "run/metrics.jsonl").read_text().splitlines()]
    step_seconds = median(row["seconds"] for row in rows[len(rows) // 2 :])
    result = {"benchmark": "mlflow", "fault": arguments.fault} | compare(seen, step_seconds)
    print(json.dumps(result) if arguments.json else sentence(result))


def sentence(result: dict[str, Any]) -> str:
    return (
        f"MLflow {result['fault']}: at most {1e3 * result['cost']:.2f} ms a step of "
        f"{1e3 * result['step_seconds']:.1f} ({result['steps']} steps), after "
        f"{result['import_seconds']:.1f} s of imports; goal: < {1e3 * GOAL:g} ms"
    )


@contextmanager
def broken_server(fault: str) -> Iterator[str]:
    """An address that refuses, takes connections and never answers, or answers 500."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        host, port = listener.getsockname()
        if fault == "silent":
            listener.listen(64)
        if fault != "500":
            yield f"http://{host}:{port}"
            return
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Failing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()


class _Failing(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.send_error(500)

    do_GET = do_POST

    def log_message(self, *_: Any) -> None:
        pass


def train(arguments: argparse.Namespace, folder: Path, address: str) -> list[tuple[int, float]]:
    """Trains; returns pairs of steps done and processor seconds of the sender so far, every half second."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    config = folder / "deepspeed.json"
    config.write_text(json.dumps(RECIPE | {"zero_optimization": {"stage": 2}}))
    args = [
        *("train", f"--deepspeed_config={config}", *SMALL, f"data.path={arguments.data.resolve()}"),
        *(f"run.dir={folder}", "run.name=run", f"steps={arguments.steps}"),
        *("track.mlflow=true", f"track.uri={address}"),
    ]
    meeting = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    metrics = folder / "run/metrics.jsonl"
    with (folder / "output").open("wb") as output:
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", "from bigtfm.cli import app; app()", *args],
                env=os.environ | meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=output,
                stderr=output,
            )
            for rank in range(RANKS)
        ]
        seen = []
        while any(rank.poll() is None for rank in ranks):
            time.sleep(0.5)
            senders = [p for p in descendants(ranks[0].pid) if "bigtfm.mlflow_sender" in p.words]
            if senders and metrics.exists():
                seen.append((metrics.read_bytes().count(b"\n"), processor_seconds(senders[0].pid)))
    if any(rank.returncode for rank in ranks):
        raise SystemExit((folder / "output").read_text())
    return [(steps, seconds) for steps, seconds in seen if 0 < steps < arguments.steps]


def compare(seen: list[tuple[int, float]], step_seconds: float) -> dict[str, Any]:
    """From the second half of the steps: by then the sender has been imported."""
    (_, imported), *_ = half = [row for row in seen if row[0] > seen[-1][0] // 2]
    (first, _), (last, spent) = half[0], half[-1]
    return {
        "step_seconds": step_seconds,
        "cost": (spent - imported) / (last - first),
        "steps": last - first,
        "import_seconds": imported,
    }


if __name__ == "__main__":
    main()
