"""Checkpoints that DeepSpeed's own `save_checkpoint` wrote, gone on from in a run."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed_loop
import pytest
import torch
from conftest import TINY, losses
from peak_memory import peak_memory

from bigtfm.cli import app
from bigtfm.config.problems import NoCheckpoint
from bigtfm.config.sections import ModelSection
from bigtfm.engine import checkpoint, weights
from bigtfm.engine.deepspeed_saved import open_checkpoint
from bigtfm.model.transformer import initial_value
from bigtfm.run_directory import open_run

pytestmark = [pytest.mark.launcher, pytest.mark.slow]

SAVE_AT, STEPS = 4, 7
MODEL = ("model.bias=true", "model.ffn_hidden_size=85", "run.seed=7")  # odd sizes: partitions end in padding
BF16 = {"bf16": {"enabled": True}}
VARIANTS = {"wrapped": {"stage": 3}, "frozen": {"stage": 2}, "frozen-3": {"stage": 3}}  # saved by 2 ranks
FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}  # at stage 1: BF16_Optimizer
CELLS: dict[str, dict[str, Any]] = {  # DeepSpeed's: what is saved by 1 rank and by 2
    "0": {"stage": 0},
    "1": {"stage": 1},
    "2": {"stage": 2},
    "3": {"stage": 3},
    "0-bf16": {"stage": 0, **BF16},
    "1-bf16": {"stage": 1, **BF16, **FP32_SUMS},
}
GO_ON_AT = {"0": 3, "1": 0, "2": 1, "3": 2, "0-bf16": 2, "1-bf16": 3}  # another stage


def config(path: Path, stage: int, **changes: Any) -> str:
    content = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "weight_decay": 0.1, "torch_adam": True}},
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {"warmup_max_lr": 3e-3, "warmup_num_steps": 3, "total_num_steps": 20},
        },
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage},
    }
    path.write_text(
        json.dumps({key: value for key, value in (content | changes).items() if value is not None})
    )
    return str(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """A folder with `saved-RANKS/CELL`, what DeepSpeed saved and how it went on, and `runs/RANKS-CELL`, what
    became of it in a run at another stage and on another number of ranks.
    """
    folder = tmp_path_factory.mktemp("own")
    overrides = [*TINY, *MODEL, f"data.path={tiny_data}", f"steps={STEPS}"]

    def own(ranks: int, cells: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
        return [
            {
                "do": "train",
                "config": config(folder / f"own-{cell}.json", **values),
                "overrides": overrides,
                "out": str(folder / f"saved-{ranks}" / cell),
                "save_at": SAVE_AT,
                "steps": STEPS,
                "variant": cell.partition("-")[0] if cell in VARIANTS else "",
            }
            for cell, values in cells.items()
        ]

    def gone_on(ranks: int, cell: str, spoil: str = "") -> dict[str, Any]:
        changes = {key: value for key, value in CELLS[cell].items() if key != "data_types"}
        return {
            "do": "go_on",
            "source": str(folder / f"saved-{ranks}" / cell),
            "config": config(folder / f"run-{cell}.json", **changes | {"stage": GO_ON_AT[cell]}),
            "overrides": overrides,
            "out": str(folder / "runs" / f"{ranks}-{cell}{spoil}"),
            "steps": STEPS,
            "spoil": spoil,
        }

    controls = [gone_on(1, "1", spoil) for spoil in ("exp_avg", "updates")]
    deepspeed_loop.run(own(1, CELLS), folder / "first", 1)
    second = [*own(2, CELLS | VARIANTS), *(gone_on(1, cell) for cell in CELLS), *controls]
    deepspeed_loop.run(second, folder / "second", 2)
    deepspeed_loop.run([gone_on(2, cell) for cell in CELLS], folder / "third", 1)
    return folder


def curves(trained: Path, ranks: int, cell: str, spoiled: str = "") -> tuple[list[float], list[float]]:
    """Losses of the steps after the save: DeepSpeed's own, and the run's."""
    own = json.loads((trained / f"saved-{ranks}" / cell / "losses.json").read_text())
    return own[SAVE_AT:], losses(trained / "runs" / f"{ranks}-{cell}{spoiled}")


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_the_run_goes_on_as_deepspeed_itself(trained: Path, ranks: int, cell: str) -> None:
    own, run = curves(trained, ranks, cell)
    assert run == pytest.approx(own, rel=1e-5)


@pytest.mark.parametrize("spoiled", ["exp_avg", "updates"])
def test_what_an_import_forgets_shows(trained: Path, spoiled: str) -> None:
    own, run = curves(trained, 1, "1", spoiled)
    assert run[0] == pytest.approx(own[0], rel=1e-5)  # the first loss is of the weights alone
    assert max(abs(a - b) for a, b in zip(own, run, strict=True)) > 1e-3


def test_every_weight_and_moment_is_deepspeeds(trained: Path) -> None:
    """The same training, whole at stage 0 and cut up at stages 1 to 3."""
    whole = torch.load(model_states(trained / "saved-1/0"), weights_only=True)
    for stage in ("0", "1", "2", "3"):
        saved = open_checkpoint(trained / "saved-1" / stage)
        assert saved.moments == ["exp_avg", "exp_avg_sq"]
        assert saved.updates == SAVE_AT
        for name, values in whole["module"].items():
            torch.testing.assert_close(saved.read(name, "fp32"), values, rtol=0, atol=1e-6)
        assert sum(float(saved.read(name, "exp_avg_sq").sum()) for name in saved.shapes) > 0


@pytest.fixture
def start(
    trained: Path, tiny_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Runs `bigtfm import-deepspeed SOURCE OUT` in this process; returns its exit code and what it said."""

    def command(source: Path, *overrides: str, changes: dict[str, Any] | None = None) -> tuple[int, str]:
        file = config(tmp_path / "ds.json", **{"stage": 1} | (changes or {}))
        out, data = str(tmp_path / "runs" / "out"), f"data.path={tiny_data}"
        values = [*TINY, *MODEL, data, f"steps={STEPS}", *overrides]
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            app(["import-deepspeed", str(source), out, "--deepspeed_config", file, *values])
        said = capfd.readouterr()
        return int(ended.value.code or 0), said.err or said.out

    return command


@pytest.fixture
def saved(trained: Path, tmp_path: Path) -> Path:
    """A copy of what 2 ranks saved at stage 1, to be damaged."""
    return Path(shutil.copytree(trained / "saved-2/1", tmp_path / "saved"))


def model_states(saved: Path) -> Path:
    return saved / f"global_step{SAVE_AT}" / "mp_rank_00_model_states.pt"


def optim_states(saved: Path, rank: int) -> Path:
    return saved / f"global_step{SAVE_AT}" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def change(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    content = torch.load(path, weights_only=False)
    edit(content)
    torch.save(content, path)


def refused(result: tuple[int, str], code: int, *said: str) -> None:
    """One line with all of `said`, and nothing is left."""
    assert result[0] == code, result[1]
    assert result[1].count("\n") == 1, result[1]
    for part in said:
        assert part in result[1]


def test_it_says_what_was_imported_and_what_comes_next(start: Any, saved: Path, tmp_path: Path) -> None:
    code, said = start(saved)
    assert code == 0, said
    assert "ZeRO stage 1, 2 ranks, step 4" in said
    assert "exp_avg, exp_avg_sq" in said
    assert "32 consumed, by DeepSpeed's count" in said
    assert f"bigtfm train --deepspeed_config {tmp_path / 'ds.json'}" in said
    model, _, _ = open_run(tmp_path / "runs/out")
    module = torch.load(model_states(saved), weights_only=True)["module"]
    assert all(torch.equal(value, module[name]) for name, value in model.named_parameters())
    refused(start(saved), 64, "is there already")


def lose_latest(saved: Path) -> None:
    (saved / "latest").unlink()


def lose_shard(saved: Path, rank: int = 1) -> None:
    optim_states(saved, rank).unlink()


def truncate(saved: Path) -> None:
    with optim_states(saved, 1).open("rb+") as file:
        file.truncate(20_000)


def flip(saved: Path) -> None:
    path = optim_states(saved, 1)
    values = torch.load(path, weights_only=False)["optimizer_state_dict"]["single_partition_of_fp32_groups"]
    place = path.read_bytes().index(values[0].detach()[:16].numpy().tobytes())
    with path.open("rb+") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))


def lead_out(saved: Path) -> None:
    (saved / "latest").write_text("../saved/global_step4")


def forge(saved: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {saved / 'ran'}",)

    change(model_states(saved), lambda content: content.update(client=Evil()))


def rename_as_transformers(saved: Path) -> None:
    def edit(content: dict[str, Any]) -> None:
        names = {name: f"transformer.h.{number}" for number, name in enumerate(content["module"])}
        content["param_shapes"] = [
            {names[name]: shape for name, shape in part.items()} for part in content["param_shapes"]
        ]
        content["module"] = {names[name]: value for name, value in content["module"].items()}
        for rank in (0, 1):
            change(optim_states(saved, rank), partial(rename, names))

    def rename(names: dict[str, str], content: dict[str, Any]) -> None:
        state = content["optimizer_state_dict"]
        state["param_slice_mappings"] = [
            {names[name]: place for name, place in part.items()} for part in state["param_slice_mappings"]
        ]

    change(model_states(saved), edit)


def age(saved: Path) -> None:
    def edit(content: dict[str, Any]) -> None:
        for state in content["optimizer_state_dict"]["base_optimizer_state"]["state"].values():
            state["step"] -= 1

    change(optim_states(saved, 1), edit)


def make_infinite(saved: Path) -> None:
    def edit(content: dict[str, Any]) -> None:
        content["optimizer_state_dict"]["single_partition_of_fp32_groups"][0].detach()[5] = math.inf

    change(optim_states(saved, 0), edit)


DAMAGE: dict[str, tuple[Callable[[Path], Any], int, tuple[str, ...]]] = {
    "no latest": (lose_latest, 76, ("neither `latest` nor model_states",)),
    "latest leads out": (lead_out, 76, ("latest", "'../saved/global_step4' is not the name of a folder")),
    "latest is up": (lambda saved: (saved / "latest").write_text(".."), 76, ("'..' is not the name",)),
    "latest names nothing": (
        lambda saved: (saved / "latest").write_text("global_step9"),
        76,
        ("global_step9, which is not there",),
    ),
    "no folder": (shutil.rmtree, 76, ("no such folder",)),
    "last shard lost": (lose_shard, 76, ("1 ranks' optim_states are there, of 2",)),
    "first shard lost": (lambda saved: lose_shard(saved, 0), 76, ("rank 0's optim_states are missing",)),
    "model states lost": (lambda saved: model_states(saved).unlink(), 76, ("rank 0's model_states",)),
    "truncated": (truncate, 76, ("zero_pp_rank_1", "damaged")),
    "empty": (lambda saved: optim_states(saved, 0).write_bytes(b""), 76, ("zero_pp_rank_0", "damaged")),
    "a flipped bit": (flip, 76, ("zero_pp_rank_1", "differs from its CRC-32")),
    "tensor parallel": (
        lambda saved: shutil.copy(
            model_states(saved), model_states(saved).with_name("mp_rank_01_model_states.pt")
        ),
        76,
        ("mp_rank_01_model_states.pt", "pipeline, tensor or expert parallelism"),
    ),
    "pipeline": (
        lambda saved: model_states(saved).with_name("layer_00-model_states.pt").write_bytes(b""),
        76,
        ("pipeline, tensor or expert parallelism",),
    ),
    "forged": (forge, 76, ("would run more", "--trust-pickles")),
    "a dict of nothing": (
        lambda saved: torch.save({}, optim_states(saved, 1)),
        76,
        ("not as DeepSpeed writes it",),
    ),
    "a list": (lambda saved: torch.save([1], model_states(saved)), 76, ("not as DeepSpeed writes it",)),
    "transformers": (
        rename_as_transformers,
        76,
        ("lacks embed_tokens.weight", "has also transformer.h.", "`bigtfm import-hf`"),
    ),
    "ranks of two steps": (age, 76, ("of 2 steps: after [3.0, 4.0] updates",)),
    "no counts": (
        lambda saved: change(model_states(saved), lambda content: content.update(global_steps=None)),
        76,
        ("not as DeepSpeed writes it", "count"),
    ),
    "infinite": (make_infinite, 70, ("fp32 of embed_tokens.weight is not finite",)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_no_checkpoint_of_ours_ends_in_one_line(
    start: Any, saved: Path, tmp_path: Path, damage: str
) -> None:
    make, code, said = DAMAGE[damage]
    make(saved)
    refused(start(saved), code, *said)
    assert not (saved / "ran").exists()
    assert not list((tmp_path / "runs").iterdir())


def test_a_shard_of_another_number_of_ranks_is_refused(start: Any, saved: Path, trained: Path) -> None:
    shutil.copy(optim_states(trained / "saved-1/1", 0), optim_states(saved, 0))
    refused(start(saved), 76, "2 ranks' optim_states are there")


def test_pickles_of_the_users_own_need_trust(start: Any, saved: Path) -> None:
    change(model_states(saved), lambda content: content.update(client=Fraction(1, 3)))
    refused(start(saved), 76, "fractions.Fraction", "--trust-pickles")
    code, said = start(saved, "--trust-pickles")
    assert code == 0, said


@pytest.mark.parametrize(
    ("overrides", "changes", "code", "said"),
    [
        (["model.num_layers=3"], {}, 76, "of another model: it lacks decoder.layers.2."),
        (["model.num_layers=1"], {}, 76, "it has also decoder.layers.1."),
        (["model.ffn_hidden_size=96"], {}, 76, "is [170, 32] there and [192, 32] here"),
        ([], {"train_batch_size": 16}, 64, "recipe.global_batch was 8"),
        ([], {"gradient_clipping": 0.5}, 64, "recipe.gradient_clipping was 1.0"),
        (
            [],
            {"optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "weight_decay": 0.2, "torch_adam": True}}},
            64,
            "recipe.weight_decay.embed_tokens.weight was 0.1",
        ),
        (
            [],
            {
                "optimizer": {
                    "type": "AdamW",
                    "params": {"lr": 3e-3, "weight_decay": 0.1, "betas": [0.9, 0.95]},
                }
            },
            64,
            "recipe.optimizer.betas was [0.9, 0.999]",
        ),
        ([], {"optimizer": {"type": "SGD", "params": {"lr": 3e-3}}}, 64, "recipe.optimizer.type was AdamW"),
        ([], {"scheduler": None}, 64, "recipe.scheduler"),
    ],
)
def test_another_model_or_recipe_is_refused(
    start: Any, saved: Path, overrides: list[str], changes: dict[str, Any], code: int, said: str
) -> None:
    refused(start(saved, *overrides, changes=changes), code, said)


def test_a_recipe_may_be_changed_on_purpose(start: Any, saved: Path, tmp_path: Path) -> None:
    wsd = {"total_num_steps": 20, "warmup_num_steps": 3, "decay_num_steps": 5}
    changes = {"scheduler": {"type": "WSD", "params": wsd}}
    refused(start(saved, changes=changes), 64, "recipe.scheduler.type was WarmupDecayLR")
    code, said = start(saved, "resume.allow=recipe", changes=changes)
    assert code == 0, said
    state = checkpoint.read_state(checkpoint.newest(tmp_path / "runs/out/checkpoints") or tmp_path)
    assert state["scheduler"]["next_step"] == SAVE_AT + 1


def test_a_prefix_that_all_names_have_is_taken_off(start: Any, trained: Path, tmp_path: Path) -> None:
    code, said = start(trained / "saved-2/wrapped")
    assert code == 0, said
    assert checkpoint.newest(tmp_path / "runs/out/checkpoints")


@pytest.mark.parametrize("cell", ["frozen", "frozen-3"])
def test_what_was_frozen_is_taken_over_when_it_may_be_trained(
    start: Any, trained: Path, tmp_path: Path, cell: str
) -> None:
    source = trained / "saved-2" / cell
    refused(start(source), 64, "recipe.weight_decay.embed_tokens.weight was frozen")
    code, said = start(source, "resume.allow=recipe")
    assert code == 0, said
    folder = checkpoint.newest(tmp_path / "runs/out/checkpoints")
    assert folder is not None
    shapes = weights.weight_shapes(folder)
    found = dict(weights.read_weights(folder, shapes))["embed_tokens.weight"]
    initial = initial_value("embed_tokens.weight", tuple(found.shape), read_model(folder), seed=7)
    assert torch.equal(found, initial)


def put_together(folder: Path, optimizer: dict[str, Any]) -> Path:
    """A stage-0 checkpoint of a matrix 0 .. 5 and a vector 6 .. 8 in half precision."""
    module = {"matrix": torch.arange(6.0).view(2, 3).half(), "vector": torch.arange(6.0, 9.0).half()}
    counters = {"global_steps": 5, "global_samples": 40, "skipped_steps": 2}
    state = {"module": module, "optimizer": optimizer, "dp_world_size": 1, **counters}
    torch.save(state, folder / "mp_rank_00_model_states.pt")
    return folder


def test_flat_groups_of_fp16_at_stage_0(tmp_path: Path) -> None:
    """FP16_Optimizer with a fused Adam, which no CPU has: flat groups, the count in param_groups."""
    inner = {
        "state": {0: {"exp_avg": torch.arange(10.0, 16.0)}, 1: {"exp_avg": torch.arange(16.0, 19.0)}},
        "param_groups": [{"params": [0], "step": 3}, {"params": [1], "step": 3}],
    }
    flat = [torch.arange(6.0), torch.arange(6.0, 9.0)]
    scaling = {"dynamic_loss_scale": True, "cur_scale": 1024.0, "cur_iter": 5, "scale_window": 1000}
    saved = open_checkpoint(
        put_together(tmp_path, {"optimizer_state_dict": inner, "fp32_groups_flat": flat, **scaling})
    )
    assert saved.updates == 3
    assert saved.read("matrix", "fp32").tolist() == [[0, 1, 2], [3, 4, 5]]
    assert saved.read("matrix", "exp_avg").tolist() == [[10, 11, 12], [13, 14, 15]]
    assert saved.read("vector", "exp_avg").tolist() == [16, 17, 18]
    assert saved.loss_scaler["cur_scale"] == 1024.0


def test_masters_that_are_not_the_weights_are_not_taken_for_theirs(tmp_path: Path) -> None:
    inner = {"state": {}, "param_groups": [{"params": [0]}, {"params": [1]}]}
    flat = [torch.arange(1.0, 7.0), torch.arange(6.0, 9.0)]
    with pytest.raises(NoCheckpoint, match="it can't be told which"):
        open_checkpoint(put_together(tmp_path, {"optimizer_state_dict": inner, "fp32_groups_flat": flat}))


def test_one_tensor_is_held_at_a_time(tmp_path: Path) -> None:
    shapes = {f"weight.{number}": (1024, 512) for number in range(32)}  # 2 MiB each, with moments 192 MiB
    flat = 32 * 1024 * 512 // 2
    for rank in (0, 1):
        moments = {key: torch.ones(flat) for key in ("exp_avg", "exp_avg_sq")}
        optimizer = {"state": {0: moments | {"step": 4.0}}, "param_groups": [{"params": [0], "lr": 1e-3}]}
        own = {
            "zero_stage": 3,
            "partition_count": 2,
            "optimizer_state_dict": optimizer,
            "fp32_flat_groups": [torch.ones(flat)],
        }
        torch.save(
            {"optimizer_state_dict": own}, tmp_path / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        )
        counters = {"global_steps": 4, "global_samples": 32, "skipped_steps": 0}
        state = {"param_shapes": [shapes], **counters}
        torch.save(state, tmp_path / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
    prepare = (
        "from pathlib import Path; from bigtfm.engine.deepspeed_saved import open_checkpoint; "
        "from bigtfm.engine.weights import save_training; from bigtfm.engine.checkpoint import Progress; "
        f"folder = Path({str(tmp_path)!r}); keys = ['fp32', 'exp_avg', 'exp_avg_sq']"
    )
    measured = (
        "saved = open_checkpoint(folder); save_training(folder / 'out', saved.shapes, "
        "((f'{name}|{key}', saved.read(name, key)) for name in saved.shapes for key in keys), "
        "Progress(4), keys[1:], 4)"
    )
    assert peak_memory(prepare, measured) < 32  # MiB


def read_model(folder: Path) -> ModelSection:
    return ModelSection.model_validate(checkpoint.read_state(folder)["progress"]["identity"]["model"])
