"""What all sides train: a GPT-2 shape, a data set, a batch, a recipe. No torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigtfm.data.indexed import TokenDataset
from bigtfm.data.prepare import prepare

LEARNING_RATE, BETAS, EPS, WEIGHT_DECAY, CLIPPING = 6e-4, (0.9, 0.95), 1e-8, 0.1, 1.0
PRINTABLE = ["\n", *map(chr, range(32, 125))]  # with BOS and EOS a vocabulary of 96


@dataclass(frozen=True)
class Workload:
    """Learned positions, LayerNorm, GELU (tanh), biases, a tied head; no dropout; fp32."""

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    seq_len: int
    batch: int
    vocab_size: int

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.seq_len

    def data(self, folder: Path) -> Path:
        """The data set, prepared once: the embedded corpus as one document, so that no window has two."""
        out = folder / f"vocabulary-{self.vocab_size}"
        if not (out / "dataset.json").is_file():
            characters = self.vocab_size == len(PRINTABLE) + 2
            text = out.with_suffix(".txt")
            text.write_text(_corpus(), encoding="utf-8")
            prepare(
                [str(text)], out, validation_fraction=0, document_bytes=10**9, workers=1, progress=False,
                **({"tokenizer": _characters(folder)} if characters else {"vocab_size": self.vocab_size}),
            )  # fmt: skip
        return out

    def tokens(self, folder: Path) -> NDArray[np.int64]:
        """The training tokens [N]."""
        split = TokenDataset.open(self.data(folder)).split("train")
        return split.read(0, split.num_tokens).astype(np.int64)

    def run_config(self, folder: Path) -> list[str]:
        """bigtfm's run config, as overrides of its defaults."""
        model = {
            "hidden_size": self.hidden_size, "num_layers": self.num_layers,
            "num_attention_heads": self.num_heads, "ffn_hidden_size": 4 * self.hidden_size,
            "max_seq_len": self.seq_len, "positions": "learned", "norm": "layernorm",
            "activation": "gelu_tanh", "bias": "true", "vocab_multiple": 1,
        }  # fmt: skip
        quiet = ("eval.every=0", "eval.tokens=1", "save.every=0", "track.mlflow=false")
        path = self.data(folder)
        return [*(f"model.{key}={value}" for key, value in model.items()), *quiet, f"data.path={path}"]

    def deepspeed(self, stage: int) -> dict[str, Any]:
        """The DeepSpeed JSON, whoever reads it."""
        params = {"lr": LEARNING_RATE, "betas": list(BETAS), "eps": EPS, "weight_decay": WEIGHT_DECAY}
        return {
            "train_micro_batch_size_per_gpu": self.batch,
            "gradient_accumulation_steps": 1,
            "optimizer": {"type": "AdamW", "params": params},
            "gradient_clipping": CLIPPING,
            "zero_optimization": {"stage": stage},
        }


WORKLOADS = {
    each.name: each
    for each in (
        Workload("gpt-14m", 6, 384, 6, seq_len=256, batch=8, vocab_size=8192),
        Workload("gpt-1m", 4, 128, 4, seq_len=64, batch=12, vocab_size=96),
        Workload("gpt-11m", 6, 384, 6, seq_len=128, batch=8, vocab_size=512),
    )
}


def _corpus() -> str:
    import bigtfm

    path = Path(bigtfm.__path__[0]) / "data/corpus/state_of_the_union.jsonl"
    text = "\n".join(json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines())
    known = set(PRINTABLE)
    return "".join(character for character in text if character in known)


def _characters(folder: Path) -> Path:
    """A Hugging Face tokenizer with a token for each character."""
    tokens = ["<s>", "</s>", *PRINTABLE]
    values = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "decoder": {"type": "Fuse"},
        "added_tokens": [
            {"id": number, "content": token, "special": True, "single_word": False, "lstrip": False,
             "rstrip": False, "normalized": False}
            for number, token in enumerate(tokens[:2])
        ],
        "pre_tokenizer": {
            "type": "Split", "pattern": {"Regex": "[\\s\\S]"}, "behavior": "Isolated", "invert": False,
        },
        "model": {
            "type": "WordLevel", "vocab": {token: number for number, token in enumerate(tokens)},
            "unk_token": " ",
        },
    }  # fmt: skip
    path = folder / "characters" / "tokenizer.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values), encoding="utf-8")
    return path.parent
