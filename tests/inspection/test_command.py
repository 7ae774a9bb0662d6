"""`bigtfm inspect` on run directories of every family: its files, its JSON, and one line for a bad input."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_models import save_run

from bigtfm.cli import app
from bigtfm.engine.checkpoint import Progress, read_state
from bigtfm.engine.weights import save_weights
from bigtfm.inspection.capture import capture
from bigtfm.inspection.command import inspect, numbers
from bigtfm.inspection.page import STEPS, page
from bigtfm.inspection.reading import Reading, read
from bigtfm.inspection.report import Selection, look
from bigtfm.run_directory import open_run

RUNS = {"gpt": None, "bert": None, "t5": "span_corruption", "bart": "infilling"}
CONFIG, NO_CHECKPOINT = 64, 76
HOSTILE = "</script><img src=x onerror=alert(1)> $\\frac{"


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_data):
    """Run directories of random models, one of each kind, and a folder that has no checkpoint."""
    folder = tmp_path_factory.mktemp("runs")
    for kind, objective in RUNS.items():
        save_run(folder / kind, tiny_data / "tokenizer", kind, objective)
    save_run(folder / "long", tiny_data / "tokenizer", "gpt", max_seq_len=4000)
    (folder / "nothing").mkdir()
    return folder


@pytest.fixture
def run(capsys, monkeypatch):
    monkeypatch.setattr("bigtfm.cli.SILENCE", 0)

    def call(*args):
        with pytest.raises(SystemExit) as ended:
            app(["inspect", *map(str, args)])
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return call


def shown_data(html):
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    return json.loads(data)


def unpacked(text, *shape):
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), "<u2").reshape(shape) / STEPS


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
def test_files_of_every_family(kind, runs, run, tmp_path):
    out = tmp_path / "deep" / "out"
    code, printed, said = run("--run", runs / kind, "--text", "The people of America", "--out", out, "--json")
    assert (code, said) == (0, "")
    found = json.loads(printed)
    assert [Path(path).parent for path in found["files"]] == [out] * len(found["files"])
    assert {path.name for path in out.iterdir()} == {Path(path).name for path in found["files"]}
    kinds = (
        ["decoder"] if kind == "gpt" else ["encoder"] if kind == "bert" else ["encoder", "decoder", "cross"]
    )
    assert [maps["name"] for maps in found["attention"]] == kinds
    tensors = load_file(out / "maps.safetensors")
    shown = shown_data((out / "inspect.html").read_text(encoding="utf-8"))
    for maps, drawn in zip(found["attention"], shown["maps"], strict=True):
        name = maps["name"]
        queries, keys = (len(found["texts"][maps[side]]["ids"]) for side in ("queries", "keys"))
        weights = tensors[f"{name}.weights"]
        assert list(weights.shape) == [len(maps["layers"]), 4, queries, keys] == maps["shape"]
        torch.testing.assert_close(tensors[f"{name}.mean"], weights.mean(1))
        assert (weights.sum(-1) - 1).abs().max() < 1e-6
        assert drawn["views"] == ["0", "1", "2", "3", "mean", *(["rollout"] if name != "cross" else [])]
        for layer, planes in enumerate(drawn["planes"]):
            exact = [*weights[layer], tensors[f"{name}.mean"][layer]]
            exact += [tensors[f"{name}.rollout"][layer]] if name != "cross" else []
            values = unpacked(planes, len(exact), queries, keys)
            assert np.abs(values - torch.stack(exact).numpy()).max() <= 0.51 / STEPS
    for path in out.glob("*.png"):
        with Image.open(path) as picture:
            width, height = picture.size
        assert 300 < width < 4000
        assert 150 < height < 4000
    last = "encoder" if kind == "bert" else "decoder"
    assert len(found["logit_lens"]) == len(found["norms"][last]["features"])
    assert len(found["logit_lens"][0]) == len(found["texts"][last]["ids"])
    assert found["mean_loss"] == pytest.approx(np.mean([one["loss"] for one in found["judged"].values()]))


def test_chosen_layers_and_heads(runs, run, tmp_path):
    """They are the ones of the model, in the page too; a stack without the layer is left out."""
    code, printed, _ = run(
        "--run", runs / "t5", "--text", "The people", "--target", "<extra_id_0> of", "--layers", "2,1",
        "--heads", "3", "--out", tmp_path, "--json",
    )  # fmt: skip
    found = json.loads(printed)
    assert code == 0
    assert [(maps["name"], maps["layers"], maps["heads"]) for maps in found["attention"]] == [
        ("encoder", [1, 2], [3]), ("decoder", [1], [3]), ("cross", [1], [3])
    ]  # fmt: skip
    model, tokenizer, special = open_run(runs / "t5")
    reading = read(model, tokenizer, special, "The people", target="<extra_id_0> of")
    assert reading.decoder == (special.start, special.sentinels[0], *tokenizer.encode(" of"))
    assert reading.labels == (*reading.decoder[1:], special.eos)
    insides, tensors = capture(model, reading), load_file(tmp_path / "maps.safetensors")
    assert torch.equal(
        tensors["encoder.weights"][:, 0], torch.stack(insides["encoder"].self_attention[1:])[:, 3]
    )
    assert torch.equal(tensors["cross.weights"][0, 0], insides["decoder"].cross_attention[1][3])


def test_the_decoder_reads_what_it_writes(runs):
    """Without --target; its end is judged where it has come to one."""
    for kind in ("t5", "bart"):
        model, tokenizer, special = open_run(runs / kind)
        reading = read(model, tokenizer, special, "The people", max_new_tokens=5)
        lead = len(reading.decoder) - 5
        assert reading.decoder[0] == special.start
        report = look(model, tokenizer, special, reading, Selection(), "x")
        greedy = [report.judged[place] for place in range(lead, len(reading.decoder))]
        assert {one.rank for one in greedy} == {1}
        assert reading.labels[-1] is None
        full = read(model, tokenizer, special, "The people", max_new_tokens=10_000)
        assert len(full.decoder) <= model.config.max_seq_len


def test_a_gpt_is_not_judged_on_its_first_token(runs):
    model, tokenizer, special = open_run(runs / "gpt")
    reading = read(model, tokenizer, special, "The people")
    assert reading.decoder == (special.bos, *tokenizer.encode("The people"))
    assert list(look(model, tokenizer, special, reading, Selection(), "x").judged) == list(
        range(1, len(reading.decoder))
    )


def test_a_bert_is_not_asked_for_its_marks(runs):
    model, tokenizer, special = open_run(runs / "bert")
    reading = read(model, tokenizer, special, "The [MASK] of")
    assert special.mask in reading.encoder
    assert [reading.encoder[place] for place in reading.hidden] == tokenizer.encode("The") + tokenizer.encode(
        " of"
    )


@pytest.mark.parametrize(
    ("kind", "objective", "shape"),
    [("bert", "classification", {"num_labels": 3, "next_sentence": False}),
     ("gpt", "tagging", {"num_labels": 3}), ("bert", "question_answering", {"next_sentence": False})],
)  # fmt: skip
def test_a_task_head_says_no_tokens(kind, objective, shape, tmp_path, tiny_data):
    """Attention and norms are there; losses, gradients and the logit lens are not made up."""
    save_run(tmp_path / "run", tiny_data / "tokenizer", kind, objective, **shape)
    found = inspect(tmp_path / "run", "The people")
    report = found.report
    assert (report.judged, report.lens, report.mean_loss) == ({}, [], None)
    assert (report.maps[0].weights.sum(-1) - 1).abs().max() < 1e-6
    (norms,) = report.norms.values()
    assert (norms.gradients, norms.parameters) == (None, None)
    assert len(norms.neurons) == 3
    assert {path.stem.split("-")[0] for path in found.files} == {
        "inspect",
        "attention",
        "rollout",
        "norms",
        "maps",
    }
    assert objective in report.facts["head"]


@pytest.mark.slow
def test_another_checkpoint(tmp_path, tiny_data, run):
    """--step and --best: the attention is that of those weights, and the page says whose."""
    save_run(tmp_path / "run", tiny_data / "tokenizer", "gpt")
    model, _, _ = open_run(tmp_path / "run")
    identity = read_state(tmp_path / "run/checkpoints/step-00000000")["progress"]["identity"]
    moved = {name: weight.detach() * 3 for name, weight in model.named_parameters()}
    shapes = {name: tuple(weight.shape) for name, weight in moved.items()}
    progress = Progress(identity=identity, step=1, best_step=0)
    save_weights(tmp_path / "run/checkpoints", shapes, iter(moved.items()), progress)
    found = {}
    for options in ((), ("--best",), ("--step", 0), ("--step", 1)):
        code, _, _ = run(
            "--run", tmp_path / "run", "--text", "The people", *options, "--layers", "0", "--heads", "0"
        )
        assert code == 0
        found[options] = load_file(tmp_path / "run/inspect/maps.safetensors")["decoder.weights"]
        html = (tmp_path / "run/inspect/inspect.html").read_text(encoding="utf-8")
        assert ("step 1</h1>" in html) == (options == ("--step", 1))
    assert torch.equal(found[()], found["--step", 1])
    assert torch.equal(found["--best",], found["--step", 0])
    assert not torch.equal(found[()], found["--best",])


# --- the page --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hostile_page(runs):
    model, tokenizer, special = open_run(runs / "gpt")
    reading = Reading(decoder=(special.bos, 5, 6), labels=(5, 6, None))
    report = look(model, tokenizer, special, reading, Selection(), f"runs/{HOSTILE}")
    words = [HOSTILE] * 3  # as a tokenizer may have such a token
    return page(replace(report, words={"decoder": words}, said=words, facts={HOSTILE: HOSTILE}))


def test_hostile_text_stays_text(runs, run, tmp_path):
    """In the page, and in the pictures, which write no formulas and warn of no letter."""
    text = f"{HOSTILE} 你好 мир مرحبا 🙂"
    code, _, said = run("--run", runs / "long", "--text", text, "--out", tmp_path)
    assert (code, said) == (0, "")
    html = (tmp_path / "inspect.html").read_text(encoding="utf-8")
    assert html.count("</script>") == 2
    assert "<img" not in html
    words = shown_data(html)["words"]["decoder"]
    assert "".join(words[1:]).replace("·", " ").startswith(f"{HOSTILE} 你 1/3你 2/3你 3/3好 1/3")


def test_hostile_tokens_and_names_stay_text(hostile_page):
    assert shown_data(hostile_page)["words"]["decoder"] == [HOSTILE] * 3
    assert hostile_page.count("</script>") == 2
    assert "<img" not in hostile_page
    assert "<h1>runs/&lt;/script&gt;" in hostile_page


def test_the_page_asks_for_nothing(hostile_page):
    """No address in it, and a policy that allows its own script and style alone."""
    assert not re.search(r"https?:|[\"'(]//|@import|url\(|\bsrc=|\bhref=", hostile_page.replace("src=x", ""))
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', hostile_page)
    *_, script = re.findall(r"<script>(.*?)</script>", hostile_page, re.DOTALL)
    (style,) = re.findall(r"<style>(.*?)</style>", hostile_page, re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (script, style)]
    assert policy == f"default-src 'none'; script-src 'sha256-{hashes[0]}'; style-src 'sha256-{hashes[1]}'"


# --- bad inputs ------------------------------------------------------------------------------------------

BAD = [
    ("gpt", ["--text", ""], CONFIG, "--text: it has no tokens"),
    ("bert", ["--text", ""], CONFIG, "--text: it has no tokens"),
    ("gpt", ["--text", "America " * 40], CONFIG, "the model reads at most 24"),
    ("bert", ["--text", "America " * 40], CONFIG, "the model reads at most 24"),
    ("t5", ["--text", "The", "--target", "America " * 40], CONFIG, "--target: it has"),
    ("t5", ["--text", "The", "--target", ""], CONFIG, "--target: it has no tokens"),
    ("t5", ["--text", "The <extra_id_999>"], CONFIG, "--text: <extra_id_999> is unknown"),
    ("gpt", ["--text", "The", "--target", "a"], CONFIG, "a gpt has no decoder that reads another text"),
    ("bert", ["--text", "The", "--target", "a"], CONFIG, "a bert has no decoder"),
    ("gpt", ["--text", "The", "--layers", "3"], CONFIG, "the model has no layer 3. Fix: choose among 0 to 2"),
    ("gpt", ["--text", "The", "--heads", "0-4"], CONFIG, "--heads: the model has no head 4"),
    ("gpt", ["--text", "The", "--heads", "first"], CONFIG, "--heads: 'first' names none"),
    ("gpt", ["--text", "The", "--layers", "2-1"], CONFIG, "--layers: '2-1' names none"),
    ("gpt", ["--text", "The", "--layers", ""], CONFIG, "--layers: '' names none"),
    ("gpt", ["--text", "The", "--step", "7"], NO_CHECKPOINT, "there are: step-00000000"),
    ("gpt", ["--text", "The", "--best"], NO_CHECKPOINT, "no evaluation yet"),
    ("gpt", ["--text", "The", "--best", "--step", "0"], CONFIG, "--step and --best at once"),
    ("gpt", [], CONFIG, "Missing option '--text'"),
    ("nothing", ["--text", "The"], NO_CHECKPOINT, "no checkpoint"),
    ("nowhere", ["--text", "The"], NO_CHECKPOINT, "no checkpoint"),
    ("long", ["--text", "a b c d " * 400], CONFIG, "Fix: choose fewer with --layers and --heads"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "options", "code", "piece"), BAD)
def test_one_line_for_a_bad_input(kind, options, code, piece, runs, run, tmp_path):
    found, printed, said = run("--run", runs / kind, *options, "--out", tmp_path / "out")
    assert (found, printed) == (code, "")
    assert said.count("\n") == 1
    assert said.startswith("bigtfm: error: ")
    assert piece in said
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_a_file(runs, run, tmp_path):
    (tmp_path / "out").write_text("")
    code, _, said = run("--run", runs / "gpt", "--text", "The", "--out", tmp_path / "out")
    assert code == 74
    assert said.count("\n") == 1


def test_numbers_and_ranges():
    assert numbers(None, "x") is None
    assert numbers("3, 0-1,1", "x") == (0, 1, 3)
