"""Progress is plain lines in a log, a live line on a terminal; the time left is not fooled by a pause."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from bigtfm.config.batch import GlobalBatch
from bigtfm.console import Console, Summary, duration


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def row(step: int) -> dict[str, float | int | None]:
    return {
        "step": step,
        "loss": 9.0 / step,
        "tokens_per_second": 12345.6,
        "mfu": 0.412,
        "lr": 1e-3,
        "grad_norm": 0.5,
    }


SUMMARY = Summary(
    run_dir=Path("runs/demo"),
    steps=300,
    tokens=1_228_800,
    seconds=192.4,
    loss=3.21,
    val_loss=3.4,
    val_bits_per_byte=1.8,
    unigram_bits_per_byte=2.4,
    best_step=250,
    checkpoint=Path("runs/demo/checkpoints/step-00000300"),
    curve=Path("runs/demo/curve.png"),
    mlflow_run="3ef0",
    next_commands=(
        ("let it write", 'bigtfm generate --run runs/demo --prompt "The"'),
        ("see the curves", "make ui"),
    ),
)


def run(stream: io.StringIO, total: int = 300) -> Clock:
    clock = Clock()
    console = Console(total, every=100, stream=stream, clock=clock)
    for step in range(1, total + 1):
        clock.now += 2.0
        console.step(row(step))
        if step == 200:
            console.evaluation(200, 3.5, 1.9, best=True)
    console.warning("grad norm is not known at stage 0")
    console.summary(SUMMARY)
    return clock


@pytest.mark.parametrize("forced", [{}, {"FORCE_COLOR": "1", "TTY_COMPATIBLE": "1"}])
def test_a_log_gets_plain_lines(monkeypatch: pytest.MonkeyPatch, forced: dict[str, str]) -> None:
    for name, value in forced.items():
        monkeypatch.setenv(name, value)
    stream = io.StringIO()
    run(stream)
    text = stream.getvalue()
    assert not set(text) & {chr(code) for code in (*range(10), *range(11, 32), 127)}
    lines = text.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("step ")] == [
        "1/300",
        "100/300",
        "200/300",
        "300/300",
    ]
    assert len({line.index("tokens/s") for line in lines if line.startswith("step ")}) == 1  # aligned
    assert "loss  0.0900" in lines[1]
    assert "6m40s left" in lines[1]  # 200 steps of 2 s
    assert "MFU 41.2%" in lines[1]
    assert "eval 200/300  validation loss 3.5000  1.9000 bits/byte  best so far" in lines
    assert "warning: grad norm is not known at stage 0" in lines


def test_the_summary_names_results_files_and_commands() -> None:
    stream = io.StringIO()
    run(stream)
    lines = stream.getvalue().splitlines()
    assert "validation      1.8000 bits/byte, 25% below the unigram baseline of 2.4000" in lines
    assert "steps           300, best at step 250" in lines
    assert "time            3m12s" in lines
    assert "checkpoint      runs/demo/checkpoints/step-00000300" in lines
    assert lines[-3:] == [
        "next:",
        '  let it write    bigtfm generate --run runs/demo --prompt "The"',
        "  see the curves  make ui",
    ]


def test_a_model_worse_than_the_baseline_is_told_so() -> None:
    stream = io.StringIO()
    Console(1, stream=stream).summary(
        Summary(Path("r"), 1, 1, 1.0, val_bits_per_byte=3.0, unigram_bits_per_byte=2.4)
    )
    assert "25% ABOVE the unigram baseline" in stream.getvalue()


def test_what_is_not_known_is_left_out() -> None:
    stream = io.StringIO()
    console = Console(2, stream=stream)
    console.step({"step": 1, "loss": 2.0, "grad_norm": None})
    console.summary(Summary(Path("r"), 1, 1, 1.0))
    assert "grad norm" not in stream.getvalue()
    assert "None" not in stream.getvalue()


def test_a_terminal_gets_a_live_line_and_whole_lines_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setenv("TERM", "xterm")
    screen = Screen()
    run(screen)
    text = screen.getvalue()
    assert "━" in text
    assert "\r" in text
    assert text.count("tokens/s") > 100  # drawn at nearly every step, the clock standing 2 s apart
    assert "validation loss 3.5000" in text
    assert 'bigtfm generate --run runs/demo --prompt "The"\n' in text


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    screen = Screen()
    run(screen)
    assert "\x1b" not in screen.getvalue()
    assert "\r" not in screen.getvalue()


def test_the_live_line_is_not_drawn_at_every_one_of_a_thousand_steps_a_second(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    screen, clock = Screen(), Clock()
    console = Console(1000, stream=screen, clock=clock)
    for step in range(1, 1001):
        clock.now += 0.001
        console.step(row(step))
    console.close()
    assert screen.getvalue().count("loss") < 30


@pytest.mark.parametrize(("pause", "longest"), [(2.0, 100), (36_000.0, 130)])
def test_a_pause_does_not_spoil_the_time_left(pause: float, longest: float) -> None:
    stream, clock = io.StringIO(), Clock()
    console = Console(150, every=100, stream=stream, clock=clock)
    for step in range(1, 101):
        clock.now += pause if step == 50 else 2.0
        console.step(row(step))
    left = stream.getvalue().splitlines()[1].split(" left")[0].split()[-1]
    minutes, seconds = left.removesuffix("s").split("m")
    assert 100 <= int(minutes) * 60 + int(seconds) <= longest


def test_the_time_left_is_that_of_the_steps_to_come() -> None:
    stream, clock = io.StringIO(), Clock()
    console = Console(
        150, every=100, steps_left=GlobalBatch(32, (8,), (100,)).steps_left, stream=stream, clock=clock
    )
    for step in range(1, 101):
        clock.now += 0.1
        console.step(row(step))
    assert "20 s left" in stream.getvalue(), "50 steps of 0.4 s"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (59.4, "59 s"),
        (59.6, "1m00s"),
        (3599, "59m59s"),
        (7384, "2h03m"),
        (4 * 86400 + 6 * 3600, "4d06h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize("terminal", [False, True])
def test_output_that_cannot_be_written_ends_nothing(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

        def isatty(self) -> bool:
            return terminal

    monkeypatch.setenv("TERM", "xterm")
    shown = Console(3, every=1, stream=Gone())
    for step in (1, 2, 3):
        shown.step({"step": step, "loss": 1.0})
    shown.warning("nobody reads this")
    shown.close()
