"""BERT: an encoder over packed documents (Devlin et al. 2018; Liu et al. 2019; Warner et al. 2024).

N documents, T tokens of all documents together, M of them labelled, C features, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bigtfm.config.marks import IGNORE
from bigtfm.model.attention import Documents
from bigtfm.model.heads import LanguageModel, MaskedHead, NextSentence
from bigtfm.model.transformer import AttentionMaps, Stack


class BERT(LanguageModel):
    """Masked-token model; with config.next_sentence also a judge of sentence pairs."""

    def _make_stacks(self) -> None:
        self.encoder = Stack(self.config, "encoder", seed=self.seed, compute=self.compute)
        pretraining = self.task_head is None
        self.mlm_head = MaskedHead(self.config) if pretraining else None
        self.next_sentence = NextSentence(self.config) if self.config.next_sentence and pretraining else None
        if self.next_sentence is not None and not self.objective.next_sentence:  # it gets no gradient
            for parameter in self.next_sentence.parameters():
                parameter.no_weight_decay = True  # type: ignore[attr-defined]

    def forward(
        self,
        input_ids: Tensor,  # [T] int64
        labels: Tensor,  # [T] int64, -100: no label
        position_ids: Tensor,  # [T] int64
        cu_seqlens: Tensor,  # [N + 1] int32
        seq_lens: tuple[int, ...],
        token_keys: Tensor | None = None,  # [T] int64, what dropout depends on; needed where it acts
        token_type_ids: Tensor | None = None,  # [T] int64: 0 sentence A, 1 sentence B; None: all 0
        next_sentence_labels: Tensor | None = None,  # [N] int64: 0 B follows A, 1 it does not, -100 no pair
        labelled: Tensor | None = None,  # [M] int64, places of the labels; None: a GPU is waited for to tell
        l1_scale: float | None = None,  # see `loss`
    ) -> tuple[Tensor, Tensor]:
        """(sum of the token losses in nats, fp32 scalar; number of token labels, int64 scalar).

        The sum includes objective.next_sentence times the sum of the pairs' losses: a pair weighs as much as
        that many hidden tokens, however the batch is split.
        """
        pairs = None
        if next_sentence_labels is not None and self.next_sentence is not None:
            pairs = labels.new_full(labels.shape, IGNORE)  # at the first token of each document
            pairs[cu_seqlens[:-1].long()] = next_sentence_labels
        places = None if labelled is None else torch.arange(len(labels), device=labels.device)
        (documents,), ((input_ids, labels, position_ids, token_keys, token_type_ids, pairs, places),) = (
            self.in_good_order(
                [Documents(cu_seqlens, seq_lens)],
                [input_ids, labels, position_ids, token_keys, token_type_ids, pairs, places],
            )
        )
        x = self.hidden(
            input_ids, position_ids, documents, token_keys=token_keys, token_type_ids=token_type_ids
        )
        if self.mlm_head is None:
            return self.loss(x, labels, l1_scale, documents)
        if labelled is None or places is None:
            labelled = (labels != IGNORE).nonzero()[:, 0]
        else:
            labelled = places.argsort()[labelled]  # where the documents' order has put them
        # [M]: the vocabulary is not asked about the others
        loss_sum, count = self.loss(self.mlm_head(x[labelled]), labels[labelled], l1_scale, documents)
        if pairs is not None and self.next_sentence is not None:
            first = documents.cu_seqlens[:-1].long()
            logits = self.next_sentence(x[first]).float()
            loss_sum = loss_sum + self.objective.next_sentence * F.cross_entropy(
                logits, pairs[first], reduction="sum"
            )
        return loss_sum, count

    def hidden(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        documents: Documents,
        *,
        token_keys: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        maps: AttentionMaps | None = None,
    ) -> Tensor:
        """Features [T, C] behind the last block (and norm); arguments as in `forward`."""
        out: Tensor = self.encoder(
            self.embed(input_ids),
            position_ids,
            documents,
            token_keys=token_keys,
            token_type_ids=token_type_ids,
            maps=maps,
        )
        return out

    def logits(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        documents: Documents,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """Logits [T, V] of the token at each place; arguments as in `forward`."""
        return self.vocabulary(self.hidden(input_ids, position_ids, documents, token_type_ids=token_type_ids))

    def vocabulary(self, x: Tensor) -> Tensor:
        """Logits [T, V] of features [T, C]."""
        assert self.mlm_head is not None, "a task's head has taken its place"
        return self.project(self.mlm_head(x))
