"""`bigtfm inspect`: from a run and a text to a page, pictures and tensors in a folder."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from bigtfm.config.problems import ConfigProblem
from bigtfm.engine.weights import write_safetensors
from bigtfm.inspection import pictures
from bigtfm.inspection.page import page
from bigtfm.inspection.reading import read
from bigtfm.inspection.report import Report, Selection, look, tensors
from bigtfm.run_directory import open_run
from bigtfm.whole_files import whole_file, write_whole


@dataclass(frozen=True)
class Inspected:
    """What was found, and the files that show it."""

    report: Report
    files: list[Path]


def inspect(
    run_dir: Path,
    text: str,
    *,
    target: str | None = None,
    max_new_tokens: int = 50,
    layers: str | None = None,
    heads: str | None = None,
    out: Path | None = None,
    step: int | None = None,
    best: bool = False,
) -> Inspected:
    """Looks into a run's model while it reads `text`, and writes inspect.html, PNGs and maps.safetensors.

    target, max_new_tokens: as in `read`. layers, heads: whose attention is shown, numbers from 0 such as
    "0,2-3"; None: all. out: folder; None: RUN/inspect. step, best: as in `open_run`.

    Raises:
        ConfigProblem: a text or a choice is not for this model.
        NoCheckpoint, DataProblem: as `open_run`. StorageProblem: the folder can't be written.
    """
    selection = Selection(numbers(layers, "--layers"), numbers(heads, "--heads"))
    model, tokenizer, special = open_run(run_dir, step, best)
    reading = read(model, tokenizer, special, text, target=target, max_new_tokens=max_new_tokens)
    which = f", step {step}" if step is not None else ", its best checkpoint" if best else ""
    report = look(model, tokenizer, special, reading, selection, f"{run_dir}{which}")
    folder = out or run_dir / "inspect"
    shown, exact, found = folder / "inspect.html", folder / "maps.safetensors", tensors(report)
    write_whole(shown, page(report))
    with whole_file(exact) as building:
        write_safetensors(building, {name: tuple(found[name].shape) for name in found}, found.items())
    return Inspected(report, [shown, *pictures.draw_all(report, folder), exact])


def numbers(text: str | None, where: str) -> tuple[int, ...] | None:
    """Numbers and ranges, "0,2-3" -> (0, 2, 3), in order and each once.

    Raises:
        ConfigProblem: it is something else.
    """
    if text is None:
        return None
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,6})\s*(?:-\s*([0-9]{1,6})\s*)?", part)
        if match is None or (match[2] is not None and int(match[2]) < int(match[1])):
            fix = "write numbers and ranges, such as 0,2-3"
            raise ConfigProblem(f"'{text}' names none", where=where, fix=fix)
        found.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return tuple(sorted(found))


def told(inspected: Inspected) -> str:
    """What a terminal shows."""
    report = inspected.report
    lines = [f"{name}: {fact}" for name, fact in report.facts.items()]
    if report.mean_loss is not None:
        lines.append(f"loss: {report.mean_loss:.3f} nats a token, over {len(report.judged)} tokens")
    return "\n".join([*lines, *map(str, inspected.files)])
