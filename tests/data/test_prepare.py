import gzip
import hashlib
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtfm.config.problems import ConfigProblem, DataProblem, StorageProblem
from bigtfm.data import prepare as prepare_module
from bigtfm.data.documents import document_hash, read_documents
from bigtfm.data.indexed import TokenDataset
from bigtfm.data.prepare import prepare
from bigtfm.data.sources import Reading, find_sources, plan_units
from bigtfm.data.tokenizer import SentencePieceTokenizer, load_tokenizer
from bigtfm.data.train_tokenizer import train_sentencepiece

WORDS = "we the people of this great union shall in congress assembled speak with one voice tonight".split()
KIB = 1024
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


def text(size, seed=0, paragraph=300):
    """`size` bytes of words in paragraphs."""
    rng = random.Random(seed)
    lines = [" ".join(rng.choices(WORDS, k=paragraph // 5)) for _ in range(size // paragraph + 2)]
    return "\n\n".join(lines).encode()[:size]


ROWS = [f"document {i}: {text(60, i).decode()}" for i in range(40)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tokenizer that is ready: most tests need not train one."""
    folder = tmp_path_factory.mktemp("model")
    SentencePieceTokenizer(train_sentencepiece([text(20_000)], vocab_size=300)).save(folder)
    return folder / "tokenizer.model"


def documents(out, *splits):
    """The documents of a data set, decoded; in the order of the stream."""
    dataset = TokenDataset.open(out)
    dataset.verify()
    tokenizer = load_tokenizer(dataset.tokenizer_path)
    found = []
    for name in splits or ("train", "validation"):
        split = dataset.split(name)
        starts = [*split.document_starts(0, split.num_tokens).tolist(), split.num_tokens]
        assert len(starts) == split.num_documents + 1
        for a, b in pairwise(starts):
            ids = split.read(a, b)
            assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
            assert not np.isin(ids[1:-1], [tokenizer.bos_id, tokenizer.eos_id]).any()
            found.append(tokenizer.decode_bytes(ids[1:-1]))
        assert split.header.max_id == split.read(0, split.num_tokens).max(initial=0) or not split.num_tokens
    assert sum(map(len, found)) == sum(
        dataset.split(name).num_bytes for name in splits or ("train", "validation")
    )
    return found


def digest(out):
    """SHA-256 of every file of a data set, prepare.json (which names the input's place and time) aside."""
    files = (path for path in sorted(out.rglob("*")) if path.is_file() and path.name != "prepare.json")
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def problem(call, *parts, kind=DataProblem):
    with pytest.raises(kind) as caught:
        call()
    line = caught.value.line
    assert "\n" not in line
    for part in parts:
        assert str(part) in line
    return line


# Inputs of every kind


def write_rows(path, rows=ROWS, column="text"):
    name = path.name
    if ".jsonl" in name:
        content = "".join(json.dumps({"id": i, column: row}) + "\n" for i, row in enumerate(rows)).encode()
    elif ".csv" in name:
        import csv

        buffer = io.StringIO()
        csv.writer(buffer).writerows([["id", column], *enumerate(rows)])
        content = buffer.getvalue().encode()
    else:
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.table({"id": range(len(rows)), column: rows})
        pyarrow.parquet.write_table(table, path, row_group_size=7)
        return path
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.csv.gz", "a.parquet"])
def test_rows_are_documents(tmp_path, model, name):
    rows = [
        *ROWS,
        'quotes "and", commas',
        "two\nlines\r\n",
        "caf\u00e9 \u2581 \U0001f600",
        " blanks  ",
        "",
        ROWS[0],
    ]
    path = write_rows(tmp_path / name, rows)
    summary = prepare([str(path)], tmp_path / "out", tokenizer=model, validation_fraction=0, unit_bytes=KIB)
    assert documents(tmp_path / "out") == [row.encode() for row in rows if row]
    assert summary.empty_documents == 1
    assert "1 empty document left out" in summary.line
    assert summary.splits["train"].documents == len(rows) - 1
    assert summary.splits["validation"].tokens == 0


def test_another_column(tmp_path, model):
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        path = write_rows(tmp_path / name, column="content")
        out = tmp_path / f"out-{name}"
        problem(
            lambda path=path, out=out: prepare([str(path)], out, tokenizer=model), "no column 'text'", path
        )
        line = problem(
            lambda path=path, out=out: prepare([str(path)], out, tokenizer=model, text_column="contents"),
            "did you mean 'content'",
        )
        assert ":1:" in line or name == "a.parquet"
        prepare([str(path)], out, tokenizer=model, text_column="content")
        assert sorted(documents(out)) == sorted(row.encode() for row in ROWS)


def test_a_folder_recursively_and_sorted(tmp_path, model):
    for name, rows in (("b/2.jsonl", ROWS[10:20]), ("b/1.csv", ROWS[:10]), ("c.parquet", ROWS[20:30])):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        write_rows(tmp_path / "in" / name, rows)
    for other in ("README.md", ".hidden.txt", ".git/x.txt"):
        (tmp_path / "in" / other).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / other).write_text("not data")
    prepare([str(tmp_path / "in")], tmp_path / "out", tokenizer=model, validation_fraction=0)
    assert documents(tmp_path / "out") == [row.encode() for row in ROWS[:30]]


def test_stdin(tmp_path, model, monkeypatch):
    content = text(50 * KIB)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    prepare(["-"], tmp_path / "txt", tokenizer=model, validation_fraction=0)
    assert b"".join(documents(tmp_path / "txt")) == content
    rows = b'{"text": "one"}\n{"text": "two"}'
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(rows)))
    prepare(["-"], tmp_path / "jsonl", tokenizer=model, validation_fraction=0, stdin_format="jsonl")
    assert documents(tmp_path / "jsonl") == [b"one", b"two"]


def test_the_embedded_corpus(tmp_path):
    summary = prepare(out=tmp_path)
    assert summary.vocab_size == 2048
    found = documents(tmp_path)
    assert len(found) == 51
    assert 1.7e6 < sum(map(len, found)) < 2e6
    assert summary.splits["validation"].documents >= 1


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_hugging_face_data_sets(tmp_path, model):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_dict({"text": ROWS})
    expected = [row.encode() for row in ROWS]
    rows.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=rows, test=rows.select([0])).save_to_disk(tmp_path / "splits")
    (tmp_path / "loader").mkdir()
    rows.select(range(20)).to_parquet(tmp_path / "loader" / "train-0.parquet")
    rows.select(range(20, 40)).to_parquet(tmp_path / "loader" / "train-1.parquet")
    rows.select([5]).to_parquet(tmp_path / "loader" / "test-0.parquet")
    loader = f"hf:{tmp_path / 'loader'}"
    options = {"tokenizer": model, "validation_fraction": 0, "unit_bytes": KIB, "workers": 1}
    for number, name in enumerate(
        [str(tmp_path / "saved"), str(tmp_path / "splits"), loader, f"{loader}:train"]
    ):
        prepare([name], tmp_path / str(number), **options)
        assert documents(tmp_path / str(number)) == expected
    prepare([f"{loader}:test"], tmp_path / "test", **options)
    assert documents(tmp_path / "test") == expected[5:6]
    problem(lambda: prepare([f"{loader}:tset"], tmp_path / "x", **options), "did you mean 'test'")
    problem(lambda: prepare([loader], tmp_path / "x", text_column="txt", **options), "did you mean 'text'")
    problem(
        lambda: prepare([str(tmp_path / "saved")], tmp_path / "x", text_column="y", **options), "no column"
    )


def test_a_hub_name_without_a_network(tmp_path):
    code = """
import sys
from bigtfm.config.problems import Problem
from bigtfm.data.prepare import prepare
try:
    prepare(["hf:nobody/nothing"], sys.argv[1])
except Problem as problem:
    print(problem.line)
    sys.exit(problem.exit_code)
"""
    pytest.importorskip("datasets")
    environment = {**ENVIRONMENT, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 65, done.stderr
    assert re.fullmatch(r"error: hf:nobody/nothing: datasets can't load it: .*\. Fix: .*\n", done.stdout)


def test_a_vocabulary_beyond_uint16(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"</s>": 0, "<unk>": 1, **{f"w{i}": i for i in range(2, 70_000)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    source = write_rows(tmp_path / "a.jsonl", ["w2 w69999 w65536", "w3"])
    prepare([str(source)], tmp_path / "out", tokenizer=tmp_path / "tokenizer.json", validation_fraction=0)
    dataset = TokenDataset.open(tmp_path / "out")
    split = dataset.split("train")
    assert (dataset.header.dtype, dataset.vocab_size, split.header.max_id) == ("uint32", 70_000, 69_999)
    assert split.read(0, split.num_tokens).tolist() == [0, 2, 69999, 65536, 0, 0, 3, 0]


# .txt files


def cut(path, unit_bytes, document_bytes):
    reading = Reading("text", document_bytes, unit_bytes)
    units = plan_units(find_sources([str(path)]), reading)
    return [document for unit in units for span in unit for document in read_documents(span, reading)]


TEXTS = st.lists(
    st.sampled_from(["a", "word ", "\n", "\n\n", " ", "\u6f22", "\U0001f600", "\r\n \n"]), max_size=300
)


@settings(max_examples=200, deadline=None)
@given(parts=TEXTS, unit_bytes=st.integers(1, 200), document_bytes=st.integers(1, 60))
def test_documents_of_a_text_join_to_it(tmp_path_factory, parts, unit_bytes, document_bytes):
    content = "".join(parts).encode()
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_bytes(content)
    assert b"".join(cut(path, unit_bytes, document_bytes)) == content
    (zipped := path.with_suffix(".txt.gz")).write_bytes(gzip.compress(content))
    assert b"".join(cut(zipped, unit_bytes, document_bytes)) == content


def test_a_text_is_cut_at_paragraphs(tmp_path):
    content = text(100 * KIB)
    (tmp_path / "a.txt").write_bytes(content)
    found = cut(tmp_path / "a.txt", 20 * KIB, 2 * KIB)
    assert b"".join(found) == content
    assert all(document.endswith(b"\n\n") for document in found[:-1])
    assert all(len(document) <= 4 * KIB for document in found)
    assert np.mean([len(document) >= 2 * KIB for document in found]) > 0.8  # units' tails may be shorter
    one_line = content.replace(b"\n", b" ")
    (tmp_path / "b.txt").write_bytes(one_line)
    found = cut(tmp_path / "b.txt", 20 * KIB, 2 * KIB)
    assert b"".join(found) == one_line
    assert all(document.startswith(b" ") for document in found[1:])  # no word is cut
    chinese = ("\u6f22" * 50_000).encode()
    (tmp_path / "c.txt").write_bytes(chinese)
    assert all(
        set(document.decode()) == {"\u6f22"} for document in cut(tmp_path / "c.txt", 100 * KIB, 2 * KIB)
    )


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_the_tail_is_not_lost(tmp_path, model, name):
    """No newline at the end of the file, and a last unit of one byte."""
    path = tmp_path / name
    content = {
        "a.txt": b"one\n\ntwo",
        "a.jsonl": b'{"text": "one"}\n{"text": "two"}',
        "a.csv": b"text\none\ntwo",
    }
    path.write_bytes(content[name])
    prepare(
        [str(path)], tmp_path / "out", tokenizer=model, validation_fraction=0, unit_bytes=3, document_bytes=4
    )
    assert b"".join(documents(tmp_path / "out")).replace(b"\n", b"") == b"onetwo"


@settings(max_examples=50, deadline=None)
@given(
    rows=st.lists(st.text(max_size=30), max_size=20),
    unit_bytes=st.integers(1, 300),
    end=st.sampled_from(["", "\n"]),
)
def test_jsonl_units_share_the_lines_out(tmp_path_factory, rows, unit_bytes, end):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_text(
        "\n".join(json.dumps({"text": row}, ensure_ascii=False) for row in rows) + end, encoding="utf-8"
    )
    assert cut(path, unit_bytes, 1) == [row.encode() for row in rows]


def test_bytes_that_are_no_text(tmp_path, model):
    content = random.Random(0).randbytes(5000) + b"\0\n\n" + "\u2581".encode()
    (tmp_path / "a.txt").write_bytes(content)
    prepare([str(tmp_path / "a.txt")], tmp_path / "out", tokenizer=model, validation_fraction=0)
    assert b"".join(documents(tmp_path / "out")) == content
    (tmp_path / "b.csv").write_bytes(b"text,id\n\xff\xfe,1\n")
    prepare([str(tmp_path / "b.csv")], tmp_path / "csv", tokenizer=model, validation_fraction=0)
    assert documents(tmp_path / "csv") == [b"\xff\xfe"]


# The split


def test_the_split_is_by_hash(tmp_path, model):
    rows = [f"row {i}" for i in range(400)]
    prepare([str(write_rows(tmp_path / "a.jsonl", rows + rows[:50]))], tmp_path / "a", tokenizer=model)
    validation = set(documents(tmp_path / "a", "validation"))
    assert validation == {row.encode() for row in rows if document_hash(row.encode()) < 0.1 * 2**64}
    assert 15 <= len(validation) <= 70
    assert not validation & set(documents(tmp_path / "a", "train"))  # duplicates stay together
    shuffled = random.Random(1).sample(rows, 300)
    prepare([str(write_rows(tmp_path / "b.csv", shuffled))], tmp_path / "b", tokenizer=model)
    assert set(documents(tmp_path / "b", "validation")) == validation & {row.encode() for row in shuffled}
    prepare([str(tmp_path / "a.jsonl")], tmp_path / "c", tokenizer=model, validation_fraction=0.2)
    assert validation < set(documents(tmp_path / "c", "validation"))  # a larger fraction adds


def test_at_least_one_document_is_for_validation(tmp_path, model):
    rows = [row for row in map(str, range(30)) if document_hash(row.encode()) > 0.2 * 2**64]
    first = min(rows, key=lambda row: document_hash(row.encode()))
    path = write_rows(tmp_path / "a.jsonl", [*rows, "filler " * 20, first])  # twice, in different units
    options = {"tokenizer": model, "validation_fraction": 0.01, "unit_bytes": 64}
    summary = prepare([str(path)], tmp_path / "one", workers=1, **options)
    assert documents(tmp_path / "one", "validation") == [first.encode()] * 2
    assert summary.splits["train"].documents == len(rows)
    prepare([str(path)], tmp_path / "two", workers=2, **options)
    assert digest(tmp_path / "one") == digest(tmp_path / "two")
    one = write_rows(tmp_path / "one.jsonl", ["only one"])
    problem(
        lambda: prepare([str(one)], tmp_path / "x", **options), "none is left to train on", "--document-bytes"
    )


# The same bytes, whatever happens


def test_any_number_of_workers(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_bytes(text(300 * KIB))
    write_rows(tmp_path / "in" / "b.jsonl", ROWS * 20)
    write_rows(tmp_path / "in" / "c.parquet")
    results = []
    for workers in (1, 2, 3):
        out = tmp_path / str(workers)
        prepare(
            [str(tmp_path / "in")],
            out,
            workers=workers,
            unit_bytes=32 * KIB,
            file_bytes=20 * KIB,
            vocab_size=400,
        )
        results.append(digest(out))
    assert results[0] == results[1] == results[2]
    assert len(TokenDataset.open(tmp_path / "1").header.splits["train"].files) > 3
    assert b"".join(documents(tmp_path / "1", "train"))
    prepare(
        [str(tmp_path / "in")], tmp_path / "other", unit_bytes=32 * KIB, file_bytes=20 * KIB, vocab_size=401
    )
    assert digest(tmp_path / "other") != results[0]  # the comparison can fail


@pytest.mark.parametrize("shards", [("2/3", "0/3", "1/3"), ("2/3", "0/3"), ("0/99", "98/99")])
def test_any_number_of_shards(tmp_path, monkeypatch, shards):
    """In any order; what a lost one has not done is done by the command that joins them."""
    source = str(write_rows(tmp_path / "a.jsonl", ROWS * 20))
    options = {"workers": 1, "unit_bytes": 4 * KIB, "file_bytes": 20 * KIB, "vocab_size": 400}
    whole = prepare([source], tmp_path / "whole", **options)
    out, numbers, tokenised = tmp_path / "parts", set(), []
    for shard in shards:
        summary = prepare([source], out, shard=shard, **options)
        assert f"shard {shard} done" in summary.line
        assert not (out / "dataset.json").exists()
        numbers = {int(path.parent.name) for path in out.glob(".prepare/units/*/record.json")}
    units = range(len(plan_units(find_sources([source]), Reading("text", 1024, 4 * KIB))))
    assert len(units) > 12
    parts = [tuple(map(int, shard.split("/"))) for shard in shards]
    assert numbers == {unit for number, of in parts for unit in units[number::of]}

    run_units = prepare_module.run_units

    def watched(job, units, pending, workers, chosen):
        tokenised.extend(pending)
        return run_units(job, units, pending, workers, chosen)

    monkeypatch.setattr(prepare_module, "run_units", watched)
    joined = prepare([source], out, **options)
    assert set(tokenised) == set(units) - numbers
    assert joined.splits == whole.splits
    assert digest(out) == digest(tmp_path / "whole")
    assert "was there already" in prepare([source], out, shard="1/3", **options).line


def test_shards_at_once(tmp_path):
    """Four processes that start together train one tokenizer, and not one waits for another's units."""
    source = tmp_path / "a.txt"
    source.write_bytes(text(600 * KIB))
    prepare([str(source)], tmp_path / "whole", unit_bytes=131072, vocab_size=400)
    script = SCRIPT.replace("workers=2", "workers=1, shard=sys.argv[3]")
    command = [sys.executable, "-c", script, str(source), str(tmp_path / "out")]
    at_work = [subprocess.Popen([*command, f"{number}/4"], env=ENVIRONMENT) for number in range(4)]
    assert [process.wait(60) for process in at_work] == [0] * 4
    trained = load_tokenizer(tmp_path / "out" / ".prepare" / "tokenizer")
    assert trained.identity == load_tokenizer(tmp_path / "whole" / "tokenizer").identity
    prepare([str(source)], tmp_path / "out", unit_bytes=131072, vocab_size=400)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_shards_and_others_keep_apart(tmp_path, model):
    import fcntl

    source, out = write_rows(tmp_path / "a.jsonl"), tmp_path / "out"
    work = out / ".prepare"
    prepare([str(source)], out, tokenizer=model, shard="0/2")
    another = "another `bigtfm prepare` is at work"
    with (work / "lock").open("a+") as lock, (work / "lock-1-of-2").open("a+") as mine:
        fcntl.flock(lock, fcntl.LOCK_SH)  # as shard 1 does
        fcntl.flock(mine, fcntl.LOCK_EX)
        problem(lambda: prepare([str(source)], out, tokenizer=model), another)
        problem(lambda: prepare([str(source)], out, tokenizer=model, shard="1/2"), another)
        prepare([str(source)], out, tokenizer=model, shard="0/2")
        fcntl.flock(lock, fcntl.LOCK_EX)  # as a command that joins
        problem(lambda: prepare([str(source)], out, tokenizer=model, shard="0/2"), another)
    for path in work.glob("units/*/record.json"):
        path.unlink()
    for shard in ("0/2", "1/2"):  # nor does one clear what another has only begun
        other = {"tokenizer": model, "shard": shard, "validation_fraction": 0.5}
        problem(lambda other=other: prepare([str(source)], out, **other), "of another command")
    prepare([str(source)], out, tokenizer=model, validation_fraction=0.5)


SCRIPT = """
import sys
from bigtfm.config.problems import Problem
from bigtfm.data.prepare import prepare
if __name__ == "__main__":
    try:
        prepare([sys.argv[1]], sys.argv[2], workers=2, unit_bytes=131072, vocab_size=400)
    except Problem as problem:
        sys.exit(problem.line)
"""


def start(source, out, **options):
    """The script at work on `source`, leading a session of its own."""
    script = out.with_suffix(".py")
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(source), str(out)]
    return subprocess.Popen(command, env=ENVIRONMENT, start_new_session=True, **options)


def wait_for_units(process, out, number):
    while len(finished_units(out)) < number and process.poll() is None:
        time.sleep(0.01)


def finished_units(out):
    """Their records; a folder that is not finished has a dot in its name."""
    records = out.glob(".prepare/units/[0-9]*/record.json")
    return [path for path in records if "." not in path.parent.name]


def test_killed_and_continued(tmp_path):
    source = tmp_path / "a.txt"
    source.write_bytes(text(6 << 20))
    options = {"unit_bytes": 128 * KIB, "vocab_size": 400}
    prepare([str(source)], tmp_path / "whole", workers=2, **options)
    out = tmp_path / "killed"
    for wanted in (2, 10):  # twice: a continued run is killed as well
        process = start(source, out)
        wait_for_units(process, out, wanted)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL  # it was still at work
        deadline = time.monotonic() + 10
        while session(process.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not session(process.pid)  # no worker outlives it
    problem(lambda: TokenDataset.open(out), "no finished data set")
    kept = {path: path.stat().st_mtime_ns for path in finished_units(out)}
    assert len(kept) >= 10
    (out / ".prepare" / "units" / "00000001" / "train.bin").write_bytes(b"cut short by a power loss")
    survivors = []
    publish = prepare_module.publish

    def watch(*arguments):
        survivors.extend(path for path, stamp in kept.items() if path.stat().st_mtime_ns == stamp)
        publish(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module, "publish", watch)
        prepare([str(source)], out, workers=1, **options)
    assert len(survivors) == len(kept) - 1  # all but the damaged one were kept
    assert digest(out) == digest(tmp_path / "whole")
    assert b"".join(sorted(documents(out))) == b"".join(sorted(documents(tmp_path / "whole")))
    assert not (out / ".prepare").exists()


def session(leader):
    """The processes that run in the session of `leader`."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = status.read_text().rpartition(")")[2].split()
            if fields[3] == str(leader) and fields[0] != "Z":
                found.append(int(status.parent.name))
    return found


def command_line(pid):
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def test_killed_while_it_is_put_in_place(tmp_path, model, monkeypatch):
    """At every rename and sync of the last step: not there, then continued to the same bytes."""
    source = write_rows(tmp_path / "a.jsonl")
    options = {"tokenizer": model}
    prepare([str(source)], tmp_path / "whole", **options)

    class Killed(BaseException):
        pass

    for moment in range(20):
        out, calls = tmp_path / f"killed-{moment}", iter(range(100))

        def or_die(function, calls=calls, moment=moment):
            def wrapped(*arguments, **keywords):
                if next(calls) == moment:
                    raise Killed
                return function(*arguments, **keywords)

            return wrapped

        publish = prepare_module.publish

        def dying(*arguments, or_die=or_die, publish=publish):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Path, "rename", or_die(Path.rename))
                patch.setattr(os, "fsync", or_die(os.fsync))
                publish(*arguments)

        monkeypatch.setattr(prepare_module, "publish", dying)
        try:
            prepare([str(source)], out, **options)
        except Killed:
            assert (
                not (out / "dataset.json").exists()
                or digest(out).items() >= digest(tmp_path / "whole").items()
            )
        else:
            break
        finally:
            monkeypatch.setattr(prepare_module, "publish", publish)
        prepare([str(source)], out, **options)
        assert digest(out) == digest(tmp_path / "whole")
    assert moment > 6  # it was "killed" that many times


def test_what_is_there_is_kept(tmp_path, model):
    source, out = write_rows(tmp_path / "a.jsonl"), tmp_path / "out"
    first = prepare([str(source)], out, tokenizer=model)
    again = prepare([str(source)], out, tokenizer=model, workers=3)
    assert (first.existing, again.existing) == (False, True)
    assert (again.splits, again.identity) == (first.splits, first.identity)
    before = digest(out)
    line = problem(
        lambda: prepare([str(source)], out, tokenizer=model, validation_fraction=0.5), "another command"
    )
    assert "validation_fraction was 0.1, is 0.5" in line
    assert digest(out) == before
    write_rows(source, ROWS[:30])
    problem(
        lambda: prepare([str(source)], out, tokenizer=model), "the input files have changed since", "--force"
    )
    assert digest(out) == before
    prepare([str(source)], out, tokenizer=model, force=True)
    assert len(documents(out)) == 30
    assert not (out / ".prepare").exists()


def test_unfinished_work_of_another_command(tmp_path, model, monkeypatch):
    source, out = write_rows(tmp_path / "a.jsonl"), tmp_path / "out"

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare_module, "publish", fail)
    problem(
        lambda: prepare([str(source)], out, tokenizer=model),
        "No space left",
        "continues",
        kind=StorageProblem,
    )
    monkeypatch.undo()
    problem(
        lambda: prepare([str(source)], out, tokenizer=model, text_column="id"), "unfinished work", "--force"
    )
    prepare([str(source)], out, tokenizer=model, validation_fraction=0, force=True)
    assert documents(out) == [row.encode() for row in ROWS]


def test_one_at_a_time(tmp_path, model):
    import fcntl

    source, out = write_rows(tmp_path / "a.jsonl"), tmp_path / "out"
    (out / ".prepare").mkdir(parents=True)
    with (out / ".prepare" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        problem(lambda: prepare([str(source)], out, tokenizer=model), "another `bigtfm prepare` is at work")
    prepare([str(source)], out, tokenizer=model)


def test_a_killed_worker_is_noticed(tmp_path):
    source = tmp_path / "a.txt"
    source.write_bytes(text(4 << 20))
    with start(source, tmp_path / "out", stderr=subprocess.PIPE, text=True) as process:
        wait_for_units(process, tmp_path / "out", 1)
        workers = [pid for pid in session(process.pid) if b"spawn_main" in command_line(pid)]
        assert len(workers) == 2
        os.kill(workers[0], signal.SIGKILL)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert error.startswith("error: ")
    assert "a worker was killed" in error
    assert error.count("\n") == 1


# Bounded memory

MEMORY = """
import resource, sys
from bigtfm.data.prepare import prepare
prepare([sys.argv[1]], sys.argv[2], tokenizer=sys.argv[3], workers=1, unit_bytes=2**40)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def peak_memory(source, out, model):
    command = [sys.executable, "-c", MEMORY, str(source), str(out), str(model)]
    return int(
        subprocess.run(command, capture_output=True, text=True, check=True, env=ENVIRONMENT).stdout
    )  # MiB


@pytest.mark.slow
def test_memory_does_not_grow_with_the_input(tmp_path, model):
    """One unit of 24 MB on a single line, plain and compressed."""
    line = text(1 << 20).replace(b"\n", b" ")
    (tmp_path / "small.txt").write_bytes(line)
    (tmp_path / "large.txt").write_bytes(line * 24)
    (tmp_path / "large.txt.gz").write_bytes(gzip.compress(line * 12, 1))
    small = peak_memory(tmp_path / "small.txt", tmp_path / "1", model)
    assert peak_memory(tmp_path / "large.txt", tmp_path / "2", model) < small + 12
    assert peak_memory(tmp_path / "large.txt.gz", tmp_path / "3", model) < small + 12
    assert TokenDataset.open(tmp_path / "2").split("train").num_bytes > 20 << 20


# Mistakes, one line each


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"vocab_size": 10}, "--vocab-size is 10"),
        ({"vocab_size": 1000, "tokenizer": True}, "drop one"),
        ({"model_type": "bep"}, "did you mean 'bpe'"),
        ({"validation_fraction": 1.0}, "[0, 1)"),
        ({"validation_fraction": float("nan")}, "[0, 1)"),
        ({"validation_fraction": -0.1}, "[0, 1)"),
        ({"document_bytes": 0}, "--document-bytes"),
        ({"workers": 0}, "--workers"),
        ({"stdin_format": "json"}, "did you mean 'jsonl'"),
        ({"inputs": []}, "no input"),
        ({"shard": "16/16"}, "the first is 0/16, the last 15/16"),
        ({"shard": "3"}, "--shard is 3"),
        ({"shard": "0/2", "inputs": ["-"]}, "stdin can be read only once"),
        ({"shard": "0/2", "force": True}, "--force would clear"),
    ],
)
def test_wrong_options(tmp_path, model, options, part):
    options = {"inputs": ["embedded"], **options}
    if options.get("tokenizer"):
        options["tokenizer"] = model
    problem(lambda: prepare(out=tmp_path / "out", **options), part, kind=ConfigProblem)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"}\n\n{"text": \n', (":4:", "invalid JSON")),
        ("a.jsonl", b'{"text": "a"}\n\xff\n', (":2:", "invalid JSON")),
        ("a.jsonl", b'{"text": "a"}\n["b"]\n', (":2:", "not a JSON object")),
        ("a.jsonl", b'{"text": "a"}\n{"texts": "b"}\n', (":2:", "did you mean 'texts'")),
        ("a.jsonl", b'{"text": 3}\n', (":1:", "holds int, not text")),
        ("a.jsonl", b"[" * 100_000, (":1:", "invalid JSON")),
        ("a.jsonl", b'{"text": ""}\n{"text": null}\n', ("no text in the input",)),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 999)[:-9], ("damaged gzip",)),
        ("a.jsonl.gz", b"not gzip", ("damaged gzip",)),
        ("a.csv", b'text,id\n"a,1\n', (":2:", "invalid CSV")),
        ("a.csv", b"id,text\n1,a\n2\n", (":3:", "only 1 of 2 columns")),
        ("a.csv", b"text\n", ("no text in the input",)),
        ("a.parquet", b"PAR1 not really", ("not a readable parquet file",)),
        ("a.txt", b"", ("no text in the input",)),
        ("a.txt", "text".encode("utf-16"), ("UTF-16", "iconv")),
        ("a.pdf", b"x", ("unsupported kind of file '.pdf'", ".parquet")),
    ],
)
@pytest.mark.parametrize("trained", [False, True])
def test_wrong_inputs(tmp_path, model, name, content, parts, trained):
    path = tmp_path / name
    path.write_bytes(content)
    tokenizer = None if trained else model
    problem(lambda: prepare([str(path)], tmp_path / "out", tokenizer=tokenizer), *parts)
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_a_problem_in_a_worker_is_one_line(tmp_path, model):
    path = write_rows(tmp_path / "a.jsonl", ROWS * 10)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:300], b"{oops\n", *lines[300:]]))
    call = lambda: prepare([str(path)], tmp_path / "out", tokenizer=model, workers=2, unit_bytes=4 * KIB)  # noqa: E731
    problem(call, f"{path}:301: invalid JSON")


def test_missing_inputs(tmp_path, model):
    problem(lambda: prepare([str(tmp_path / "no.txt")], tmp_path / "out"), "no such file or folder")
    (tmp_path / "in").mkdir()
    problem(lambda: prepare([str(tmp_path / "in")], tmp_path / "out"), "no data in this folder")
    (tmp_path / "in" / "x.txt").symlink_to(tmp_path / "gone")
    problem(lambda: prepare([str(tmp_path / "in")], tmp_path / "out"), "can't be read")
    problem(lambda: prepare(["embedded"], tmp_path / "out", tokenizer=tmp_path / "no"), "no such tokenizer")
    problem(lambda: prepare(["embedded"], tmp_path / "out", vocab_size=900_000), "is the largest possible")
    problem(lambda: prepare(["hf:a:b:c"], tmp_path / "out"), "hf:NAME:SPLIT")
    (tmp_path / "file").write_text("")
    problem(lambda: prepare(out=tmp_path / "file"), "is a file", kind=ConfigProblem)


def test_silent_without_a_terminal(tmp_path, model, capfd):
    prepare([str(write_rows(tmp_path / "a.jsonl"))], tmp_path / "out", vocab_size=320)
    assert capfd.readouterr() == ("", "")
