"""`bigtfm plan`: what it prints, writes and draws, and what it does not know."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from bigtfm.config.problems import ConfigProblem
from bigtfm.plan.command import show
from bigtfm.plan.job import plan, target_of

ROOT = Path(__file__).parents[2]
GPT2 = [ROOT / "configs/gpt_124m.toml", ROOT / "ds_configs/zero1_bf16.json"]
NO_DATA = ["data.path=nowhere", "model.vocab_size=50257"]
PLACE = {"gpus": 8, "gpu": "h100-80g", "gpus_per_node": 8}


def test_a_plan_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert show(*GPT2, NO_DATA, **PLACE, as_json=True)
    said = json.loads(capsys.readouterr().out)
    assert said["fits"]
    assert said["parameters"] == 124_475_904  # GPT-2's, its vocabulary padded by 47 rows
    assert said["gpu_hours"] == pytest.approx(said["steps"] * said["step_seconds"] / 3600 * 8)
    assert said["gpu_hours"] == pytest.approx(said["gpu_hours_per_billion_tokens"] * said["tokens"] / 1e9)
    assert said["kilowatt_hours"] == pytest.approx(said["gpu_hours"] * 0.7)
    assert said["memory"]["peak"] <= said["budget"]
    assert any("no calibration for h100-80g" in line for line in said["unknown"])
    assert 0.1 < said["mfu"] < 0.7


def test_the_hours_of_a_ramp_up_are_those_of_its_steps(capsys: pytest.CaptureFixture[str]) -> None:
    def said(*overrides: str) -> dict[str, Any]:
        show(*GPT2, [*NO_DATA, "steps=300", *overrides], **PLACE, as_json=True)
        return json.loads(capsys.readouterr().out)

    ramp, whole = said("rampup_sizes=256", "rampup_steps=200"), said()
    assert ramp["step_seconds"] == whole["step_seconds"]
    half = (ramp["hours"] * 3600 - 100 * whole["step_seconds"]) / 200
    assert 0.5 * whole["step_seconds"] < half < 0.6 * whole["step_seconds"], "the update stays"


def test_a_plan_for_reading(capsys: pytest.CaptureFixture[str]) -> None:
    show(*GPT2, [*NO_DATA, "compile_blocks=true"], **PLACE | {"gpus": 16})
    said = " ".join(capsys.readouterr().out.split())
    for words in (
        "fits into",
        "tokens/s",
        "GPU-h",
        "kWh",
        "network card",
        "not known",
        "compiled blocks",
        "a billion tokens",
    ):
        assert words in said


def test_what_does_not_fit_says_so_and_a_search_finds_what_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = [ROOT / "configs/llama_8b.toml", ROOT / "ds_configs/zero3_bf16.json"]
    shape = ["data.path=nowhere", "model.vocab_size=128256", "compute.loss=whole"]
    assert show(*job, shape[:2], **PLACE), "in chunks the logits fit"
    capsys.readouterr()
    assert not show(*job, shape, **PLACE)
    said = " ".join(capsys.readouterr().out.split())
    assert "does NOT fit" in said
    assert re.search(r"advice: ZeRO 3, micro batch \d+ x \d+.* fits: .* the same loss", said)
    found = tmp_path / "found.json"
    assert show(*job, shape, **PLACE, search=True, write=found, as_json=True)
    said = json.loads(capsys.readouterr().out)
    first = said["found"][0]
    again, *_ = plan(job[0], found, [*shape, f"recompute={first['recompute']}"], **PLACE)
    assert again.fits
    assert again.step.seconds == pytest.approx(first["step_seconds"])
    assert again.setting.global_batch == 512
    with pytest.raises(ConfigProblem, match="is there already"):
        show(*job, shape, **PLACE, search=True, write=found, as_json=True)


def test_a_picture(tmp_path: Path) -> None:
    show(*GPT2, NO_DATA, **PLACE, picture=tmp_path / "memory.png", as_json=True)
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_on_a_cpu_the_rates_are_measured(tiny_data: Path) -> None:
    files = [ROOT / "configs/quickstart.toml", ROOT / "ds_configs/zero2_fp32.json"]
    found, *_ = plan(*files, [f"data.path={tiny_data}"], gpus=2, gpu="cpu", gpus_per_node=8)
    assert found.setting.vocab_size == 512
    assert found.mfu is None
    assert "measured" in found.step.rates.source


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gpu": "h100-80"}, "no GPU 'h100-80'.*did you mean h100-80g"),
        ({"picture": Path("x.foo")}, "--picture is a PNG"),
        ({"search": True, "write": Path("/no/where/x.json")}, "can't become a file"),
        ({"calibrate": Path("/no/where/x.json")}, "can't become a file"),
        ({"gpu": "t4"}, "t4 has no units for bf16"),
        ({"write": Path("x.json")}, "--write is for what a search finds"),
        ({"confirm": 2}, "--confirm is for what a search finds"),
        ({"calibration": Path("a"), "calibrate": Path("b")}, "both say the rates"),
        ({"calibration": ROOT / "pyproject.toml"}, "holds no calibration"),
    ],
)
def test_mistakes(changes: dict, said: str) -> None:
    with pytest.raises(ConfigProblem) as caught:
        show(*GPT2, NO_DATA, **PLACE | changes)
    assert re.search(said, caught.value.line), caught.value.line


def test_the_vocabulary_is_needed() -> None:
    with pytest.raises(ConfigProblem, match="vocabulary is not known"):
        show(*GPT2, ["data.path=nowhere"], **PLACE)


def test_a_cpu_s_memory_is_shared_by_its_ranks() -> None:
    one, two = (target_of("cpu", ranks, 8).budget for ranks in (1, 2))
    assert two < one / 2
