"""Encoder-decoder over packed pairs (Vaswani et al. 2017; T5, Raffel et al. 2020; BART, Lewis et al. 2020).

N pairs of documents, T tokens of the encoder's documents, U of the decoder's, C features, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from bigtfm.model.attention import Documents
from bigtfm.model.heads import LanguageModel
from bigtfm.model.transformer import AttentionMaps, Cache, Memory, Stack


class EncoderDecoder(LanguageModel):
    """Reads a document, writes another; both stacks and, where tied, the output layer share the embedding."""

    def _make_stacks(self) -> None:
        self.encoder = Stack(self.config, "encoder", seed=self.seed, compute=self.compute)
        self.decoder = Stack(self.config, "decoder", seed=self.seed, compute=self.compute, cross=True)

    def forward(
        self,
        input_ids: Tensor,  # [T] int64
        position_ids: Tensor,  # [T] int64
        cu_seqlens: Tensor,  # [N + 1] int32
        seq_lens: tuple[int, ...],
        decoder_input_ids: Tensor,  # [U] int64: the start token, then the labels before
        labels: Tensor,  # [U] int64, -100: no label
        decoder_position_ids: Tensor,  # [U] int64
        decoder_cu_seqlens: Tensor,  # [N + 1] int32
        decoder_seq_lens: tuple[int, ...],
        token_keys: Tensor | None = None,  # [T] int64, what dropout depends on; needed where it acts
        decoder_token_keys: Tensor | None = None,  # [U] int64
        l1_scale: float | None = None,  # see `loss`
    ) -> tuple[Tensor, Tensor]:
        """(sum of the token losses in nats, fp32 scalar; number of labels, int64 scalar)."""
        (source, target), (read, written) = self.in_good_order(
            [Documents(cu_seqlens, seq_lens), Documents(decoder_cu_seqlens, decoder_seq_lens)],
            [input_ids, position_ids, token_keys],
            [decoder_input_ids, decoder_position_ids, decoder_token_keys, labels],
        )
        input_ids, position_ids, token_keys = read
        decoder_input_ids, decoder_position_ids, decoder_token_keys, labels = written
        memory = self.encode(input_ids, position_ids, source, token_keys=token_keys)
        x = self.hidden(
            decoder_input_ids, decoder_position_ids, target, memory=memory, token_keys=decoder_token_keys
        )
        return self.loss(x, labels, l1_scale, target)

    def encode(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        documents: Documents,
        *,
        token_keys: Tensor | None = None,
        maps: AttentionMaps | None = None,
    ) -> Memory:
        """What the decoder attends to; arguments as in `forward`."""
        x = self.encoder(self.embed(input_ids), position_ids, documents, token_keys=token_keys, maps=maps)
        return Memory(x, documents, self.encoder.words(token_keys))

    def hidden(
        self,
        decoder_input_ids: Tensor,
        decoder_position_ids: Tensor,
        documents: Documents,
        *,
        memory: Memory | None = None,
        token_keys: Tensor | None = None,
        cache: Cache | None = None,
        maps: AttentionMaps | None = None,
    ) -> Tensor:
        """Features [U, C] behind the decoder's last block; the memory is given as such or in a cache."""
        out: Tensor = self.decoder(
            self.embed(decoder_input_ids),
            decoder_position_ids,
            documents,
            token_keys=token_keys,
            memory=memory,
            cache=cache,
            maps=maps,
        )
        return out

    def logits(
        self, decoder_input_ids: Tensor, decoder_position_ids: Tensor, documents: Documents, memory: Memory
    ) -> Tensor:
        """Logits [U, V] of the next token after each of the decoder's tokens."""
        return self.project(self.hidden(decoder_input_ids, decoder_position_ids, documents, memory=memory))
