"""The user's DeepSpeed JSON: read strictly, validated without torch, "auto" resolved, the batch solved.

What may stand in it is in deepspeed_schema.py and deepspeed_types.py, what must fit together in
deepspeed_rules.py; deepspeed_walk.py compares a file with the first two.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from bigtfm.config.deepspeed_rules import ELEMENT_WISE, RULES
from bigtfm.config.deepspeed_schema import CLIPPING_DEFAULT, Key, Table
from bigtfm.config.deepspeed_types import OPTIMIZERS, SCHEDULERS
from bigtfm.config.deepspeed_walk import Finding, canonical, findings
from bigtfm.config.problems import ConfigProblem
from bigtfm.config.sections import ModelSection

_OFFLOADED = ("param", "optimizer")

BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


class BatchTriple(NamedTuple):
    """micro_batch x accumulation x world size = global_batch, in sequences."""

    micro_batch: int
    accumulation: int
    global_batch: int


class StatedBatch(NamedTuple):
    """What the JSON says; None where it says nothing or "auto"."""

    train_batch_size: int | None
    micro_batch: int | None
    accumulation: int | None


@dataclass(frozen=True)
class DeepSpeedConfig:
    """A valid DeepSpeed JSON. `text` is the file as read, `values` what it holds; never mutated."""

    path: Path
    text: str
    values: dict[str, Any]

    @property
    def zero(self) -> dict[str, Any]:
        """The section zero_optimization."""
        section: dict[str, Any] = self.values.get("zero_optimization", {})
        return section

    @property
    def zero_stage(self) -> int:
        """0 to 3; 0 shards nothing."""
        number: int = self.zero.get("stage", 0)
        return number

    @property
    def precision(self) -> Literal["fp32", "bf16", "fp16"]:
        """fp32, bf16 or fp16."""
        return "bf16" if self.enabled("bf16") else "fp16" if self.enabled("fp16") else "fp32"

    @property
    def grad_accum_dtype(self) -> str:
        """Type in which gradients are summed: fp32, bf16 or fp16."""
        return self.values.get("data_types", {}).get("grad_accum_dtype") or self.precision

    @property
    def clipping(self) -> float:
        """Largest L2 norm of the gradient; 0 for no limit. Unset it is DeepSpeed's default, 1.0."""
        return float(self.values.get("gradient_clipping", CLIPPING_DEFAULT))

    @property
    def optimizer_type(self) -> str:
        """AdamW, Adam, Adagrad, SGD, Lamb, Lars, Lion or Muon, however it is capitalised in the file."""
        return canonical(self.values["optimizer"]["type"], OPTIMIZERS)

    @property
    def stated_optimizer_params(self) -> dict[str, Any]:
        """The optimizer's parameters as the file states them."""
        section: dict[str, Any] = self.values["optimizer"]["params"]
        return section

    @property
    def optimizer_params(self) -> dict[str, Any]:
        """The optimizer's parameters, defaults filled in."""
        return _filled(self.stated_optimizer_params, OPTIMIZERS[self.optimizer_type])

    @property
    def lr(self) -> float:
        """Peak learning rate."""
        lr: float = self.stated_optimizer_params["lr"]
        return lr

    @property
    def scheduler_type(self) -> str | None:
        """One of DeepSpeed's five, or InverseSquareRoot, WSD or ReduceOnPlateau; None: the lr is constant."""
        kind: str | None = self.values.get("scheduler", {}).get("type")
        return kind

    @property
    def scheduler_params(self) -> dict[str, Any]:
        """The scheduler's parameters, defaults filled in; "auto" stays. Empty without a scheduler."""
        if self.scheduler_type is None:
            return {}
        return _filled(self.values["scheduler"]["params"], SCHEDULERS[self.scheduler_type])

    @property
    def horizon(self) -> int | None:
        """The scheduler's total steps; None where it has none, or "auto"."""
        total = self.scheduler_params.get("total_num_steps")
        return None if total == "auto" else total

    @property
    def scheduled_steps(self) -> int:
        """Steps that warm-up and decay take together, under a scheduler that has a horizon; else 0."""
        params = self.scheduler_params
        if "total_num_steps" not in params:
            return 0
        number: int = params.get("warmup_num_steps", 0) + params.get("decay_num_steps", 0)
        return number

    @property
    def stated_batch(self) -> StatedBatch:
        """The three batch keys."""
        values = [self.values.get(key) for key in BATCH_KEYS]
        return StatedBatch(*(None if value == "auto" else value for value in values))

    def enabled(self, section: str) -> bool:
        """Whether a section such as bf16 is on."""
        on: bool = self.values.get(section, {}).get("enabled", False)
        return on

    def offload(self, what: str) -> str:
        """Where `what` ("optimizer" or "param") is offloaded to: none, cpu or nvme."""
        device: str = (self.zero.get(f"offload_{what}") or {}).get("device", "none")
        return device

    def steps_of(self, run_steps: int | None) -> int:
        """Optimizer steps of the run: run.steps, or the scheduler's horizon where that is unset.

        Raises:
            ConfigProblem: no number at all, more than the scheduler has, or fewer than its warm-up takes.
        """
        if run_steps is None and self.horizon is None:
            kind = self.scheduler_type
            why = (
                f"the {kind} of {self.path} states no total_num_steps"
                if kind
                else f"{self.path} has no scheduler"
            )
            raise ConfigProblem(
                f"run.steps is missing, and {why}",
                where="run config",
                fix="set run.steps, for example run.steps=1000",
            )
        steps = self.horizon if run_steps is None else run_steps
        assert steps is not None
        if self.horizon is not None and steps > self.horizon:
            raise ConfigProblem(
                f"run.steps {steps} is larger than scheduler.params.total_num_steps {self.horizon}",
                where=str(self.path),
                fix=f'set run.steps to {self.horizon} or less, or write "total_num_steps": {steps}',
            )
        if self.horizon is None and steps < self.scheduled_steps:
            raise ConfigProblem(
                f"run.steps {steps} is less than warm-up and decay take, {self.scheduled_steps} steps",
                where=str(self.path),
                fix=f"set run.steps to {self.scheduled_steps} or more, or lower warmup_num_steps",
            )
        return steps

    def solve_batch(self, world_size: int) -> BatchTriple:
        """The batch triangle on `world_size` ranks, as DeepSpeed solves it, but exact.

        Raises:
            ConfigProblem: there is no solution (the fix lists valid ones), or ZeRO's groups don't fit.
        """
        if world_size < 1:
            raise ConfigProblem(f"a world of {world_size} ranks", where="command line", fix="use 1 or more")
        shard = self.zero.get("zero_hpz_partition_size", 1)
        if world_size % shard:
            raise ConfigProblem(
                f"zero_optimization.zero_hpz_partition_size {shard} does not divide {world_size} ranks",
                where=str(self.path),
                fix="set it to the number of GPUs in a node",
            )
        whole, micro, accumulation = self.stated_batch
        if whole is None:
            assert micro is not None  # a rule sees to it
            return BatchTriple(micro, accumulation or 1, micro * (accumulation or 1) * world_size)
        if micro is None:
            accumulation = accumulation or 1
            micro = whole // (accumulation * world_size)
        elif accumulation is None:
            accumulation = whole // (micro * world_size)
        if micro * accumulation * world_size != whole:
            raise self._unsolvable(world_size, whole)
        return BatchTriple(micro, accumulation, whole)

    def with_micro_batch(self, micro: int, world_size: int) -> DeepSpeedConfig:
        """The same global batch in micro batches of a size that divides the stated one."""
        stated, accumulation, whole = self.solve_batch(world_size)
        batch = dict(zip(BATCH_KEYS, (whole, micro, accumulation * stated // micro), strict=True))
        return replace(self, values=self.values | batch)

    def _unsolvable(self, world_size: int, whole: int) -> ConfigProblem:
        _, micro, accumulation = self.stated_batch
        product = f"{micro or 'a micro batch'} x {accumulation or 'an accumulation'} x {world_size} ranks"
        unit = (micro or 1) * (accumulation or 1)
        blocks = whole // unit if whole % unit == 0 else 0
        if accumulation and micro:  # all three are stated: one number of ranks fits
            worlds = [str(blocks)] if blocks else []
        else:
            worlds = [str(ranks) for ranks in range(1, blocks + 1) if blocks % ranks == 0]
        if whole % world_size == 0:
            share = whole // world_size
            pairs = [f"{m} x {share // m} x {world_size}" for m in range(1, share + 1) if share % m == 0]
            fix = f"use one of (micro batch x accumulation x ranks) {_few(pairs)}"
        else:
            block = unit * world_size
            near = [size for size in (whole // block * block, (whole // block + 1) * block) if size]
            fix = "use train_batch_size " + " or ".join(
                f"{n} = {unit} x {n // block} x {world_size}" for n in near
            )
        return ConfigProblem(
            f"train_batch_size {whole} is not {product}",
            where=str(self.path),
            fix=f"{fix}, or run on {_few(worlds)} ranks" if worlds else fix,
        )

    def resolved(self, model: ModelSection, steps: int, world_size: int | None = None) -> dict[str, Any]:
        """What DeepSpeed is given: a deep copy without "auto", with every default that bears on the result.

        Sizes follow from the model's width as in Hugging Face's integration. With `world_size` all three
        batch keys are numbers; without it those that are "auto" are left out, for DeepSpeed to solve.
        """
        values = copy.deepcopy(self.values)
        if zero := values.get("zero_optimization"):
            area = model.hidden_size * model.hidden_size
            _replace_auto(zero, "reduce_bucket_size", area)
            _replace_auto(zero, "stage3_prefetch_bucket_size", int(0.9 * area))
            _replace_auto(zero, "stage3_param_persistence_threshold", 10 * model.hidden_size)
        values["gradient_clipping"] = self.clipping
        params = _keys_only(self.optimizer_params, OPTIMIZERS[self.optimizer_type])
        values["optimizer"] = {"type": self.optimizer_type, "params": params}
        if self.scheduler_type is not None:
            schedule = _keys_only(self.scheduler_params, SCHEDULERS[self.scheduler_type])
            _replace_auto(schedule, "total_num_steps", steps)
            _replace_auto(schedule, "warmup_max_lr", self.lr)
            _replace_auto(schedule, "warmup_min_lr", 0.0)
            values["scheduler"] = {"type": self.scheduler_type, "params": schedule}
        if self.optimizer_type in ELEMENT_WISE and self.zero_stage:
            values["zero_allow_untested_optimizer"] = True
        for key in BATCH_KEYS:
            if values.get(key) == "auto":
                del values[key]
        if world_size is not None:
            micro, accumulation, whole = self.solve_batch(world_size)
            values.update(zip(BATCH_KEYS, (whole, micro, accumulation), strict=True))
        return values


def acting_stage(zero: Mapping[str, Any], *, optimizer: str, precision: str, world_size: int) -> int:
    """The ZeRO stage that a run really has. One rank in fp32 shares nothing: stages 1 to 3 would only copy.

    They keep a second copy of the weights, and move all gradients into buckets and back.

    zero: the section zero_optimization.
    """
    stage = int(zero.get("stage", 0))
    offloads = any((zero.get(f"offload_{what}") or {}).get("device", "none") != "none" for what in _OFFLOADED)
    spared = world_size == 1 and precision == "fp32" and optimizer in ("Adam", "AdamW") and not offloads
    return 0 if spared else stage


REDUCE_BUCKET = 500_000_000  # DeepSpeed's default, in elements


def reduce_bucket(zero: Mapping[str, Any], parameters: int) -> int:
    """Gradients that are reduced together, in elements: what the JSON says, or DeepSpeed's default.

    It allocates that many, however few parameters there are: of a smaller model, all of them at once.

    zero: the section zero_optimization.
    """
    return int(zero.get("reduce_bucket_size", min(REDUCE_BUCKET, parameters)))


def load_deepspeed_json(path: Path) -> DeepSpeedConfig:
    """Read a DeepSpeed JSON and validate all of it that does not depend on the number of ranks.

    Raises:
        ConfigProblem: the file can't be read, is no JSON, or a key or value is wrong. The line names the
            first mistake and how many more there are.
    """
    path = Path(path)
    text, values = _read(path)
    config = DeepSpeedConfig(path, text, values)
    found = findings(values)
    if not found:  # the rules may rely on every key being sound
        found = [Finding(f"{rule.key}: {rule.reason}", rule.fix) for rule in RULES if rule.broken(config)]
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise ConfigProblem(found[0].what + more, where=str(path), fix=found[0].fix)
    return config


def _read(path: Path) -> tuple[str, dict[str, Any]]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                raise ConfigProblem(
                    f"key '{key}' stands there twice", where=str(path), fix="keep one of them"
                )
            seen[key] = value
        return seen

    try:
        text = path.read_bytes().decode("utf-8")
        values = json.loads(text, object_pairs_hook=unique)
    except FileNotFoundError:
        fix = "pass an existing file with --deepspeed_config, for example ds_configs/zero2_bf16.json"
        raise ConfigProblem("no such file", where=str(path), fix=fix) from None
    except json.JSONDecodeError as error:
        raise ConfigProblem(f"not valid JSON: {error}", where=str(path), fix="correct that line") from None
    except RecursionError:
        raise ConfigProblem("nested too deeply", where=str(path), fix="pass a DeepSpeed JSON") from None
    except (OSError, ValueError) as error:  # a folder, no UTF-8, or a number of thousands of digits
        raise ConfigProblem(f"can't be read: {error}", where=str(path), fix="pass a DeepSpeed JSON") from None
    if not isinstance(values, dict):
        raise ConfigProblem("holds no JSON object", where=str(path), fix='write { "train_batch_size": ... }')
    return text, values


def _filled(stated: dict[str, Any], table: Table) -> dict[str, Any]:
    """`stated` over the defaults of `table`."""
    keys = {name: spec for name, spec in table.items() if isinstance(spec, Key)}
    return {name: spec.default for name, spec in keys.items() if spec.default is not None} | stated


def _keys_only(params: dict[str, Any], table: Table) -> dict[str, Any]:
    """A copy without what is refused unless it does nothing: some implementations don't take it at all."""
    return copy.deepcopy({name: value for name, value in params.items() if isinstance(table[name], Key)})


def _replace_auto(section: dict[str, Any], key: str, value: Any) -> None:
    if section.get(key) == "auto":
        section[key] = value


def _few(items: list[str]) -> str:
    return ", ".join(items if len(items) <= 12 else [*items[:11], "..."])
