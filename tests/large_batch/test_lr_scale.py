"""What `bigtfm lr-scale` makes of a recipe: the published rules, by numbers worked out by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bigtfm.cli import app
from bigtfm.config.deepspeed import load_deepspeed_json
from bigtfm.config.problems import ConfigProblem
from bigtfm.large_batch.lr_scale import Scaled, scale

Json = Callable[..., Path]
ADAMW = {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.98], "weight_decay": 0.1}}
COSINE = {"type": "WarmupCosineLR", "params": {"total_num_steps": 1000, "warmup_num_steps": 50}}


@pytest.fixture
def scaled(deepspeed_json: Json) -> Callable[..., Scaled]:
    def run(batch: int, rule: str | None = None, **changes: Any) -> Scaled:
        return scale(load_deepspeed_json(deepspeed_json(**changes)), batch, rule)

    return run


def test_adam_at_four_times_the_batch(scaled: Callable[..., Scaled]) -> None:
    """Malladi et al. 2022, definition 5.2, and decay for the same lr x decay over an epoch."""
    found = scaled(32, optimizer=ADAMW, scheduler=COSINE)
    params = found.values["optimizer"]["params"]
    assert (found.rule, found.factor, found.values["train_batch_size"]) == ("adam", 4, 32)
    assert params["lr"] == pytest.approx(2e-3)
    assert params["betas"] == pytest.approx([0.6, 0.92])
    assert params["eps"] == pytest.approx(5e-9)
    assert params["weight_decay"] == pytest.approx(0.2)
    assert found.values["scheduler"]["params"] == {"total_num_steps": 250, "warmup_num_steps": 13}
    assert found.changes["optimizer.params.eps"] == (None, params["eps"])
    assert "gradient_clipping" not in found.changes


def test_back_again_is_where_it_began(tmp_path: Path, scaled: Callable[..., Scaled]) -> None:
    there = scaled(32, optimizer=ADAMW)
    path = tmp_path / "there.json"
    path.write_text(json.dumps(there.values))
    back = scale(load_deepspeed_json(path), 8).values["optimizer"]["params"]
    for name, value in ADAMW["params"].items():  # type: ignore[attr-defined]
        assert back[name] == pytest.approx(value)


def test_l2_decay_of_adam_stays(scaled: Callable[..., Scaled]) -> None:
    params = {"lr": 1e-3, "betas": [0.9, 0.98], "weight_decay": 0.1, "adam_w_mode": False}
    found = scaled(32, optimizer={"type": "Adam", "params": params})
    assert found.values["optimizer"]["params"]["weight_decay"] == 0.1


def test_sgd_is_linear_and_its_momentum_stays(scaled: Callable[..., Scaled]) -> None:
    sgd = {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}
    warmup = {"type": "WarmupLR", "params": {"warmup_num_steps": 100, "warmup_max_lr": 0.1}}
    found = scaled(64, optimizer=sgd, scheduler=warmup)
    assert found.values["optimizer"]["params"] == {"lr": pytest.approx(0.8), "momentum": 0.9}
    assert found.values["scheduler"]["params"] == {
        "warmup_num_steps": 13,
        "warmup_max_lr": pytest.approx(0.8),
    }


def test_lamb_is_a_square_root_and_keeps_its_warm_up_steps(scaled: Callable[..., Scaled]) -> None:
    """You et al. 2019, table 1: from 512 to 1 k sequences lr x sqrt(2), and twice the share of warm-up."""
    lamb = {"type": "Lamb", "params": {"lr": 5 / 2**3 / 1e3, "weight_decay": 0.01}}
    found = scaled(16, optimizer=lamb, scheduler=COSINE)
    assert found.values["optimizer"]["params"]["lr"] == pytest.approx(5 / 2**2.5 / 1e3)
    assert found.values["optimizer"]["params"]["weight_decay"] == 0.01
    assert found.values["scheduler"]["params"] == {"total_num_steps": 500, "warmup_num_steps": 50}


def test_a_rule_may_be_chosen(scaled: Callable[..., Scaled]) -> None:
    found = scaled(32, "sqrt", optimizer=ADAMW)
    assert found.changes == {
        "train_batch_size": (8, 32),
        "optimizer.params.lr": (1e-3, pytest.approx(2e-3)),
    }


def test_the_micro_batch_stays(scaled: Callable[..., Scaled]) -> None:
    """On one rank 8 = 2 x 4, or 4 steps of accumulation of what is left."""
    both = scaled(32, gradient_accumulation_steps=4).values
    assert both["train_micro_batch_size_per_gpu"] == 2
    assert "gradient_accumulation_steps" not in both
    alone = {"train_micro_batch_size_per_gpu": None, "gradient_accumulation_steps": 4}
    assert scaled(32, **alone).values["gradient_accumulation_steps"] == 16


@pytest.mark.parametrize(
    ("batch", "rule", "changes", "said", "fix"),
    [
        (128, None, {"optimizer": ADAMW}, "betas of -0.6, 0.68", "a batch of at most 80"),
        (32, None, {"optimizer": {"type": "Lion", "params": {"lr": 1e-4}}}, "no rule for Lion", "--rule"),
        (32, "adam", {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}}, "not for SGD", "--rule sqrt"),
        (32, "cubic", {}, "unknown rule 'cubic'", "linear"),
        (32, None, {"train_batch_size": None}, "train_batch_size is not stated", "state it"),
        (
            12,
            None,
            {"train_micro_batch_size_per_gpu": None, "gradient_accumulation_steps": 1},
            "1 times 1.5 is no whole number",
            "state train_micro_batch_size_per_gpu",
        ),
        (
            400,
            "sqrt",
            {"optimizer": {"type": "Lamb", "params": {"lr": 1e-3}}, "scheduler": COSINE},
            "20 steps are left, and warm-up and decay take 50",
            "a larger total_num_steps",
        ),
        (
            32,
            None,
            {"scheduler": {"type": "ReduceOnPlateau", "params": {}}},
            "the lengths of ReduceOnPlateau are not scaled",
            "WSD",
        ),
    ],
)
def test_where_a_rule_ends(
    batch: int, rule: str | None, changes: dict[str, Any], said: str, fix: str, scaled: Callable[..., Scaled]
) -> None:
    with pytest.raises(ConfigProblem) as refused:
        scaled(batch, rule, **changes)
    assert said in refused.value.what
    assert fix in refused.value.fix


def test_the_command_writes_a_sound_file_and_spoils_none(
    tmp_path: Path, deepspeed_json: Json, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "large.json"
    args = ["lr-scale", "--deepspeed_config", str(deepspeed_json()), "--batch", "32", "--out", str(out)]
    for code, words in ((0, "train_batch_size: 8 -> 32"), (64, "is there already")):
        with pytest.raises(SystemExit) as ended:
            app(args)
        said = capsys.readouterr()
        assert int(ended.value.code or 0) == code
        assert words in said.out + said.err
    written = load_deepspeed_json(out)
    assert written.stated_batch.train_batch_size == 32
    assert written.lr == pytest.approx(6e-3)
    with pytest.raises(SystemExit):
        app([*args[:-2], "--json"])
    assert json.loads(capsys.readouterr().out)["changes"]["train_batch_size"] == {"before": 8, "after": 32}
