"""The planner's speeds on GPUs beside published ones: MosaicML's MPT models of 125 M to 30 B parameters.

    python benchmarks/published_speeds.py

The rows of published_speeds.csv are those of llm-foundry, scripts/train/benchmarking/README.md (commit
061f2c7): A100 and H100, bf16, FSDP's FULL_SHARD, which is ZeRO 3, with Triton's flash attention. EFFICIENCY
in bigtfm/planner/step_time.py was fitted to them; nothing here is measured.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple

from bigtfm.config.sections import ModelSection, ObjectiveSection
from bigtfm.plan.job import target_of
from bigtfm.planner.memory import plan_memory
from bigtfm.planner.setting import Setting
from bigtfm.planner.step_time import plan_step, table_rates

ROWS = Path(__file__).with_suffix(".csv")
VOCABULARY = 50_368  # GPT-NeoX's, padded


class Published(NamedTuple):
    """A row, and what the planner makes of it."""

    setting: Setting
    speed: float  # tokens a second and GPU, published
    planned: float
    fits: bool  # by the plan; all of them ran

    @property
    def ratio(self) -> float:
        return self.planned / self.speed


def published() -> Iterator[Published]:
    """Every row, planned."""
    with ROWS.open(encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            setting = _setting(row)
            target = target_of(row["gpu"], setting.world_size, 8)
            assert target.device is not None
            rates = table_rates(target.device, "bf16")
            assert rates is not None
            planned = plan_step(setting, rates).tokens_per_second / setting.world_size
            fits = plan_memory(setting).peak <= target.budget
            yield Published(setting, float(row["tokens_per_second_per_gpu"]), planned, fits)


def _setting(row: dict[str, str]) -> Setting:
    shape = ("hidden_size", "num_layers", "num_attention_heads")
    model = ModelSection(
        **{name: int(row[name]) for name in shape},  # type: ignore[arg-type]
        max_seq_len=int(row["seq_len"]), positions="learned", norm="layernorm", activation="gelu", bias=False,
    )  # fmt: skip
    return Setting(
        model=model, objective=ObjectiveSection(), vocab_size=VOCABULARY, seq_len=int(row["seq_len"]),
        micro_batch=int(row["micro_batch"]), accumulation=int(row["accumulation"]),
        world_size=int(row["gpus"]), precision="bf16", grad_accum_dtype="bf16", optimizer="AdamW",
        torch_adam=False, clips=True, zero={"stage": 3}, recompute=row["recompute"],
        attention="flash_attn_2", device=row["gpu"],
    )  # fmt: skip


def main() -> None:
    """Prints every row, and the ratios by GPU."""
    rows = list(published())
    for row in rows:
        s = row.setting
        print(
            f"{s.model.hidden_size} x {s.model.num_layers}, T {s.seq_len}, {s.world_size} {s.device}, micro "
            f"batch {s.micro_batch}, recompute {s.recompute}: planned {row.planned:,.0f} tokens/s a GPU, "
            f"published {row.speed:,.0f}, ratio {row.ratio:.2f}{'' if row.fits else ', planned too large'}"
        )
    for gpu in dict.fromkeys(row.setting.device for row in rows):
        ratios = [row.ratio for row in rows if row.setting.device == gpu]
        said = f"{median(ratios):.2f} in the median, {min(ratios):.2f} to {max(ratios):.2f}"
        print(f"{gpu}, {len(ratios)} rows: planned over published {said}")
    print(f"planned to fit: {sum(row.fits for row in rows)} of {len(rows)}, which all ran")


if __name__ == "__main__":
    main()
