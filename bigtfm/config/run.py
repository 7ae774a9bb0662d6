"""The run config: model, data, objective, steps, evaluation, saving: TOML, then `key=value` overrides.

It has no field for anything that the DeepSpeed JSON has a key for (batch sizes, precision, optimizer, lr,
schedule, clipping, ZeRO): those live there and only there. The defaults are the quickstart's.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Collection, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from bigtfm.config.deepspeed_walk import place_of
from bigtfm.config.problems import ConfigProblem, did_you_mean, shown
from bigtfm.config.sections import (
    HEADED,
    LABELLED,
    OBJECTIVES,
    SUPERVISED,
    USED_BY,
    BatchSection,
    ComputeSection,
    DataSection,
    DistillSection,
    EvalSection,
    GuardSection,
    ModelSection,
    Objective,
    ObjectiveSection,
    ResumeSection,
    RunSection,
    SaveSection,
    Section,
    TrackSection,
    TuneSection,
)


class RunConfig(Section):
    """One run. Frozen; every field states its unit."""

    run: RunSection = RunSection()
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    objective: ObjectiveSection = ObjectiveSection()
    distill: DistillSection = DistillSection()
    tune: TuneSection = TuneSection()
    batch: BatchSection = BatchSection()
    compute: ComputeSection = ComputeSection()
    eval: EvalSection = EvalSection()
    save: SaveSection = SaveSection()
    guard: GuardSection = GuardSection()
    track: TrackSection = TrackSection()
    resume: ResumeSection = ResumeSection()

    @model_validator(mode="after")
    def _objective_fits(self) -> RunConfig:
        family, objective = self.model.family, self.objective
        if objective.kind and objective.kind not in OBJECTIVES[family]:
            raise ValueError(
                f"a {family} can't learn objective.kind {objective.kind}",
                f"set objective.kind to {' or '.join(OBJECTIVES[family])}, or another model.family",
            )
        if self.model.num_labels and self.objective_kind not in LABELLED:
            raise ValueError(
                f"model.num_labels does nothing for {self.objective_kind}",
                f"leave it out; it is for {' and '.join(LABELLED)}",
            )
        if self.tune.train == "head" and self.objective_kind not in HEADED:
            raise ValueError(
                f"tune.train head leaves nothing to train: {self.objective_kind} has no head of its own",
                "set tune.train to all",
            )
        useless = {
            "where the head alone is trained": (
                "layer_decay",
                "embeddings",
                "lora_rank",
                "lora_alpha",
                "lora_on",
            )
            if self.tune.train == "head"
            else (),
            "where adapters are trained": ("embeddings",) if self.tune.lora_rank else (),
            "without tune.lora_rank": () if self.tune.lora_rank else ("lora_alpha", "lora_on"),
        }
        for where, names in useless.items():
            for name in names:
                if getattr(self.tune, name) != TuneSection.model_fields[name].default:
                    raise ValueError(f"tune.{name} does nothing {where}", f"leave tune.{name} out")
        if self.tune.lora_rank and self.model.keep_zeros:
            raise ValueError(
                "model.keep_zeros can't keep the zeros of a matrix that an adapter is merged into",
                "leave tune.lora_rank out, or model.keep_zeros",
            )
        if self.tune.lora_rank and self.objective.l1:
            raise ValueError(
                "objective.l1 is a penalty on the weights, which stay as they are where adapters are trained",
                "set objective.l1 to 0",
            )
        if not self.tune.embeddings and self.model.tied_embeddings and self.objective_kind not in HEADED:
            raise ValueError(
                "tune.embeddings false would leave the output layer as it is, too: it is tied to them",
                "set model.tied_embeddings to false",
            )
        if self.run.vectors and self.run.init_from:
            raise ValueError(
                "run.vectors and run.init_from both say what the embedding begins with", "keep one of them"
            )
        if self.distill.teacher and self.objective_kind in HEADED:
            raise ValueError(
                f"distill.teacher teaches tokens, and {self.objective_kind} learns none",
                "leave distill.teacher out",
            )
        if self.objective_kind in SUPERVISED and (self.data.packing != "best_fit" or self.data.stream):
            raise ValueError(
                f"objective.kind {self.objective_kind} learns whole examples, and "
                + ("a stream has none" if self.data.stream else "windows would cut them"),
                "prepare a task's data set, and leave data.stream out"
                if self.data.stream
                else "set data.packing to best_fit",
            )
        for name, kinds in USED_BY.items():
            default = type(objective).model_fields[name].default
            if self.objective_kind not in kinds and getattr(objective, name) != default:
                raise ValueError(
                    f"objective.{name} does nothing for {self.objective_kind}",
                    f"leave it out; it is for {' and '.join(kinds)}",
                )
        if self.model.attention_dropout and self.compute.attention not in ("auto", "reference"):
            raise ValueError(
                f"compute.attention {self.compute.attention} can't drop attention weights",
                "set model.attention_dropout to 0, or compute.attention to auto",
            )
        if objective.mask_random + objective.mask_keep > 1:
            raise ValueError(
                f"objective.mask_random {objective.mask_random} + mask_keep {objective.mask_keep} is over 1",
                "set them to shares of the hidden tokens, such as 0.1 and 0.1",
            )
        if objective.next_sentence and not self.model.next_sentence:
            raise ValueError(
                "objective.next_sentence needs a model with a next-sentence head",
                "set model.next_sentence to true and model.token_types to 2",
            )
        if objective.next_sentence and self.data.stream:
            raise ValueError(
                "objective.next_sentence takes sentences from all over the text, and a stream is read once",
                "set objective.next_sentence to 0, or `bigtfm prepare` the text and leave data.stream out",
            )
        return self

    @property
    def objective_kind(self) -> Objective:
        """What is predicted."""
        return self.objective.kind or OBJECTIVES[self.model.family][0]

    @property
    def supervised(self) -> bool:
        """Whether it learns a task's examples."""
        return self.objective_kind in SUPERVISED

    @model_validator(mode="after")
    def _sequence_fits(self) -> RunConfig:
        if self.seq_len > self.model.max_seq_len:
            raise ValueError(
                f"data.seq_len {self.seq_len} is longer than model.max_seq_len {self.model.max_seq_len}",
                f"set data.seq_len to {self.model.max_seq_len} or less, or raise model.max_seq_len",
            )
        return self

    @property
    def seq_len(self) -> int:
        """Tokens in a training sequence."""
        return self.data.seq_len or self.model.max_seq_len

    @property
    def run_dir(self) -> Path:
        """The run directory."""
        return Path(self.run.dir) / self.run.name


def to_toml(run: RunConfig, head: str) -> str:
    """A run config as a file, whose first line is `head`: what differs from the defaults."""
    lines = [head]
    for table, values in run.model_dump(mode="json", exclude_defaults=True, exclude_none=True).items():
        lines += ["", f"[{table}]", *(f"{key} = {_toml_value(value)}" for key, value in values.items())]
    return "\n".join(lines) + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{name} = {_toml_value(each)}" for name, each in value.items()) + " }"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml_value, value))}]"
    return json.dumps(value, ensure_ascii=False)


def load_run_config(path: Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Defaults, then the TOML file at `path` (if any), then `key=value` overrides.

    A key on the command line may leave its table out where only one has it: steps=1000 is run.steps=1000.

    Raises:
        ConfigProblem: the file can't be read, is no TOML, or a key or value is wrong. The line names the
            first mistake and how many more there are.
    """
    values = _read(path) if path else {}
    overridden = {_apply(values, override) for override in overrides}
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise _explain(error, str(path) if path else "run config", overridden) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        fix = "pass an existing run config with --config, for example configs/quickstart.toml"
        raise ConfigProblem("no such file", where=str(path), fix=fix) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigProblem(f"not valid TOML: {error}", where=str(path), fix="correct that line") from None
    except RecursionError:
        raise ConfigProblem("nested too deeply", where=str(path), fix="pass a run config") from None
    except (OSError, ValueError) as error:  # a folder, or no UTF-8
        raise ConfigProblem(f"can't be read: {error}", where=str(path), fix="pass a TOML file") from None


def _sections() -> dict[str, type[Section]]:
    """The tables of the run config."""
    fields: dict[str, Any] = dict(RunConfig.model_fields)
    return {table: field.annotation for table, field in fields.items()}


def _apply(values: dict[str, Any], override: str) -> str:
    """Enter `key=value` into `values`; returns the key's full name."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        fix = "write for example run.steps=1000"
        raise ConfigProblem(f"'{override}' is not key=value", where="command line", fix=fix)
    path = _locate(key.strip())
    table, _, name = path.partition(".")
    section = values.setdefault(table, {})
    if not isinstance(section, dict):
        fix = f"write [{table}] on a line of its own, above its keys"
        raise ConfigProblem(f"{table} must be a table, not {shown(section)}", where="run config", fix=fix)
    section[name] = _parse(text, _sections()[table].model_fields[name].annotation)
    return path


def _locate(key: str) -> str:
    """Full name of `key`, which may lack its table."""
    known = [f"{table}.{name}" for table, section in _sections().items() for name in section.model_fields]
    matches = [path for path in known if key in (path, path.partition(".")[2])]
    if len(matches) > 1:
        fix = f"write one of: {', '.join(matches)}"
        raise ConfigProblem(f"key '{key}' is ambiguous", where="command line", fix=fix)
    if not matches:
        raise ConfigProblem(f"unknown key '{key}'", where="command line", fix=_unknown_fix(key))
    return matches[0]


def _parse(text: str, annotation: Any) -> Any:
    """A TOML value where it is one, else the text itself: quotes are for the shell, not for us."""
    try:
        parsed = tomllib.loads(f"value = {text}")
        value = parsed["value"] if len(parsed) == 1 else text
    except (ValueError, RecursionError):  # no TOML, or brackets without end
        value = text
    if annotation is str and not isinstance(value, str):
        return text  # a run may be called 2024-05-01
    kinds = (annotation, *get_args(annotation))  # the tuple of `tuple[...] | None`, too
    if not any(get_origin(kind) is tuple for kind in kinds) or isinstance(value, list):
        return value
    return [_parse(part.strip(), None) for part in value.split(",")] if isinstance(value, str) else [value]


def _unknown_fix(key: str) -> str:
    """For an unknown 'table.name' or 'name': the key that was meant, here or in the DeepSpeed JSON."""
    table, _, name = key.rpartition(".")
    sections = _sections()
    known = {
        f"{section}.{field}": field for section, model in sections.items() for field in model.model_fields
    }
    elsewhere = [path for path, field in known.items() if field == name]
    if elsewhere:
        return f"did you mean {' or '.join(repr(path) for path in elsewhere)}?"
    place = place_of(name)
    if place:
        return f"it belongs into the DeepSpeed JSON, as {place}"
    if not table and name in sections:
        return f"write {name}.KEY=VALUE, with KEY one of: {', '.join(sections[name].model_fields)}"
    same_table = {path: field for path, field in known.items() if path.startswith(f"{table}.")}
    for paths in (same_table, known):
        close = get_close_matches(name, paths.values(), n=1) or get_close_matches(
            name, paths.values(), n=1, cutoff=0.55
        )
        if close:
            return " or ".join(
                f"did you mean '{path}'?" for path, field in paths.items() if field == close[0]
            )
    return did_you_mean(name, same_table.values() or sections)


def _explain(error: ValidationError, where: str, overridden: Collection[str]) -> ConfigProblem:
    """One line for the first thing that is wrong, and how many more there are."""
    by_key: dict[str, list[ErrorDetails]] = {}
    for detail in error.errors():
        by_key.setdefault(_key(detail["loc"]), []).append(detail)
    key, details = next(iter(by_key.items()))
    more = f" (and {len(by_key) - 1} more)" if len(by_key) > 1 else ""
    what, fix = _finding(key, details)
    said_there = key.partition("[")[0] in overridden
    return ConfigProblem(what + more, where="command line" if said_there else where, fix=fix)


def _key(loc: tuple[int | str, ...]) -> str:
    """table.name, or table.name[n].name in a list of tables.

    A union reports every branch, under the key and the name of the branch; a tuple, the place in it.
    """
    key = ".".join(str(part) for part in loc[:2])
    return f"{key}[{loc[2]}].{loc[3]}" if len(loc) > 3 and isinstance(loc[2], int) else key


def _fields(table: str) -> dict[str, FieldInfo]:
    """The keys of a table, or of `table.name[n]`, an entry of a list of tables."""
    section, _, name = table.partition("[")[0].partition(".")
    fields = _sections()[section].model_fields
    return get_args(fields[name].annotation)[0].model_fields if name else fields


def _finding(key: str, details: list[ErrorDetails]) -> tuple[str, str]:
    """What is wrong with `key`, and the fix."""
    first = details[0]
    if first["type"] == "extra_forbidden":
        table, _, name = key.rpartition(".")
        if "[" in key:
            return f"unknown key '{key}'", did_you_mean(name, _fields(table))
        return f"unknown key '{key}'", _unknown_fix(key) if table else _unknown_table_fix(key)
    if first["type"] == "value_error":  # raised by a validator above, with its fix
        what, fix = first["ctx"]["error"].args
        return what, fix
    if "." not in key:
        return f"{key} must be a table, not {shown(first['input'])}", f"write [{key}] above its keys"
    expected = " or ".join(dict.fromkeys(_expectation(detail) for detail in details))
    if first["type"] == "missing" and "[" in key:
        return f"{key} is missing", f"state {key.rpartition('.')[2]} in each of these tables"
    table, _, name = key.rpartition(".")
    field = _fields(table)[name]
    annotation = field.annotation
    value, fix = first["input"], f"{key} is: {field.description}"
    if (
        isinstance(value, str)
        and annotation is not str
        and not isinstance(_parse(value, annotation), (str, list))
    ):
        fix = f"write {value} without quotes"
    elif isinstance(value, float) and value.is_integer() and first["type"] == "int_type":
        fix = f"write {int(value)}"
    elif close := get_close_matches(str(value), re.findall("'([^']*)'", expected), n=1):
        fix = f"did you mean '{close[0]}'?"
    return f"{key} must be {expected}, not {shown(value)}", fix


def _expectation(detail: ErrorDetails) -> str:
    """Completes "must be ..." from pydantic's sentence."""
    if detail["type"] == "string_pattern_mismatch":
        return "letters, digits, '.', '_' or '-', not beginning with one of the last three"
    if detail["type"] == "model_type":
        return "a list of tables"
    if detail["type"] == "missing":  # of a list
        return "a longer list"
    for begin in ("Input should be ", "String should have ", "Tuple should have "):
        if detail["msg"].startswith(begin):
            return detail["msg"].removeprefix(begin)
    return detail["msg"]


def _unknown_table_fix(table: str) -> str:
    """For something unknown at the top of the file: a mistyped table, or a key above the first [table]."""
    known = [name for name in _sections() if name in get_close_matches(table, _sections(), n=1)]
    return f"did you mean [{known[0]}]?" if known else _unknown_fix(table)
