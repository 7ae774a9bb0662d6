import hashlib
import json
import os
import pickle
import shutil
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtfm.config.problems import ConfigProblem, DataProblem
from bigtfm.config.sections import DataSection
from bigtfm.data.best_fit import pack
from bigtfm.data.indexed import Header, Split, TokenDataset
from bigtfm.data.loader import Loader
from bigtfm.data.mixture import BLOCK, MAX_PERIOD, Mixture, parts_of, training_order, turns
from bigtfm.data.order import MAX_SIZE, Windows
from bigtfm.job import check_job
from bigtfm.run_directory import identity, refuse_changes

WEIGHTS = st.lists(st.sampled_from([0.1, 0.3, 0.25, 1.0, 2.0, 7.0, 0.05, 0.333]), min_size=1, max_size=7)


def windows(*sizes, seq_len=4):
    """Sources of so many windows, one behind the other."""
    sources, start = [], 0
    for size in sizes:
        sources.append(Windows(size * seq_len + 1, seq_len, start=start))
        start += size * seq_len + 1
    return sources


def sources_of(mixture, first, count):
    """The source of each sample."""
    edges = np.cumsum([source.size for source in mixture.sources])
    return np.searchsorted(edges, mixture.pieces(first, count).ids, side="right")


def worst(order, shares):
    """How far a source's count ever is from its share, in samples."""
    taken = np.cumsum(np.array(order)[:, None] == np.arange(len(shares)), axis=0)
    ideal = np.arange(1, len(order) + 1)[:, None] * np.array([float(share) for share in shares])
    return float(np.abs(taken - ideal).max())


# --- proportions --------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=9))
def test_after_any_samples_each_source_is_within_one_of_its_share(parts):
    order = turns(parts)
    assert np.array_equal(np.bincount(order, minlength=len(parts)), parts)
    assert worst(order, [Fraction(part, sum(parts)) for part in parts]) < 1 + 1e-9


def round_robin(parts, count):
    """One of each in turn, whoever has had its part of the period is left out."""
    left, order = list(parts), []
    while len(order) < count:
        if not any(left):
            left = list(parts)
        for source in range(len(parts)):
            if left[source]:
                left[source] -= 1
                order.append(source)
    return order[:count]


def test_the_test_of_proportions_sees_other_orders():
    """Controls: random draws, and a round robin with the right counts a period, both go astray."""
    parts = [7, 2, 1]
    shares = [0.7, 0.2, 0.1]
    assert worst(np.tile(turns(parts), 100), shares) < 1
    assert worst(np.random.default_rng(0).choice(3, 1000, p=shares), shares) > 5
    assert worst(round_robin([70, 20, 10], 1000), shares) > 5


@settings(max_examples=200, deadline=None)
@given(WEIGHTS, st.integers(0, 5000), st.integers(1, 400))
def test_proportions_hold_from_the_first_sample_to_any_other(weights, first, count):
    mixture = Mixture(windows(*range(50, 50 + len(weights))), 7, weights)
    shares = np.array(weights) / sum(weights)
    before, after = mixture.counts(first), mixture.counts(first + count)
    assert np.abs(before - first * shares).max() < 1 + 1e-6
    assert np.abs(after - (first + count) * shares).max() < 1 + 1e-6
    seen = np.bincount(sources_of(mixture, first, count), minlength=len(weights))
    assert np.array_equal(after - before, seen)


@pytest.mark.parametrize(
    ("weights", "parts"),
    [
        ([0.7, 0.3], [7, 3]),
        ([0.1, 0.2, 0.3], [1, 2, 3]),  # as written: binary fractions would need a period of 2**55
        ([1.0], [1]),
        ([3.0, 3.0], [1, 1]),
        ([1e-05, 0.99999], None),
        ([0.123456789, 0.2, 1 / 3], None),
        ([1.0] + [1e-9] * 300, None),
    ],
)
def test_parts(weights, parts):
    got = parts_of(weights)
    if parts is not None:
        assert got == parts
        return
    assert sum(got) == MAX_PERIOD
    assert min(got) >= 1
    for part, weight in zip(got, weights, strict=True):
        assert part == 1 or abs(part - weight / sum(weights) * MAX_PERIOD) <= max(1, len(weights))
    began = time.process_time()
    assert len(turns(got)) == MAX_PERIOD
    assert time.process_time() - began < 2


# --- random access ------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(
    weights=WEIGHTS,
    first=st.integers(0, 3 * BLOCK),
    counts=st.lists(st.integers(1, 60), min_size=1, max_size=8),
    limits=st.lists(st.one_of(st.just(MAX_SIZE), st.integers(1, 9000)), min_size=7, max_size=7),
    sizes=st.lists(st.integers(1, 200), min_size=7, max_size=7),
)
def test_samples_do_not_depend_on_how_or_when_they_are_asked_for(weights, first, counts, limits, sizes):
    """Any ranks, micro-batches and resumes are such splits of the same range."""

    def mixture():
        limits_ = [MAX_SIZE, *limits[1 : len(weights)]]
        return Mixture(windows(*sizes[: len(weights)]), 3, weights, limits_)

    def columns(mixture, first, count):
        pieces = mixture.pieces(first, count)
        return np.stack([pieces.ids, pieces.starts, pieces.stops])

    whole = columns(mixture(), first, sum(counts))
    parts, start, one = [], first, mixture()
    for n, count in enumerate(counts):
        asked = one if n % 2 else mixture()  # a resumed run begins anew
        parts.append(columns(asked, start, count))
        start += count
    assert np.array_equal(np.concatenate(parts, axis=1), whole)
    backwards = [columns(one, first + i, 1) for i in reversed(range(sum(counts)))][::-1]
    assert np.array_equal(np.concatenate(backwards, axis=1), whole)


def test_each_source_runs_through_its_own_epochs():
    mixture = Mixture(windows(30, 30, 50), 5, [0.5, 0.25, 0.25])
    pieces = mixture.pieces(0, 4000)
    source = sources_of(mixture, 0, 4000)
    orders = []
    for n, size in enumerate((30, 30, 50)):
        ids = pieces.ids[source == n] - (0, 30, 60)[n]
        epochs = ids[: len(ids) // size * size].reshape(-1, size)
        assert all(np.array_equal(np.sort(epoch), np.arange(size)) for epoch in epochs)
        assert len(np.unique(epochs, axis=0)) == len(epochs) > 10  # each in an order of its own
        orders.append(epochs[0])
    assert not np.array_equal(orders[0], orders[1])  # of one size, and yet not the same
    alone = Mixture(windows(30), 5).pieces(0, 600).ids
    assert np.array_equal(pieces.ids[source == 0][:600], alone)  # the first keeps the order it has alone
    starts = np.array([0, 121, 242])[source] + (pieces.ids - np.array([0, 30, 60])[source]) * 4
    assert np.array_equal(pieces.starts, starts)
    assert np.array_equal(pieces.stops, starts + 4)


# --- limits -------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 9), st.one_of(st.just(MAX_SIZE), st.integers(1, 300))),
        min_size=1,
        max_size=6,
    )
)
def test_limits_are_kept_and_the_others_fill_the_place_in_proportion(sources):
    weights, limits = [float(w) for w, _ in sources], [limit for _, limit in sources]
    mixture = Mixture(windows(*[20] * len(sources)), 1, weights, limits)
    count = min(1500, mixture.num_samples)
    source = sources_of(mixture, 0, count)
    taken = np.zeros(len(sources), int)
    since, before = 0, taken.copy()
    for n, chosen in enumerate(source.tolist(), 1):
        taken[chosen] += 1
        active = np.array([t < limit for t, limit in zip(before, limits, strict=True)])
        shares = np.where(active, weights, 0) / np.array(weights)[active].sum()
        assert np.abs(taken - before - (n - since) * shares).max() < 1 + 1e-9
        if limits[chosen] == taken[chosen]:
            since, before = n, taken.copy()
    assert all(t <= limit for t, limit in zip(taken, limits, strict=True))
    assert np.array_equal(taken, mixture.counts(count))
    if mixture.num_samples == count:
        assert taken.tolist() == limits


def test_beyond_the_limits_is_our_own_mistake():
    mixture = Mixture(windows(10, 10), 1, [1.0, 1.0], [15, 5])
    assert mixture.num_samples == 20
    assert len(mixture.pieces(18, 2).ids) == 2
    with pytest.raises(AssertionError):
        mixture.pieces(18, 3)


# --- data sets ----------------------------------------------------------------------------------------------


def write_sparse(folder, tokens, files, documents, tokenizer=b"t", seed=0):
    """A data set of holes: every token and document start is 0."""
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "t.model").write_bytes(tokenizer)
    sha = hashlib.sha256(tokenizer).hexdigest()

    def entry(name):
        for suffix, size in ((".bin", 2 * tokens // files), (".idx", 8 * documents // files)):
            with (folder / (name + suffix)).open("wb") as file:
                os.truncate(file.fileno(), size)
        return {
            "name": f"{name}.bin", "tokens": tokens // files, "documents": documents // files, "sha256": sha,
            "index": f"{name}.idx", "index_sha256": sha,
        }  # fmt: skip

    def split(names):
        return {
            "documents": documents // files * len(names), "tokens": tokens // files * len(names),
            "bytes": tokens, "max_id": 0, "files": [entry(name) for name in names],
        }  # fmt: skip

    header = Header.model_validate({
        "dtype": "uint16", "vocab_size": 100, "source": {"seed": seed}, "options": {},
        "splits": {
            "train": split([f"train-{n:05d}" for n in range(files)]), "validation": split(["validation"]),
        },
        "tokenizer": {
            "kind": "sentencepiece", "identity": sha, "bos_id": 1, "eos_id": 2,
            "files": [{"name": "t.model", "sha256": sha}],
        },
    })  # fmt: skip
    (folder / "dataset.json").write_text(header.model_dump_json())
    return folder


def data_section(*sources):
    return DataSection.model_validate({"sources": sources})


def first_batch(section, first, seq_len=2048):
    """What training does before its first step."""
    datasets = [TokenDataset.open(path) for path in section.paths]
    order = training_order(datasets, section, seq_len, seed=1)
    stream = Split.join([dataset.split("train") for dataset in datasets])
    return Loader(stream, order, seq_len, datasets[0].vocab_size).batch(first, 8)


def test_a_trillion_tokens_open_as_fast_as_a_billion(tmp_path):
    """Start-up costs what the files cost that there are (benchmarks/bench_order.py has its figures)."""

    def made(name, tokens):
        return str(write_sparse(tmp_path / name, tokens, 64, tokens // 1000, seed=name))

    seconds = {}
    for tokens in (10**9, 10**12):
        a, b = made(f"a-{tokens}", tokens), made(f"b-{tokens}", tokens)
        one, two = DataSection(path=a), data_section({"path": a, "weight": 0.7}, {"path": b, "weight": 0.3})
        for section, sources in ((one, 1), (two, 2)):
            tries = []
            for _ in range(5):
                began = time.process_time()
                batch = first_batch(section, first=tokens // 10**6)
                tries.append(time.process_time() - began)
            assert len(batch.input_ids) == 8 * 2048
            assert len({sample // (tokens // 2048) for sample in batch.samples}) == sources
            seconds[tokens, sources] = min(tries)
    assert all(seconds[10**12, sources] < 2 * seconds[10**9, sources] for sources in (1, 2)), seconds


def test_a_joined_stream_is_the_files_one_behind_the_other(tmp_path, tiny_data):
    dataset = TokenDataset.open(tiny_data)
    parts = [dataset.split("train"), dataset.split("validation")]
    joined = pickle.loads(pickle.dumps(Split.join(parts)))
    sizes = [part.num_tokens for part in parts]
    assert joined.num_tokens == sum(sizes)
    assert joined.num_documents == sum(part.num_documents for part in parts)
    whole = np.concatenate([part.read(0, size) for part, size in zip(parts, sizes, strict=True)])
    assert np.array_equal(joined.read(0, sum(sizes)), whole)
    starts = np.concatenate([part.document_starts(0, size) for part, size in zip(parts, sizes, strict=True)])
    starts[parts[0].num_documents :] += sizes[0]
    assert np.array_equal(joined.document_starts(0, sum(sizes)), starts)
    assert np.array_equal(joined.document_positions(np.arange(len(starts))), starts)


def test_sources_need_the_same_tokenizer_and_to_be_prepared(tmp_path):
    a = write_sparse(tmp_path / "a", 1000, 1, 10)
    b = write_sparse(tmp_path / "b", 1000, 1, 10, tokenizer=b"other")
    section = data_section({"path": str(a)}, {"path": str(b)})
    with pytest.raises(DataProblem) as caught:
        training_order([TokenDataset.open(path) for path in (a, b)], section, 16, 0)
    assert str(a) in caught.value.line
    assert str(b) in caught.value.line
    c = write_sparse(tmp_path / "c", 16, 1, 1)
    section = data_section({"path": str(a)}, {"path": str(c)})
    with pytest.raises(DataProblem, match="16 tokens, too few for a sequence of 16") as caught:
        training_order([TokenDataset.open(path) for path in (a, c)], section, 16, 0)
    assert caught.value.where == str(c)


def test_max_epochs_are_passes_over_a_source(tmp_path):
    a, b = write_sparse(tmp_path / "a", 1601, 1, 10), write_sparse(tmp_path / "b", 801, 1, 10)
    section = data_section(
        {"path": str(a), "max_epochs": 0.1}, {"path": str(b), "weight": 0.5, "max_epochs": 2.5}
    )
    order = training_order([TokenDataset.open(path) for path in (a, b)], section, 16, 0)
    assert order.num_samples == 10 + 125
    assert order.counts(135).tolist() == [10, 125]


# --- what `bigtfm check` says -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_data(tmp_path_factory, tiny_data):
    """Two data sets of one tokenizer: the tiny one, and its validation text once more."""
    from bigtfm.data.prepare import prepare

    folder = tmp_path_factory.mktemp("second")
    (folder / "text.txt").write_text("The state of the Union is strong.\n\n" * 800)
    prepare(
        [str(folder / "text.txt")], folder / "tokens", tokenizer=str(tiny_data / "tokenizer"), workers=1,
        validation_fraction=0.1, progress=False,
    )  # fmt: skip
    return tiny_data, folder / "tokens"


def overrides(two_data, *entries):
    tables = [f'{{path="{path}", {entry}}}' for path, entry in zip(two_data, entries, strict=True)]
    return [
        f"data.sources=[{', '.join(tables)}]",
        "max_seq_len=32",
        "hidden_size=32",
        "num_attention_heads=2",
    ]


def test_check_shows_shares_tokens_and_epochs(two_data, deepspeed_json):
    job = check_job(None, deepspeed_json(), [*overrides(two_data, "weight=0.9", "weight=0.1"), "steps=50"], 1)
    told = json.loads(job.resolved.to_json())
    sizes = [source.size for source in job.order.sources]
    assert [source["share"] for source in told["sources"]] == [0.9, 0.1]
    assert [source["epochs"] for source in told["sources"]] == [360 / sizes[0], 40 / sizes[1]]
    tokens = [dataset.split("train").num_tokens for dataset in job.datasets]
    assert [source["train_tokens"] for source in told["sources"]] == tokens
    assert told["train_tokens"] == sum(tokens)
    assert told["tokens_per_step"] == 8 * 32
    assert told["steps_per_epoch"] == sum(sizes) / 8
    assert told["epochs"] == 50 * 8 / sum(sizes)


def test_a_run_longer_than_its_sources_is_refused_with_the_steps_that_are_possible(two_data, deepspeed_json):
    capped = overrides(two_data, "max_epochs=0.01", "max_epochs=1")
    with pytest.raises(ConfigProblem) as caught:
        check_job(None, deepspeed_json(), [*capped, "steps=100000"], 1)
    possible = int(caught.value.fix.partition("set run.steps to ")[2].split()[0])
    assert check_job(None, deepspeed_json(), [*capped, f"steps={possible}"], 1).resolved.steps == possible
    with pytest.raises(ConfigProblem):
        check_job(None, deepspeed_json(), [*capped, f"steps={possible + 1}"], 1)


def test_identity_names_every_source_and_one_data_set_is_what_it_was(two_data, deepspeed_json):
    first, second = (TokenDataset.open(path).identity for path in two_data)
    sizes = ["max_seq_len=32", "hidden_size=32", "num_attention_heads=2", "steps=5"]
    job = check_job(None, deepspeed_json(), [f"data.path={two_data[0]}", *sizes], 1)
    before = {"data": {"sha256": first, "seq_len": 32}}  # as checkpoints of before mixtures have it
    assert identity(job)["data"] == before["data"]
    mixed = [*overrides(two_data, "weight=0.9", "weight=0.1, max_epochs=3"), "steps=5"]
    now = identity(check_job(None, deepspeed_json(), mixed, 1))
    assert now["data"]["sources"] == {
        "1": {"sha256": first, "weight": 0.9, "max_epochs": None},
        "2": {"sha256": second, "weight": 0.1, "max_epochs": 3.0},
    }
    with pytest.raises(ConfigProblem, match=r"data\.sources was unset"):
        refuse_changes(before, {"data": now["data"]}, (), Path("run"))
    other = json.loads(json.dumps(now["data"]))
    other["sources"]["2"]["weight"] = 0.2
    with pytest.raises(ConfigProblem, match=r"data\.sources\.2\.weight was 0\.2 .* and is 0\.1 now"):
        refuse_changes({"data": other}, {"data": now["data"]}, (), Path("run"))
    for path in two_data:
        pack(path, 32)
    packed = identity(check_job(None, deepspeed_json(), [*mixed, "data.packing=best_fit"], 1))
    assert packed["data"] == now["data"] | {"packing": "best_fit"}
    for path in two_data:
        shutil.rmtree(path / "packed-32")
