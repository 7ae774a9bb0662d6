"""The tasks by their names, and a task as the user sets it."""

from __future__ import annotations

import csv
from collections.abc import Sequence

from bigtfm.config.problems import ConfigProblem, did_you_mean
from bigtfm.data.examples import TaskSetting
from bigtfm.tasks import (
    chat,
    classification,
    question_answering,
    relation_extraction,
    summarisation,
    tagging,
    translation,
)
from bigtfm.tasks.task import Task

TASKS: dict[str, Task] = {
    module.TASK.format.name: module.TASK
    for module in (
        classification,
        tagging,
        relation_extraction,
        question_answering,
        translation,
        summarisation,
        chat,
    )
}


def task_of(name: str) -> Task:
    """The task of that name.

    Raises:
        ConfigProblem: there is none.
    """
    if name not in TASKS:
        raise ConfigProblem(f"unknown --task '{name}'", where="command line", fix=did_you_mean(name, TASKS))
    return TASKS[name]


def setting_of(
    name: str,
    columns: Sequence[str] = (),
    labels: str | None = None,
    max_tokens: int = 512,
    template: str | None = None,
) -> TaskSetting:
    """What `bigtfm prepare --task` asks for; columns: NAME=COLUMN each; labels: with commas between them, one
    that has a comma in double quotes.

    Raises:
        ConfigProblem: something of it is none of the task's.
    """
    form = task_of(name).format

    def problem(what: str, fix: str) -> ConfigProblem:
        return ConfigProblem(what, where="command line", fix=fix)

    chosen = dict(form.columns)
    for one in columns:
        own, equals, column = one.partition("=")
        if not equals or not column:
            raise problem(f"--column {one} is not NAME=COLUMN", f"for example {next(iter(chosen))}=my_column")
        if own not in chosen:
            raise problem(f"--task {name} reads no '{own}'", did_you_mean(own, chosen))
        chosen[own] = column
    if labels is not None and form.labels_of is None:
        raise problem(f"--labels does nothing for --task {name}", "leave it out")
    stated = tuple(_listed(labels)) if labels is not None else ()
    if len({*stated}) < len(stated) or "" in stated:
        raise problem("--labels has one twice, or an empty one", "name each label once")
    if len(stated) == 1:
        raise problem(f"--labels has {stated[0]} alone: there is nothing to tell apart", "name two or more")
    if template is not None and name != "chat":
        raise problem(f"--template does nothing for --task {name}", "leave it out")
    if template is not None and template not in chat.TEMPLATES:
        raise problem(f"unknown --template '{template}'", did_you_mean(template, chat.TEMPLATES))
    if max_tokens < 8:
        raise problem(f"--max-tokens is {max_tokens}", "pass 8 or more")
    options = {"template": template or "plain"} if name == "chat" else {}
    return TaskSetting(form, chosen, stated, max_tokens, options)


def _listed(labels: str) -> list[str]:
    """The values of a line of CSV."""
    try:
        [values] = csv.reader([labels], skipinitialspace=True, strict=True)
    except (csv.Error, ValueError):
        fix = "put commas between labels, and double quotes around one that has a comma"
        raise ConfigProblem("--labels can't be read", where="command line", fix=fix) from None
    return [value.strip() for value in values]
