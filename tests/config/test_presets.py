"""Every shipped run config with every shipped DeepSpeed JSON."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from bigtfm.check import Resolved, render, resolve
from bigtfm.config.deepspeed import DeepSpeedConfig, load_deepspeed_json
from bigtfm.config.problems import ConfigProblem, DataProblem
from bigtfm.config.run import RunConfig, load_run_config
from bigtfm.data.mixture import training_order
from bigtfm.planner.parameters import count_parameters

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))
PRESETS = sorted((ROOT / "ds_configs").glob("*.json"))
STAGES = [preset for preset in PRESETS if preset.stem.startswith("zero")]  # the rest are recipes of their own
PARAMETERS = {  # published counts, with the vocabulary that they belong to
    "gpt_124m": (124_439_808, 50257),
    "gpt_350m": (354_823_168, 50257),
    "gpt_774m": (774_030_080, 50257),
    "gpt_1.5b": (1_557_611_200, 50257),
    "gpt_1.3b": (1_315_758_080, 50272),  # OPT's, of the same shapes
    "gpt_2.7b": (2_651_596_800, 50272),
    "gpt_6.7b": (6_658_473_984, 50272),
    "llama_1b": (1_235_814_400, 128256),
    "llama_8b": (8_030_261_248, 128256),
    "bert_110m": (110_106_428, 30522),  # transformers' BertForPreTraining
    "modernbert_149m": (149_655_232, 50368),
    "transformer_65m": (63_081_472, 37000),  # the paper says 65 M
    "t5_248m": (247_577_856, 32128),  # google/t5-v1_1-base
    "bart_139m": (139_420_416, 50265),
}


@dataclass(frozen=True)
class Dataset:
    """A data set's header, and no data."""

    vocab_size: int = 50257
    num_tokens: int = 9_000_000_000
    path: str = "data/some"

    def split(self, name: str) -> Dataset:
        return self


def come_to(run: RunConfig, deepspeed: DeepSpeedConfig, ranks: int, tokens: int = 9_000_000_000) -> Resolved:
    datasets: Any = (Dataset(num_tokens=tokens),)
    order = training_order(datasets, run.data, run.seq_len, run.run.seed)
    return resolve(run, deepspeed, ranks, datasets, order, 50257)


def name(path: Path) -> str:
    return path.stem


def test_all_are_there() -> None:
    assert {path.stem for path in CONFIGS} == {"quickstart", *PARAMETERS}
    stages = {f"zero{stage}_{precision}" for stage in range(4) for precision in ("fp32", "bf16", "fp16")}
    offload = {"zero2_offload_cpu_bf16", "zero3_offload_cpu_bf16", "zero3_offload_nvme_bf16"}
    assert {path.stem for path in PRESETS} == stages | offload | {"large_batch_lamb"}


@pytest.mark.parametrize("preset", PRESETS, ids=name)
@pytest.mark.parametrize("config", CONFIGS, ids=name)
def test_every_pair_resolves(config: Path, preset: Path) -> None:
    run, deepspeed = load_run_config(config), load_deepspeed_json(preset)
    for world_size in (1, 2, 4) if deepspeed.precision == "fp32" else (8, 16, 64):
        resolved = come_to(run, deepspeed, world_size)
        assert resolved.micro_batch * resolved.accumulation * world_size == resolved.global_batch
        assert resolved.tokens_per_step == resolved.global_batch * run.seq_len
        assert resolved.steps == deepspeed.horizon
        values = deepspeed.resolved(run.model, resolved.steps, world_size)
        assert '"auto"' not in json.dumps(values)
        assert json.loads(resolved.to_json())["parameters"] == resolved.parameters


@pytest.mark.parametrize("preset", STAGES, ids=name)
def test_a_preset_is_what_its_name_says(preset: Path) -> None:
    deepspeed = load_deepspeed_json(preset)
    stage, *offload, precision = preset.stem.split("_")
    assert deepspeed.zero_stage == int(stage.removeprefix("zero"))
    assert deepspeed.precision == precision
    assert deepspeed.offload("optimizer") == (offload[1] if offload else "none")
    assert deepspeed.offload("param") == (offload[1] if offload and deepspeed.zero_stage == 3 else "none")
    assert "gradient_accumulation_steps" not in deepspeed.values


def test_presets_of_one_precision_are_one_recipe() -> None:
    """Only sharding, offload and precision differ: that is what the same loss at every stage is about."""
    recipes: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for preset in STAGES:
        deepspeed = load_deepspeed_json(preset)
        recipe = {
            key: deepspeed.values[key]
            for key in deepspeed.values
            if key not in ("zero_optimization", "bf16", "fp16")
        }
        recipes[deepspeed.precision == "fp32"].append(recipe)
    for recipe in recipes.values():
        assert all(other == recipe[0] for other in recipe)


def test_readme_names_every_preset_or_its_family() -> None:
    readme = (ROOT / "ds_configs" / "README.md").read_text()
    for preset in PRESETS:
        stage = preset.stem.partition("_")[0]
        assert f"`{preset.stem}`" in readme or f"`{stage}_*`" in readme


@pytest.mark.parametrize("model", PARAMETERS)
def test_parameter_counts(model: str) -> None:
    published, vocab_size = PARAMETERS[model]
    count = count_parameters(load_run_config(ROOT / "configs" / f"{model}.toml").model, vocab_size)
    assert count == pytest.approx(published, rel=0.01)


def test_quickstart_states_the_defaults() -> None:
    path = ROOT / "configs" / "quickstart.toml"
    assert load_run_config(path) == RunConfig()
    stated = tomllib.loads(path.read_text())
    for table, section in RunConfig.model_fields.items():
        fields = section.annotation.model_fields  # type: ignore[union-attr]
        wanted = {key for key, field in fields.items() if field.default is not None}  # TOML has no null
        assert set(stated[table]) == wanted


@pytest.mark.parametrize("config", CONFIGS, ids=name)
def test_headers_say_what_to_expect(config: Path) -> None:
    header = config.read_text().partition("\n\n")[0]
    for word in ("Expect", "Hardware", "Tokens", "DeepSpeed"):
        assert word in header
    assert ("not yet run here" in header) == (config.stem != "quickstart"), "only what was measured is stated"
    named = [part.rstrip(":,;") for part in header.split() if part.startswith("ds_configs/")]
    assert named
    assert all((ROOT / path).is_file() for path in named if "*" not in path)


def test_steps_stop_earlier_never_later() -> None:
    deepspeed = load_deepspeed_json(ROOT / "ds_configs" / "zero1_fp32.json")
    short = come_to(load_run_config(None, ["steps=20"]), deepspeed, 1)
    assert (short.steps, short.horizon) == (20, 400)
    with pytest.raises(ConfigProblem, match=r"run\.steps 401 is larger than .* 400"):
        come_to(load_run_config(None, ["steps=401"]), deepspeed, 1)


def test_epochs() -> None:
    deepspeed = load_deepspeed_json(ROOT / "ds_configs" / "zero1_fp32.json")
    resolved = come_to(load_run_config(None), deepspeed, 2, 16 * 128 * 100 + 1)
    assert (resolved.steps_per_epoch, resolved.epochs) == (100.0, 4.0)


@pytest.mark.parametrize(
    ("overrides", "changes", "fragment"),
    [
        (["eval.every=0", "patience=2"], {}, "eval.patience waits for evaluations"),
        (
            ["eval.every=0", "steps=9"],
            {"scheduler": {"type": "ReduceOnPlateau", "params": {}}},
            "scheduler ReduceOnPlateau waits for evaluations",
        ),
        (
            ["recompute=selective", "bias=true"],
            {"zero_optimization": {"stage": 3, "memory_efficient_linear": True}},
            "memory_efficient_linear true gives wrong gradients",
        ),
        (
            [],
            {
                "zero_optimization": {
                    "stage": 3,
                    "offload_param": {"device": "nvme", "nvme_path": "/n", "buffer_size": 1000},
                }
            },
            "buffer_size 1000 is less than",
        ),
        (["fp8=rowwise"], {}, "the weights that stage 3 gathers until the backward pass"),
        (
            ["fp8=rowwise", "recompute=full", "ffn_hidden_size=200"],
            {},
            "compute.fp8 takes matrices whose sides are multiples of 16, and the model has one of 192 x 200",
        ),
        (["steps=20"], {"train_batch_size": 18}, "train_batch_size 18 is not 4 x an accumulation x 2 ranks"),
    ],
)
def test_files_that_do_not_fit_together(
    overrides: list[str], changes: dict[str, Any], fragment: str, tmp_path: Path
) -> None:
    values = json.loads((ROOT / "ds_configs" / "zero3_fp32.json").read_text()) | changes
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigProblem) as caught:
        come_to(load_run_config(None, overrides), load_deepspeed_json(path), 2)
    assert fragment in caught.value.line
    assert "\n" not in caught.value.line


def test_too_little_text() -> None:
    deepspeed = load_deepspeed_json(ROOT / "ds_configs" / "zero1_fp32.json")
    with pytest.raises(DataProblem, match="128 tokens, too few"):
        come_to(load_run_config(None), deepspeed, 1, 128)


def test_the_table_shows_the_truths() -> None:
    from rich.console import Console

    deepspeed = load_deepspeed_json(ROOT / "ds_configs" / "zero2_fp32.json")
    console = Console(width=120, record=True, file=StringIO())
    console.print(render(come_to(load_run_config(None), deepspeed, 2), "sdpa: CPU"))
    shown = console.export_text()
    for truth in (
        "16 sequences = 4 micro batch x 2 accumulation x 2 ranks",
        "2,048 = 16 x 128",
        "lr 0.0015",
        "400",
    ):
        assert truth in shown


def test_a_ramp_up_of_the_batch_is_counted_everywhere() -> None:
    """100 steps of 4, 100 of 8 and 200 of 16 sequences, where without it 400 are of 16."""
    from rich.console import Console

    deepspeed = load_deepspeed_json(ROOT / "ds_configs" / "zero2_fp32.json")
    ramp = ["rampup_sizes=4,8", "rampup_steps=100,100", "data.seq_len=100"]
    sequences = 100 * 4 + 100 * 8 + 200 * 16
    found = come_to(load_run_config(None, ramp), deepspeed, 1, tokens=100 * sequences + 1)
    assert (found.global_batch, found.epochs, found.tokens_per_step) == (16, 1.0, 100 * sequences // 400)
    console = Console(width=120, record=True, file=StringIO())
    console.print(render(found, "sdpa: CPU"))
    shown = " ".join(console.export_text().split())
    assert "ramp-up 1 4 sequences in 100 steps ramp-up 2 8 sequences in 100 steps" in shown
    assert "tokens per step 1,100 in the mean, of 16 x 100" in shown
    once = 'data.sources=[{path = "a", max_epochs = 1}]'
    with pytest.raises(ConfigProblem) as caught:
        come_to(load_run_config(None, [*ramp, once]), deepspeed, 1, tokens=100 * (sequences - 1) + 1)
    assert "399 steps of 4 and 8 and 16, and the run has 400" in caught.value.line


def test_checking_needs_no_torch_and_no_time() -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "import bigtfm.check; from bigtfm.config.deepspeed import load_deepspeed_json\n"
        "from bigtfm.config.run import load_run_config\n"
        f"load_deepspeed_json(Path({str(PRESETS[0])!r})), load_run_config(Path({str(CONFIGS[0])!r}))\n"
        "assert not {'torch', 'deepspeed', 'transformers', 'datasets'} & sys.modules.keys()\n"
    )
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert time.perf_counter() - start < 2


TASKS = sorted((ROOT / "configs" / "tasks").glob("*.toml"))
HEADS = {"classification": 2, "tagging": 9}  # labels of SST-2, of CoNLL-2003 in BIO


@pytest.mark.parametrize("config", TASKS, ids=name)
def test_a_tasks_recipe_names_its_task_and_counts_its_parameters(config: Path) -> None:
    """The number in its name is that of its model with the vocabulary of the published one."""
    run, stated = load_run_config(config), config.stem.rpartition("_")[2]
    assert run.supervised
    assert run.run.name == config.stem
    vocab = {"bert": 30522, "encoder_decoder": 32000 if run.run.init_from is None else 50265, "gpt": 128256}
    model = run.model.model_copy(update={"num_labels": HEADS.get(run.objective_kind)})
    found = count_parameters(model, vocab[model.family], run.objective_kind)
    millions = float(stated[:-1]) * (1000 if stated.endswith("b") else 1)
    assert found / 1e6 == pytest.approx(millions, rel=0.25 if stated == "1b" else 0.08)
    head = config.read_text(encoding="utf-8").partition("[run]")[0]
    for part in (
        "Expect      not yet run here.",
        "Hardware",
        "--task ",
        "DeepSpeed",
    ):
        assert part in head
    task = head.partition("--task ")[2].split()[0]
    assert run.objective_kind in TASK_KINDS[task]


TASK_KINDS = {
    "classification": ("classification",), "relation_extraction": ("classification",),
    "tagging": ("tagging",),
    "question_answering": ("question_answering",), "translation": ("sequence_to_sequence", "completion"),
    "summarisation": ("sequence_to_sequence", "completion"), "chat": ("completion",),
}  # fmt: skip
