"""What import-hf and export-hf share: writing whole or not at all, comparing, and telling."""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from bigtfm.config.problems import ConfigProblem
from bigtfm.config.sections import ModelSection, ObjectiveSection
from bigtfm.engine import loading
from bigtfm.huggingface.mapping import Shape
from bigtfm.huggingface.parity import require_parity
from bigtfm.model.families import make_model

SHOWN_BYTES = 10**9  # from here on, progress is shown
ORIGIN = "imported.json"  # beside the original config.json: which tokenizer belongs to it


def compared(
    saved: Path,
    section: ModelSection,
    vocab_size: int,
    folder: Path,
    name: str,
    wanted: bool,
    objective: ObjectiveSection | None = None,
) -> str:
    """What came of comparing a checkpoint with the class `name` of transformers in `folder`.

    Raises:
        NumericsProblem: they disagree.
    """
    if not wanted:
        return "no (--no-compare)"
    if find_spec("transformers") is None:
        return "no: transformers is not installed (pip install 'bigtfm[hf]')"
    from transformers import __version__

    model = make_model(section, vocab_size, objective=objective)
    loading.load_weights(saved, model)
    return f"with {name} of transformers {__version__}: {require_parity(model.eval(), folder, name)}"


@contextmanager
def made_whole(out: Path) -> Iterator[Path]:
    """A hidden folder to write into, which becomes `out` at the end; of a failure nothing stays.

    Of several at once the first that is whole becomes `out`.

    Raises:
        ConfigProblem: `out` is taken, before or at the end.
        StorageProblem: there is no room.
    """
    taken = ConfigProblem("is there already", where=str(out), fix="choose another OUT, or remove it")
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise taken
    out = Path(os.path.abspath(out))
    out.parent.mkdir(parents=True, exist_ok=True)
    with _private(out) as building:
        try:
            yield building
        except OSError as error:
            error.filename = error.filename or str(out)  # a write that finds no room names no file
            raise
        try:
            building.rename(out)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise taken from None
            raise


@contextmanager
def _private(out: Path) -> Iterator[Path]:
    """A folder beside `out` that is this process's alone; those that killed ones left are removed."""
    for left in out.parent.glob(f".building-{glob.escape(out.name)}-*"):
        with suppress(OSError), _opened(left) as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the lock goes with its process
            shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f".new-{out.name}-", dir=out.parent))
    with _opened(folder) as handle:
        with suppress(OSError):  # a file system without locks: it keeps a name that nobody removes
            fcntl.flock(handle, fcntl.LOCK_EX)
            folder = folder.rename(folder.with_name(folder.name.replace(".new", ".building", 1)))
        try:
            building = folder / out.name  # with the user's own permissions, which mkdtemp's has not
            building.mkdir()
            yield building
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        yield handle
    finally:
        os.close(handle)


def with_progress(
    tensors: Iterable[tuple[str, Tensor]], shapes: Mapping[str, Shape], label: str
) -> Iterator[tuple[str, Tensor]]:
    """The same tensors, with a bar on a terminal where there are many bytes of them."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    total = 4 * sum(map(math.prod, shapes.values()))
    columns = (TextColumn(label), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    shown = total >= SHOWN_BYTES and console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not shown) as bar:
        task = bar.add_task(label, total=total)
        for name, tensor in tensors:
            yield name, tensor
            bar.advance(task, 4 * tensor.numel())


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """An object as an indented JSON file."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def lines(**facts: str) -> list[str]:
    """What is told on a terminal: a fact a line, without those that are ""."""
    return [f"{name:<12} {value}" for name, value in facts.items() if value]


def count(shapes: Mapping[str, Shape]) -> str:
    """How many elements tensors of these shapes have."""
    return f"{sum(map(math.prod, shapes.values())):,}"


def some(names: list[str]) -> str:
    """A few names and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
