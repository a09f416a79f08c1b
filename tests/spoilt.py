"""A part that goes wrong in the middle of a run, for tests of what is then said."""

from dataclasses import dataclass, replace
from math import nan

from opd.loss.chunked import StudentLogits
from opd.objectives.vocabulary import FullReverseKL
from opd.types import Batch, TokenLoss, VocabularyScores


@dataclass(frozen=True, slots=True, kw_only=True)
class NotFinite(FullReverseKL):
    """A loss that is no number."""

    def __call__(self, student: StudentLogits, batch: Batch[VocabularyScores]) -> TokenLoss:
        result = FullReverseKL()(student, batch)
        return replace(result, loss=result.loss * nan)
