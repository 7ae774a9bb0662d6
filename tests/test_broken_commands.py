"""Broken commands, through the real program: one line (what, where, the fix) and the documented exit code."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rank_runner
import signing
import torch
from conftest import TINY

from bigtfm.cli import app
from bigtfm.config.problems import known_cause

CONFIG, DATA, STORAGE, NO_CHECKPOINT = 64, 65, 74, 76
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
DEEPSPEED = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-3}},
}
Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """The program in an empty folder: arguments -> exit code and what it said on stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bigtfm.cli.SILENCE", 0)
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)

    def call(*args: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            app(list(args))
        return int(ended.value.code or 0), capsys.readouterr().err

    return call


def assert_one_line(answer: tuple[int, str], code: int, piece: str) -> None:
    found, said = answer
    assert said.count("\n") == 1, said
    assert said.startswith("bigtfm: error: "), said
    assert ". Fix: " in said
    assert piece in said, said
    assert found == code, said


@pytest.fixture
def job(run: Run, tiny_data: Path, tmp_path: Path) -> list[str]:
    """What `bigtfm check` and `train` need, in the order of the command line."""
    (tmp_path / "ds.json").write_text(json.dumps(DEEPSPEED))
    return ["--deepspeed_config", "ds.json", f"data.path={tiny_data}", *TINY, "steps=2"]


def test_the_job_itself_is_sound(run: Run, job: list[str]) -> None:
    assert run("check", *job) == (0, ""), "so what is broken below is what the test breaks"


# --- the command line ------------------------------------------------------------------------------------

USAGE = [
    (["--nope"], "No such option: --nope"),
    (["trian"], "No such command 'trian'"),
    (["train"], "Missing option '--deepspeed_config'"),
    (["train", "--deepspeed_config"], "requires an argument"),
    (["train", "--deepspeed_config", "x.json", "--local_rank", "two"], "Invalid value for '--local_rank'"),
    (["check", "--deepspeed_config", "x.json", "--config"], "requires an argument"),
    (["check", "--deepspeed_config", "x.json", "--json=1"], "does not take a value"),
    (["check", "--deepspeed_config", "x.json", "--bad\nflag"], "No such option"),
    (["check", "--deepspeed_config", "x.json", "--world-size", "0"], "Invalid value for '--world-size'"),
    (["check", "--deepspeed_config", "x.json", "--world-size", "two"], "Invalid value for '--world-size'"),
    (["prepare", "stray.txt"], "unexpected extra argument"),
    (["prepare", "--workers", "many"], "Invalid value for '--workers'"),
    (["prepare", "--workers", ""], "Invalid value for '--workers'"),
    (["prepare", "--validation-fraction", "half"], "Invalid value for '--validation-fraction'"),
    (["generate"], "Missing option '--run'"),
    (["generate", "--run", "r", "--temperature", "-1"], "Invalid value for '--temperature'"),
    (["generate", "--run", "r", "--temperature", "nan"], "Invalid value for '--temperature'"),
    (["generate", "--run", "r", "--top-p", "1.5"], "Invalid value for '--top-p'"),
    (["generate", "--run", "r", "--top-k", "-1"], "Invalid value for '--top-k'"),
    (["generate", "--run", "r", "--max-new-tokens", "0"], "Invalid value for '--max-new-tokens'"),
    (["sync"], "Missing argument"),
    (["version", "3"], "unexpected extra argument"),
]


@pytest.mark.parametrize(("args", "piece"), USAGE)
def test_usage_errors_are_one_line(run: Run, args: list[str], piece: str) -> None:
    assert_one_line(run(*args), CONFIG, piece)


def test_no_command_shows_the_commands(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        app([])
    assert not ended.value.code
    assert "prepare" in capsys.readouterr().out


# --- both files ------------------------------------------------------------------------------------------

OVERRIDES = [
    ("nonsense", "'nonsense' is not key=value"),
    ("=3", "is not key=value"),
    ("stpes=3", "did you mean 'run.steps'?"),
    ("steps=", "run.steps must be"),
    ("steps=-1", "run.steps must be"),
    ("steps=1.5", "run.steps must be"),
    ("steps=nan", "run.steps must be"),
    ("steps=99999999999999999999", "steps 99999999999999999999 is too large"),
    ("steps=" + "[" * 5000, "run.steps must be"),
    ("run.name=../up", "run.name must be"),
    ("run.name=a\nb", "run.name must be"),
    ("run.name=\u00fc", "run.name must be"),
    ("run.name=" + "x" * 201, "at most 200 characters"),
    ("model.hidden_size=33", "is not a multiple of"),
    ("model.dropout=inf", "finite number"),
    ("data.seq_len=64", "longer than model.max_seq_len"),
    ("resume.allow=everything", "resume.allow must be"),
    ("lr=3", "it belongs into the DeepSpeed JSON, as optimizer.params.lr"),
    ("model.max_seq_len=9999999", "too few for a sequence"),
    ("data.path=nowhere", "no such data set"),
    ("data.path=ds.json", "can't be read"),
]


@pytest.mark.parametrize(("override", "piece"), OVERRIDES)
def test_broken_overrides(run: Run, job: list[str], override: str, piece: str) -> None:
    data = piece in ("too few for a sequence", "no such data set", "can't be read")
    assert_one_line(run("check", *job, override), DATA if data else CONFIG, piece)


JSON: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not valid JSON"),
    "a byte order mark": (b"\xef\xbb\xbf{}", "not valid JSON"),
    "UTF-16": ("{}".encode("utf-16"), "can't be read"),
    "NUL": (b"{}\0", "not valid JSON"),
    "deep": (b"[" * 100_000, "nested too deeply"),
    "a list": (b"[]", "holds no JSON object"),
    "a key twice": (b'{"bf16": {}, "bf16": {}}', "stands there twice"),
    "a line end in a key": (b'{"a\\nb": 1}', "unknown key 'a b'"),
    "NaN": (
        json.dumps(DEEPSPEED).replace("0.003", "NaN").encode(),
        "must be a number > 0 and <= 1e+30, not nan",
    ),
    "no float": (
        json.dumps(DEEPSPEED).replace("0.003", "1" + "0" * 400).encode(),
        "optimizer.params.lr must be a number",
    ),
    "a batch beyond counting": (
        json.dumps(DEEPSPEED | {"train_batch_size": 10**15 + 37}).encode(),
        "train_batch_size",
    ),
}


@pytest.mark.parametrize("name", JSON)
def test_broken_deepspeed_json(run: Run, job: list[str], tmp_path: Path, name: str) -> None:
    content, piece = JSON[name]
    (tmp_path / "ds.json").write_bytes(content)
    assert_one_line(run("check", *job), CONFIG, piece)


TOML: dict[str, tuple[bytes, str]] = {
    "a byte order mark": (b"\xef\xbb\xbf[run]\n", "not valid TOML"),
    "binary": (bytes(range(256)), "can't be read"),
    "a key twice": (b"[run]\nseed=1\nseed=2\n", "not valid TOML"),
    "deep": (b"a=" + b"[" * 100_000, "nested too deeply"),
    "a list of tables": (b"[[model]]\n", "model must be a table"),
    "an unknown table": (b"[trainer]\n", "unknown key 'trainer'"),
    "a number in quotes": (b'[run]\nseed="4"\n', "write 4 without quotes"),
}


@pytest.mark.parametrize("name", TOML)
def test_broken_run_config(run: Run, job: list[str], tmp_path: Path, name: str) -> None:
    content, piece = TOML[name]
    (tmp_path / "run.toml").write_bytes(content)
    assert_one_line(run("check", "--config", "run.toml", *job), CONFIG, piece)


@pytest.mark.parametrize("flag", ["--config", "--deepspeed_config"])
@pytest.mark.parametrize("path", ["", ".", "nowhere", "ds.json/x", "y" * 300])
def test_paths_that_are_no_files(run: Run, job: list[str], flag: str, path: str) -> None:
    code, said = run("check", *job, flag, path)
    assert said.count("\n") == 1
    assert ". Fix: " in said
    assert code == CONFIG


ENVIRONMENTS = [
    ({"WORLD_SIZE": None}, "WORLD_SIZE not set"),
    ({"RANK": "5", "WORLD_SIZE": "2"}, "RANK 5 of WORLD_SIZE 2"),
    ({"RANK": ""}, "RANK='' is not a whole number"),
    ({"WORLD_SIZE": "0"}, "can't be"),
    ({"LOCAL_RANK": "1"}, "can't be"),
    ({"MASTER_PORT": "abc"}, "MASTER_PORT='abc' is not a whole number"),
    ({"MASTER_PORT": "99999"}, "a free port from 1 to 65535"),
    ({"MASTER_ADDR": ""}, "MASTER_ADDR=''"),
]


@pytest.mark.parametrize(("change", "piece"), ENVIRONMENTS)
def test_broken_launches(
    run: Run, monkeypatch: pytest.MonkeyPatch, change: dict[str, str | None], piece: str
) -> None:
    sound = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29555",
    }
    for name, value in (sound | change).items():
        if value is not None:
            monkeypatch.setenv(name, value)
    assert_one_line(run("train", "--deepspeed_config", "never-read.json"), CONFIG, piece)


# --- data ------------------------------------------------------------------------------------------------

PREPARE: list[tuple[str, bytes, list[str], int, str]] = [
    ("in.txt", b"", [], DATA, "in.txt: no text in the input"),
    ("in.txt", b"text", ["--out", ""], CONFIG, "--out is empty"),
    ("in.txt", b"text", ["--input", ""], CONFIG, "an --input is empty"),
    ("in.txt", b"text", ["--out", "in.txt"], CONFIG, "is a file"),
    ("in.txt", b"text", ["--out", "in.txt/x"], STORAGE, "can't be written"),
    ("in.txt", b"text", ["--vocab-size", "259"], CONFIG, "--vocab-size is 259"),
    ("in.txt", b"text", ["--validation-fraction", "1"], CONFIG, "--validation-fraction is 1.0"),
    ("in.txt", b"text", ["--validation-fraction", "nan"], CONFIG, "--validation-fraction is nan"),
    ("in.txt", b"text", ["--model-type", "bpe\n"], CONFIG, "did you mean 'bpe'?"),
    ("in.txt", b"text", ["--tokenizer", "nowhere"], DATA, "no such tokenizer"),
    ("in.txt", b"text", ["--tokenizer", "in.txt"], DATA, "sentencepiece can't load it"),
    ("in.txt", "text".encode("utf-16"), [], DATA, "the text is UTF-16"),
    ("in.csv", "text,label".encode("utf-16"), [], DATA, "the text is UTF-16"),
    ("in.pdf", b"text", [], DATA, "unsupported kind of file"),
    ("in.txt.gz", b"text", [], DATA, "damaged gzip file"),
    ("in.jsonl", b'{"text": "a"}\n{', [], DATA, "in.jsonl:2: invalid JSON"),
    ("in.jsonl", b"[" * 100_000, [], DATA, "invalid JSON"),
    ("in.jsonl", b'{"txt": "a"}', [], DATA, "did you mean 'txt'?"),
    ("in.jsonl", b'{"text": 3}', [], DATA, "holds int, not text"),
    ("in.csv", b'a,text\n1,"b', [], DATA, "in.csv:2: invalid CSV"),
    ("in.csv", b"a,text\n1\n", [], DATA, "only 1 of 2 columns"),
    ("in.parquet", b"PAR1", [], DATA, "not a readable parquet file"),
]


@pytest.mark.parametrize(("name", "content", "flags", "code", "piece"), PREPARE)
def test_broken_input(
    run: Run, tmp_path: Path, name: str, content: bytes, flags: list[str], code: int, piece: str
) -> None:
    (tmp_path / name).write_bytes(content)
    assert_one_line(run("prepare", "--input", name, "--out", "out", "--workers", "1", *flags), code, piece)
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_parquet_with_a_damaged_page(run: Run, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "in.parquet"
    table = pyarrow.table({"text": [f"line {number}" for number in range(500)]})
    pyarrow.parquet.write_table(table, path, use_dictionary=False, compression="none")
    damaged = path.read_bytes().replace(b"line 250", b"line\xff250")
    path.write_bytes(damaged)
    answer = run("prepare", "--input", "in.parquet", "--out", "out", "--workers", "1")
    assert_one_line(answer, DATA, "not a readable parquet file")


@pytest.mark.parametrize("content", ["[]", '{"eos_token": ["a"]}', '{"eos_token": {"id": 3}}'])
def test_special_tokens_of_another_shape(run: Run, tmp_path: Path, content: str) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    (folder / "tokenizer_config.json").write_text(content)
    code, said = run("prepare", "--input", "embedded", "--out", "out", "--tokenizer", "tokenizer")
    assert_one_line((code, said), DATA, "tokenizer")


def test_an_input_whose_name_is_no_text(run: Run, tmp_path: Path, corpus_lines: list[str]) -> None:
    name = os.fsdecode(b"sp\xffech\n.txt")
    (tmp_path / name).write_text("\n\n".join(corpus_lines)[:40_000], encoding="utf-8")
    sizes = ["--vocab-size", "400", "--workers", "1"]
    assert run("prepare", "--input", name, "--out", "out", *sizes) == (0, "")
    assert run("prepare", "--input", name, "--out", "out", *sizes) == (0, ""), "and it is known again"


def _headers() -> dict[str, tuple[Callable[[Any], Any], str]]:
    def put(path: str, value: Any) -> Callable[[Any], Any]:
        def change(header: Any) -> Any:
            *parents, last = path.split(".")
            place = header
            for key in parents:
                place = place[int(key) if key.isdigit() else key]
            place[last] = value
            return header

        return change

    return {
        "a list": (lambda header: [], "not the header"),
        "another format": (put("format", "x"), "not the header"),
        "another version": (put("version", 2), "format version 2"),
        "a smaller vocabulary": (put("vocab_size", 300), "beyond the vocabulary"),
        "a float": (put("vocab_size", 512.5), "vocab_size"),
        "another dtype": (put("dtype", "uint8"), "dtype"),
        "a wrong count": (put("splits.train.tokens", 5), "but the files hold"),
        "a negative count": (put("splits.train.files.0.tokens", -5), "splits.train.files.0.tokens"),
        "no bytes": (put("splits.train.bytes", 0), "of 0 bytes"),
        "a path": (put("splits.train.files.0.name", "../train-00000.bin"), "splits.train.files.0.name"),
        "another hash": (put("splits.train.files.0.sha256", "0" * 64), "its SHA-256 is"),
        "a smaller id": (put("splits.train.max_id", 3), "above the header's 3"),
        "another identity": (put("tokenizer.identity", "0" * 64), "identity isn't"),
    }


@pytest.mark.parametrize("name", _headers())
def test_broken_headers(run: Run, job: list[str], tiny_data: Path, tmp_path: Path, name: str) -> None:
    change, piece = _headers()[name]
    shutil.copytree(tiny_data, tmp_path / "data")
    header = change(signing.read(tiny_data / "dataset.json"))
    (tmp_path / "data" / "dataset.json").write_text(json.dumps(header))  # some are no objects, none is sealed
    assert_one_line(run("check", *job, "data.path=data"), DATA, piece)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a header nested too deeply": lambda data: (data / "dataset.json").write_bytes(b"[" * 100_000),
    "a token file cut short": lambda data: os.truncate(data / "train-00000.bin", 1001),
    "an index cut short": lambda data: os.truncate(data / "train-00000.idx", 8),
    "no token file": lambda data: (data / "validation-00000.bin").unlink(),
    "a flipped bit": lambda data: _flip(data / "train-00000.bin", 999),
    "a flipped bit of the index": lambda data: _flip(data / "train-00000.idx", 9),
    "no tokenizer": lambda data: shutil.rmtree(data / "tokenizer"),
    "another tokenizer": lambda data: _flip(data / "tokenizer" / "tokenizer.model", 99),
}


def _flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_data_sets(run: Run, job: list[str], tiny_data: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(tiny_data, tmp_path / "data")
    DAMAGE[name](tmp_path / "data")
    assert_one_line(run("check", *job, "data.path=data"), DATA, str(Path("data")))


def test_an_index_out_of_order_with_its_hash(
    run: Run, job: list[str], tiny_data: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    index = (data / "train-00000.idx").read_bytes()
    index = index[:8] + index[16:24] + index[8:16] + index[24:]
    (data / "train-00000.idx").write_bytes(index)
    header = signing.read(data / "dataset.json")
    header["splits"]["train"]["files"][0]["index_sha256"] = hashlib.sha256(index).hexdigest()
    signing.write(data / "dataset.json", header)
    assert_one_line(run("check", *job, "data.path=data"), DATA, "from document to document")


def test_patience_without_a_validation_split(
    run: Run, job: list[str], tiny_data: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_data, tmp_path / "data")
    header = signing.read(tiny_data / "dataset.json")
    header["splits"]["validation"] = {"documents": 0, "tokens": 0, "bytes": 0, "max_id": -1, "files": []}
    signing.write(tmp_path / "data" / "dataset.json", header)
    answer = run("check", *job, "data.path=data", "eval.every=1", "eval.patience=2")
    assert_one_line(answer, CONFIG, "has no validation split")


# --- checkpoints -----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """A run directory with the checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("broken-commands")
    (folder / "ds.json").write_text(json.dumps(DEEPSPEED))
    args = ["--deepspeed_config", "ds.json", f"data.path={tiny_data}", *TINY, "steps=2", "save.every=1"]
    finished = rank_runner.run(["train", *args, "run.name=run"], folder)
    assert finished.code == 0, finished.output
    return folder / "runs" / "run"


def _write(checkpoint: Path, name: str, content: Any) -> None:
    """Replaces a file of a checkpoint, and signs it in the manifest."""
    (checkpoint / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    manifest = signing.read(checkpoint / "manifest.json")
    written = (checkpoint / name).read_bytes()
    manifest["files"][name] = {"bytes": len(written), "sha256": hashlib.sha256(written).hexdigest()}
    signing.write(checkpoint / "manifest.json", manifest)


def _index(checkpoint: Path, **changes: Any) -> None:
    """Changes the first fragment of a parameter, and signs the index."""
    index = json.loads((checkpoint / "index.json").read_text())
    index["embed_tokens.weight"]["fragments"][0].update(changes)
    _write(checkpoint, "index.json", index)


def _manifest(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = signing.read(checkpoint / "manifest.json")
    change(manifest["files"])
    signing.write(checkpoint / "manifest.json", manifest)


def _lead_out(checkpoint: Path) -> None:
    elsewhere = checkpoint.parent.parent / f"{checkpoint.name}.safetensors"
    (checkpoint / SHARD).rename(elsewhere)
    (checkpoint / SHARD).symlink_to(elsewhere)


SHARD = "shard-00000.safetensors"
CORRUPTIONS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda c: (c / "manifest.json").unlink(), "manifest.json: No such file"),
    "no index": (lambda c: (c / "index.json").unlink(), "index.json: No such file"),
    "no state": (lambda c: (c / "state.json").unlink(), "state.json: No such file"),
    "a shard cut short": (lambda c: os.truncate(c / SHARD, 1000), "1000 bytes instead of"),
    "a flipped bit": (lambda c: _flip(c / SHARD, 5000), "differs from its SHA-256"),
    "a pipe": (lambda c: (os.unlink(c / "index.json"), os.mkfifo(c / "index.json")), "not a plain file"),
    "a link out of the folder": (_lead_out, "not a plain file"),
    "a manifest nested too deeply": (
        lambda c: (c / "manifest.json").write_bytes(b"[" * 100_000),
        "manifest.json is damaged",
    ),
    "a manifest without files": (lambda c: _manifest(c, dict.clear), "does not list index.json"),
    "a manifest without the shard": (lambda c: _manifest(c, lambda f: f.pop(SHARD)), "does not list"),
    "a manifest that leads out": (
        lambda c: _manifest(c, lambda f: f.update({"../x": {"bytes": 1, "sha256": ""}})),
        "not a plain file name",
    ),
    "an index that leads out": (lambda c: _index(c, file=f"../step-00000001/{SHARD}"), "does not list"),
    "an index with a hole": (lambda c: _index(c, numel=5), "does not cover embed_tokens.weight"),
    "an index that is a list": (lambda c: _write(c, "index.json", []), "index.json is damaged"),
    "a state without progress": (lambda c: _write(c, "state.json", {"format": 1}), "state.json is damaged"),
    "no folder": (lambda c: (shutil.rmtree(c), c.touch()), "Not a directory"),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_generate_refuses_damaged_checkpoints(
    run: Run, finished_run: Path, tmp_path: Path, name: str
) -> None:
    corrupt, piece = CORRUPTIONS[name]
    shutil.copytree(finished_run, tmp_path / "run")
    command = ["generate", "--run", "run", "--max-new-tokens", "1"]
    corrupt(tmp_path / "run" / "checkpoints" / "step-00000002")
    code, said = run(*command)
    assert (code, said.count("\n")) == (0, 1), "the one before it serves"
    assert said.startswith("bigtfm: note: passed over step-00000002: ")
    assert piece in said
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000001")
    assert_one_line(run(*command), NO_CHECKPOINT, piece)


SIGNED: dict[str, Callable[[Path], object]] = {
    "no safetensors": lambda c: _write(c, SHARD, b"rubbish"),
    "a file of another kind": lambda c: _index(c, file="state.json"),
    "no such parameter": lambda c: _write(c, "index.json", {}),
}


@pytest.mark.parametrize("name", SIGNED)
def test_generate_refuses_signed_rubbish(run: Run, finished_run: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(finished_run, tmp_path / "run")
    SIGNED[name](tmp_path / "run" / "checkpoints" / "step-00000002")
    answer = run("generate", "--run", "run", "--max-new-tokens", "1")
    assert_one_line(answer, NO_CHECKPOINT, "step-00000002")


GENERATE = [
    (["--run", "nowhere"], NO_CHECKPOINT, "no checkpoint"),
    (["--run", "file"], NO_CHECKPOINT, "no checkpoint"),
    (["--run", "run", "--temperature", "inf"], CONFIG, "temperature is inf"),
    (["--run", "run", "--top-p", "0"], CONFIG, "top_p is 0.0"),
    (["--run", "run", "--prompt", "word " * 200], CONFIG, "max_seq_len"),
]


@pytest.mark.parametrize(("flags", "code", "piece"), GENERATE)
def test_broken_generate(
    run: Run, finished_run: Path, tmp_path: Path, flags: list[str], code: int, piece: str
) -> None:
    (tmp_path / "run").symlink_to(finished_run)
    (tmp_path / "file").touch()
    assert_one_line(run("generate", *flags), code, piece)


def test_generate_takes_a_prompt_that_is_no_text(run: Run, finished_run: Path) -> None:
    prompt = os.fsdecode(b"\xff\xfe")
    assert run("generate", "--run", str(finished_run), "--prompt", prompt, "--max-new-tokens", "1") == (0, "")


def test_generate_refuses_another_tokenizer(run: Run, finished_run: Path, tmp_path: Path) -> None:
    shutil.copytree(finished_run, tmp_path / "run")
    assert run("prepare", "--out", "other", "--vocab-size", "700", "--workers", "1") == (0, "")
    shutil.copytree(tmp_path / "other" / "tokenizer", tmp_path / "run" / "tokenizer", dirs_exist_ok=True)
    answer = run("generate", "--run", "run", "--max-new-tokens", "1")
    assert_one_line(answer, DATA, "not the tokenizer that the model was trained with")


@pytest.fixture
def resume(finished_run: Path, tmp_path: Path, tiny_data: Path) -> Callable[..., rank_runner.Finished]:
    """Resumes a copy of the finished run, in a rank of its own."""
    shutil.copytree(finished_run, tmp_path / "runs" / "run")
    (tmp_path / "ds.json").write_text(json.dumps(DEEPSPEED))
    job = ["--deepspeed_config", "ds.json", f"data.path={tiny_data}", *TINY, "run.name=run", "save.every=1"]
    return lambda *overrides, environ=None: rank_runner.run(
        ["train", *job, *overrides], tmp_path, environ=environ
    )


def _errors(finished: rank_runner.Finished) -> list[str]:
    assert "Traceback" not in finished.output, finished.output
    return [line for line in finished.output.splitlines() if ". Fix: " in line]


@pytest.mark.launcher
def test_resume_refuses_when_every_checkpoint_is_damaged(
    resume: Callable[..., rank_runner.Finished], tmp_path: Path
) -> None:
    for checkpoint in (tmp_path / "runs/run/checkpoints").iterdir():
        os.truncate(checkpoint / SHARD, 1000)
    finished = resume("steps=3")
    assert (finished.code, len(_errors(finished))) == (NO_CHECKPOINT, 1), finished.output
    assert json.loads((tmp_path / "runs/run/failure.json").read_text())["exit_code"] == NO_CHECKPOINT


@pytest.mark.launcher
def test_a_damaged_later_checkpoint_does_not_push_out_a_new_one(
    resume: Callable[..., rank_runner.Finished], tmp_path: Path
) -> None:
    checkpoints = tmp_path / "runs/run/checkpoints"
    shutil.copytree(checkpoints / "step-00000001", checkpoints / "step-00000009")
    (checkpoints / "step-00000009" / "manifest.json").unlink()
    finished = resume("steps=4", "save.keep=1")
    assert (finished.code, _errors(finished)) == (0, []), finished.output
    assert "step-00000004" in os.listdir(checkpoints), "what was saved last is the one to keep"


@pytest.mark.launcher
def test_a_model_beyond_any_disk_is_one_line(resume: Callable[..., rank_runner.Finished]) -> None:
    finished = resume("steps=3", "run.name=large", "model.hidden_size=1000000000")
    assert (finished.code, len(_errors(finished))) == (STORAGE, 1), finished.output
    assert "the disk is full: a checkpoint needs 288,0" in finished.output


def test_a_model_that_memory_can_not_hold_has_a_known_cause() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    problem = known_cause(caught.value)
    assert problem is not None
    assert problem.exit_code == CONFIG
    assert problem.what.startswith("out of memory")


def test_a_folder_that_a_full_disk_does_not_take_has_a_known_cause(tmp_path: Path) -> None:
    error = shutil.Error([("tokenizer/a", "out/a", "[Errno 28] No space left on device")])
    error.filename = str(tmp_path)  # as huggingface.convert.made_whole has it
    problem = known_cause(error)
    assert problem is not None
    assert (problem.exit_code, problem.what) == (STORAGE, "[Errno 28] No space left on device")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EMFILE, os.strerror(errno.EMFILE), "x"),
        OSError(errno.ENFILE, os.strerror(errno.ENFILE)),
        RuntimeError("[/gloo/transport/tcp/pair.cc:1] socket: Too many open files"),
    ],
)
def test_too_few_file_descriptors_are_said_so(error: Exception) -> None:
    problem = known_cause(error)
    assert problem is not None
    assert (problem.exit_code, problem.line) == (
        STORAGE,
        "error: this machine: too many files and connections are open at once. Fix: raise `ulimit -n`, then "
        "start the same command again",
    )


@pytest.mark.launcher
def test_a_port_in_use_is_one_line(resume: Callable[..., rank_runner.Finished], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        environ = {"MASTER_PORT": str(taken.getsockname()[1])}
        finished = resume("steps=3", environ=environ)
    assert (finished.code, len(_errors(finished))) == (CONFIG, 1), finished.output
    assert "another program has the port MASTER_PORT names" in finished.output


@pytest.mark.launcher
def test_two_trainings_in_one_directory(resume: Callable[..., rank_runner.Finished], tmp_path: Path) -> None:
    with (tmp_path / "runs/run/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        finished = resume("steps=3")
    assert (finished.code, len(_errors(finished))) == (CONFIG, 1), finished.output
    assert "another training is at work here" in finished.output


@pytest.mark.launcher
@pytest.mark.slow
def test_a_killed_rank_is_noticed_by_the_other(run: Run, job: list[str], tmp_path: Path) -> None:
    ranks = rank_runner.start(["train", *job, "steps=100000", "run.name=run"], tmp_path, world_size=2)
    deadline = time.monotonic() + 60
    while not (tmp_path / "runs/run/metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    ranks[1].kill()
    finished = rank_runner.finish(ranks, tmp_path, timeout=60)
    assert (finished.code, len(_errors(finished))) == (79, 1), finished.output
    assert "error: rank 1: is gone" in finished.output
    assert json.loads((tmp_path / "runs/run/failure.json").read_text())["exit_code"] == 79
