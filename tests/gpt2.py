"""GPT-2 on a node of eight H100, for tests of the planner."""

from bigtfm.config.sections import ModelSection, ObjectiveSection
from bigtfm.planner.setting import Setting

GPT2 = ModelSection(
    hidden_size=768,
    num_layers=12,
    num_attention_heads=12,
    max_seq_len=1024,
    positions="learned",
    norm="layernorm",
    activation="gelu",
    bias=True,
    vocab_multiple=1,
)
ON_H100 = Setting(
    model=GPT2,
    objective=ObjectiveSection(),
    vocab_size=50257,
    seq_len=1024,
    micro_batch=8,
    accumulation=1,
    world_size=8,
    precision="bf16",
    grad_accum_dtype="bf16",
    optimizer="AdamW",
    torch_adam=False,
    clips=True,
    zero={"stage": 0},
    recompute="none",
    attention="flash_attn_3",
    device="NVIDIA H100 80GB HBM3",
)
