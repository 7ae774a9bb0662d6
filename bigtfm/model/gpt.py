"""GPT: a pre-norm decoder over packed documents (Radford et al. 2019), Llama-style where the config says so.

N documents, T tokens of all documents together, C features, K key/value heads, D head size, V vocabulary, Vp
vocabulary padded to a multiple, B rows and S slots of a cache.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigtfm.config.run import ModelSection
from bigtfm.model.attention import by_length
from bigtfm.model.layers import Embedding, Linear, l1_penalty, rotary_angles, sinusoids
from bigtfm.model.randomness import dropout, stream_key, token_words
from bigtfm.model.transformer import Block, Cache, Packed, Recompute, make_norm, run_blocks


class GPT(nn.Module):
    """Next-token model. Its parameters are uninitialised until `init_weights` or a checkpoint fills them.

    vocab_size: tokens of the data; the matrices are padded to config.vocab_multiple, and padding never enters
    the loss. seed: of the initial weights and of dropout. label_smoothing, l1: see `forward`. recompute: see
    `run_blocks`.
    """

    def __init__(
        self,
        config: ModelSection,
        vocab_size: int,
        *,
        seed: int = 0,
        label_smoothing: float = 0.0,
        l1: float = 0.0,
        recompute: Recompute = "none",
    ) -> None:
        super().__init__()
        self.config, self.vocab_size, self.seed = config, vocab_size, seed
        self.label_smoothing, self.l1, self.recompute = label_smoothing, l1, recompute
        rows = config.padded_vocab_size(vocab_size)
        self.embed_tokens = Embedding(rows, config.hidden_size)
        self.embed_positions = (
            Embedding(config.max_seq_len, config.hidden_size) if config.positions == "learned" else None
        )
        self.layers = nn.ModuleList(Block(config, index) for index in range(config.num_layers))
        self.norm = make_norm(config)
        self.lm_head = None if config.tied_embeddings else Linear(config.hidden_size, rows, bias=False)

    def forward(
        self,
        input_ids: Tensor,  # [T] int64
        labels: Tensor,  # [T] int64, -100: no label
        position_ids: Tensor,  # [T] int64
        cu_seqlens: Tensor,  # [N + 1] int32
        seq_lens: tuple[int, ...],
        token_keys: Tensor
        | None = None,  # [T] int64, what a token's dropout depends on; needed where it acts
        l1_scale: float | None = None,  # needed where l1 acts
    ) -> tuple[Tensor, Tensor]:
        """(sum of the token losses in nats, fp32 scalar; number of labels, int64 scalar).

        In training mode the token loss has label smoothing (Szegedy et al. 2016, as torch's cross_entropy
        defines it), and the gradient of l1 * l1_scale * sum |w| is added to that of the returned sum, whose
        value it leaves alone. For a step to minimise "mean token loss + l1 * sum |w|", a caller that divides
        the sums of a step's F forwards (all ranks and accumulation steps) by the step's number of labels n
        passes l1_scale = n / F.
        """
        order = by_length(cu_seqlens, seq_lens)
        if order is not None:  # a sum of losses does not depend on the order of documents
            index, cu_seqlens, seq_lens = order
            input_ids, labels, position_ids = input_ids[index], labels[index], position_ids[index]
            token_keys = None if token_keys is None else token_keys[index]
        x = self.hidden(input_ids, position_ids, cu_seqlens, seq_lens, token_keys=token_keys)
        loss_sum = F.cross_entropy(
            self.project(x).float(),
            labels,
            reduction="sum",
            label_smoothing=self.label_smoothing if self.training else 0.0,
        )
        if self.training and self.l1:
            assert l1_scale is not None, "with l1, the caller must say how much of it belongs to this forward"
            penalty = l1_penalty(self) * (self.l1 * l1_scale)
            loss_sum = loss_sum + (penalty - penalty.detach())
        return loss_sum, (labels != -100).sum()

    def hidden(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        seq_lens: tuple[int, ...],
        *,
        token_keys: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Features [T, C] behind the norm; arguments as in `forward`. A cache takes in keys and values."""
        config = self.config
        words = None
        if self.training and config.dropout:
            assert token_keys is not None, "dropout is a function of token_keys"
            words = token_words(token_keys, stream_key(self.seed, "dropout"))
        rotary = config.positions == "rotary"
        angles = rotary_angles(position_ids, config.head_size, config.rotary_base) if rotary else None
        packed = Packed(cu_seqlens, seq_lens, causal=True, angles=angles, dropout_words=words, cache=cache)
        x = self._embed(input_ids, position_ids)
        if words is not None:
            x = dropout(x, config.dropout, words, site=0)
        out: Tensor = self.norm(run_blocks(self.layers, x, packed, self.recompute))
        return out

    def _embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x: Tensor = self.embed_tokens(input_ids)  # [T, C]
        if self.embed_positions is not None:
            x = x + self.embed_positions(position_ids)
        elif self.config.positions == "sinusoidal":
            # tokens scaled to the sinusoids' size, as in Vaswani et al. 2017, section 3.4
            x = x * math.sqrt(x.shape[-1]) + sinusoids(position_ids, x.shape[-1]).to(x.dtype)
        return x

    def project(self, x: Tensor) -> Tensor:
        """Logits [T, V] of features [T, C]; the padded columns are cut off."""
        logits: Tensor = self.embed_tokens(x, project=True) if self.lm_head is None else self.lm_head(x)
        return logits[:, : self.vocab_size]  # [T, Vp] -> [T, V]

    def logits(
        self, input_ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor, seq_lens: tuple[int, ...]
    ) -> Tensor:
        """Logits [T, V] of the next token after each token; arguments as in `forward`."""
        return self.project(self.hidden(input_ids, position_ids, cu_seqlens, seq_lens))

    def new_cache(self, rows: int, slots: int) -> tuple[list[Tensor], list[Tensor]]:
        """Empty keys and values [B, S, K, D] of each block: B = rows sequences of S = slots tokens."""
        shape = (rows, slots, self.config.kv_heads, self.config.head_size)
        k = [self.embed_tokens.weight.new_zeros(shape) for _ in self.layers]
        return k, [torch.zeros_like(keys) for keys in k]
