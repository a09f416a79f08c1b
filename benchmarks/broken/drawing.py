"""Objectives that draw tokens themselves, in the wrong way."""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from opd.loss.chunked import StudentLogits
from opd.objectives.montecarlo import MonteCarloDivergence
from opd.types import Batch, TokenLoss, VocabularyScores


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnFromTeacher(MonteCarloDivergence):
    """Draws from the teacher's distribution, under ratios of the student's."""

    def draw(self, student: StudentLogits, batch: Batch[VocabularyScores]) -> Int[Tensor, "n m"]:
        return MonteCarloDivergence.draw(self, StudentLogits(logits=batch.scores.vocabulary_logprobs), batch)


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnOnce(MonteCarloDivergence):
    """One draw per state, counted as often as there should be draws."""

    def draw(self, student: StudentLogits, batch: Batch[VocabularyScores]) -> Int[Tensor, "n m"]:
        return MonteCarloDivergence.draw(self, student, batch)[:, :1].expand(-1, self.samples).contiguous()


@dataclass(frozen=True, slots=True, kw_only=True)
class OneDrawLeftOut(MonteCarloDivergence):
    """The loss leaves out what was drawn last."""

    def __call__(self, student: StudentLogits, batch: Batch[VocabularyScores]) -> TokenLoss:
        ids = self.draw(student, batch)
        return self.given(torch.cat([ids[:, :-1], ids[:, :1]], dim=-1), student, batch)
