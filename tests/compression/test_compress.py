"""`bigtfm compress` on a trained model: what it costs, what can be done with the result, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import rank_runner
import torch
from compression_runs import QUIET, SHAPE, Compress, ds_json
from conftest import losses
from safetensors.torch import load_file

from bigtfm.cli import app
from bigtfm.compression import measure
from bigtfm.engine import checkpoint, weights
from bigtfm.model.quantized import QuantizedMatrix, quantize
from bigtfm.run_directory import open_run

pytestmark = [pytest.mark.slow, pytest.mark.launcher]


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speed is not what is tested."""
    monkeypatch.setattr(measure, "ROUNDS", 2)


def newest(run: Path) -> Path:
    found = checkpoint.newest(run / "checkpoints")
    assert found is not None
    return found


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return dict(weights.read_weights(newest(run), weights.weight_shapes(newest(run))))


def test_int8_is_a_quarter_on_the_disk_and_costs_next_to_nothing(
    trained: Path, tmp_path: Path, compress: Compress
) -> None:
    code, report, said = compress("--run", trained, "--out", tmp_path / "int8", "--method", "int8")
    assert (code, said) == (0, "")
    before, after = report["before"], report["after"]
    assert before["bytes"] == 4 * before["parameters"]
    stored = newest(tmp_path / "int8")
    assert after["bytes"] == sum(path.stat().st_size for path in stored.iterdir()) <= 0.3 * before["bytes"]
    assert after["val_loss"] <= 1.02 * before["val_loss"]
    assert after["val_loss"] != before["val_loss"]
    rows = [json.loads(row) for row in (trained / "metrics.jsonl").read_text().splitlines()]
    assert before["val_loss"] == pytest.approx(rows[-1]["val_loss"], rel=1e-6), "as training has it"
    assert rows[0]["loss"] > 1.3 * before["val_loss"], "the control: it has learned something"
    assert json.loads((tmp_path / "int8/compression.json").read_text()) == report
    for name, kept in load_file(stored / "shard-00000.safetensors").items():
        assert kept.dtype == (torch.int8 if name.endswith("|int8") else torch.float32)


@pytest.mark.parametrize(("method", "most", "dearer"), [("int4", 0.2, 1.05), ("int8-dynamic", 0.3, 1.02)])
def test_other_integers(
    trained: Path, tmp_path: Path, compress: Compress, method: str, most: float, dearer: float
) -> None:
    code, report, _ = compress("--run", trained, "--out", tmp_path / "new", "--method", method)
    assert code == 0
    assert report["after"]["bytes"] <= most * report["before"]["bytes"]
    assert report["after"]["val_loss"] <= dearer * report["before"]["val_loss"]
    model, _, _ = open_run(tmp_path / "new")
    kinds = {module.kind for module in model.modules() if isinstance(module, QuantizedMatrix)}
    assert kinds == ({"int4", "int8"} if method == "int4" else {"int8_dynamic"})


def test_the_result_writes_exports_and_is_verified(
    trained: Path, tmp_path: Path, compress: Compress, capfd: pytest.CaptureFixture[str]
) -> None:
    new = tmp_path / "int8"
    compress("--run", trained, "--out", new, "--method", "int8")
    for command in (
        ["generate", "--run", new, "--prompt", "My fellow", "--max-new-tokens", 5, "--temperature", 0],
        ["export", new, tmp_path / "one.safetensors"],
        ["export-hf", new, tmp_path / "hf"],
    ):
        with pytest.raises(SystemExit) as ended:
            app(list(map(str, command)))
        assert not ended.value.code, capfd.readouterr().err
    exported, expected = load_file(tmp_path / "one.safetensors"), weights_of(trained)
    assert exported.keys() == expected.keys()
    for name, values in exported.items():
        if values.dim() == 2:
            expected[name] = quantize(expected[name], "int8").dequantized()
        torch.testing.assert_close(values, expected[name], rtol=1e-6, atol=0)

    state = newest(new) / "state.json"
    assert json.loads(state.read_text())["probe"]["loss"] > 0
    shard = newest(new) / "shard-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(SystemExit) as ended:
        app(["generate", "--run", str(new)])
    assert ended.value.code == 76
    assert "differs from its SHA-256" in capfd.readouterr().err


def train(folder: Path, data: Path, *overrides: str, ranks: int = 1, **changes: Any) -> rank_runner.Finished:
    args = [
        "train",
        "--deepspeed_config",
        str(ds_json(folder, **changes)),
        *SHAPE,
        *QUIET,
        f"data.path={data}",
    ]
    return rank_runner.run([*args, "run.steps=5", *overrides], folder, ranks)


def test_integers_are_not_trained_on(
    trained: Path, tiny_data: Path, tmp_path: Path, compress: Compress
) -> None:
    compress("--run", trained, "--out", tmp_path / "int8", "--method", "int8")
    finished = train(tmp_path, tiny_data, f"run.init_from={tmp_path / 'int8'}", "run.name=on")
    assert finished.code == 64
    assert "its weights are int8: compressed to be used, not to be trained on" in finished.output
    assert "Traceback" not in finished.output


def zeros_of(run: Path) -> dict[str, torch.Tensor]:
    return {name: values == 0 for name, values in weights_of(run).items() if ".layers." in name}


@pytest.mark.parametrize("method", ["magnitude", "2:4"])
def test_pruned_weights_are_zero_and_training_wins_loss_back(
    trained: Path, tiny_data: Path, tmp_path: Path, compress: Compress, method: str
) -> None:
    pruned = tmp_path / "pruned"
    code, report, _ = compress("--run", trained, "--out", pruned, "--method", method)
    assert code == 0
    assert report["before"]["zeros"] == 0
    assert report["after"]["zeros"] == 0.5
    assert report["after"]["val_loss"] > report["before"]["val_loss"]
    original = weights_of(trained)
    for name, zeros in zeros_of(pruned).items():
        magnitudes = original[name].abs()
        if magnitudes.dim() == 1:  # a norm
            assert not zeros.any()
        elif method == "2:4":
            fours = zeros.unflatten(1, (-1, 4))
            assert bool((fours.sum(-1) == 2).all())
            largest = magnitudes.unflatten(1, (-1, 4)).masked_fill(~fours, 0).amax(-1)
            assert bool((largest <= magnitudes.unflatten(1, (-1, 4)).masked_fill(fours, 9).amin(-1)).all())
        else:
            assert magnitudes[zeros].max() <= magnitudes[~zeros].min()

    tuned = ["run.steps=20", f"run.init_from={pruned}", "model.keep_zeros=true", "run.name=tuned"]
    finished = train(tmp_path, tiny_data, *tuned)
    assert finished.code == 0, finished.output
    rows = (tmp_path / "runs/tuned/metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["val_loss"] < report["after"]["val_loss"]
    after = zeros_of(tmp_path / "runs/tuned")
    assert all(torch.equal(zeros, after[name]) for name, zeros in zeros_of(pruned).items())


def test_a_pruned_run_is_not_trained_on_as_if_it_were_dense(
    trained: Path, tiny_data: Path, tmp_path: Path, compress: Compress
) -> None:
    compress("--run", trained, "--out", tmp_path / "pruned", "--method", "magnitude")
    dense = [f"run.init_from={tmp_path / 'pruned'}", "run.name=dense"]
    finished = train(tmp_path, tiny_data, *dense)
    assert finished.code == 64
    assert "model.keep_zeros was True when this run was saved and is False now" in finished.output
    muon = {"type": "Muon", "params": {"lr": 1e-3}}
    finished = train(tmp_path, tiny_data, *dense, "model.keep_zeros=true", optimizer=muon)
    assert finished.code == 64
    assert "Muon's update of a matrix leaves none of its zeros" in finished.output
    finished = train(tmp_path, tiny_data, *dense, "resume.allow=model")
    assert finished.code == 0, finished.output
    assert not any(zeros.any() for zeros in zeros_of(tmp_path / "runs/dense").values()), "the control"


def test_zeros_stay_zeros_and_the_loss_is_the_same_at_every_stage(
    trained: Path, tiny_data: Path, tmp_path: Path, compress: Compress
) -> None:
    pruned = tmp_path / "pruned"
    compress("--run", trained, "--out", pruned, "--method", "magnitude", "--share", 0.7)
    begin = [f"run.init_from={pruned}", "model.keep_zeros=true", "run.steps=5", f"data.path={tiny_data}"]
    kinds: dict[str, dict[str, Any]] = {f"zero{n}": {"zero_optimization": {"stage": n}} for n in range(4)}
    kinds |= {f"bf16-{n}": {"zero_optimization": {"stage": n}, "bf16": {"enabled": True}} for n in (1, 3)}
    for kind, stage, lr in (("Lion", 1, 1e-3), ("Adagrad", 2, 1e-2), ("SGD", 3, 1e-2), ("Lamb", 0, 1e-2)):
        recipe = {"type": kind, "params": {"lr": lr, "weight_decay": 0.1}}
        kinds[kind] = {"zero_optimization": {"stage": stage}, "optimizer": recipe}
    jobs = [
        [
            str(ds_json(tmp_path, train_micro_batch_size_per_gpu=2, **changes)),
            *SHAPE,
            *QUIET,
            *begin,
            f"run.name={name}",
        ]
        for name, changes in kinds.items()
    ]
    finished = rank_runner.train_all(jobs, tmp_path, 2)
    assert finished.codes == [0, 0], finished.output[-3000:]
    before, old = zeros_of(pruned), weights_of(pruned)
    for name in kinds:
        after, values = zeros_of(tmp_path / "runs" / name), weights_of(tmp_path / "runs" / name)
        assert all(torch.equal(zeros, after[key]) for key, zeros in before.items()), name
        moved = "decoder.layers.0.mlp.down.weight"
        assert not torch.equal(values[moved], old[moved]), "the others have moved"
    curves = {name: losses(tmp_path / "runs" / name) for name in kinds}
    for stage in (1, 2, 3):
        assert curves[f"zero{stage}"] == pytest.approx(curves["zero0"], abs=1e-5)


def test_fewer_heads_are_a_smaller_model_that_trains_on(
    trained: Path, tmp_path: Path, compress: Compress
) -> None:
    new = tmp_path / "heads"
    code, report, _ = compress("--run", trained, "--out", new, "--method", "heads", "--share", 0.25)
    assert code == 0
    assert report["after"]["parameters"] == report["before"]["parameters"] - 2 * 4 * 32 * 128
    assert report["after"]["bytes"] < report["before"]["bytes"]
    args = ["train", "--deepspeed_config", str(ds_json(tmp_path)), "--config", str(new / "run.toml"), *QUIET]
    finished = rank_runner.run([*args, f"run.init_from={new}", "run.name=on", "run.steps=5"], tmp_path)
    assert finished.code == 0, finished.output
    rows = (tmp_path / "runs/on/metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[0])["loss"] < 1.1 * report["after"]["val_loss"], "it begins where the other ended"


BAD = [
    (["--method", "int7"], "unknown method 'int7'. Fix: did you mean 'int8'?"),
    (["--method", "magnitude", "--share", "1.5"], "--share 1.5 is out of range"),
    (["--method", "magnitude", "--share", "nan"], "--share nan is out of range"),
    (["--method", "int8", "--share", "0.5"], "--share does nothing for int8"),
    (["--method", "int8", "--group-size", "64"], "--group-size does nothing for int8"),
    (["--method", "heads", "--share", "0.05"], "removes 0 of them"),
    (["--method", "distill"], "distillation is a training, of a smaller model"),
    (["--method", "int8", "--data", "nowhere"], "nowhere: no such data set"),
    (["--method", "int8", "--run", "nowhere"], "nowhere: no checkpoint"),
    (["--method", "int8", "--out", "taken"], "taken: is there already"),
]


@pytest.mark.parametrize(("args", "said"), BAD, ids=[" ".join(args) for args, _ in BAD])
def test_bad_input_is_one_line(
    trained: Path,
    tmp_path: Path,
    compress: Compress,
    monkeypatch: pytest.MonkeyPatch,
    args: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("something")
    code, _, line = compress("--run", trained, "--out", tmp_path / "new", *args)
    assert said in line
    assert line.count("\n") == 1
    assert code == 76 if "nowhere: no checkpoint" in said else code in (64, 65)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"], "nothing is left behind"


def test_what_is_quantised_is_not_compressed_again(trained: Path, tmp_path: Path, compress: Compress) -> None:
    compress("--run", trained, "--out", tmp_path / "int8", "--method", "int8")
    code, _, line = compress("--run", tmp_path / "int8", "--out", tmp_path / "again", "--method", "magnitude")
    assert code == 64
    assert "its weights are int8 already" in line


def test_data_of_another_tokenizer_is_refused(
    trained: Path, tiny_data: Path, tmp_path: Path, compress: Compress, corpus_lines: list[str]
) -> None:
    from bigtfm.data.prepare import prepare

    (tmp_path / "text.txt").write_text("\n\n".join(corpus_lines)[:60_000])
    prepare([str(tmp_path / "text.txt")], tmp_path / "other", vocab_size=400, workers=1, progress=False)
    code, _, line = compress(
        "--run", trained, "--out", tmp_path / "new", "--method", "int8", "--data", tmp_path / "other"
    )
    assert code == 65
    assert "has another tokenizer than the run" in line
    shutil.rmtree(tmp_path / "other")
