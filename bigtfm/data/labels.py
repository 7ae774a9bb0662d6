"""The labels that a task's rows have, and whether anything can be learnt of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from bigtfm.config.problems import DataProblem, counted, shown
from bigtfm.data.examples import TaskSetting
from bigtfm.data.indexed import MAX_MARK
from bigtfm.data.sources import Unit

FEW = 10  # so many may stand once each: a set to try something out with
NUMBERS = 50  # more different ones than these, with fractions, are a quantity and no classes
_COLUMN = "name the column of the labels with --column"


def find_labels(
    task: TaskSetting, units: Sequence[Unit], where: str, report: Callable[[str, int, int], None]
) -> tuple[str, ...]:
    """All labels of the rows, sorted. where: the input's name.

    Raises:
        DataProblem: there are none, or such that nothing can be learnt of them.
    """
    found: Counter[str] = Counter()
    for number, unit in enumerate(units):
        report("reading for the labels", number, len(units))
        for span in unit:
            found += task.labels_in(span)
        if len(found) > MAX_MARK:
            raise DataProblem(
                f"more than {MAX_MARK:,} labels, such as {shown(min(found))}", where=where, fix=_COLUMN
            )
    require_learnable(found, where)
    return tuple(sorted(found))


def require_learnable(found: Counter[str], where: str) -> None:
    """Raises DataProblem where labels, counted, tell nothing apart, or name each row anew."""
    if not found:
        raise DataProblem("no labels in the input", where=where, fix="check --input and --column")
    example, places = shown(min(found)), found.total()
    if len(found) == 1:
        what = f"{example} is the label everywhere: there is nothing to tell apart"
        raise DataProblem(what, where=where, fix=f"{_COLUMN}, or all that there may be with --labels")
    if len(found) > FEW and 2 * len(found) > places:
        why = "nearly each stands once"
    elif len(found) > NUMBERS and _are_fractions(found):
        why = "numbers are a quantity, not classes"
    else:
        return
    raise DataProblem(
        f"{counted(len(found), 'different label')} in {places:,} places, such as {example}: {why}",
        where=where,
        fix=f"{_COLUMN}, or make a few classes of them; to learn them all the same, name all with --labels",
    )


def _are_fractions(labels: Counter[str]) -> bool:
    """Whether all are numbers, and some not whole."""
    try:
        return any(not float(label).is_integer() for label in labels)
    except ValueError:
        return False
