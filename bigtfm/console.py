"""What rank 0 shows in training: a live line on a terminal, plain lines elsewhere, a summary at the end."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TextIO, cast

from rich.console import Console as Terminal
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_REFRESH = 0.1  # seconds between two drawings of the live line
_MEMORY = 100  # steps that the time left is judged by


@dataclass(frozen=True)
class Summary:
    """A finished run in plain values; what is None is left out.

    `steps` and `tokens` count from the run's beginning, `seconds` from its last start; losses are in nats a
    token; `next_commands` pairs what a command is for with the command.
    """

    run_dir: Path
    steps: int
    tokens: int
    seconds: float
    loss: float | None = None
    val_loss: float | None = None
    val_bits_per_byte: float | None = None
    unigram_bits_per_byte: float | None = None
    best_step: int | None = None
    checkpoint: Path | None = None
    curve: Path | None = None
    mlflow_run: str | None = None
    next_commands: tuple[tuple[str, str], ...] = ()


class _Output:
    """A stream whose reader may leave or whose disk may fill: that ends the output, not the training."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream  # Python started without stdout has None
        self.encoding = getattr(stream, "encoding", "utf-8")

    def isatty(self) -> bool:
        return self._stream is not None and self._stream.isatty()

    def write(self, text: str) -> int:
        if self._stream is not None:
            try:
                self._stream.write(text)
            except OSError:
                self._leave(self._stream)
        return len(text)

    def flush(self) -> None:
        if self._stream is not None:
            try:
                self._stream.flush()
            except OSError:
                self._leave(self._stream)

    def _leave(self, stream: TextIO) -> None:
        self._stream = None
        with suppress(OSError):  # what is buffered already must not fail again when the interpreter ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Console:
    """Shows steps `start_step` + 1 to `total_steps`.

    On a terminal the live line is drawn anew at most ten times a second, from within `step`: no thread.
    Elsewhere a plain line comes every `every` steps, at the first and at the last.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        *,
        every: int = 10,
        steps_left: Callable[[int, int], float] = lambda step, total: total - step,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._start, self._every = total_steps, start_step, every
        self._steps_left = steps_left  # as GlobalBatch.steps_left
        self._clock = clock
        self._stream = _Output(sys.stdout if stream is None else stream)
        self._intervals: deque[float] = deque(maxlen=_MEMORY)
        self._last_step_at: float | None = None
        self._drawn_at = -1.0
        # FORCE_COLOR and its like tell rich that a file is a terminal: a log stays plain.
        self._terminal = Terminal(
            file=cast(IO[str], self._stream), highlight=False, force_terminal=self._stream.isatty()
        )
        self._live: Live | None = None
        if self._is_live():
            self._live = Live(console=self._terminal, auto_refresh=False, transient=True)
            self._live.start()

    def step(self, row: Mapping[str, Any]) -> None:
        """Show a step: `step` and, where not None, loss, tokens_per_second, mfu (0 to 1), lr, grad_norm."""
        now = self._clock()
        if self._last_step_at is not None:  # the first step's time holds compilation and warm-up
            self._intervals.append(now - self._last_step_at)
        self._last_step_at = now
        step = int(row["step"])
        if self._live is not None:
            if now - self._drawn_at >= _REFRESH or step == self._total:
                self._drawn_at = now
                self._live.update(self._live_line(step, row), refresh=True)
        elif step % self._every == 0 or step in (self._start + 1, self._total):
            width = len(str(self._total))
            self._line(f"step {step:{width}}/{self._total}  " + "  ".join(self._figures(step, row)).rstrip())

    def evaluation(
        self, step: int, val_loss: float, val_bits_per_byte: float | None, *, best: bool = False
    ) -> None:
        """Show an evaluation: nats a token and, where every token is predicted, bits a byte."""
        width = len(str(self._total))
        mark = "  best so far" if best else ""
        losses = f"validation loss {val_loss:.4f}"
        if val_bits_per_byte is not None:
            losses += f"  {val_bits_per_byte:.4f} bits/byte"
        self._line(f"eval {step:{width}}/{self._total}  {losses}{mark}", style="cyan")
        self._last_step_at = self._clock()  # the time left is that of the steps

    def note(self, text: str) -> None:
        """Show a line among the others."""
        self._line(text)

    def warning(self, text: str) -> None:
        """Show a warning."""
        self._line(f"warning: {text}", style="yellow")

    def close(self) -> None:
        """End the live line; called before a traceback, an error line or the summary is printed."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def summary(self, summary: Summary) -> None:
        """End the live line and show how the run ended and what to try next."""
        self.close()
        facts = _facts(summary)
        if self._is_live():
            grid = Table.grid(padding=(0, 2))
            grid.add_column(style="dim", no_wrap=True)
            grid.add_column(overflow="fold")
            for name, value in facts:
                grid.add_row(name, Text(value))
            self._terminal.print(
                Panel(grid, title=Text(str(summary.run_dir)), title_align="left", expand=False)
            )
        else:
            self._line(f"-- {summary.run_dir}")
            for name, value in facts:
                self._line(f"{name:<15} {value}")
        if summary.next_commands:
            self._line("next:")
            width = max(len(purpose) for purpose, _ in summary.next_commands)
            for purpose, command in summary.next_commands:
                self._line(f"  {purpose:<{width}}  {command}")  # on a line of its own: to be copied whole

    def _is_live(self) -> bool:
        return self._terminal.is_terminal and not self._terminal.is_dumb_terminal

    def _line(self, text: str, style: str = "") -> None:
        if self._is_live():
            self._terminal.print(Text(text, style=style), soft_wrap=True)
        else:
            self._stream.write(text + "\n")
            self._stream.flush()

    def _live_line(self, step: int, row: Mapping[str, Any]) -> Table:
        """A bar that takes what is left of the width, and the figures; too narrow, these are cut."""
        figures = f"{step}/{self._total}  " + "  ".join(self._figures(step, row))
        line = Table.grid(padding=(0, 1))
        bar = min(40, self._terminal.width - len(figures) - 2)
        if bar >= 8:
            line.add_row(ProgressBar(self._total, step, width=bar), Text(figures))
        else:
            line.add_row(Text(figures, no_wrap=True, overflow="ellipsis"))
        return line

    def _figures(self, step: int, row: Mapping[str, Any]) -> list[str]:
        shown = (
            ("loss", "loss {:7.4f}"),
            ("tokens_per_second", "{:>9,.0f} tokens/s"),
            ("mfu", "MFU {:5.1%}"),
            ("lr", "lr {:.2e}"),
            ("grad_norm", "grad norm {:7.3f}"),
        )
        figures = [form.format(row[name]) for name, form in shown if row.get(name) is not None]
        left = self._seconds_left(step)
        figures.insert(
            1, f"{'' if left is None else duration(left) + ' left':>11}"
        )  # before what a narrow window cuts
        return figures

    def _seconds_left(self, step: int) -> float | None:
        """Remaining steps times the mean of the last; a pause (a laptop asleep) counts as ten."""
        if not self._intervals or step >= self._total:
            return None
        longest = 10 * statistics.median(self._intervals)
        pace = statistics.fmean(min(taken, longest) for taken in self._intervals)
        return self._steps_left(step, self._total) * pace


@contextmanager
def progress_bar(label: str, on: bool = True) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, if that is a terminal: hears what is done, and of how many."""
    from rich.progress import Progress

    console = Terminal(stderr=True)
    with Progress(console=console, transient=True, disable=not (on and console.is_terminal)) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def at_work(label: str) -> Iterator[None]:
    """On stderr, if that is a terminal: what is being done, where nobody knows for how long."""
    console = Terminal(stderr=True)
    with console.status(label) if console.is_terminal else nullcontext():
        yield


def duration(seconds: float) -> str:
    """12 s, 3m05s, 2h03m or 4d06h."""
    whole = max(0, round(seconds))
    for unit, part, size, smaller in (("d", "h", 86400, 3600), ("h", "m", 3600, 60), ("m", "s", 60, 1)):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // smaller:02d}{part}"
    return f"{whole} s"


def _facts(summary: Summary) -> list[tuple[str, str]]:
    best = "" if summary.best_step is None else f", best at step {summary.best_step:,}"
    facts = [
        ("steps", f"{summary.steps:,}{best}"),
        ("tokens", f"{summary.tokens:,}"),
        ("time", duration(summary.seconds)),
    ]
    if summary.loss is not None:
        facts.append(("training loss", f"{summary.loss:.4f} nats/token"))
    if summary.val_loss is not None:
        facts.append(("validation loss", f"{summary.val_loss:.4f} nats/token"))
    if summary.val_bits_per_byte is not None:
        facts.append(("validation", f"{summary.val_bits_per_byte:.4f} bits/byte{_beside_baseline(summary)}"))
    places = (
        ("checkpoint", summary.checkpoint),
        ("loss curve", summary.curve),
        ("MLflow run", summary.mlflow_run),
    )
    return facts + [(name, str(value)) for name, value in places if value is not None]


def _beside_baseline(summary: Summary) -> str:
    bits, baseline = summary.val_bits_per_byte, summary.unigram_bits_per_byte
    if bits is None or not baseline:
        return ""
    word = "below" if bits <= baseline else "ABOVE"
    return f", {abs(1 - bits / baseline):.0%} {word} the unigram baseline of {baseline:.4f}"
