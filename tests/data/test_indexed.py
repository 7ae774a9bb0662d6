import hashlib
import json
import sys
import time
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtfm.config.problems import DataProblem
from bigtfm.data.indexed import TokenDataset

DOCUMENTS = {"train": [3, 2, 5, 9, 2, 2, 7, 4], "validation": [4, 6]}  # tokens of each
PER_FILE = 3  # documents


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def write(folder, *, dtype="uint16", vocab_size=100, documents=DOCUMENTS):
    """A data set by the description of the format, not by the code that writes them."""
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "tokenizer.model").write_bytes(b"model")
    splits, streams = {}, {}
    for name, lengths in documents.items():
        stream = (np.arange(sum(lengths)) * 13 % vocab_size).astype(dtype)
        streams[name] = stream
        starts = np.cumsum([0, *lengths])
        files = []
        for number, first in enumerate(range(0, len(lengths), PER_FILE)):
            last = min(first + PER_FILE, len(lengths))
            tokens = stream[starts[first] : starts[last]].astype(np.dtype(dtype).newbyteorder("<")).tobytes()
            index = (starts[first:last] - starts[first]).astype("<u8").tobytes()
            stem = f"{name}-{number:05d}"
            (folder / f"{stem}.bin").write_bytes(tokens)
            (folder / f"{stem}.idx").write_bytes(index)
            counts = {"tokens": int(starts[last] - starts[first]), "documents": last - first}
            names = {"name": f"{stem}.bin", "index": f"{stem}.idx"}
            files.append({**counts, **names, "sha256": sha256(tokens), "index_sha256": sha256(index)})
        splits[name] = {
            "documents": len(lengths),
            "tokens": sum(lengths),
            "bytes": 3 * sum(lengths),
            "max_id": int(stream.max(initial=0)) if len(stream) else -1,
            "files": files,
        }
    tokenizer_file = {"name": "tokenizer.model", "sha256": sha256(b"model")}
    header = {
        "format": "bigtfm-tokens",
        "version": 1,
        "dtype": dtype,
        "vocab_size": vocab_size,
        "tokenizer": {
            "kind": "sentencepiece",
            "identity": sha256(b"model"),
            "bos_id": 1,
            "eos_id": 2,
            "files": [tokenizer_file],
        },
        "splits": splits,
        "source": {},
        "options": {},
    }
    (folder / "dataset.json").write_text(json.dumps(header))
    return streams


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "set")
    return tmp_path / "set"


def change(folder, edit):
    path = folder / "dataset.json"
    header = json.loads(path.read_text())
    edit(header)
    path.write_text(json.dumps(header))


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_every_range_across_files(tmp_path, dtype):
    streams = write(tmp_path / "set", dtype=dtype)
    dataset = TokenDataset.open(tmp_path / "set")
    assert dataset.vocab_size == 100
    for name, stream in streams.items():
        split = dataset.split(name)
        starts = np.cumsum([0, *DOCUMENTS[name]])[:-1]
        assert (split.num_tokens, split.num_documents, split.num_bytes) == (
            len(stream),
            len(starts),
            3 * len(stream),
        )
        for a in range(len(stream) + 1):
            for b in range(a, len(stream) + 1):
                tokens = split.read(a, b)
                assert tokens.dtype == dtype
                np.testing.assert_array_equal(tokens, stream[a:b])
                found = split.document_starts(a, b)
                assert found.dtype == np.int64
                np.testing.assert_array_equal(found, starts[(starts >= a) & (starts < b)])


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 1), (0, 1000)])
def test_ranges_outside(folder, start, stop):
    split = TokenDataset.open(folder).split("train")
    with pytest.raises(IndexError):
        split.read(start, stop)
    with pytest.raises(IndexError):
        split.document_starts(start, stop)


def test_an_empty_split(tmp_path):
    write(tmp_path / "set", documents={"train": [3], "validation": []})
    split = TokenDataset.open(tmp_path / "set").split("validation")
    assert split.num_tokens == 0
    assert len(split.read(0, 0)) == len(split.document_starts(0, 0)) == 0


def test_identity_names_the_header(folder):
    before = TokenDataset.open(folder).identity
    assert before == sha256((folder / "dataset.json").read_bytes())
    change(folder, lambda header: header["options"].update(x=1))
    assert TokenDataset.open(folder).identity != before


def test_opening_reads_no_tokens(tmp_path):
    """A sparse file of 64 GB opens at once, and so does a look-up in its index of a billion documents."""
    folder = tmp_path / "set"
    write(folder, documents={"train": [4], "validation": [4]})
    tokens, documents = 32 * 10**9, 10**9
    for name, size in (("train-00000.bin", 2 * tokens), ("train-00000.idx", 8 * documents)):
        with (folder / name).open("r+b") as file:
            file.truncate(size)

    def edit(header):
        split = header["splits"]["train"]
        for counts in (split, split["files"][0]):
            counts["tokens"], counts["documents"] = tokens, documents

    change(folder, edit)
    started = time.perf_counter()
    split = TokenDataset.open(folder).split("train")
    assert len(split.read(tokens - 10, tokens)) == 10
    split.document_starts(5, 10)
    assert time.perf_counter() - started < 1


def test_no_torch():
    import subprocess

    code = "import sys, bigtfm.data.indexed; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda h: h.update(format="other"), "not the header of a bigtfm data set"),
        (lambda h: h.update(version=2), "format version 2, but this bigtfm reads 1"),
        (lambda h: h.update(dtype="int8"), "dtype"),
        (lambda h: h.update(dtype="float64"), "dtype"),
        (lambda h: h.update(vocab_size=50), "beyond the vocabulary of 50"),
        (lambda h: h.update(vocab_size=70000), "doesn't fit uint16"),
        (lambda h: h.update(vocab_size="100"), "vocab_size"),
        (lambda h: h.update(vocab_sizes=100), "vocab_sizes"),
        (lambda h: h.pop("tokenizer"), "tokenizer"),
        (lambda h: h["tokenizer"].update(bos_id=100), "BOS or EOS id is beyond"),
        (lambda h: h["tokenizer"].update(identity="0" * 64), "identity isn't the SHA-256"),
        (lambda h: h["tokenizer"]["files"][0].update(sha256="0" * 64), "the file was changed"),
        (lambda h: h["splits"].pop("validation"), "splits"),
        (lambda h: h["splits"].update(test=h["splits"]["train"]), "splits"),
        (lambda h: h["splits"]["train"].update(max_id=100), "id 100, beyond the vocabulary"),
        (lambda h: h["splits"]["train"].update(tokens=7), "tokens is 7, but the files hold 34"),
        (lambda h: h["splits"]["train"].update(documents=-1), "documents"),
        (lambda h: h["splits"]["train"]["files"][0].update(name="../../etc/passwd"), "files.0.name"),
        (lambda h: h["splits"]["train"]["files"][0].update(name="nothing.bin"), "missing file"),
    ],
)
def test_broken_headers(folder, edit, message):
    TokenDataset.open(folder)
    change(folder, edit)
    with pytest.raises(DataProblem) as caught:
        TokenDataset.open(folder)
    assert message in caught.value.line
    assert caught.value.exit_code == 65
    assert "\n" not in caught.value.line


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"format": "bigtfm-tokens", "version": 1}']
)
def test_headers_that_are_none(folder, text):
    (folder / "dataset.json").write_bytes(text)
    with pytest.raises(DataProblem, match=r"dataset\.json"):
        TokenDataset.open(folder)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_flipped_header_byte_is_refused_or_harmless(tmp_path_factory, data):
    """Whatever one damaged byte makes of the header: a data set or a DataProblem, nothing else."""
    folder = tmp_path_factory.getbasetemp() / "flipped"
    if not folder.exists():
        write(folder)
        (folder / "saved").write_bytes((folder / "dataset.json").read_bytes())
    text = bytearray((folder / "saved").read_bytes())
    text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    (folder / "dataset.json").write_bytes(text)
    with suppress(DataProblem):
        TokenDataset.open(folder)


@pytest.mark.parametrize("name", ["train-00001.bin", "train-00001.idx", "tokenizer/tokenizer.model"])
def test_missing_and_cut_files(folder, name):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-1])
    with pytest.raises(DataProblem, match=r"but the header says"):
        TokenDataset.open(folder)
    (folder / name).unlink()
    with pytest.raises(DataProblem, match="missing file") as caught:
        TokenDataset.open(folder)
    assert name in caught.value.line


def test_missing_data_set_names_the_command(tmp_path):
    with pytest.raises(DataProblem) as caught:
        TokenDataset.open(tmp_path / "nothing")
    assert f"bigtfm prepare --input YOUR_TEXT --out {tmp_path / 'nothing'}" in caught.value.fix
    with pytest.raises(DataProblem, match="no finished data set"):
        TokenDataset.open(tmp_path)


def test_unknown_split(folder):
    with pytest.raises(DataProblem, match="did you mean 'validation'"):
        TokenDataset.open(folder).split("valid")


@pytest.mark.parametrize("name", ["train-00002.bin", "validation-00000.bin", "train-00000.idx"])
def test_verify_finds_one_changed_bit(folder, name):
    dataset = TokenDataset.open(folder)
    dataset.verify()
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    TokenDataset.open(folder)  # opening can't see it ...
    with pytest.raises(DataProblem, match="the file was changed") as caught:  # ... verifying does
        dataset.verify()
    assert name in caught.value.where
