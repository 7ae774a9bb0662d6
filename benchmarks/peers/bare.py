"""A GPT-2 in the manner of nanoGPT (github.com/karpathy/nanoGPT), and a training loop of plain torch.

B batch, T tokens, C features, H heads, D head size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peers.turns import Turns
from peers.workload import BETAS, CLIPPING, EPS, LEARNING_RATE, WEIGHT_DECAY, Workload


class Attention(nn.Module):
    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, C] -> [B, T, C]
        b, t, c = x.shape
        q, k, v = (
            y.view(b, t, self.heads, c // self.heads).transpose(1, 2) for y in self.qkv(x).split(c, dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # [B, H, T, D]
        return self.out(y.transpose(1, 2).contiguous().view(b, t, c))


class Block(nn.Module):
    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(size), nn.LayerNorm(size)
        self.attention = Attention(size, heads)
        self.mlp = nn.Sequential(nn.Linear(size, 4 * size), nn.GELU("tanh"), nn.Linear(4 * size, size))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    def __init__(self, shape: Workload) -> None:
        super().__init__()
        size = shape.hidden_size
        self.tokens, self.places = nn.Embedding(shape.vocab_size, size), nn.Embedding(shape.seq_len, size)
        self.blocks = nn.ModuleList(Block(size, shape.num_heads) for _ in range(shape.num_layers))
        self.norm, self.head = nn.LayerNorm(size), nn.Linear(size, shape.vocab_size, bias=False)
        self.tokens.weight = self.head.weight
        self.apply(initialise)

    def forward(self, ids: Tensor) -> Tensor:  # [B, T] -> logits [B, T, V]
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)


def batches(shape: Workload, folder: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """Ids and labels [B, T] of windows at random places, without end."""
    tokens = torch.from_numpy(shape.tokens(folder))
    draw = torch.Generator().manual_seed(0)
    while True:
        starts = torch.randint(len(tokens) - shape.seq_len, (shape.batch,), generator=draw).tolist()
        rows = torch.stack([tokens[start : start + shape.seq_len + 1] for start in starts])
        yield rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def train(model: nn.Module, shape: Workload, folder: Path, turns: Turns) -> None:
    """nanoGPT's loop: its optimizer groups, clipping and schedule; one loss read a step, for the log."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPS)
    data = batches(shape, folder)
    turns.step()
    for step in range(10**9):
        lr = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * min(step / 10_000, 1)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        ids, labels = next(data)
        logits = model(ids)
        loss = F.cross_entropy(logits.view(-1, logits.shape[-1]), labels.view(-1))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIPPING)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        turns.notes["loss"] = loss.item()
        turns.step()


def run(shape: Workload, folder: Path, turns: Turns) -> None:
    torch.manual_seed(0)
    train(GPT(shape), shape, folder, turns)
