"""Files that can't be trusted: 1000 flipped bits and cuts, crafted pickles, names and links that lead out."""

from __future__ import annotations

import json
import pickle
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rank_runner
import signing
import torch
from conftest import TINY

from bigtfm.config.problems import DataProblem, NoCheckpoint
from bigtfm.data.best_fit import Packed, pack
from bigtfm.data.indexed import TokenDataset
from bigtfm.data.tokenizer import load_tokenizer
from bigtfm.engine import checkpoint, weights
from bigtfm.engine.checkpoint import Progress

SHAPES = {f"block.{n}.weight": (5 + n, 7) for n in range(8)}
TRIES = 1000


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of steps 1 and 2, in several shards each."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for step in (1, 2):
        tensors = ((name, torch.randn(shape)) for name, shape in SHAPES.items())
        weights.save_weights(folder, SHAPES, tensors, Progress(step=step), shard_bytes=600)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """A data set with its plan."""
    folder = tmp_path_factory.mktemp("data") / "tokens"
    shutil.copytree(tiny_data, folder)
    pack(folder, 32)
    return folder


def damage(sound: bytes, dice: random.Random) -> bytes:
    """One flipped bit, or less of it."""
    if dice.random() < 0.2:
        return sound[: dice.randrange(len(sound))]
    place, content = dice.randrange(len(sound)), bytearray(sound)
    content[place] ^= 1 << dice.randrange(8)
    return bytes(content)


def unseen(files: list[Path], accepted: Callable[[], bool], tries: int, seed: int) -> list[str]:
    """The damages, of so many random ones, that `accepted` lets pass."""
    dice, passed = random.Random(seed), []
    for turn in range(tries):
        path = files[turn % len(files)]
        sound = path.read_bytes()
        path.write_bytes(damage(sound, dice))
        if accepted():
            passed.append(f"{path.name}, turn {turn}")
        path.write_bytes(sound)
    assert accepted()
    return passed


def test_every_damage_to_a_checkpoint_is_seen_and_the_one_before_is_taken(root: Path) -> None:
    newest = root / "step-00000002"
    files = sorted(newest.iterdir())
    assert len(files) >= 5
    assert not unseen(files, lambda: checkpoint.defect(newest) is None, TRIES // 2, seed=1)
    manifest = newest / "manifest.json"
    assert not unseen([manifest], lambda: checkpoint.defect(newest) is None, TRIES // 2, seed=2)
    sound = manifest.read_bytes()
    manifest.write_bytes(sound[:-40] + b"0" * 40)
    assert checkpoint.newest(root) == root / "step-00000001"
    manifest.write_bytes(sound)


def opens(data: Path) -> bool:
    try:
        dataset = TokenDataset.open(data)
        dataset.verify()
        load_tokenizer(dataset.tokenizer_path)
        Packed.open(dataset, 32)
    except DataProblem:
        return False
    return True


def test_every_damage_to_a_data_set_is_seen(data: Path) -> None:
    signed = {Path(file["name"]) for file in signing.read(data / "dataset.json")["tokenizer"]["files"]}
    files = [data / "tokenizer" / name for name in signed]
    files += [path for path in data.iterdir() if path.suffix in (".bin", ".idx")]
    files += [data / "dataset.json", *(data / "packed-32").iterdir()]
    assert len(files) >= 10
    assert not unseen(sorted(files), lambda: opens(data), TRIES, seed=3)


def test_without_seals_some_damage_would_pass(data: Path, root: Path) -> None:
    """The control: a header as an earlier version wrote it says nothing of its own bytes."""
    header = data / "dataset.json"
    sealed = header.read_bytes()
    header.write_text(json.dumps(signing.read(header), indent=1))
    shutil.rmtree(data / "packed-32")
    pack(data, 32)

    def opens_header() -> bool:
        try:
            TokenDataset.open(data)
        except DataProblem:
            return False
        return True

    assert len(unseen([header], opens_header, 300, seed=4)) > 10
    header.write_bytes(sealed)
    shutil.rmtree(data / "packed-32")
    pack(data, 32)


# --- nothing is unpickled


PICKLES = re.compile(
    r"\bpickle\.loads?\(|torch\.load\(|allow_pickle\s*=\s*True|marshal\.|shelve|(?<!\.)\beval\(|\bexec\("
)
ALLOWED = {
    "engine/deepspeed_files.py": "torch.load(",  # import-deepspeed: weights_only, unless --trust-pickles
    "data/prefetch.py": "pickle.loads(",  # from its own workers, over their pipes
}


def test_no_code_reads_pickles_but_two_named_places(repository: Path) -> None:
    found = {}
    for path in (repository / "bigtfm").rglob("*.py"):
        lines = path.read_text(encoding="utf-8").splitlines()
        calls = {m[0] for line in lines for m in PICKLES.finditer(line)}
        if calls:
            found[str(path.relative_to(repository / "bigtfm"))] = calls
    assert found == {name: {call} for name, call in ALLOWED.items()}


@pytest.fixture
def repository() -> Path:
    return Path(__file__).parent.parent


class Bomb:
    """Unpickled, it leaves a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_the_bomb_goes_off(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "mark")))
    assert (tmp_path / "mark").exists()


@pytest.mark.launcher
def test_planted_pickles_scripts_and_links_do_nothing(
    tmp_path: Path, tiny_data: Path, deepspeed_json: Callable[..., Path]
) -> None:
    """In every place that training, generation, export and comparison read, or that DeepSpeed would read."""
    data, mark, outside = tmp_path / "data", tmp_path / "mark", tmp_path / "outside"
    shutil.copytree(tiny_data, data)
    args = ["--deepspeed_config", str(deepspeed_json()), f"data.path={data}", *TINY, "save.every=2"]
    first = rank_runner.run(["train", *args, "run.name=run", "steps=2"], tmp_path)
    assert first.code == 0, first.output
    outside.mkdir()
    (outside / "kept").touch()
    run, bomb = tmp_path / "runs/run", pickle.dumps(Bomb(mark))
    checkpoints = run / "checkpoints"
    planted = [
        "latest",
        "zero_to_fp32.py",
        *(
            f"step-00000002/{name}"
            for name in ("mp_rank_00_model_states.pt", "state.pkl", "pytorch_model.bin")
        ),
        *(f"step-00000003/{name}" for name in ("manifest.json", "state.json", "latest")),
    ]
    places = [checkpoints / name for name in planted]
    places += [run / name for name in ("micro_batch.json", "mlflow.json", "tracking.json", "events.jsonl")]
    places += [run / ".lock", run / "tokenizer/tokenizer.pkl", data / "tokenizer/tokenizer.pkl"]
    places += [data / "packed-32/plan.json", data / "latest", data / "train-00001.bin"]
    for place in places:
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(bomb)
    (checkpoints / ".building-step-00000004").symlink_to(outside)
    (checkpoints / "step-00000004").symlink_to(outside)
    (checkpoints / ".removing-step-00000002").symlink_to(outside)

    again = rank_runner.run(
        ["train", *args, "run.name=run", "steps=4", "guard.halve_micro_batch=true"], tmp_path
    )
    assert again.code == 0, again.output
    assert "passed over" in again.output
    for command in (
        ["generate", "--run", "runs/run", "--max-new-tokens", "1"],
        ["export", "runs/run", "out.safetensors"],
        ["compare", "runs/run", "runs/run"],
        ["check", *args, "steps=4"],
    ):
        done = rank_runner.run(command, tmp_path)
        assert done.code == 0, done.output
    assert not mark.exists()
    assert [path.name for path in outside.iterdir()] == ["kept"]
    assert not (checkpoints / "step-00000004").is_symlink()


def test_code_beside_a_tokenizer_or_a_data_set_is_not_run(tmp_path: Path) -> None:
    from bigtfm.data.tables import open_split

    mark = tmp_path / "mark"
    evil = f"import pathlib; pathlib.Path({str(mark)!r}).touch()\nclass Evil: pass\n"
    folder = tmp_path / "evil"
    folder.mkdir()
    (folder / "evil.py").write_text(evil)  # a data set's loading script, too: it has the folder's name
    config = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"auto_map": {"AutoConfig": "evil.Evil"}}))
    with pytest.raises(DataProblem, match="transformers can't load it"):
        load_tokenizer(folder)
    (folder / "data.pkl").write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(DataProblem):
        open_split(f"hf:{folder}")
    assert not mark.exists()


def test_a_link_in_place_of_a_shard_is_not_followed(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "linked")
    for folder in (tmp_path / "linked").iterdir():
        shard = folder / "shard-00000.safetensors"
        shard.rename(tmp_path / folder.name)
        shard.symlink_to(tmp_path / folder.name)
    with pytest.raises(NoCheckpoint, match=r"shard-00000\.safetensors: not a plain file"):
        checkpoint.newest(tmp_path / "linked")
