"""What a run leaves to look at: metrics.jsonl, one JSON object a step, and the curve drawn from it.

metrics.jsonl is the record: what else shows a run (curve.png, MLflow) is made from it, again if need be.
"""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

from bigtfm.config.problems import StorageProblem, too_many_files

# JSON has no word for these: they are written as strings and read back as the floats they stand for.
NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricsLog:
    """Appends to metrics.jsonl: an object a line, each written at once; floats read back exactly.

    A row gets the wall-clock `time` (Unix seconds) at which it was written: what is sent to MLflow later, or
    twice, keeps its time. A line torn by a kill is dropped when the log is opened.

    retry_seconds: how long rows that can't be written are kept and tried again with the next ones.

    Raises:
        StorageProblem: the file can't be written, or is gone.
    """

    def __init__(self, path: Path, retry_seconds: float = 0.0) -> None:
        self.path, self._retry_seconds = path, retry_seconds
        self._waiting = bytearray()  # what the file has not taken yet
        self._failing_since: float | None = None
        self._file = self._open()

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row; it holds at least `step`."""
        values = {
            key: _writable(value) for key, value in ({"time": round(time.time(), 3)} | dict(row)).items()
        }
        self._waiting += json.dumps(values, allow_nan=False).encode() + b"\n"
        self._try()

    def flush(self) -> None:
        """Brings the rows to the disk: a power cut leaves them there. For any thread.

        Raises:
            OSError: it can't.
        """
        with self.path.open("rb+") as file:
            os.fsync(file.fileno())

    def truncate_after(self, step: int, cut: Path | None = None) -> int:
        """Drop the rows past `step`, the step of the checkpoint that is resumed from. All or nothing.

        Returns the step of the last row; 0: there is none.

        cut: a file that they go to.
        """
        self._file.close()
        shorter = self.path.with_suffix(".tmp")
        try:
            with self.path.open("rb") as rows, shorter.open("wb") as kept:
                lines = list(rows)
                steps = [parse_row(line)["step"] for line in lines]
                number = sum(there <= step for there in steps)
                kept.writelines(lines[:number])
                kept.flush()
                os.fsync(kept.fileno())
            if cut is not None:
                cut.parent.mkdir(exist_ok=True)
                cut.write_bytes(b"".join(lines[number:]))
            os.replace(shorter, self.path)
        except OSError as error:
            raise _unwritable(self.path, error) from None
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
            raise StorageProblem(
                "a line is damaged", where=str(self.path), fix="remove that line, then start again"
            ) from None
        self._file = self._open()
        return int(steps[number - 1]) if number else 0

    def close(self) -> None:
        """Close the file; rows that still wait are tried for as long as others."""
        while self._waiting:
            self._try()
            if self._waiting:
                time.sleep(0.2)
        self._file.close()

    def _try(self) -> None:
        """Writes what waits, or keeps it; raises when it has waited for too long."""
        try:
            self._write()
            self._failing_since = None
        except OSError as error:
            self._file.close()  # a handle may be stale where the file is sound
            now = time.monotonic()
            self._failing_since = self._failing_since or now
            if now - self._failing_since >= self._retry_seconds:
                self._waiting.clear()
                raise _unwritable(self.path, error) from None

    def _write(self) -> None:
        if os.stat(self.path).st_ino != self._inode:
            raise FileNotFoundError(errno.ENOENT, "another file is in its place")
        if self._file.closed:
            self._file = FileIO(self.path, "a")
        while self._waiting:
            del self._waiting[: self._file.write(self._waiting)]

    def _open(self) -> FileIO:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = FileIO(self.path, "a+")
            file.truncate(_whole_lines(file))
            self._inode = os.fstat(file.fileno()).st_ino
        except OSError as error:
            raise _unwritable(self.path, error) from None
        return file


def parse_row(line: bytes) -> dict[str, Any]:
    """One line of metrics.jsonl. Raises ValueError if it is torn."""
    return {
        key: NOT_FINITE.get(value, value) if isinstance(value, str) else value
        for key, value in json.loads(line).items()
    }


def iterate_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of metrics.jsonl, without a last line that a kill has torn. No file: no rows.

    Raises:
        StorageProblem: the file can't be read, or a line before the last is damaged.
    """
    if not path.exists():
        return
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.endswith(b"\n"):
                    try:
                        yield parse_row(line)
                    except (ValueError, AttributeError, RecursionError):
                        raise StorageProblem(
                            "this line is damaged", where=f"{path}:{number}", fix="remove the line"
                        ) from None
    except OSError as error:
        raise StorageProblem(
            f"can't be read: {error.strerror}", where=str(path), fix="check the file system"
        ) from None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All rows of metrics.jsonl; see `iterate_metrics`."""
    return list(iterate_metrics(path))


def _writable(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _whole_lines(file: FileIO) -> int:
    """Bytes up to and with the last newline."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 4096)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def _unwritable(path: Path, error: OSError) -> StorageProblem:
    return too_many_files(error) or StorageProblem(
        f"can't be written: {error.strerror}",
        where=str(path),
        fix="free space or correct the permissions, then resume",
    )


# --- the curve ---------------------------------------------------------------------------------------------

_INK, _GRID, _EDGE = "#333333", "#e6e6e6", "#bbbbbb"
_RAW, _SMOOTH, _VALIDATION, _BASELINE = "#a9c4e4", "#1f5fa8", "#d1495b", "#777777"


def plot_curve(run_dir: Path) -> Path:
    """Draw training and validation loss and the learning rate against the step, as RUN_DIR/curve.png.

    The dashed line is the unigram baseline, the loss of knowing token frequencies alone
    (`unigram_bits_per_byte` in resolved.json), once an evaluation tells what a bit a byte is in nats a token.

    Raises:
        StorageProblem: metrics.jsonl can't be read or the picture can't be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [
        tuple(row.get(name, math.nan) for name in ("step", "loss", "lr", "val_loss", "val_bits_per_byte"))
        for row in iterate_metrics(run_dir / "metrics.jsonl")
    ]
    steps, losses, rates, *_ = zip(*rows, strict=True) if rows else ((), (), ())
    evaluations = [(step, loss, bits) for step, _, _, loss, bits in rows if math.isfinite(loss)]
    figure = Figure(figsize=(8, 5), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    _draw_losses(upper, steps, losses)
    if evaluations:
        _draw_evaluations(upper, evaluations, _unigram_bits_per_byte(run_dir))
    if rows:
        upper.legend(loc="upper right", facecolor="white", edgecolor="none", framealpha=0.85)
    lower.plot(steps, rates, color=_INK, linewidth=1.2)
    lower.set_ylim(bottom=0)
    lower.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    lower.xaxis.get_major_locator().set_params(integer=True)
    upper.set_title(run_dir.name, loc="left", color=_INK, fontsize=12, fontweight="bold")
    upper.set_ylabel("loss (nats / token)")
    lower.set_ylabel("learning rate")
    lower.set_xlabel("step")
    for axes in (upper, lower):
        axes.grid(color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_EDGE)
        axes.tick_params(color=_EDGE, labelcolor=_INK)
    figure.align_ylabels()
    path, drawing = run_dir / "curve.png", run_dir / "curve.png.tmp"
    try:
        figure.savefig(drawing, format="png")
        os.replace(drawing, path)
    except OSError as error:
        raise _unwritable(path, error) from None
    return path


def _draw_losses(axes: Any, steps: Sequence[int], losses: Sequence[float]) -> None:
    every = max(1, len(steps) // 4000)  # more points than the picture has pixels only blacken it
    axes.plot(steps[::every], losses[::every], color=_RAW, linewidth=0.8)
    label = f"training {losses[-1]:.3f}" if losses else "training"
    axes.plot(steps[::every], smoothed(losses)[::every], color=_SMOOTH, linewidth=1.8, label=label)


def _draw_evaluations(axes: Any, evaluations: list[tuple[int, float, float]], baseline: float | None) -> None:
    """Points (step, nats a token, bits a byte), and the baseline, given in bits a byte, in nats a token."""
    steps, losses, bits = zip(*evaluations, strict=True)
    marker = "o" if len(steps) < 60 else ""
    label = f"validation {losses[-1]:.3f}"
    axes.plot(steps, losses, color=_VALIDATION, linewidth=1.2, marker=marker, markersize=4.5, label=label)
    if baseline is not None and bits[-1] > 0:
        nats = baseline * losses[-1] / bits[-1]
        dashes, label = (0, (5, 4)), f"unigram baseline {nats:.3f}"
        axes.axhline(nats, color=_BASELINE, linestyle=dashes, linewidth=1.2, label=label)


def _unigram_bits_per_byte(run_dir: Path) -> float | None:
    try:
        value = json.loads((run_dir / "resolved.json").read_text()).get("unigram_bits_per_byte")
    except (OSError, ValueError, AttributeError):
        return None
    return float(value) if isinstance(value, int | float) else None


def smoothed(values: Sequence[float]) -> list[float]:
    """Mean over the neighbours on both sides, blind to NaN.

    2 % of the points each side; fewer near the start, where the curve is steep.
    """
    sums, counts = [0.0], [0]
    for value in values:
        finite = math.isfinite(value)
        sums.append(sums[-1] + (value if finite else 0.0))
        counts.append(counts[-1] + finite)
    reach = max(3, len(values) // 50)
    result = []
    for index in range(len(values)):
        first, stop = index - min(reach, index), min(index + min(reach, index) + 1, len(values))
        count = counts[stop] - counts[first]
        result.append((sums[stop] - sums[first]) / count if count else math.nan)
    return result
