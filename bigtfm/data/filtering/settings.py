"""What of the text becomes a data set: a TOML file of filters, read strictly; part of the set's identity.

    [gopher]                       # rules of length and symbols, each with the paper's value
    [language]
    keep = ["en"]
    [duplicates]
    near = 0.8
    [mask]
    [contamination]
    files = ["eval.jsonl"]

A section that is there is on. How the filters are carried out: units.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field

from bigtfm.config.optional import library
from bigtfm.config.problems import ConfigProblem, DataProblem, did_you_mean, shown
from bigtfm.config.sections import Section
from bigtfm.config.strict_toml import read_toml, validated
from bigtfm.data.examples import TaskSetting

Maskable = Literal["email", "ip", "phone", "card"]
SHORTEST_NGRAM = 8  # words; Brown et al. 2020, appendix C


class Gopher(Section):
    """The rules of Rae et al. 2021, "Scaling language models: Gopher", appendix A.1.1."""

    min_words: int = Field(default=50, ge=0, description="least words of a document")
    max_words: int = Field(default=100_000, ge=1, description="most words of a document")
    min_mean_word: float = Field(default=3.0, ge=0, description="least mean length of a word, in characters")
    max_mean_word: float = Field(
        default=10.0, gt=0, description="greatest mean length of a word, in characters"
    )
    max_symbols: float = Field(default=0.1, ge=0, description="most # and ellipses a word")
    max_bullets: float = Field(default=0.9, ge=0, le=1, description="largest share of lines with a bullet")
    max_ellipses: float = Field(default=0.3, ge=0, le=1, description="largest share of lines that end in ...")
    min_alphabetic: float = Field(default=0.8, ge=0, le=1, description="least share of words with a letter")
    min_stop_words: int = Field(default=2, ge=0, description="least number of different stop words")
    stop_words: tuple[str, ...] = Field(
        default=("the", "be", "to", "of", "and", "that", "have", "with"),
        strict=False,
        description="what counts as one; those of the paper are English",
    )


class Language(Section):
    """What language the text is in, as py3langid has it."""

    keep: tuple[str, ...] = Field(
        strict=False, min_length=1, description='codes of ISO 639-1, such as ["en"]'
    )
    characters: int = Field(
        default=500, ge=20, description="how much of a document is looked at, from its start"
    )


class Duplicates(Section):
    """Of documents that are alike the first one stays."""

    exact: bool = Field(default=True, description="drop what is the same byte for byte")
    near: float = Field(
        default=0.8,
        ge=0,
        le=1,
        description="drop what has this Jaccard similarity with an earlier one; 0: don't",
    )
    shingle: int = Field(default=5, ge=1, description="words in the pieces that are compared")
    permutations: int = Field(default=128, ge=16, le=1024, description="numbers in a MinHash signature")


class Mask(Section):
    """Personal data that is replaced by <email>, <ip>, <phone>, <card>."""

    kinds: tuple[Maskable, ...] = Field(
        default=get_args(Maskable), strict=False, min_length=1, description="what is replaced"
    )


class Contamination(Section):
    """What is in an evaluation set, too, goes (Brown et al. 2020, GPT-3, appendix C)."""

    files: tuple[str, ...] = Field(
        default=(), strict=False, description="evaluation sets, of any kind that --input takes"
    )
    ngram: int = Field(
        default=13, ge=SHORTEST_NGRAM, description="words in a row that no document may share with them"
    )


class Filters(Section):
    """All filters; None: off. text_column: of the evaluation sets; digests: of their files."""

    gopher: Gopher | None = None
    language: Language | None = None
    duplicates: Duplicates | None = None
    mask: Mask | None = None
    contamination: Contamination | None = None
    text_column: str = "text"
    digests: tuple[str, ...] = ()

    @property
    def identity(self) -> dict[str, Any]:
        """What decides which documents stay, for the header: files by content, versions of libraries."""
        found = self.model_dump(mode="json", exclude_none=True, exclude={"text_column", "digests"})
        if self.contamination is not None:
            found["contamination"]["files"] = list(self.digests)
        if self.language is not None:
            found["language"]["py3langid"] = _version("py3langid")
        if self.duplicates is not None and self.duplicates.near:
            found["duplicates"]["rensa"] = _version("rensa")
        return found

    @property
    def compares(self) -> bool:
        """Whether documents are compared with each other."""
        return self.duplicates is not None and (self.duplicates.exact or self.duplicates.near > 0)


_SECTIONS: dict[str, type[Section]] = {
    "gopher": Gopher,
    "language": Language,
    "duplicates": Duplicates,
    "mask": Mask,
    "contamination": Contamination,
}


def load_filters(path: str | Path | None, exclude: Sequence[str], text_column: str) -> Filters | None:
    """The file's filters, and evaluation sets to keep out besides; None: there are neither.

    Raises:
        ConfigProblem: the file is wrong, a language unknown, or a library not installed.
        DataProblem: an evaluation set is not there.
    """
    if path is None and not exclude:
        return None
    values = read_toml(Path(path), "pass one like that in docs/data.md") if path is not None else {}
    where = str(path) if path is not None else "--exclude"
    for name in values.keys() - _SECTIONS.keys():
        raise ConfigProblem(f"unknown section '{name}'", where=where, fix=did_you_mean(name, _SECTIONS))
    found: dict[str, Any] = {
        name: validated(_SECTIONS[name], table, f"{where}: [{name}]") for name, table in values.items()
    }
    if exclude:
        before = found.get("contamination", Contamination())
        found["contamination"] = before.model_copy(update={"files": (*before.files, *exclude)})
    files = found["contamination"].files if "contamination" in found else ()
    digests = tuple(map(_digest, files))
    filters = Filters.model_construct(**found, text_column=text_column, digests=digests)
    _require(bool(found), "it has no section", where, f"write one of: {', '.join(_SECTIONS)}")
    _require("contamination" not in found or bool(files), "[contamination] has no files", where, "name some")
    if filters.language is not None:
        _languages(filters.language, where)
    if filters.duplicates is not None:
        what = "[duplicates] has exact = false and near = 0: nothing to do"
        _require(filters.compares, what, where, "remove the section")
        if filters.duplicates.near:
            needed("rensa", "near duplicates")
    return filters


def require_for_rows(filters: Filters, task: TaskSetting) -> None:
    """Raises ConfigProblem where a filter would spoil the rows of a task."""
    where = f"filters for --task {task.format.name}"
    _require(
        filters.mask is None,
        "[mask] would change the text, and what the rows say of its words would be wrong",
        where,
        "leave [mask] out, or mask the rows before",
    )
    near = filters.duplicates is not None and filters.duplicates.near > 0
    _require(
        not (near and task.format.share_texts),
        "rows that ask different things of one text would be near duplicates",
        where,
        "set near = 0 in [duplicates]: what is the same goes all the same",
    )


def _languages(section: Language, where: str) -> None:
    known = language_identifier().nb_classes
    for code in section.keep:
        if code not in known:
            fix = f"use codes of ISO 639-1, such as {', '.join(('en', 'de', 'fr', 'es', 'zh'))}"
            raise ConfigProblem(f"unknown language {shown(code)}", where=f"{where}: [language]", fix=fix)


def language_identifier() -> Any:
    """py3langid's, with the model that comes in its package."""
    langid = needed("py3langid.langid", "[language]")
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE)


def needed(module: str, what: str) -> Any:
    """A library of the extra `filters`.

    Raises:
        ConfigProblem: it is not installed.
    """
    lacking = f"{module.partition('.')[0]} is not installed, and needed for {what}"
    return library(module, lacking, where="filters", extra="filters")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _digest(path: str) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        fix = "pass files that are there"
        raise DataProblem(f"can't be read: {error.strerror}", where=path, fix=fix) from None


def _require(holds: bool, what: str, where: str, fix: str) -> None:
    if not holds:
        raise ConfigProblem(what, where=where, fix=fix)
