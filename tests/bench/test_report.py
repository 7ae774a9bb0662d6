"""What a report says, against rows made by hand."""

from __future__ import annotations

import base64
import csv
import errno
import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest

from bigtfm.bench.against import changes
from bigtfm.bench.command import bench
from bigtfm.bench.plots import MOST_BARS
from bigtfm.bench.report import make_report
from bigtfm.bench.results import RESULTS, Row, together
from bigtfm.bench.views import fronts, scalings
from bigtfm.config.problems import ConfigProblem, StorageProblem

GIB = 2**30
ROOT = Path(__file__).parents[2]
SPREAD = (0.99, 0.995, 1.0, 1.005, 1.01)


def row(key: str, *, seconds: float = 1.0, peak: int = GIB, **more: Any) -> Row:
    base = {
        "key": key, "repeat": 0, "matrix": "hand-made", "grid": "g", "status": "ok", "why": "",
        "model": "tiny", "zero_stage": 0, "precision": "fp32", "ranks": 1, "micro_batch": 4,
        "accumulation": 1, "seq_len": 100, "recompute": "none", "attention": "auto", "compile": False,
        "overrides": [], "deepspeed": {}, "parameters": 1000, "tokens_per_step": 400, "device": "cpu",
    }  # fmt: skip
    base |= more
    times = [seconds * factor for factor in SPREAD]
    tokens = base["tokens_per_step"]
    return base | {
        "seconds": times,
        "step_seconds": {"low": times[1], "median": times[2], "high": times[3]},
        "tokens_per_second": {
            "low": tokens / times[3],
            "median": tokens / times[2],
            "high": tokens / times[1],
        },
        "matmul_share": 0.5,
        "loss": 2.5,
        "split": dict.fromkeys(
            ("data", "forward", "backward", "update", "record", "collectives"), seconds / 6
        ),
        "memory": {"weights": peak // 4, "activations": peak // 2, "peak": peak},
        "predicted": {"memory": {"peak": int(peak * 1.1)}, "step_seconds": seconds * 0.9},
    }


def failed(key: str, **more: Any) -> Row:
    keep = ("key", "repeat", "matrix", "grid", "model", "ranks", "zero_stage", "micro_batch")
    return {name: row(key)[name] for name in keep} | {"status": "oom", "why": "step 1: no memory"} | more


def write(folder: Path, *rows: Row) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / RESULTS).write_text("".join(json.dumps(each) + "\n" for each in rows))
    return folder


def test_runs_of_a_cell_are_taken_together() -> None:
    one, two = together([row("a"), row("b", micro_batch=8), row("a", seconds=2.0, repeat=1)])
    assert (one.label, two.label) == ("micro batch 4", "micro batch 8")
    assert len(one.rows) == 2
    assert one.seconds.median == pytest.approx((1.01 + 1.98) / 2)
    assert one.noise > two.noise


def test_one_failed_run_fails_its_cell() -> None:
    (cell,) = together([row("a"), failed("a", repeat=1)])
    assert not cell.ok


def test_weak_and_strong_scaling_are_found() -> None:
    weak = [
        row(f"w{n}", grid="weak", ranks=n, tokens_per_step=400 * n, seconds=1 + n / 10) for n in (1, 2, 4)
    ]
    strong = [
        row(f"s{n}", grid="strong", ranks=n, accumulation=4 // n, tokens_per_step=1600, seconds=4 / n)
        for n in (4, 1, 2)
    ]
    found = {
        (one.kind, tuple(result.ranks for result in one.results)): one
        for one in scalings(together(weak + strong))
    }
    assert set(found) == {("weak", (1, 2, 4)), ("strong", (1, 2, 4))}
    assert found["weak", (1, 2, 4)].efficiency == pytest.approx([1, 1.1 / 1.2, 1.1 / 1.4])
    assert found["strong", (1, 2, 4)].efficiency == pytest.approx([1, 1, 1])


def test_the_front_holds_what_nothing_beats_in_both() -> None:
    cells = together(
        [
            row("slow-small", peak=1 * GIB, seconds=4.0, micro_batch=1),
            row("fast-large", peak=3 * GIB, seconds=1.0, micro_batch=2),
            row("beaten", peak=3 * GIB, seconds=2.0, micro_batch=3),
            row("between", peak=2 * GIB, seconds=2.0, micro_batch=4),
            row("other", peak=9 * GIB, seconds=9.0, seq_len=50),
        ]
    )
    found = {name: [result.key for result in front] for name, front in fronts(cells).items()}
    assert found == {"tiny, T 100": ["slow-small", "between", "fast-large"], "tiny, T 50": ["other"]}


def test_changes_beyond_noise_are_told_from_those_within() -> None:
    old = [
        row("same"),
        row("slower"),
        row("faster"),
        row("larger"),
        row("broken"),
        row("gone"),
        failed("mended"),
    ]
    new = [
        row("same", seconds=1.015), row("slower", seconds=1.1), row("faster", seconds=0.9),
        row("larger", peak=2 * GIB), failed("broken"), row("mended"), row("new"),
    ]  # fmt: skip
    found = {change.verdict: change for change in changes(together(old), together(new))}
    assert set(found) == {"same", "slower", "faster", "larger", "broken", "mended", "new", "gone"}
    assert found["slower"].speed == pytest.approx(1 / 1.1)
    assert {verdict for verdict, change in found.items() if change.is_regression} == {
        "slower", "larger", "broken", "gone",
    }  # fmt: skip


def test_noisy_runs_hide_a_difference_that_quiet_ones_show() -> None:
    def run(key: str, *, seconds: float, noisy: bool) -> Row:
        found = row(key, seconds=seconds)
        return found | {"seconds": [seconds * (1 + (n - 2) * 0.2) for n in range(5)]} if noisy else found

    for noisy, verdict in ((False, "slower"), (True, "same")):
        old, new = (together([run("a", seconds=seconds, noisy=noisy)]) for seconds in (1.0, 1.1))
        assert [change.verdict for change in changes(old, new)] == [verdict]


def test_the_report_is_whole_and_needs_no_other_file(tmp_path: Path) -> None:
    rows = [
        row("a"),
        row("b", micro_batch=8, seconds=1.2),
        row("c", ranks=2, tokens_per_step=800),
        failed("d"),
    ]
    out = write(tmp_path / "out", *rows)
    make_report(out, write(tmp_path / "old", row("a", seconds=0.5), failed("d")))
    page = (out / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', page), "it would need another file"
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    names = [
        name for name in ("throughput", "split", "memory", "scaling", "pareto") if f'alt="{name}"' in page
    ]
    assert len(pictures) == len(names) == 5
    for name, data in zip(names, pictures, strict=True):
        assert base64.b64decode(data) == (out / f"{name}.png").read_bytes()
    for said in ("hand-made", "step 1: no memory", "slower", "Planned and measured", "+10.0%", "-10.0%"):
        assert said in page
    text = (out / "report.md").read_text()
    assert "| ZeRO 0" not in text, "it does not vary"
    assert "400 (398 to 402)" in text
    with (out / "results.csv").open() as lines:
        table = list(csv.DictReader(lines))
    assert [line["key"] for line in table] == ["a", "b", "c", "d"]
    assert float(table[1]["tokens_per_second"]) == pytest.approx(400 / 1.2)
    assert table[0]["activations_bytes"] == str(GIB // 2)
    assert table[3]["status"] == "oom"


def test_text_from_outside_is_no_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    why = "<script>alert(1)</script> a | b [/x] [rank0]: died"
    out = write(tmp_path / "out", row("a"), failed("b", why=why, grid="<script>alert(2)"))
    bench([], out)
    for name in ("report.html", "report.md"):
        assert "<script>alert" not in (out / name).read_text()
    assert "a \\| b" in (out / "report.md").read_text()
    assert "[/x] [rank0]: died" in " ".join(capsys.readouterr().out.split())


def test_a_grid_of_which_nothing_was_measured_says_so(tmp_path: Path) -> None:
    make_report(write(tmp_path, failed("a"), failed("b")))
    assert "none was measured: see Failed" in (tmp_path / "report.md").read_text()


def test_a_comparison_over_other_hardware_says_so(tmp_path: Path) -> None:
    old, new = ({"hardware": {"cpu": cpu, "cores": 2}} for cpu in ("Old", "New"))
    out = write(tmp_path / "out", row("a", **new))
    make_report(out, write(tmp_path / "old", row("a", **old)))
    assert "made elsewhere: processor: Old before, New now" in (out / "report.md").read_text()
    make_report(out, write(tmp_path / "other", row("b", **new)))
    assert "no cell is in both" in (out / "report.md").read_text()
    make_report(out, out)
    assert "made elsewhere" not in (out / "report.md").read_text()


def test_what_to_compare_with_is_looked_for_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bigtfm.bench.command.run_matrix", lambda *_, **__: pytest.fail("it measures"))
    for options in ({"against": tmp_path}, {"runs": tmp_path / "nowhere"}):
        with pytest.raises(ConfigProblem, match=r"no results of a benchmark|no such folder"):
            bench([ROOT / "benchmarks/matrices/quick.toml"], tmp_path / "out", **options)


def test_many_cells_have_pictures_of_some(tmp_path: Path) -> None:
    rows = [row(f"k{n}", micro_batch=n) for n in range(1, MOST_BARS + 3)]
    make_report(write(tmp_path, *rows))
    (height,) = struct.unpack(">I", (tmp_path / "throughput.png").read_bytes()[20:24])
    assert height < 110 * (2 + 0.3 * MOST_BARS)
    assert (tmp_path / "report.md").read_text().count("\n| micro batch") == len(rows)


def test_a_full_disk_leaves_the_report_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_report(write(tmp_path, row("a")))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write(tmp_path, row("a"), row("b", micro_batch=8))

    def full(path: Path, content: bytes) -> int:
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StorageProblem, match="No space left"):
        make_report(tmp_path)
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert after.keys() <= before.keys(), "no half of a file"
    assert all(before[name] == content for name, content in after.items() if name != RESULTS)


def test_no_results_and_damaged_ones_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigProblem, match="no results of a benchmark"):
        make_report(tmp_path)
    whole = json.dumps(row("a"))
    torn = ('{"key": ', "{}", "3", json.dumps({**row("a"), "seconds": None}).replace('"seconds"', '"s"'))
    for line in torn:
        (tmp_path / RESULTS).write_text(f"{whole}\n{line}\n{whole}\n")
        with pytest.raises(StorageProblem, match="line 2 is damaged"):
            make_report(tmp_path)
