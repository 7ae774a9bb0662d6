"""Filters of `bigtfm prepare`: rules, masks, duplicates against brute force, and the same bytes."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigtfm.config.problems import ConfigProblem, DataProblem, Problem
from bigtfm.data.filtering import duplicates as filters_duplicates
from bigtfm.data.filtering import run as filters_run
from bigtfm.data.filtering import settings as filters_module
from bigtfm.data.filtering.duplicates import banding, compare
from bigtfm.data.filtering.rules import Ngrams, broken_rule, luhn, masked, ngrams, words_of
from bigtfm.data.filtering.settings import Gopher, load_filters
from bigtfm.data.filtering.units import Filtering, Judge, judge_unit
from bigtfm.data.indexed import TokenDataset
from bigtfm.data.prepare import prepare
from bigtfm.data.sources import Reading, find_sources, plan_units
from bigtfm.data.tokenizer import SentencePieceTokenizer, load_tokenizer
from bigtfm.data.train_tokenizer import train_sentencepiece
from bigtfm.tasks.known import setting_of

VOCABULARY = (
    "the people of this great union shall speak with one voice and that have to be heard in every valley"
    " mountain river city farm school house senate border market engine harbour winter summer letter"
).split()
READING = Reading("text", 1024, 2000)


def prose(seed: int, words: int = 80) -> str:
    """Sentences that break no rule."""
    drawn = random.Random(seed)
    return " ".join(drawn.choices(VOCABULARY, k=words)).capitalize() + f" number{seed}."


def changed(text: str, share: float, seed: int) -> str:
    """The text with this share of its words replaced, in one place."""
    words = text.split()
    count = round(share * len(words))
    words[10 : 10 + count] = [f"other{seed}n{n}" for n in range(count)]
    return " ".join(words)


def write_rows(path: Path, rows: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    return path


def digest(out: Path) -> str:
    """Of all files of a data set but prepare.json, which knows the inputs' times."""
    found = hashlib.sha256()
    for path in sorted(out.rglob("*")):
        if path.is_file() and path.name != "prepare.json":
            found.update(str(path.relative_to(out)).encode() + path.read_bytes())
    return found.hexdigest()


def texts(out: Path) -> list[str]:
    """The documents of a data set."""
    dataset = TokenDataset.open(out)
    dataset.verify()
    tokenizer, found = load_tokenizer(dataset.tokenizer_path), []
    for name in ("train", "validation"):
        split = dataset.split(name)
        starts = [*split.document_starts(0, split.num_tokens).tolist(), split.num_tokens]
        found += [tokenizer.decode_bytes(split.read(a, b)[1:-1]).decode() for a, b in pairwise(starts)]
    return sorted(found)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    sample = [prose(seed, 400).encode() for seed in range(30)] + [
        b"<email> joe@example.com \xc3\xa4 0123456789"
    ]
    SentencePieceTokenizer(train_sentencepiece(sample, vocab_size=420)).save(folder)
    return folder / "tokenizer.model"


@pytest.fixture
def run(tmp_path: Path, model: Path) -> Callable[..., Path]:
    """prepare() with these filters; small units, so that documents that are alike lie in different ones."""

    def call(rows: list[str], toml: str, name: str = "out", **options: Any) -> Path:
        source = write_rows(tmp_path / "rows.jsonl", rows) if rows else tmp_path / "rows.jsonl"
        (tmp_path / "filters.toml").write_text(toml)
        settings = {"tokenizer": model, "workers": 1, "unit_bytes": 2000, "progress": False} | options
        prepare([str(source)], tmp_path / name, filters=tmp_path / "filters.toml", **settings)
        return tmp_path / name

    return call


# --- rules


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (prose(1), None),
        (prose(1, 40), "too few words"),
        (prose(1, 300), "too many words"),
        ("a b c d " * 20, "mean word length"),
        ("pneumonoultramicroscopic " * 60, "mean word length"),
        (prose(1) + " #" * 20, "symbols"),
        (prose(1) + " word... wait…" * 10, "symbols"),
        ("\n".join(f"- {prose(n, 12)}" for n in range(6)), "bullets"),
        ("\n".join(f"{prose(n, 30)}..." for n in range(5)), "ellipses"),
        (prose(1) + " 1234" * 30, "words without a letter"),
        ("lorem ipsum dolor amet " * 20, "stop words"),
        ("lorem ipsum dolor amet the " * 20, "stop words"),
        ("lorem ipsum dolor amet the and " * 20, None),
        (" \n ", "too few words"),
    ],
)
def test_gophers_rules(text: str, reason: str | None) -> None:
    assert broken_rule(text, Gopher(max_words=250)) == reason


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Mail a.b+c@mail.example.co.uk now", "Mail <email> now"),
        ("not@mail, @name and a@b.c", "not@mail, @name and a@b.c"),
        ("from 192.168.0.1, or fe80::1ff:fe23:4567:890a", "from <ip>, or <ip>"),
        (
            "version 1.2.3, 10.0.0.256, at 12:30:45, std::vector",
            "version 1.2.3, 10.0.0.256, at 12:30:45, std::vector",
        ),
        ("+49 30 1234567, (415) 555-2671, 415-555-2671", "<phone>, <phone>, <phone>"),
        ("1990 1991 1992, 2019-2020, 100,000,000", "1990 1991 1992, 2019-2020, 100,000,000"),
        ("4111 1111 1111 1111 or 378282246310005", "<card> or <card>"),
        ("4111 1111 1111 1112", "4111 1111 1111 1112"),
        ("half a pair \udcff joe@example.com", "half a pair \udcff <email>"),
    ],
)
def test_personal_data_is_masked(text: str, wanted: str) -> None:
    found, counts = masked(text, ("email", "ip", "phone", "card"))
    assert found == wanted
    assert sum(counts.values()) == len(re.findall("<(?:email|ip|phone|card)>", wanted))
    assert masked(text, ())[0] == text


def test_luhn() -> None:
    assert luhn("79927398713")
    assert [digit for digit in "0123456789" if luhn("7992739871" + digit)] == ["3"]


def test_ngrams_of_an_evaluation_set() -> None:
    item = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    known = Ngrams([item, "Alpha, beta gamma delta epsilon zeta eta theta!", "too short to count"], 13)
    assert known.in_text(words_of(f"before {item.upper()} after"))
    assert known.in_text(
        words_of("before two three four five six seven eight nine ten eleven twelve thirteen fourteen")
    )
    assert not known.in_text(words_of(item.replace("seven", "SEVENTH")))
    assert known.in_text(words_of("x alpha beta gamma delta epsilon zeta eta theta y"))
    assert not known.in_text(words_of("alpha beta gamma delta epsilon zeta eta"))
    assert not known.in_text(words_of("too short to count " * 5))


# --- duplicates


def jaccard(one: str, other: str) -> float:
    a, b = set(ngrams(words_of(one), 5)), set(ngrams(words_of(other), 5))
    return len(a & b) / len(a | b)


def judged(tmp_path: Path, rows: list[str], toml: str, unit_bytes: int = 2000) -> tuple[Filtering, int]:
    source = write_rows(tmp_path / "rows.jsonl", rows)
    (tmp_path / "filters.toml").write_text(toml)
    wanted = load_filters(tmp_path / "filters.toml", (), "text")
    assert wanted is not None
    reading = Reading("text", 1024, unit_bytes)
    filtering = Filtering(tmp_path / f"filtered-{unit_bytes}", wanted, reading)
    units = plan_units(find_sources([str(source)]), reading)
    for number, unit in enumerate(units):
        judge_unit(filtering, number, unit)
    return filtering, len(units)


def test_near_duplicates_are_those_of_brute_force(tmp_path: Path) -> None:
    rows = [prose(seed, 400) for seed in range(60)]
    rows += [changed(rows[n], share, n) for n, share in enumerate(np.linspace(0, 0.3, 60))]
    random.Random(3).shuffle(rows)
    filtering, units = judged(tmp_path, rows, "[duplicates]\nnear = 0.8\npermutations = 256\n")
    assert units > 10
    compare(filtering, units, lambda *_: None)
    earlier = np.load(filtering.folder / "compared" / "earlier.npy")
    most = [max((jaccard(rows[n], rows[m]) for m in range(n)), default=0.0) for n in range(len(rows))]
    surely = {n for n, similarity in enumerate(most) if similarity > 0.9}
    perhaps = {n for n, similarity in enumerate(most) if similarity > 0.68}
    assert len(surely) >= 8
    assert len(set(range(len(rows))) - perhaps) > 70
    assert surely <= set(np.flatnonzero(earlier >= 0)) <= perhaps
    assert all(jaccard(rows[n], rows[earlier[n]]) > 0.68 for n in np.flatnonzero(earlier >= 0))
    assert all(before < n for n, before in enumerate(earlier))


@pytest.mark.parametrize("at_a_time", [15, 50])
def test_in_bounded_memory_and_any_units_the_same_is_found(tmp_path: Path, at_a_time: int) -> None:
    rows = [
        prose(seed % 40, 90) if seed % 3 else changed(prose(seed % 40, 90), 0.05, seed) for seed in range(100)
    ]
    found = []
    for unit_bytes, most in ((2000, filters_duplicates.AT_A_TIME), (2000, at_a_time), (9000, at_a_time)):
        folder = tmp_path / str(len(found))
        folder.mkdir()
        filtering, units = judged(folder, rows, "[duplicates]\n", unit_bytes)
        compare(filtering, units, lambda *_: None, most)
        found.append((np.load(filtering.folder / "compared" / "earlier.npy") >= 0).tolist())
    assert found[0] == found[1] == found[2]
    assert 40 < sum(found[0]) < 90


def test_banding_finds_what_reaches_the_threshold() -> None:
    for threshold, permutations in ((0.8, 128), (0.5, 128), (0.95, 64)):
        bands, rows = banding(threshold, permutations)
        assert bands * rows <= permutations
        assert 1 - (1 - threshold**rows) ** bands >= 0.99
        assert 1 - (1 - threshold ** (rows + 1)) ** (permutations // (rows + 1)) < 0.99


def test_exact_duplicates_alone(run: Callable[..., Path]) -> None:
    rows = [prose(seed) for seed in range(30)]
    out = run([*rows, *rows[5:15], changed(rows[20], 0.02, 0)], "[duplicates]\nnear = 0\n")
    assert texts(out) == sorted([*rows, changed(rows[20], 0.02, 0)])
    found = json.loads((out / "filters.json").read_text())
    assert found["dropped"]["exact duplicate"]["documents"] == 10
    near = run([], "[duplicates]\n", "near")
    assert texts(near) == sorted(rows)


# --- the whole


EVERYTHING = '[gopher]\n[language]\nkeep = ["en"]\n[duplicates]\n[mask]\n'
GERMAN = "Das ist der Bericht zur Lage der Nation, den niemand lesen will the and weil er so lang ist. " * 6


def mixed() -> tuple[list[str], list[str]]:
    """Rows, and what is to stay of them."""
    good = [prose(seed) for seed in range(40)]
    mail = [f"{prose(seed)} Write to joe{seed}@example.com." for seed in range(40, 44)]
    bad = [prose(1, 20), GERMAN, "- a\n" * 60, "", good[3], changed(good[4], 0.03, 1)]
    rows = [*good, *bad, *mail]
    stay = [*good, *(re.sub(r"joe\d+@example.com", "<email>", row) for row in mail)]
    return rows, sorted(stay)


def test_what_stays_and_what_the_report_says(run: Callable[..., Path]) -> None:
    rows, stay = mixed()
    out = run(rows, EVERYTHING)
    assert texts(out) == stay
    found = json.loads((out / "filters.json").read_text())
    dropped = {name: each["documents"] for name, each in found["dropped"].items()}
    assert dropped == {
        "too few words": 1, "mean word length": 1, "language": 1, "exact duplicate": 1, "near duplicate": 1,
    }  # fmt: skip
    assert (found["documents"], found["kept_documents"]) == (len(rows) - 1, len(stay))
    assert found["bytes"] == sum(map(len, rows))
    assert found["masked"] == {"email": 4}
    assert found["dropped"]["near duplicate"]["examples"][0]["like"] == rows[4][:400]
    page = (out / "filters.html").read_text()
    assert GERMAN[:100] in page
    assert "src=" not in page, "self-contained"
    options = TokenDataset.open(out).header.options
    assert options["filters"]["gopher"]["min_words"] == 50
    assert options["filters"]["duplicates"]["rensa"]


def test_without_filters_nothing_is_new(run: Callable[..., Path], tmp_path: Path, model: Path) -> None:
    rows, _ = mixed()
    out = run(rows, EVERYTHING)
    options = {"tokenizer": model, "workers": 1, "unit_bytes": 2000, "progress": False}
    with pytest.raises(DataProblem, match="holds a data set of another command"):
        prepare([str(tmp_path / "rows.jsonl")], out, **options)
    prepare([str(tmp_path / "rows.jsonl")], out, force=True, **options)
    assert "filters" not in TokenDataset.open(out).header.options
    assert not list(out.glob("filters.*"))
    assert len(texts(out)) == len([row for row in rows if row])


def test_the_page_escapes_what_a_document_says(run: Callable[..., Path]) -> None:
    out = run([*mixed()[0], "<script>alert(1)</script>"], "[gopher]\n")
    assert "<script>" not in (out / "filters.html").read_text()


@pytest.mark.slow
def test_any_number_of_workers_gives_the_same_bytes(run: Callable[..., Path]) -> None:
    """Also where the tokenizer is trained, of what stays."""
    rows, _ = mixed()
    more = {"tokenizer": None, "vocab_size": 400}
    outs = [run(rows, EVERYTHING, f"w{workers}", workers=workers, **more) for workers in (1, 2)]
    assert digest(outs[0]) == digest(outs[1])
    other = run(rows, EVERYTHING.replace("[mask]", ""), "other", **more)
    assert digest(other) != digest(outs[0]), "the comparison can fail"


def test_after_a_kill_judged_units_are_read(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, _ = mixed()
    whole = run(rows, EVERYTHING, "whole")
    real, calls = filters_run.run_all, list[int]()

    def stops(work: Any, wanted: Any, *more: Any) -> Any:
        for place, (number, record) in enumerate(real(work, wanted, *more)):
            calls.append(number)
            yield number, record
            if place == 1:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(filters_run, "run_all", stops)
        with pytest.raises(KeyboardInterrupt):
            run(rows, EVERYTHING)
        (whole.parent / "out" / ".prepare" / "filtered" / "00000001" / "hashes.npy").write_bytes(b"torn")
    with monkeypatch.context() as patch:
        patch.setattr(filters_duplicates, "_mark_near", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            run([], EVERYTHING)
    judged_again: list[int] = []

    def watched(work: Any, wanted: Any, *more: Any) -> Any:
        judged_again.extend(wanted)
        return real(work, wanted, *more)

    monkeypatch.setattr(filters_run, "run_all", watched)
    out = run([], EVERYTHING)
    assert judged_again == []
    assert calls == [0, 1]
    assert digest(out) == digest(whole)


def test_shards_where_nothing_is_compared(run: Callable[..., Path]) -> None:
    rows, _ = mixed()
    toml = "[gopher]\n[mask]\n"
    whole = run(rows, toml, "whole")
    for shard in ("1/2", "0/2"):
        out = run(rows, toml, shard=shard)
        rows = []
    assert not (out / "dataset.json").exists()
    assert digest(run([], toml)) == digest(whole)
    with pytest.raises(ConfigProblem, match=r"--shard is given, and \[duplicates\] compares all documents"):
        run([], EVERYTHING, "other", shard="0/2")


def test_an_evaluation_set_is_kept_out(run: Callable[..., Path], tmp_path: Path, model: Path) -> None:
    rows = [prose(seed) for seed in range(20)]
    part = " ".join(rows[7].split()[20:34])
    evaluation = write_rows(tmp_path / "eval.jsonl", [part, "nothing of it"])
    out = tmp_path / "excluded"
    write_rows(tmp_path / "rows.jsonl", rows)
    options = {"tokenizer": model, "workers": 1, "progress": False}
    prepare([str(tmp_path / "rows.jsonl")], out, exclude=[str(evaluation)], **options)
    assert texts(out) == sorted(rows[:7] + rows[8:])
    identity = TokenDataset.open(out).header.options["filters"]
    write_rows(evaluation, ["another"])
    with pytest.raises(DataProblem, match="another command"):
        prepare([str(tmp_path / "rows.jsonl")], out, exclude=[str(evaluation)], **options)
    assert identity["contamination"]["files"] != [str(evaluation)]


def test_rows_of_a_task_are_filtered_by_their_text(
    run: Callable[..., Path], tmp_path: Path, model: Path
) -> None:
    """Whatever their labels; a row of few words goes if it is one of the evaluation set."""
    said = [prose(seed) for seed in range(40)]
    rows = [{"text": text, "label": "ab"[seed % 2]} for seed, text in enumerate(said)]
    rows[20] = {"text": said[3], "label": "a"}
    rows[30] = {"text": changed(said[4], 0.0125, 1), "label": "b"}
    rows[35:37] = [{"text": "A good film!", "label": "a"}, {"text": "No good film.", "label": "b"}]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    evaluation = tmp_path / "eval.jsonl"
    evaluation.write_text("".join(f'{{"text": "{text}"}}\n' for text in ("a good film", said[7][:200])))
    setting = setting_of("classification", max_tokens=512)
    made = {}
    for unit_bytes in (2000, 1 << 20):
        out = run(
            [],
            "[duplicates]",
            f"{unit_bytes}",
            task=setting,
            exclude=[str(evaluation)],
            unit_bytes=unit_bytes,
        )
        made[unit_bytes] = texts(out)
    gone = {7, 20, 30, 35}
    assert made[2000] == made[1 << 20] == sorted(row["text"] for n, row in enumerate(rows) if n not in gone)
    report = json.loads((out / "filters.json").read_text())
    assert {name: found["documents"] for name, found in report["dropped"].items()} == {
        "contamination": 2, "exact duplicate": 1, "near duplicate": 1
    }  # fmt: skip


# --- mistakes, one line each


@pytest.mark.parametrize(
    ("task", "toml", "line"),
    [
        ("question_answering", "[duplicates]", "near duplicates. Fix: set near = 0"),
        ("relation_extraction", "[duplicates]", "near duplicates. Fix: set near = 0"),
        ("tagging", "[mask]", "would be wrong. Fix: leave \\[mask\\] out"),
    ],
)
def test_filters_that_would_spoil_rows(run: Callable[..., Path], task: str, toml: str, line: str) -> None:
    with pytest.raises(ConfigProblem, match=line):
        run([prose(0)], toml, task=setting_of(task))


@pytest.mark.parametrize(
    ("toml", "kind", "line"),
    [
        ("[gofer]", ConfigProblem, "unknown section 'gofer'. Fix: did you mean 'gopher'"),
        (
            "[gopher]\nmin_word = 3",
            ConfigProblem,
            r"\[gopher\]: unknown key 'min_word'. Fix: did you mean 'min_words'",
        ),
        ("", ConfigProblem, "it has no section"),
        (
            '[language]\nkeep = ["english"]',
            ConfigProblem,
            r'unknown language "english". Fix: use codes of ISO 639-1',
        ),
        ("[language]", ConfigProblem, "keep is missing"),
        ("[duplicates]\nexact = false\nnear = 0", ConfigProblem, "nothing to do"),
        ('[mask]\nkinds = ["name"]', ConfigProblem, "kinds can't be"),
        ("[contamination]", ConfigProblem, "has no files"),
        ('[contamination]\nfiles = ["nope.jsonl"]', DataProblem, "nope.jsonl: can't be read: No such file"),
        (
            '[language]\nkeep = ["fi"]',
            DataProblem,
            r"leave nothing of \d+ documents \(language 100%\)",
        ),
    ],
)
def test_a_mistake_is_one_line(run: Callable[..., Path], toml: str, kind: type[Problem], line: str) -> None:
    with pytest.raises(kind, match=line) as caught:
        run([prose(seed) for seed in range(10)], toml, tokenizer=None)
    assert "\n" not in caught.value.line


def test_a_library_that_is_not_there(run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "rensa", None)
    with pytest.raises(ConfigProblem, match=r"rensa is not installed.* Fix: pip install 'bigtfm\[filters\]'"):
        run([prose(1)], "[duplicates]\n")
    assert filters_module.load_filters(None, (), "text") is None


def test_bytes_that_are_no_text_come_through() -> None:
    wanted = filters_module.Filters(mask=filters_module.Mask())
    document = b"\xff\xfe joe@example.com \xed\xa0\x80"
    assert Judge(Filtering(Path(), wanted, READING)).clean(document) == b"\xff\xfe <email> \xed\xa0\x80"
