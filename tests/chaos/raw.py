"""A training by DeepSpeed alone, as its documentation shows it: what bigtfm is compared with under faults.

    deepspeed raw.py FOLDER STEPS [--stage N] [--bf16] [--save-every N] [--mlflow URI]

Batches are a function of the step, so that a resume can go on exactly where it stood. Losses go to
FOLDER/losses.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY, LENGTH, BATCH = 512, 32, 4


class TinyGPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 32)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(32, 2, 128, 0.0, batch_first=True) for _ in range(2)
        )
        self.head = nn.Linear(32, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH, dtype=self.embed.weight.dtype)
        hidden = self.embed(ids)
        for block in self.blocks:
            hidden = block(hidden, src_mask=mask, is_causal=True)
        logits = self.head(hidden).float()
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def batch_of(step: int, rank: int) -> Tensor:
    """Sequences in which each token is the one before plus a constant of the sequence."""
    draw = torch.Generator().manual_seed(1000 * step + rank)
    start, stride = torch.randint(0, VOCABULARY, (2, BATCH, 1), generator=draw)
    return (start + stride % 7 * torch.arange(LENGTH)) % VOCABULARY


def config_of(stage: int, bf16: bool) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": BATCH,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": bf16},
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("steps", type=int)
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--save-every", type=int, default=5)
    parser.add_argument("--mlflow", default="")
    parser.add_argument("--local_rank", type=int)
    options = parser.parse_args()

    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled for minutes first
    torch.manual_seed(1)
    model = TinyGPT()
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=config_of(options.stage, options.bf16)
    )
    rank = torch.distributed.get_rank()
    if options.mlflow and rank == 0:
        import mlflow

        mlflow.set_tracking_uri(options.mlflow)
    saved = options.folder / "saved"
    step = 0
    if saved.exists():
        _, client = engine.load_checkpoint(str(saved))
        step = client["step"] if client else 0
    if rank == 0:
        print(f"goes on from step {step}", flush=True)
    options.folder.mkdir(parents=True, exist_ok=True)
    with (options.folder / "losses.jsonl").open("a") if rank == 0 else open(os.devnull, "w") as losses:
        while step < options.steps:
            loss = engine(batch_of(step, rank))
            engine.backward(loss)
            engine.step()
            step += 1
            print(json.dumps({"step": step, "loss": loss.item()}), file=losses, flush=True)
            if options.mlflow and rank == 0:
                mlflow.log_metric("loss", loss.item(), step=step)
            if step % options.save_every == 0:
                engine.save_checkpoint(str(saved), client_state={"step": step})
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
