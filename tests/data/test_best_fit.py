import json
import pickle
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import rank_runner
import signing
from conftest import TINY, losses
from hypothesis import example, given, settings
from hypothesis import strategies as st
from memory_split import MemorySplit

from bigtfm.cli import app
from bigtfm.config.problems import DataProblem
from bigtfm.data.best_fit import HEADER_NAME, Packed, best_fit_decreasing, make_plan, pack
from bigtfm.data.indexed import TokenDataset
from bigtfm.data.loader import Loader
from bigtfm.data.mixture import Mixture
from bigtfm.data.prepare import prepare


def naive(lengths, capacity):
    """One item after the other, looking at every bin."""
    room, since, out = [], [], [0] * len(lengths)
    for turn, item in enumerate(sorted(range(len(lengths)), key=lambda i: -lengths[i])):
        fits = [b for b in range(len(room)) if room[b] >= lengths[item]]
        if fits:
            chosen = min(fits, key=lambda b: (room[b], since[b]))
        else:
            chosen = len(room)
            room.append(capacity), since.append(0)
        room[chosen] -= lengths[item]
        since[chosen] = turn
        out[item] = chosen
    return out


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 40).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), max_size=150))))
@example((10, [5, 3, 3, 3, 3, 2, 2, 2, 1, 1]))
def test_it_is_best_fit_decreasing_item_by_item(case):
    capacity, lengths = case
    assert best_fit_decreasing(np.array(lengths, np.int64), capacity).tolist() == naive(lengths, capacity)


@pytest.mark.parametrize("capacity", [100, 70_000])
def test_it_is_best_fit_decreasing_of_many_lengths(capacity):
    lengths = np.minimum(np.random.default_rng(0).lognormal(3, 1, 1500).astype(int) + 1, capacity)
    assert best_fit_decreasing(lengths, capacity).tolist() == naive(lengths.tolist(), capacity)


def sequences(split, seq_len):
    """Each sequence's pieces, [(start, stop), ...]."""
    plan = make_plan(split.starts, split.num_tokens, seq_len)
    ranges = list(zip(plan["starts"].tolist(), plan["stops"].tolist(), strict=True))
    first = plan["first"].tolist()
    return [ranges[a:b] for a, b in pairwise(first)]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 70), min_size=1, max_size=80), st.integers(1, 40))
def test_every_token_is_in_one_piece_and_no_document_that_fits_is_cut(lengths, seq_len):
    split = MemorySplit(lengths)
    made = sequences(split, seq_len)
    assert all(0 < sum(stop - start for start, stop in pieces) <= seq_len for pieces in made)
    pieces = sorted(piece for pieces in made for piece in pieces)
    covered = [position for piece in pieces for position in range(*piece)]
    assert covered == list(range(split.num_tokens))
    assert all(start < stop for start, stop in pieces)
    starts = {start for start, _ in pieces}
    assert set(split.starts.tolist()) <= starts  # no piece runs into another document
    for start, length in zip(split.starts.tolist(), lengths, strict=True):
        cuts = sum(start < other < start + length for other in starts)
        assert cuts == (length - 1) // seq_len


def test_an_epoch_trains_every_token_and_predicts_all_but_the_first_of_each_document():
    split = MemorySplit(np.random.default_rng(1).integers(1, 90, 200), documents=True)

    class Source:
        made = sequences(split, 32)
        size, tokens_per_sample = len(made), split.num_tokens / len(made)
        pieces = Packed.pieces
        start = 0
        _first, _starts, _stops = make_plan(split.starts, split.num_tokens, 32).values()

    loader = Loader(split, Mixture([Source()], seed=3), 32, 1000)
    batches = [loader.batch(n, min(7, Source.size - n)) for n in range(0, Source.size, 7)]
    read = np.concatenate([batch.input_ids.numpy() for batch in batches])
    assert np.array_equal(np.sort(read), np.sort(split.tokens))
    labels = np.concatenate([batch.labels.numpy() for batch in batches])
    begins = np.isin(np.arange(split.num_tokens), split.starts)
    assert np.array_equal(np.sort(labels[labels >= 0]), np.sort(split.tokens[~begins]))
    assert sum(batch.num_labels for batch in batches) == int((labels >= 0).sum())
    keys = np.concatenate([batch.token_keys.numpy() for batch in batches])
    assert len(np.unique(keys)) == len(keys)
    samples = [sample for batch in batches for sample in batch.samples]
    assert sorted(samples) == list(range(Source.size))
    at = 0
    for n, sample in enumerate(samples):  # keys are sample number * 32 + place in the sample
        tokens = sum(stop - start for start, stop in Source.made[sample])
        assert keys[at : at + tokens].tolist() == list(range(32 * n, 32 * n + tokens))
        at += tokens


def test_a_million_documents_take_a_second():
    lengths = np.minimum(np.random.default_rng(0).lognormal(6, 1.2, 10**6).astype(np.int64) + 2, 50_000)
    starts = np.cumsum(lengths) - lengths
    began = time.process_time()
    plan = make_plan(starts, int(lengths.sum()), 2048)
    assert time.process_time() - began < 4
    sizes = np.add.reduceat(plan["stops"] - plan["starts"], plan["first"][:-1])
    assert sizes.max() == 2048
    assert sizes.mean() / 2048 > 0.999


# --- on the disk --------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path, tiny_data):
    """A copy of the small data set, for plans of its own."""
    folder = tmp_path / "data"
    folder.mkdir()
    for path in tiny_data.iterdir():
        if not path.name.startswith((".", "packed")):
            (folder / path.name).symlink_to(path)
    return folder


def run(capsys, *args):
    with pytest.raises(SystemExit) as exit_:
        app(["pack", *map(str, args)])
    out = capsys.readouterr()
    return exit_.value.code, out.out, out.err


def test_the_command_says_how_full_and_how_many_are_cut(data, capsys):
    code, out, _ = run(capsys, data, "--seq-len", 32)
    assert not code
    assert out.count("\n") == 1
    assert "full" in out
    code, out, _ = run(capsys, data, "--seq-len", 32, "--json")
    told = json.loads(out)
    split = TokenDataset.open(data).split("train")
    starts = split.document_starts(0, split.num_tokens)
    lengths = np.diff(np.append(starts, split.num_tokens))
    assert told["tokens"] == split.num_tokens
    assert told["cut"] == int((lengths > 32).sum())
    assert told["cut_by_windows"] == sum(
        a // 32 != (a + n - 1) // 32 for a, n in zip(starts, lengths, strict=True)
    )
    assert told["full"] == split.num_tokens / told["sequences"] / 32
    assert not list(data.glob(".packed*"))


def test_the_same_data_give_the_same_bytes_and_a_plan_is_made_once(data):
    folder, _ = pack(data, 48)
    first = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    pack(data, 48)
    assert first == {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    (folder / "starts.i64").write_bytes(b"damaged")
    pack(data, 48)
    assert {name: content for name, (content, _) in first.items()} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }


def damage_nothing_there(folder):
    for path in folder.iterdir():
        path.unlink()


def damage_a_byte(folder):
    content = bytearray((folder / "stops.i64").read_bytes())
    content[8] ^= 1
    (folder / "stops.i64").write_bytes(content)


def damage_shorter(folder):
    (folder / "first.i64").write_bytes((folder / "first.i64").read_bytes()[:-8])


def damage_header(folder):
    (folder / HEADER_NAME).write_text("{}")


def damage_other_data(folder):
    values = signing.read(folder / HEADER_NAME)
    signing.write(folder / HEADER_NAME, values | {"dataset": "0" * 64})


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (damage_nothing_there, "there is none"),
        (damage_a_byte, "stops.i64: its SHA-256 is"),
        (damage_shorter, "first.i64 is damaged: it has not the size"),
        (damage_header, "plan.json is damaged"),
        (damage_other_data, "made for other data"),
    ],
)
def test_without_a_good_plan_the_fix_is_the_command(data, damage, said):
    folder, _ = pack(data, 32)
    dataset = TokenDataset.open(data)
    assert Packed.open(dataset, 32).size
    damage(folder)
    with pytest.raises(DataProblem) as caught:
        Packed.open(dataset, 32)
    assert said in caught.value.line
    assert f"`bigtfm pack {data} --seq-len 32`" in caught.value.fix


def test_a_plan_travels_by_path(data):
    pack(data, 32)
    plan = Packed.open(TokenDataset.open(data), 32, start=1000)
    pickled = pickle.dumps(plan)
    assert len(pickled) < 5000
    indices = np.array([5, 0, plan.size - 1])
    for one, two in zip(plan.pieces(indices), pickle.loads(pickled).pieces(indices), strict=True):
        assert np.array_equal(one, two)


@pytest.mark.launcher
def test_losses_are_the_same_on_one_rank_and_two(tmp_path: Path, data: Path, deepspeed_json) -> None:
    """Of packed sequences, and of a mixture of them with another data set whose one epoch is soon over."""
    (tmp_path / "text.txt").write_text("The state of the Union is strong.\n\n" * 300)
    prepare(
        [str(tmp_path / "text.txt")], tmp_path / "other", tokenizer=str(data / "tokenizer"), workers=1,
        validation_fraction=0.0, progress=False,
    )  # fmt: skip
    pack(data, 32), pack(tmp_path / "other", 32)
    tables = f'{{path="{data}"}}, {{path="{tmp_path / "other"}", weight=2, max_epochs=0.05}}'
    kinds = {
        "packed": [f"data.path={data}", "data.packing=best_fit"],
        "mixed": [f"data.sources=[{tables}]", "data.packing=best_fit"],
        "windows": [f"data.path={data}"],
    }
    curves: dict[str, list[list[float]]] = {}
    for world_size, micro_batch in ((1, 4), (2, 1)):
        json_file = deepspeed_json(f"{world_size}.json", train_micro_batch_size_per_gpu=micro_batch)
        jobs = [
            [str(json_file), f"run.name={kind}-{world_size}", *TINY, "steps=5", *overrides]
            for kind, overrides in kinds.items()
        ]
        finished = rank_runner.train_all(jobs, tmp_path, world_size)
        assert finished.codes == [0] * world_size, finished.output[-3000:]
        for kind in kinds:
            curves.setdefault(kind, []).append(losses(tmp_path / "runs" / f"{kind}-{world_size}"))
    for one, two in curves.values():
        assert two == pytest.approx(one, abs=1e-5)
    for kind, other in (("packed", "mixed"), ("packed", "windows"), ("mixed", "windows")):  # they differ
        assert curves[kind][0] != pytest.approx(curves[other][0], abs=1e-3)
