"""What stands on the stack in the output layer's place when a task is learnt: labels, or an answer's borders.

N documents, T tokens of all of them, M of these with a label, C features, L labels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigtfm.config.marks import BEGINS, ENDS, IGNORE, SELECTABLE
from bigtfm.config.sections import LABELLED, ModelSection
from bigtfm.model.attention import Documents
from bigtfm.model.layers import Linear


class LabelHead(nn.Module):
    """A class of each labelled token; of a whole document, where its label stands at its first or last one.

    pooled: tanh(W x + b) comes first, as in BERT's sentence classifiers (Devlin et al. 2018, its code).
    """

    def __init__(self, config: ModelSection, num_labels: int, pooled: bool) -> None:
        super().__init__()
        self.pooler = Linear(config.hidden_size, config.hidden_size, bias=True) if pooled else None
        self.classifier = Linear(config.hidden_size, num_labels, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [M, L] in fp32 of features [M, C]."""
        if self.pooler is not None:
            x = torch.tanh(self.pooler(x))
        logits: Tensor = self.classifier(x)
        return logits.float()

    def loss(
        self, x: Tensor, labels: Tensor, documents: Documents, smoothing: float
    ) -> tuple[Tensor, Tensor]:
        """(sum of the labels' losses in nats, their number); x [T, C], labels [T] (-100: none)."""
        labelled = (labels != IGNORE).nonzero()[:, 0]
        logits = self(x[labelled])
        loss = F.cross_entropy(logits, labels[labelled], reduction="sum", label_smoothing=smoothing)
        return loss, labels.new_tensor(len(labelled))


class SpanHead(nn.Module):
    """Where an answer begins and where it ends: a distribution over each document's selectable tokens.

    (Devlin et al. 2018, section 4.2.)
    """

    def __init__(self, config: ModelSection) -> None:
        super().__init__()
        self.borders = Linear(config.hidden_size, 2, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """Scores [T, 2] in fp32, of a beginning and of an end, of features [T, C]."""
        scores: Tensor = self.borders(x)
        return scores.float()

    def loss(self, x: Tensor, marks: Tensor, documents: Documents, smoothing: float) -> tuple[Tensor, Tensor]:
        """(sum over documents with an answer of -(log p(begin) + log p(end)) / 2 in nats, their number).

        x [T, C]; marks [T]: bits of selectable tokens, of the answer's first and of its last. Where an answer
        stands several times, its places' probabilities are summed. Smoothing has no meaning here.
        """
        scores = self(x).masked_fill((marks & SELECTABLE == 0)[:, None], -torch.inf)
        right = torch.stack([marks & BEGINS, marks & ENDS], 1) > 0
        document = torch.repeat_interleave(
            torch.arange(len(documents.seq_lens), device=x.device),
            torch.diff(documents.cu_seqlens.long()),
            output_size=len(x),
        )
        answered = _any(right[:, 0], document, len(documents.seq_lens))
        every = _log_sum_exp(scores, document, len(documents.seq_lens))
        chosen = _log_sum_exp(scores.masked_fill(~right, -torch.inf), document, len(documents.seq_lens))
        loss = (every - chosen)[answered]  # [answered, 2]
        return loss.sum() / 2, answered.sum()


def _any(flags: Tensor, document: Tensor, count: int) -> Tensor:
    """Whether a document has a flagged token: [T], [T] -> [count]."""
    return flags.new_zeros(count).index_put((document[flags],), flags.new_tensor(True))


def _log_sum_exp(scores: Tensor, document: Tensor, count: int) -> Tensor:
    """log sum exp of each document's scores: [T, 2], [T] -> [count, 2]."""
    index = document[:, None].expand_as(scores)
    most = scores.detach().new_full((count, 2), -torch.inf).scatter_reduce(0, index, scores.detach(), "amax")
    most = most.masked_fill(most.isinf(), 0.0)  # nothing to select
    sums = scores.new_zeros(count, 2).scatter_add(0, index, (scores - most[document]).exp())
    return sums.clamp_min(torch.finfo(torch.float32).tiny).log() + most  # log(0) would have no gradient


def make_head(config: ModelSection, kind: str | None) -> LabelHead | SpanHead | None:
    """The head that an objective needs; None: the output layer."""
    if kind in LABELLED:
        assert config.num_labels is not None, "job.py takes them from the data set"
        return LabelHead(
            config, config.num_labels, pooled=kind == "classification" and config.family == "bert"
        )
    return SpanHead(config) if kind == "question_answering" else None
