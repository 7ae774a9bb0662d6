"""The run config: precedence, overrides, one line a mistake, and no truth that the DeepSpeed JSON holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from bigtfm.config.deepspeed_types import OPTIMIZERS, SCHEDULERS
from bigtfm.config.deepspeed_walk import paths, schema
from bigtfm.config.problems import ConfigProblem
from bigtfm.config.run import RunConfig, load_run_config


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text("[run]\nsteps = 10\n[model]\nhidden_size = 96\nnum_attention_heads = 4\n")
    return path


def test_defaults_then_file_then_command_line(toml: Path) -> None:
    assert load_run_config(None).run.steps is None
    assert load_run_config(toml).run.steps == 10
    config = load_run_config(toml, ["run.steps=20", "steps=30", "model.dropout=0.1"])
    assert (config.run.steps, config.model.dropout, config.model.hidden_size) == (30, 0.1, 96)
    assert config.model.num_layers == load_run_config(None).model.num_layers


def test_frozen(toml: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_run_config(toml).run.steps = 5


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("hidden_size=384", "model.hidden_size", 384),
        ("name=2024-05-01", "run.name", "2024-05-01"),  # a date in TOML, and a fine name
        ('run.name="quoted"', "run.name", "quoted"),
        ("data.path=/data/a=b", "data.path", "/data/a=b"),
        ("mlflow=false", "track.mlflow", False),
        ("recompute=2", "compute.recompute", 2),
        ("recompute=selective", "compute.recompute", "selective"),
        ("allow=data,seed", "resume.allow", ("data", "seed")),
        ('resume.allow=["data"]', "resume.allow", ("data",)),
        ("eval.tokens=2_000_000", "eval.tokens", 2_000_000),
        ("min_delta=1", "eval.min_delta", 1.0),
    ],
)
def test_overrides(override: str, key: str, value: object) -> None:
    table, _, name = key.partition(".")
    assert getattr(getattr(load_run_config(None, [override]), table), name) == value


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ("step=5", ["unknown key 'step'", "did you mean 'run.steps'?"]),
        ("hiden_size=5", ["did you mean 'model.hidden_size'?"]),
        ("run.hidden_size=5", ["did you mean 'model.hidden_size'?"]),
        ("model.stps=5", ["unknown key 'model.stps'", "did you mean 'run.steps'?"]),
        ("lr=0.1", ["belongs into the DeepSpeed JSON, as optimizer.params.lr"]),
        ("train_batch_size=8", ["belongs into the DeepSpeed JSON"]),
        ("gradient_clipping=1", ["belongs into the DeepSpeed JSON"]),
        ("every=5", ["ambiguous", "eval.every, save.every, track.every"]),
        ("model=5", ["write model.KEY=VALUE"]),
        ("steps", ["is not key=value"]),
        ("steps=1e3", ["run.steps must be a valid integer, not 1000.0", "write 1000"]),
        ("steps=abc", ["run.steps must be a valid integer"]),
        ("steps=true", ["run.steps must be a valid integer, not true"]),
        ("steps=-1", ["greater than or equal to 1, not -1"]),
        ("recompute=ful", ["'none', 'full' or 'selective'", "integer", "did you mean 'full'?"]),
        ("recompute=0", ["greater than or equal to 1, not 0"]),
        ("hidden_size=100", ["not a multiple of model.num_attention_heads 6", "set hidden_size to 102"]),
        ("num_kv_heads=4", ["not a multiple of model.num_kv_heads 4", "1, 2, 3, 6"]),
        ("head_dim=7", ["even head size"]),
        ("seq_len=4096", ["longer than model.max_seq_len 128"]),
        ("dropout=nan", ["finite"]),
        ("run.name=../x", ["run.name must be letters"]),
        ("allow=weights", ["resume.allow must be 'data'"]),
        ('sources=[{path="a", wieght=1}]', ["unknown key 'data.sources[0].wieght'", "'weight'"]),
        ("sources=[{weight=1}]", ["data.sources[0].path is missing"]),
        (
            'sources=[{path="a"}, {path="b", weight=-1.0}]',
            ["data.sources[1].weight", "greater than 0, not -1"],
        ),
        ("sources=a,b", ["data.sources must be a list of tables"]),
        ('sources=[{path="a"}, {path="a"}]', ["data.sources has a twice"]),
        ("stream=wiki", ["data.stream wiki can't be streamed", "hf:NAME"]),
        ("text_column=body", ["does nothing without data.stream"]),
    ],
)
def test_one_line_a_mistake_on_the_command_line(override: str, fragments: list[str]) -> None:
    with pytest.raises(ConfigProblem) as caught:
        load_run_config(None, [override])
    line = caught.value.line
    assert "\n" not in line
    for fragment in fragments:
        assert fragment in line


def test_a_mistake_is_placed_where_it_was_made(toml: Path) -> None:
    with pytest.raises(ConfigProblem, match=r"error: command line: run\.steps"):
        load_run_config(toml, ["steps=0"])
    toml.write_text("[run]\nstep = 5\n")
    with pytest.raises(ConfigProblem, match=r"run\.toml: unknown key 'run\.step'"):
        load_run_config(toml)


def test_several_mistakes_are_counted_by_key(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[run]\nsteps = "5"\n[compute]\nrecompute = "ful"\n[model]\nlayers = 2\n')
    with pytest.raises(ConfigProblem, match=r"write 5 without quotes") as caught:
        load_run_config(path)
    assert "(and 2 more)" in caught.value.line  # the union's two branches are one mistake


def test_every_field_says_what_it_is() -> None:
    for table, section in RunConfig.model_fields.items():
        for name, field in section.annotation.model_fields.items():  # type: ignore[union-attr]
            assert len(field.description or "") > 10, f"{table}.{name}"


@pytest.mark.parametrize(
    ("overrides", "fragment"),
    [
        (["rotary_scaling=8,4,1,32"], "rotary_scaling [8.0, 4.0, 1.0, 32.0] is none"),
        (["rotary_scaling=0.5,1,4,32"], "a factor of 1 or more"),
        (["rotary_scaling=8,1,4,0"], "and a length"),
        (["rotary_scaling=8,1,4"], "a longer list"),
        (["positions=relative", "relative_max_distance=16"], "more than 16"),
        (["positions=relative", "family=bert", "relative_max_distance=8"], "more than 8"),
        (["positions=relative", "family=encoder_decoder", "relative_max_distance=16"], "more than 16"),
        (["positions=relative", "family=bert", "relative_buckets=7"], "set it to 8"),
        (["relative_buckets=8"], "model.relative_buckets does nothing here"),
        (["positions=learned", "rotary_base=5.0"], "model.rotary_base does nothing here"),
        (["whole_words=true"], "objective.whole_words does nothing for causal_lm"),
        (["family=bert", "span_length=9"], "objective.span_length does nothing for masked_lm"),
        (["family=encoder_decoder", "mask_random=0.5"], "it is for masked_lm"),
        (["mask_fraction=0.5"], "objective.mask_fraction does nothing for causal_lm"),
        (["attention_dropout=0.1", "attention=sdpa"], "can't drop attention weights"),
        (["compile_blocks=true", "recompute=selective"], "can't look into compiled blocks"),
        (["compile_blocks=true", "kernels=liger"], "liger has nothing to do in compiled blocks"),
        (["stream=hf:wiki", "workers=2"], "set data.workers to 0"),
        (
            [
                "stream=hf:wiki",
                "family=bert",
                "model.next_sentence=true",
                "token_types=2",
                "objective.next_sentence=77",
            ],
            "a stream is read once",
        ),
    ],
)
def test_what_would_do_nothing_or_nonsense_is_refused(overrides: list[str], fragment: str) -> None:
    with pytest.raises(ConfigProblem) as caught:
        load_run_config(None, overrides)
    assert fragment in caught.value.line


@pytest.mark.parametrize(
    "overrides",
    [
        ["positions=relative", "relative_max_distance=17"],
        ["positions=relative", "family=bert", "relative_max_distance=9"],
        ["positions=relative", "relative_buckets=7"],
        ["rotary_scaling=1,1,4,1"],
    ],
)
def test_the_edges_are_taken(overrides: list[str]) -> None:
    load_run_config(None, overrides)


def test_lists_need_no_brackets_on_the_command_line() -> None:
    run = load_run_config(None, ["rotary_scaling=8.0, 1,4.0,8192", "resume.allow=data,seed"])
    assert run.model.rotary_scaling == (8.0, 1.0, 4.0, 8192.0)
    assert run.resume.allow == ("data", "seed")


def test_no_truth_is_stated_twice() -> None:
    stated = {path.rpartition(".")[2] for path in paths(schema({}))}
    own = (
        "InverseSquareRoot",
        "WSD",
        "ReduceOnPlateau",
    )  # ReduceOnPlateau's patience is not early stopping's
    schedulers = [table for kind, table in SCHEDULERS.items() if kind not in own]
    stated |= {name for table in (*OPTIMIZERS.values(), *schedulers) for name in table}
    mine = {
        name
        for section in RunConfig.model_fields.values()
        for name in section.annotation.model_fields  # type: ignore[union-attr]
    }
    assert {"train_batch_size", "lr", "gradient_clipping", "stage", "warmup_num_steps"} <= stated
    assert not mine & stated
