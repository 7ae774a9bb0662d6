import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from memory_split import MemorySplit

from bigtfm.config.problems import DataProblem
from bigtfm.data import streaming
from bigtfm.data.indexed import TokenDataset
from bigtfm.data.loader import Loader
from bigtfm.data.order import MAX_SIZE
from bigtfm.data.prepare import prepare
from bigtfm.data.stream_source import StreamSource, _files
from bigtfm.data.streaming import ShuffledBlocks, StreamedTokens
from bigtfm.data.tokenizer import load_tokenizer

SEQ_LEN, BLOCK, SEED, HELD_OUT = 16, 8, 5, 0.2
SIZE = SEQ_LEN * BLOCK


@pytest.fixture(scope="module")
def rows(corpus_lines):
    """240 short documents, some of them empty or missing."""
    text = " ".join(corpus_lines)
    documents = [text[n * 150 : n * 150 + 40 + n * 37 % 200] for n in range(240)]
    documents[3], documents[100] = "", None
    return documents


@pytest.fixture(scope="module")
def folder(tmp_path_factory, rows):
    """Three parquet files of several row groups each, with another column beside the text."""
    import pyarrow
    import pyarrow.parquet

    path = tmp_path_factory.mktemp("stream") / "rows"
    path.mkdir()
    for n, (first, last) in enumerate([(0, 100), (100, 110), (110, 240)]):
        table = pyarrow.table({"number": range(first, last), "text": rows[first:last]})
        pyarrow.parquet.write_table(table, path / f"train-{n}.parquet", row_group_size=40)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two"]}), path / "test-0.parquet")
    return path


@pytest.fixture(scope="module")
def tokenizer(tiny_data):
    return load_tokenizer(TokenDataset.open(tiny_data).tokenizer_path)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, folder, tiny_data):
    """The training split of the same text."""
    out = tmp_path_factory.mktemp("prepared") / "tokens"
    prepare(
        [f"hf:{folder}"], out, tokenizer=tiny_data / "tokenizer", validation_fraction=HELD_OUT,
        workers=1, progress=False,
    )  # fmt: skip
    dataset = TokenDataset.open(out)
    assert dataset.split("validation").num_documents > 20
    return dataset.split("train")


@pytest.fixture(scope="module")
def repeated(prepared):
    """Four epochs of it in memory, as a stream without end."""
    epoch = prepared.read(0, prepared.num_tokens)
    starts = prepared.document_starts(0, prepared.num_tokens)
    memory = MemorySplit([1])
    memory.tokens = np.concatenate([epoch] * 4)
    memory.starts = np.concatenate([starts + n * len(epoch) for n in range(4)])
    memory.num_tokens = MAX_SIZE
    return memory


class Counting:
    """A tokenizer that counts the documents it is given."""

    def __init__(self, tokenizer):
        self.tokenizer, self.documents = tokenizer, 0

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def encode_batch(self, documents):
        self.documents += len(documents)
        return self.tokenizer.encode_batch(documents)


@pytest.fixture
def open_stream(folder, tokenizer, monkeypatch):
    """Opens the stream; few bytes are tokenized at once, so that a batch is less than a block."""
    monkeypatch.setattr(streaming, "BATCH_BYTES", 300)
    opened = []

    def start(said=None, tokenizer=tokenizer, source=None):
        source = source or StreamSource.open(f"hf:{folder}", "text")
        said = said if said is not None else []
        stream = StreamedTokens(
            source, tokenizer, np.dtype(np.uint16), SEQ_LEN, held_out=HELD_OUT, block=BLOCK
        )
        stream.start = partial(stream.start, say=said.append)
        opened.append(stream)
        return stream

    yield start
    for stream in opened:
        stream.close()


def loader_of(stream, block=BLOCK):
    return Loader(stream, ShuffledBlocks(SEQ_LEN, SEED, block), SEQ_LEN, 512)


def assert_same(batch, expected):
    for name, value in vars(expected).items():
        mine = getattr(batch, name)
        same = torch.equal(mine, value) if isinstance(value, torch.Tensor) else mine == value
        assert same, name


def blocks_in_an_epoch(prepared):
    return prepared.num_tokens // SIZE


def test_the_stream_is_what_prepare_writes_epoch_after_epoch(open_stream, prepared, repeated):
    stream, length = open_stream(), 2 * prepared.num_tokens + 100
    assert np.array_equal(stream.read(0, length), repeated.tokens[:length])
    positions = np.arange(1, length)
    before = stream.documents_before(positions)
    assert np.array_equal(before, repeated.documents_before(positions))
    assert np.array_equal(stream.document_positions(before - 1), repeated.starts[before - 1])
    assert prepared.num_tokens % SIZE, "an epoch ends inside a block here"


def test_each_block_is_shuffled_by_itself_and_each_otherwise():
    order = ShuffledBlocks(SEQ_LEN, SEED, BLOCK)
    ids = order.pieces(0, 5 * BLOCK).ids.reshape(5, BLOCK)
    assert [sorted(block) for block in ids.tolist()] == [
        list(range(n * BLOCK, (n + 1) * BLOCK)) for n in range(5)
    ]
    assert len({tuple(block % BLOCK) for block in ids}) == 5
    assert not np.array_equal(
        ids, ShuffledBlocks(SEQ_LEN, SEED + 1, BLOCK).pieces(0, 5 * BLOCK).ids.reshape(5, BLOCK)
    )
    pieces = order.pieces(3, 20)
    assert np.array_equal(pieces.ids, ids.ravel()[3:23])
    assert np.array_equal(pieces.starts, pieces.ids * SEQ_LEN)
    assert np.array_equal(pieces.stops, pieces.starts + SEQ_LEN)


def test_a_batch_is_a_function_of_its_samples(open_stream, repeated):
    loader, expected = loader_of(open_stream()), loader_of(repeated)
    for first, count in [(0, 1), (1, 5), (6, 4), (10, 30), (40, 8), (47, 3)]:  # over one and four edges, too
        assert_same(loader.batch(first, count), expected.batch(first, count))


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 4), (1, 1), (2, 2), (4, 1), (4, 3)])
def test_ranks_and_micro_batches_change_nothing(world_size, micro_batch, open_stream, repeated, prepared):
    """Each rank has a stream of its own and takes its samples; some blocks are never touched by some."""
    expected = loader_of(repeated)
    end = (blocks_in_an_epoch(prepared) + 3) * BLOCK  # into epoch 2
    global_batch = world_size * micro_batch
    marks = []
    for rank in range(world_size):
        stream = open_stream()
        loader = loader_of(stream)
        for first in range(0, end, global_batch):
            mine = first + rank * micro_batch
            assert_same(loader.batch(mine, micro_batch), expected.batch(mine, micro_batch))
            state = stream.mark_of(first + global_batch)
        marks.append(state)
    assert all(state == marks[0] for state in marks), "any rank's state serves all"


def position(name, prepared):
    """A sample to go on with."""
    epoch = blocks_in_an_epoch(prepared)
    return {
        "in the first block": 3,
        "inside a block": 5 * BLOCK + 3,
        "at a block's edge": 6 * BLOCK,
        "at a block's end": 6 * BLOCK - 1,
        "where an epoch ends": epoch * BLOCK + 1,
        "in epoch 2": (epoch + 4) * BLOCK + 2,
        "in epoch 3": (2 * epoch + 4) * BLOCK,
    }[name]


RESUMES = [
    "in the first block", "inside a block", "at a block's edge", "at a block's end", "where an epoch ends",
    "in epoch 2", "in epoch 3",
]  # fmt: skip


def saved_at(stream, sample, ahead=3):
    """What a run saves that has consumed the samples before this one, and has read ahead."""
    loader = loader_of(stream)
    for first in range(0, sample, 3):
        loader.batch(first, 3)
        stream.mark_of(min(first + 3, sample))
    loader.batch(sample, ahead * BLOCK)
    return json.loads(json.dumps(stream.mark_of(sample)))


@pytest.mark.parametrize("where", RESUMES)
def test_a_resumed_run_reads_on_at_its_block(where, open_stream, tokenizer, repeated, prepared):
    sample = position(where, prepared)
    state = saved_at(open_stream(), sample)
    said, counting = [], Counting(tokenizer)
    stream = open_stream(said, counting)
    stream.start(sample, state)
    loader, expected = loader_of(stream), loader_of(repeated)
    assert_same(loader.batch(sample, 5), expected.batch(sample, 5))
    assert_same(loader.batch(sample + 5, 2 * BLOCK), expected.batch(sample + 5, 2 * BLOCK))
    assert stream.mark_of(sample) == (state if sample >= BLOCK else None)
    assert said == []
    stream.close()
    documents = (6 * SIZE / prepared.num_tokens) * prepared.num_documents  # of six blocks
    assert counting.documents < documents + 12, "only what is asked for, and the block ahead, is tokenized"


@pytest.mark.parametrize("where", ["inside a block", "at a block's edge", "in epoch 2"])
@pytest.mark.parametrize("broken", ["none", "of another version"])
def test_without_a_state_that_serves_it_reads_from_the_beginning(
    where, broken, open_stream, repeated, prepared
):
    sample = position(where, prepared)
    state = None
    if broken != "none":
        state = saved_at(open_stream(), sample)
        state["rows"] = {"where": 17}
    said = []
    stream = open_stream(said)
    stream.start(sample, state)
    assert_same(loader_of(stream).batch(sample, 20), loader_of(repeated).batch(sample, 20))
    assert len(said) == 1
    assert ("no position was saved" if state is None else "does not serve") in said[0]
    assert f"to sample {sample // BLOCK * BLOCK}" in said[0]


@pytest.mark.parametrize("where", ["inside a block", "in epoch 2"])
def test_the_control_a_state_of_the_next_block_is_red(where, open_stream, repeated, prepared, monkeypatch):
    sample = position(where, prepared)
    stream = open_stream()
    saved_at(stream, sample)
    too_far = stream.mark_of(sample + BLOCK)
    said = []
    stream = open_stream(said)
    stream.start(sample, too_far)
    with pytest.raises(DataProblem, match="not what it was"):
        loader_of(stream).batch(sample, 4)
    monkeypatch.setattr(streaming, "digest", lambda tokens: too_far["behind"])  # nobody looks
    stream = open_stream()
    stream.start(sample, {**too_far, "position": stream_position(sample)})
    with pytest.raises(AssertionError):
        assert_same(loader_of(stream).batch(sample, 4), loader_of(repeated).batch(sample, 4))


def stream_position(sample):
    return sample // BLOCK * SIZE


def test_text_that_changed_in_place_is_noticed(open_stream, folder, tmp_path, prepared):
    """The same files of the same sizes, with other words in them."""
    copy = tmp_path / "rows"
    copy.mkdir()
    lines = [json.dumps({"text": f"line {n:04d} says nothing"}) for n in range(600)]
    path = copy / "train.jsonl"
    path.write_text("\n".join(lines))
    before = StreamSource.open(f"hf:{copy}", "text")
    sample = 3 * BLOCK + 1
    state = saved_at(open_stream(source=before), sample)
    path.write_text("\n".join(lines).replace("says", "sees"))
    after = StreamSource.open(f"hf:{copy}", "text")
    assert after.identity == before.identity
    said = []
    stream = open_stream(said, source=after)
    stream.start(sample, state)
    with pytest.raises(DataProblem, match=r"not what it was\. Fix: .*resume.allow=data"):
        loader_of(stream).batch(sample, 1)
    assert len(said) == 1
    stream.start(sample, state, accept_changes=True)
    loader_of(stream).batch(sample, 1)


def test_memory_is_bounded_by_blocks(open_stream, prepared):
    stream = open_stream()
    loader = loader_of(stream)
    block_bytes = SIZE * 2 + 2 + SIZE // 8 * 8  # documents of eight tokens or more
    held = []
    for first in range(0, 3 * blocks_in_an_epoch(prepared) * BLOCK, 4):
        loader.batch(first, 4)
        held.append(stream.held_bytes())
        stream.mark_of(first + 4)
        assert len(stream._marks) <= 2
    assert max(held) <= 2 * block_bytes
    with pytest.raises(AssertionError, match="let go"):
        loader.batch(0, 1)
    loader.batch(first + 4, 5 * BLOCK)  # the control: what is not let go is held
    assert stream.held_bytes() > 2 * block_bytes


def test_it_reads_ahead_while_training_computes(open_stream, tokenizer):
    counting = Counting(tokenizer)
    stream = open_stream(tokenizer=counting)
    assert counting.documents == 0, "nothing is read before it is asked for"
    loader_of(stream).batch(0, 1)
    at_first, deadline = counting.documents, time.monotonic() + 10
    while stream._ahead is not None and not stream._ahead.done() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert stream._ahead.done()
    ahead = counting.documents
    loader_of(stream).batch(1, BLOCK - 1)
    time.sleep(0.1)
    assert counting.documents == ahead, "one block and no more"
    assert at_first <= ahead


def test_validation_documents_are_left_out(open_stream, folder, tokenizer, prepared, repeated):
    source = StreamSource.open(f"hf:{folder}", "text")
    all_of_it = StreamedTokens(source, tokenizer, np.dtype(np.uint16), SEQ_LEN, block=BLOCK)
    tokens = all_of_it.read(0, prepared.num_tokens)
    all_of_it.close()
    assert not np.array_equal(tokens, repeated.tokens[: len(tokens)])


def write(path, name, content):
    path.mkdir(exist_ok=True)
    (path / name).write_text(content)
    return f"hf:{path}"


def jsonl(values, column="text"):
    return "".join(json.dumps({column: value}) + "\n" for value in values)


@pytest.mark.parametrize(
    ("name", "content", "suffix", "column", "said"),
    [
        (
            "a.jsonl",
            jsonl(["x"], "tekst"),
            "",
            "text",
            ["no column 'text'", "set data.text_column", "'tekst'"],
        ),
        ("a.jsonl", jsonl([1, 2]), "", "text", ["not text", "data.text_column"]),
        ("a.jsonl", jsonl([["x"]]), "", "text", ["not text"]),
        ("a.csv", "n,text\n", "", "text", ["has no rows"]),
        ("a.jsonl", jsonl(["x"]), ":trian", "text", ["no split 'trian'", "did you mean 'train'"]),
        ("a.jsonl", jsonl(["x"]), "@other", "text", ["datasets can't load it"]),
        ("a.jsonl", "not json", "", "text", ["datasets can't load it"]),
        ("a.parquet", "not parquet", "", "text", ["datasets can't load it"]),
        ("a.what", "what", "", "text", ["datasets can't load it"]),
    ],
)
def test_a_source_that_can_not_be_trained_on_is_one_line(name, content, suffix, column, said, tmp_path):
    source = write(tmp_path / "rows", name, content) + suffix
    with pytest.raises(DataProblem) as raised:
        StreamSource.open(source, column)
    assert "\n" not in raised.value.line
    for part in [source, *said]:
        assert part in raised.value.line


def test_a_name_on_the_hub_without_a_network_is_one_line(tmp_path):
    code = """
import sys
from bigtfm.config.problems import Problem
from bigtfm.data.stream_source import StreamSource
try:
    StreamSource.open("hf:nobody/nothing", "text")
except Problem as problem:
    print(problem.line)
    sys.exit(problem.exit_code)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 65, done.stderr
    assert re.fullmatch(r"error: hf:nobody/nothing: datasets can't load it: .*\. Fix: .*\n", done.stdout)


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ([f"hf://datasets/a/b@{COMMIT}/x.parquet", f"hf://datasets/a/b@{COMMIT}/y.parquet"], None),
        ([f"hf://datasets/a/b@{COMMIT}/x.parquet", f"hf://datasets/a/b@{COMMIT[::-1]}/y.parquet"], "version"),
        (["hf://datasets/a/b@main/x.parquet"], "version"),
        (["hf://buckets/a/b/x.parquet"], "version"),
        (["https://example.org/x.parquet"], "version"),
        ([f"hf://datasets/a/b@{COMMIT}/x.parquet", "https://example.org/x.parquet"], "version"),
        (None, "version"),
    ],
)  # fmt: skip
def test_what_has_no_version_is_refused(files, said):
    builder = SimpleNamespace(config=SimpleNamespace(data_files=files and {"train": files}))
    if said is None:
        assert _files(builder, "train", "hf:a/b")["revision"] == COMMIT
        other = [file.replace("x.parquet", "z.parquet") for file in files]
        assert _files(
            SimpleNamespace(config=SimpleNamespace(data_files={"train": other})), "train", "hf:a/b"
        ) != (_files(builder, "train", "hf:a/b"))
    else:
        with pytest.raises(DataProblem, match=said):
            _files(builder, "train", "hf:a/b")


def test_the_identity_is_that_of_the_text(folder, tmp_path):
    identity = StreamSource.open(f"hf:{folder}", "text").identity
    assert json.loads(json.dumps(identity)) == identity
    assert (identity["files"], identity["split"], identity["text_column"]) == (3, "train", "text")
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder, moved)
    assert StreamSource.open(f"hf:{moved}", "text").identity == identity, "a folder may stand elsewhere"
    assert StreamSource.open(f"hf:{folder}:test", "text").identity != identity
    (moved / "train-1.parquet").rename(moved / "train-9.parquet")
    assert StreamSource.open(f"hf:{moved}", "text").identity != identity, "another order"
    (moved / "train-9.parquet").unlink()
    assert StreamSource.open(f"hf:{moved}", "text").identity["bytes"] < identity["bytes"]


def test_what_goes_wrong_later_is_said_where_it_is_read(open_stream, tmp_path):
    path = tmp_path / "rows"
    path.mkdir()
    (path / "a.jsonl").write_text(jsonl(f"line {n} of some words" for n in range(200)))
    (path / "b.jsonl").write_text("not json")
    stream = open_stream(source=StreamSource.open(f"hf:{path}", "text"))
    loader = loader_of(stream)
    loader.batch(0, 2)
    for _ in range(2):  # and it stays so
        with pytest.raises(DataProblem, match="datasets can't load it"):
            loader.batch(10 * BLOCK, 1000)


def test_a_source_of_empty_documents_is_refused(open_stream, tmp_path):
    name = write(tmp_path / "rows", "a.jsonl", jsonl(["", "", ""]))
    stream = open_stream(source=StreamSource.open(name, "text"))
    with pytest.raises(DataProblem, match="holds no text"):
        stream.read(0, 1)


def test_closing_ends_the_thread_at_once(open_stream, tokenizer):
    """However much it still had to read."""
    counting = Counting(tokenizer)
    stream = open_stream(tokenizer=counting)
    stream.start(10**9, None)
    waiting = ThreadPoolExecutor(1)
    read = waiting.submit(stream.read, 10**9 * SEQ_LEN, 10**9 * SEQ_LEN + 1)
    time.sleep(0.2)
    stream.close()
    assert not any(thread.is_alive() for thread in stream._thread._threads)
    assert isinstance(read.exception(), CancelledError)
    waiting.shutdown()
    assert counting.documents > 100


def test_marks_are_where_documents_begin(open_stream, repeated):
    stream = open_stream()
    for number in range(1, 30):
        stream.read(0, number * SIZE)
        mark = stream._marks[number]
        assert number * SIZE - 2000 < mark.position <= number * SIZE
        assert mark.position in repeated.starts
