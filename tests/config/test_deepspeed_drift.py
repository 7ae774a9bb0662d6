"""The tables of keys against the installed DeepSpeed: no key that it reads is unknown, no default differs.

DeepSpeed is asked in a process of its own, so that no other test has it imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bigtfm.config.deepspeed import BATCH_KEYS, load_deepspeed_json
from bigtfm.config.deepspeed_schema import CLIPPING_DEFAULT, ZERO, Key, Refusal, Section, Table
from bigtfm.config.deepspeed_types import OPTIMIZERS, SCHEDULERS
from bigtfm.config.deepspeed_walk import schema
from bigtfm.config.run import RunConfig

ASK = '''
import inspect, json, sys
import torch
from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.ops.lamb import FusedLamb
from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.runtime import config, constants, lr_schedules
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
from deepspeed.runtime.zero import config as zero, offload_config
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

read = set()  # every key that DeepSpeed looks up, as a dotted path


class Recorder(dict):
    prefix = ""

    def note(self, key):
        read.add(self.prefix + key)

    def get(self, key, default=None):
        self.note(key)
        return super().get(key, default)

    def __contains__(self, key):
        self.note(key)
        return super().__contains__(key)

    def keys(self):
        return self


names = "activation_checkpointing aio data_types flops_profiler optimizer scheduler timers".split()
values = {name: type("R", (Recorder,), {"prefix": name + "."})() for name in names}
config.DeepSpeedConfig(Recorder({**values, "train_batch_size": 1}))

for preset in json.loads(sys.argv[2]):  # raises on what DeepSpeed does not take
    config.DeepSpeedConfig(preset)


def model(cls):
    """Names and aliases of a pydantic model's fields, with defaults that JSON can hold."""
    known = {}
    for name, field in cls.model_fields.items():
        default = field.default if isinstance(field.default, (bool, int, float, str)) else None
        known[name] = known[field.alias or name] = default
    return known


def signature(function):
    parameters = inspect.signature(function).parameters.values()
    empty = inspect.Parameter.empty
    return {p.name: None if p.default is empty else p.default for p in parameters if p.name != "self"}


json.dump({
    "read": sorted(read),
    "removed": sorted(config._REMOVED_TOP_LEVEL_CONFIG_KEYS),
    "removed_zero": sorted(config._REMOVED_ZERO_CONFIG_KEYS),
    "clipping": constants.GRADIENT_CLIPPING_DEFAULT,
    "models": {
        "zero_optimization": model(zero.DeepSpeedZeroConfig),
        "zero_optimization.offload_param": model(offload_config.DeepSpeedZeroOffloadParamConfig),
        "zero_optimization.offload_optimizer": model(offload_config.DeepSpeedZeroOffloadOptimizerConfig),
        "bf16": model(DeepSpeedBF16Config),
        "fp16": model(DeepSpeedFP16Config),
        "comms_logger": model(CommsLoggerConfig),
        "timers.throughput": model(DeepSpeedThroughputTimerConfig),
        "aio": AIO_DEFAULT_DICT,
    },
    "schedulers": {name: signature(getattr(lr_schedules, name)) for name in lr_schedules.VALID_LR_SCHEDULES},
    "optimizers": {
        "AdamW": [signature(c) for c in (FusedAdam, DeepSpeedCPUAdam, torch.optim.AdamW)],
        "Adam": [signature(c) for c in (FusedAdam, DeepSpeedCPUAdam, torch.optim.Adam)],
        "Adagrad": [signature(c) for c in (torch.optim.Adagrad, DeepSpeedCPUAdagrad)],
        "SGD": [signature(torch.optim.SGD)],
        "Lamb": [signature(FusedLamb)],
        "Lion": [signature(c) for c in (FusedLion, DeepSpeedCPULion)],
        "Muon": [dict.fromkeys((*DeepSpeedEngine._MUON_HALF_KEYS, *DeepSpeedEngine._ADAM_HALF_KEYS))],
    },
    "known_optimizers": config.DEEPSPEED_OPTIMIZERS,
}, open(sys.argv[1], "w"))
'''


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("deepspeed") / "installed.json"
    process = subprocess.run(
        [sys.executable, "-c", ASK, str(out), json.dumps(resolved_presets())],
        capture_output=True,
        text=True,
        env=os.environ | {"DS_ACCELERATOR": "cpu"},
    )
    assert process.returncode == 0, process.stderr
    answer: dict[str, Any] = json.loads(out.read_text())
    return answer


def resolved_presets() -> list[dict[str, Any]]:
    folder = Path(__file__).resolve().parents[2] / "ds_configs"
    presets = [load_deepspeed_json(path) for path in sorted(folder.glob("*.json"))]
    assert presets
    return [preset.resolved(RunConfig().model, preset.steps_of(None), world_size=1) for preset in presets]


def table(path: str) -> Table:
    found = schema({})
    for part in path.split("."):
        section = found[part]
        assert isinstance(section, Section)
        assert section.keys is not None
        found = section.keys
    return found


def known(path: str) -> bool:
    *parents, key = path.split(".")
    return key in (table(".".join(parents)) if parents else schema({}))


def test_everything_that_deepspeed_reads_is_known(installed: dict[str, Any]) -> None:
    assert "gradient_clipping" in installed["read"]
    assert "flops_profiler.module_depth" in installed["read"]
    assert len(installed["read"]) > 60  # the recorder still sees through
    assert not known("zero_optimization.made_up")
    assert not known("made_up")
    assert [path for path in installed["read"] if not known(path)] == []


def test_what_deepspeed_has_removed_is_refused(installed: dict[str, Any]) -> None:
    removed = [schema({})[key] for key in installed["removed"]] + [
        ZERO[key] for key in installed["removed_zero"]
    ]
    assert removed
    assert all(isinstance(spec, Refusal) for spec in removed)


def test_nothing_is_offered_that_deepspeed_does_not_read(installed: dict[str, Any]) -> None:
    offered = {key for key, spec in schema({}).items() if not isinstance(spec, Refusal)}
    assert offered <= {path for path in installed["read"] if "." not in path}


@pytest.mark.parametrize(
    "path",
    [
        "zero_optimization",
        "zero_optimization.offload_param",
        "zero_optimization.offload_optimizer",
        "bf16",
        "fp16",
        "comms_logger",
        "timers.throughput",
        "aio",
    ],
)
def test_sections(installed: dict[str, Any], path: str) -> None:
    theirs, ours = installed["models"][path], table(path)
    assert [key for key in theirs if key not in ours] == []
    assert [key for key, spec in ours.items() if not isinstance(spec, Refusal) and key not in theirs] == []
    for key, spec in ours.items():
        if isinstance(spec, Key) and spec.default is not None:
            assert spec.default == theirs[key], key
        if isinstance(spec, Key) and theirs.get(key) is not None:
            assert spec.test(theirs[key]), f"DeepSpeed's own default of {path}.{key} is refused"
        if isinstance(spec, Refusal) and isinstance(theirs.get(key), bool) and "two names" not in spec.reason:
            assert spec.inert(theirs[key]) or "deprecated" in spec.reason, key


def test_clipping(installed: dict[str, Any]) -> None:
    assert installed["clipping"] == CLIPPING_DEFAULT


def test_schedulers(installed: dict[str, Any]) -> None:
    for kind, theirs in installed["schedulers"].items():
        ours = SCHEDULERS[kind]
        assert set(ours) == set(theirs) - {"optimizer"}, kind
        for name, spec in ours.items():
            if isinstance(spec, Key) and spec.default is not None:
                assert spec.default == theirs[name], f"{kind}.{name}"


def test_optimizers(installed: dict[str, Any]) -> None:
    extra = {"torch_adam", "adam_w_mode", "max_grad_norm", "muon_lr", "adam_lr", "fp32_optimizer_states"}
    for kind, implementations in installed["optimizers"].items():
        ours = OPTIMIZERS[kind]
        theirs = {name for signature in implementations for name in signature}
        assert theirs - {"params", "model_params", "adamw_mode", "decoupled_weight_decay"} <= set(ours), kind
        offered = {name for name, spec in ours.items() if isinstance(spec, Key)}
        assert offered - extra <= theirs, kind
        for name, spec in ours.items():
            default = implementations[0].get(name)
            if isinstance(spec, Key) and default is not None:
                assert spec.default in (None, default), f"{kind}.{name}"
    for kind in installed["known_optimizers"]:
        assert kind in {name.lower() for name in OPTIMIZERS} or kind.startswith("mu")


def test_auto_is_taken_where_it_is_resolved() -> None:
    resolved = {
        *BATCH_KEYS,
        "zero_optimization.reduce_bucket_size",
        "zero_optimization.stage3_prefetch_bucket_size",
        "zero_optimization.stage3_param_persistence_threshold",
        "scheduler.params.total_num_steps",
        "scheduler.params.warmup_min_lr",
        "scheduler.params.warmup_max_lr",
    }
    taken = set(taking_auto(schema({}), ""))
    for kind in SCHEDULERS:
        taken |= set(taking_auto(SCHEDULERS[kind], "scheduler.params."))
    for kind in OPTIMIZERS:
        taken |= set(taking_auto(OPTIMIZERS[kind], "optimizer.params."))
    assert taken == resolved


def taking_auto(keys: Table, prefix: str) -> list[str]:
    paths = [prefix + name for name, spec in keys.items() if isinstance(spec, Key) and spec.no_auto is None]
    for name, spec in keys.items():
        if isinstance(spec, Section) and spec.keys is not None:
            paths += taking_auto(spec.keys, f"{prefix}{name}.")
    return paths
