"""What every family has in common around its stacks: token embedding, output layer and loss.

N documents, T tokens of all documents together, C features, V vocabulary, Vp vocabulary padded to a multiple.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigtfm.config.marks import IGNORE
from bigtfm.config.sections import ComputeSection, ModelSection, ObjectiveSection
from bigtfm.model.attention import Documents, by_length, groups_by_length
from bigtfm.model.cross_entropy import cross_entropy, linear_cross_entropy, path_of
from bigtfm.model.distillation import Distillation
from bigtfm.model.layers import Bias, Embedding, Linear, l1_penalty, make_norm
from bigtfm.model.task_heads import make_head


class LanguageModel(nn.Module):
    """Base of the families. Parameters are uninitialised until `init_weights` or a checkpoint fills them.

    vocab_size: tokens that the model knows; the matrices are padded to config.vocab_multiple, and padding
    never enters the loss. seed: of the initial weights and of dropout. objective: label smoothing, L1 and the
    weight of the next-sentence loss; its kind, the head. compute: recomputation and attention backend ("auto"
    is sdpa here: who knows the device chooses).
    """

    def __init__(
        self,
        config: ModelSection,
        vocab_size: int,
        *,
        seed: int = 0,
        objective: ObjectiveSection | None = None,
        compute: ComputeSection | None = None,
    ) -> None:
        super().__init__()
        self.config, self.vocab_size, self.seed = config, vocab_size, seed
        self.objective = objective or ObjectiveSection()
        self.compute = compute or ComputeSection()
        self.distillation: Distillation | None = None
        if self.compute.attention == "auto":
            self.compute = self.compute.model_copy(update={"attention": "sdpa"})
        rows = config.padded_vocab_size(vocab_size)
        self.embed_tokens = Embedding(rows, config.hidden_size)
        self.task_head = make_head(config, self.objective.kind)
        self._make_stacks()
        self.lm_head: Linear | Bias | None = None
        if self.task_head is not None:
            return
        if not config.tied_embeddings:
            self.lm_head = Linear(config.hidden_size, rows, config.head_bias)
        elif config.head_bias:
            self.lm_head = Bias(rows)

    def _make_stacks(self) -> None:
        """Makes the family's own modules; they stand between embedding and output layer."""
        raise AssertionError("a family makes its stacks")

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token embeddings [T, C] of ids [T]."""
        x: Tensor = self.embed_tokens(input_ids)
        return x

    def project(self, x: Tensor) -> Tensor:
        """Logits [T, V] of features [T, C]; the padded columns are cut off."""
        return self._padded_logits(x)[:, : self.vocab_size]

    def _padded_logits(self, x: Tensor) -> Tensor:  # [T, C] -> [T, Vp]
        if self.config.logit_scale != 1:
            x = x * self.config.logit_scale
        if self.config.tied_embeddings:
            x = self.embed_tokens(x, project=True)
        if self.lm_head is not None:
            x = self.lm_head(x)
        return x

    def loss(
        self, x: Tensor, labels: Tensor, l1_scale: float | None, documents: Documents
    ) -> tuple[Tensor, Tensor]:
        """(sum of the token losses in nats, fp32 scalar; number of labels, int64 scalar).

        x [T, C], labels [T] (-100: no label). In training mode the token loss has label smoothing (Szegedy et
        al. 2016, as torch's cross_entropy defines it), and the gradient of l1 * l1_scale * sum |w| is added
        to that of the returned sum, whose value it leaves alone. For a step to minimise "mean token loss +
        l1 * sum |w|", a caller that divides the sums of a step's F forwards (all ranks and accumulation
        steps) by the step's number of labels n passes l1_scale = n / F.
        """
        smoothing = self.objective.label_smoothing if self.training else 0.0
        count = (labels != IGNORE).sum()
        if self.task_head is not None:
            loss_sum, count = self.task_head.loss(x, labels, documents, smoothing)
        elif self.training and self.distillation is not None:
            loss_sum = self.distillation.loss(self.project(x), labels, smoothing)
        else:
            loss_sum = self._vocabulary_loss(x, labels, smoothing)
        if self.training and self.objective.l1:
            assert l1_scale is not None, "with l1, the caller must say how much of it belongs to this forward"
            penalty = l1_penalty(self) * (self.objective.l1 * l1_scale)
            loss_sum = loss_sum + (penalty - penalty.detach())
        return loss_sum, count

    def _vocabulary_loss(self, x: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        path = path_of(self.compute.loss, x, self.vocab_size)
        if path == "chunked":
            return self._fused_loss(x, labels, smoothing)
        compiled = path == "compiled"
        return cross_entropy(self._padded_logits(x), self.vocab_size, labels, smoothing, compiled=compiled)

    def _fused_loss(self, x: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        """The sum of the token losses without `project`'s logits."""
        extra = self.lm_head(None) if isinstance(self.lm_head, Bias) else None

        def of(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            bias = extra if bias is None else bias
            if len(weight) != self.vocab_size:
                weight, bias = weight[: self.vocab_size], None if bias is None else bias[: self.vocab_size]
            return linear_cross_entropy(x, weight, bias, labels, smoothing)

        if self.config.logit_scale != 1:
            x = x * self.config.logit_scale
        owner = self.embed_tokens if self.config.tied_embeddings else self.lm_head
        assert owner is not None
        loss_sum: Tensor = owner(x, loss=of)
        return loss_sum

    def in_good_order(
        self, sides: list[Documents], *tensors: list[Tensor | None]
    ) -> tuple[list[Documents], list[list[Any]]]:
        """Documents, and each side's tensors [T], in the order that the attention backend likes best.

        A sum of losses does not depend on the order of documents. Document n of a side stays the partner of
        document n of the other.
        """
        order = by_length(*sides) if groups_by_length(self.compute.attention) else None
        if order is None:
            return sides, list(tensors)
        indices, documents = order
        moved = [
            [None if tensor is None else tensor[index] for tensor in group]
            for index, group in zip(indices, tensors, strict=True)
        ]
        return documents, moved


class MaskedHead(nn.Module):
    """norm(gelu(W x + b)): what BERT does before the output layer (Devlin et al. 2018, its code)."""

    def __init__(self, config: ModelSection) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size, config.bias)
        self.norm = make_norm(config)

    def forward(self, x: Tensor) -> Tensor:  # [T, C] -> [T, C]
        out: Tensor = self.norm(F.gelu(self.dense(x)))
        return out


class NextSentence(nn.Module):
    """Whether sentence B follows A, from the first token's features (Devlin et al. 2018, section 3.1)."""

    def __init__(self, config: ModelSection) -> None:
        super().__init__()
        self.pooler = Linear(config.hidden_size, config.hidden_size, bias=True)
        self.classifier = Linear(config.hidden_size, 2, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """Features of first tokens [N, C] -> logits [N, 2]: B follows A, B is from elsewhere."""
        out: Tensor = self.classifier(torch.tanh(self.pooler(x)))
        return out
