"""Knowledge distillation: a model learns from what a larger one of its family makes of the same tokens.

loss = (1 - w) * cross-entropy with the labels + w * t^2 * KL(teacher || student), both at temperature t
(Hinton et al. 2015, section 2: the factor t^2 keeps the two gradients' sizes in proportion). As every loss
here it is a sum over the tokens that have a label.

T tokens, C features, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigtfm.config.marks import IGNORE
from bigtfm.model.attention import Documents

if TYPE_CHECKING:
    from bigtfm.model.heads import LanguageModel


class Distillation:
    """A frozen teacher beside a student. No module: no engine partitions, updates or saves the teacher.

    Both are of one family, one objective and one vocabulary, and have the same attention backend, which
    decides in which order they take the documents.
    """

    def __init__(self, teacher: LanguageModel, temperature: float, weight: float) -> None:
        self.teacher, self.temperature, self.weight = (
            teacher.eval().requires_grad_(False),
            temperature,
            weight,
        )
        self._features: Tensor | None = None  # the teacher's, of the forward that is under way
        teacher.loss = self._keep  # type: ignore[method-assign]

    def attach(self, student: LanguageModel) -> None:
        """Lets the student's training forwards return this loss; its evaluation stays as it is."""
        student.distillation = self
        student.register_forward_pre_hook(self._ask, with_kwargs=True)

    def loss(self, logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
        """The sum over the tokens with a label, an fp32 scalar: the student's logits [T, V], labels [T]."""
        known, features, t = labels != IGNORE, self._features, self.temperature
        assert features is not None, "the student's forward asks the teacher first"
        self._features = None
        logits, labels = logits.float()[known], labels[known]
        with torch.no_grad():
            wanted = F.log_softmax(self.teacher.project(features[known]).float() / t, -1)
        hard = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=label_smoothing)
        soft = F.kl_div(F.log_softmax(logits / t, -1), wanted, reduction="sum", log_target=True)
        return (1 - self.weight) * hard + self.weight * t**2 * soft

    def _ask(self, student: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        if student.training:
            with torch.no_grad():
                self.teacher(*args, **inputs)

    def _keep(
        self, x: Tensor, labels: Tensor, l1_scale: float | None, documents: Documents
    ) -> tuple[Tensor, Tensor]:
        """Takes the place of the teacher's loss: its features [T, C] are what is wanted."""
        self._features = x
        return x.new_zeros(()), (labels != IGNORE).sum()
