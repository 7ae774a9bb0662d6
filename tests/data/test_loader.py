import hashlib
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loaders import windows_loader
from memory_split import MemorySplit

from bigtfm.config.problems import DataProblem
from bigtfm.data.indexed import Header, TokenDataset
from bigtfm.data.loader import Batch
from bigtfm.data.mixture import BLOCK
from bigtfm.data.order import Windows

VOCAB = 1000


def oracle(split, window, seq_len, sample):
    """One window by the definition, token by token."""
    starts = set(split.starts.tolist())
    rows = []
    first = window * seq_len
    for i in range(first, min(first + seq_len, split.num_tokens - 1)):
        begins = i == first or i in starts
        position = 0 if begins else rows[-1][2] + 1
        label = -100 if i + 1 in starts else int(split.tokens[i + 1])
        rows.append((int(split.tokens[i]), label, position, sample * seq_len + i - first))
    return rows


def rows_of(batch):
    columns = (batch.input_ids, batch.labels, batch.position_ids, batch.token_keys)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def check(batch, split, seq_len, first_sample):
    expected = [
        row for n, w in enumerate(batch.samples) for row in oracle(split, w, seq_len, first_sample + n)
    ]
    assert rows_of(batch) == expected
    cu = batch.cu_seqlens.tolist()
    assert cu == [i for i, row in enumerate(expected) if row[2] == 0] + [len(expected)]
    assert batch.seq_lens == tuple(np.diff(cu).tolist())
    assert batch.num_labels == sum(row[1] != -100 for row in expected)
    assert {t.dtype for t in (batch.input_ids, batch.labels, batch.position_ids, batch.token_keys)} == {
        torch.int64
    }
    assert batch.cu_seqlens.dtype == torch.int32


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=40),
    seq_len=st.integers(1, 40),
    count=st.integers(1, 9),
    first=st.integers(0, 10_000),
    dtype=st.sampled_from([np.uint16, np.uint32]),
)
def test_a_batch_is_what_the_definition_says(lengths, seq_len, count, first, dtype):
    split = MemorySplit(lengths, dtype=dtype)
    if split.num_tokens > seq_len:
        loader = windows_loader(split, seq_len, seed=1, vocab_size=VOCAB)
        check(loader.batch(first, count), split, seq_len, first)
    if split.num_tokens > 1:
        loader = windows_loader(split, seq_len, seed=1, vocab_size=VOCAB, shuffle=False)
        assert loader.num_samples == -(-(split.num_tokens - 1) // seq_len)
        first %= loader.num_samples
        count = min(count, loader.num_samples - first)
        batch = loader.batch(first, count)
        assert batch.samples == tuple(range(first, first + count))
        check(batch, split, seq_len, first)


def joined(a, b):
    """Two batches one behind the other."""
    names = ("input_ids", "labels", "position_ids", "token_keys")
    tensors = {name: torch.cat([getattr(a, name), getattr(b, name)]) for name in names}
    cu = torch.cat([a.cu_seqlens[:-1], b.cu_seqlens + a.cu_seqlens[-1]])
    return Batch(
        **tensors, cu_seqlens=cu, seq_lens=a.seq_lens + b.seq_lens, num_labels=a.num_labels + b.num_labels,
        samples=a.samples + b.samples,
    )  # fmt: skip


def same(a, b):
    return all(
        torch.equal(value, getattr(b, name)) if isinstance(value, torch.Tensor) else value == getattr(b, name)
        for name, value in vars(a).items()
    )


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("first", [0, 3, BLOCK - 3])
def test_a_batch_does_not_depend_on_how_samples_are_split(shuffle, first):
    split = MemorySplit(np.random.default_rng(0).integers(2, 60, 2000))
    seq_len = 12
    loader = windows_loader(split, seq_len, seed=7, vocab_size=VOCAB, shuffle=shuffle)
    whole = loader.batch(first, 4)
    fresh = windows_loader(split, seq_len, seed=7, vocab_size=VOCAB, shuffle=shuffle)
    second = fresh.batch(first + 2, 2)  # asked in another order, by another loader
    parts = joined(fresh.batch(first, 2), second)
    assert same(whole, parts)
    one, rest = loader.batch(first, 1), loader.batch(first + 1, 3)
    assert same(whole, joined(one, rest))
    assert not same(whole, joined(rest, one))  # negative control: the comparison sees an exchanged order


def test_every_token_of_a_validation_split_is_predicted_once():
    split = MemorySplit(np.random.default_rng(1).integers(2, 50, 100))
    loader = windows_loader(split, 64, seed=0, vocab_size=VOCAB, shuffle=False)
    assert (split.num_tokens - 1) % 64, "the last window has to be a partial one here"
    labels = []
    for first in range(0, loader.num_samples, 5):
        labels += loader.batch(first, min(5, loader.num_samples - first)).labels.tolist()
    predicted = np.array([label for label in labels if label != -100])
    begins = np.zeros(split.num_tokens, bool)
    begins[split.starts] = True
    assert np.array_equal(predicted, split.tokens[~begins])
    assert len(predicted) == split.num_tokens - len(split.starts)


def test_an_epoch_has_every_full_window_once_and_the_next_another_order():
    loader = windows_loader(MemorySplit([40] * 50), 16, seed=0, vocab_size=VOCAB)
    n = (50 * 40 - 1) // 16
    first, second = loader.batch(0, n), loader.batch(n, n)
    assert sorted(first.samples) == sorted(second.samples) == list(range(n))
    assert first.samples != second.samples
    assert (
        len(set(first.token_keys.tolist()) & set(second.token_keys.tolist())) == 0
    )  # dropout differs between epochs


def test_the_seed_chooses_the_order():
    split = MemorySplit([40] * 50)
    assert len({windows_loader(split, 16, seed, VOCAB).batch(0, 20).samples for seed in range(10)}) == 10


def test_the_memo_of_a_block_changes_nothing():
    loader = windows_loader(MemorySplit([40] * 500), 16, seed=3, vocab_size=VOCAB)
    samples = [0, BLOCK + 5, 2, 3 * BLOCK - 1, BLOCK - 1]
    jumping = [loader.batch(n, 2).samples for n in samples]
    assert jumping == [
        windows_loader(MemorySplit([40] * 500), 16, 3, VOCAB).batch(n, 2).samples for n in samples
    ]
    parts = [loader.batch(n, 1024).samples for n in range(0, 2 * BLOCK, 1024)]
    assert loader.batch(0, 2 * BLOCK).samples == sum(parts, ())


def write_dataset(folder, memory, files):
    """`memory` as both splits of a data set on disk, its documents dealt to `files` files of unequal size."""
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "t.model").write_bytes(b"t")
    sha = hashlib.sha256(b"t").hexdigest()
    cuts = (np.linspace(0, 1, files + 1) ** 2 * len(memory.starts)).astype(int)
    edges = [*memory.starts[cuts[:-1]].tolist(), memory.num_tokens]
    entries = []
    for n, (first, last) in enumerate(pairwise(cuts)):
        tokens = memory.tokens[edges[n] : edges[n + 1]]
        starts = (memory.starts[first:last] - edges[n]).astype("<u8")
        tokens.tofile(folder / f"{n}.bin")
        starts.tofile(folder / f"{n}.idx")
        entries.append({
            "name": f"{n}.bin", "tokens": len(tokens), "sha256": hashlib.sha256(tokens.tobytes()).hexdigest(),
            "index": f"{n}.idx", "documents": len(starts),
            "index_sha256": hashlib.sha256(starts.tobytes()).hexdigest(),
        })  # fmt: skip
    split = {
        "documents": len(memory.starts), "tokens": memory.num_tokens, "bytes": 1, "max_id": VOCAB - 1,
        "files": entries,
    }  # fmt: skip
    header = Header.model_validate({
        "dtype": memory.tokens.dtype.name, "vocab_size": VOCAB, "source": {}, "options": {},
        "splits": {"train": split, "validation": split},
        "tokenizer": {
            "kind": "sentencepiece", "identity": sha, "bos_id": 1, "eos_id": 2,
            "files": [{"name": "t.model", "sha256": sha}],
        },
    })  # fmt: skip
    (folder / "dataset.json").write_text(header.model_dump_json())


@pytest.mark.parametrize("files", [1, 5])
@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_a_data_set_on_disk_gives_the_same_batches(tmp_path, files, dtype):
    memory = MemorySplit(np.random.default_rng(2).integers(2, 60, 300), dtype=dtype)
    write_dataset(tmp_path, memory, files)
    dataset = TokenDataset.open(tmp_path)
    for name, shuffle in (("train", True), ("validation", False)):
        loader = windows_loader(dataset.split(name), 100, 4, dataset.vocab_size, shuffle=shuffle)
        expected = windows_loader(memory, 100, 4, VOCAB, shuffle=shuffle)
        assert loader.num_samples == expected.num_samples
        n = (memory.num_tokens - 1) // 100 + (not shuffle)
        for first in range(0, n, 7):
            count = min(7, n - first)
            assert same(loader.batch(first, count), expected.batch(first, count))


def test_an_id_outside_the_vocabulary_is_named_with_its_position():
    split = MemorySplit([30] * 10)
    split.tokens[137] = VOCAB
    loader = windows_loader(split, 16, seed=0, vocab_size=VOCAB, shuffle=False)
    assert loader.batch(0, 8).num_labels  # positions up to 128
    with pytest.raises(DataProblem, match=rf"token 137 is {VOCAB}, beyond") as caught:
        loader.batch(7, 4)
    assert caught.value.exit_code == 65
    assert windows_loader(split, 16, 0, VOCAB + 1, shuffle=False).batch(7, 4).num_labels


@pytest.mark.parametrize(
    ("tokens", "full", "size"), [(16, 1, 0), (17, 1, 1), (0, 1, 0), (1, 0, 0), (2, 0, 1)]
)
def test_how_many_windows_there_are(tokens, full, size):
    assert Windows(tokens, 16, full=bool(full)).size == size


def test_one_window_is_enough():
    batch = windows_loader(MemorySplit([17]), 16, seed=0, vocab_size=VOCAB).batch(5, 3)
    assert batch.samples == (0, 0, 0)
    assert batch.cu_seqlens.tolist() == [0, 16, 32, 48]


def test_model_inputs_and_devices():
    batch = windows_loader(MemorySplit([40] * 50), 16, seed=0, vocab_size=VOCAB).batch(0, 2)
    assert set(batch.model_inputs()) == {
        "input_ids",
        "labels",
        "position_ids",
        "cu_seqlens",
        "seq_lens",
        "token_keys",
    }
    moved = batch.to("meta")
    assert {
        value.device.type for value in moved.model_inputs().values() if isinstance(value, torch.Tensor)
    } == {"meta"}
    assert moved.seq_lens == batch.seq_lens
    assert moved.num_labels == batch.num_labels
    assert same(batch.to("cpu"), batch)
    assert not same(replace(batch, num_labels=0), batch)


def test_a_batch_does_not_alias_the_data_set():
    split = MemorySplit([40] * 50)
    before = split.tokens.copy()
    batch = windows_loader(split, 16, seed=0, vocab_size=VOCAB).batch(0, 2)
    batch.input_ids.zero_()
    batch.labels.zero_()
    assert np.array_equal(split.tokens, before)
