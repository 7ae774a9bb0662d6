"""GPT: a decoder over packed documents (Radford et al. 2019), Llama-style where the config says so.

N documents, T tokens of all documents together, C features, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from bigtfm.model.attention import Documents
from bigtfm.model.heads import LanguageModel
from bigtfm.model.transformer import AttentionMaps, Cache, Stack


class GPT(LanguageModel):
    """Next-token model."""

    def _make_stacks(self) -> None:
        self.decoder = Stack(self.config, "decoder", seed=self.seed, compute=self.compute)

    def forward(
        self,
        input_ids: Tensor,  # [T] int64
        labels: Tensor,  # [T] int64, -100: no label
        position_ids: Tensor,  # [T] int64
        cu_seqlens: Tensor,  # [N + 1] int32
        seq_lens: tuple[int, ...],
        token_keys: Tensor | None = None,  # [T] int64, what dropout depends on; needed where it acts
        l1_scale: float | None = None,  # see `loss`
    ) -> tuple[Tensor, Tensor]:
        """(sum of the token losses in nats, fp32 scalar; number of labels, int64 scalar)."""
        (documents,), ((input_ids, labels, position_ids, token_keys),) = self.in_good_order(
            [Documents(cu_seqlens, seq_lens)], [input_ids, labels, position_ids, token_keys]
        )
        x = self.hidden(input_ids, position_ids, documents, token_keys=token_keys)
        return self.loss(x, labels, l1_scale, documents)

    def hidden(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        documents: Documents,
        *,
        token_keys: Tensor | None = None,
        cache: Cache | None = None,
        maps: AttentionMaps | None = None,
    ) -> Tensor:
        """Features [T, C] behind the last block (and norm); arguments as in `forward`."""
        x = self.embed(input_ids)
        out: Tensor = self.decoder(x, position_ids, documents, token_keys=token_keys, cache=cache, maps=maps)
        return out

    def logits(self, input_ids: Tensor, position_ids: Tensor, documents: Documents) -> Tensor:
        """Logits [T, V] of the next token after each token; arguments as in `forward`."""
        return self.project(self.hidden(input_ids, position_ids, documents))
