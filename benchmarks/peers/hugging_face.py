"""GPT-2 of transformers under its Trainer, alone or with DeepSpeed."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

from peers.turns import Enough, Turns
from peers.workload import BETAS, CLIPPING, EPS, LEARNING_RATE, WEIGHT_DECAY, Workload


def run(shape: Workload, folder: Path, turns: Turns, stage: int | None = None) -> None:
    """stage: of ZeRO; None: without DeepSpeed."""
    import torch
    from torch.utils.data import Dataset
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

    class Windows(Dataset[dict[str, Any]]):
        def __init__(self) -> None:
            self.rows = torch.from_numpy(shape.tokens(folder)).unfold(0, shape.seq_len, shape.seq_len)

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, number: int) -> dict[str, Any]:
            return {"input_ids": self.rows[number], "labels": self.rows[number]}

    class Clock(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 0:
                turns.step()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            turns.step()

    deepspeed = None
    if stage is not None:
        import deepspeed.ops

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}  # what a launcher sets
        os.environ.update(alone, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it compiles for minutes on a CPU
        deepspeed = shape.deepspeed(stage)
        deepspeed["optimizer"]["params"]["torch_adam"] = True  # as does its own Adam
    out = folder / f"hugging-face-{os.getpid()}"
    arguments = TrainingArguments(
        output_dir=str(out), per_device_train_batch_size=shape.batch, max_steps=10**6,
        learning_rate=LEARNING_RATE, adam_beta1=BETAS[0], adam_beta2=BETAS[1], adam_epsilon=EPS,
        weight_decay=WEIGHT_DECAY, max_grad_norm=CLIPPING, lr_scheduler_type="constant", use_cpu=True,
        report_to=[], save_strategy="no", logging_strategy="steps", logging_steps=10, disable_tqdm=True,
        dataloader_drop_last=True, deepspeed=deepspeed,
    )  # fmt: skip
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=shape.vocab_size, n_positions=shape.seq_len, n_embd=shape.hidden_size,
        n_layer=shape.num_layers, n_head=shape.num_heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    trainer = Trainer(
        model=GPT2LMHeadModel(config), args=arguments, train_dataset=Windows(), callbacks=[Clock()]
    )
    try:
        trainer.train()
    except Enough:
        return
