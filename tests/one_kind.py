"""Answers of teachers that were asked one kind of scores."""

from collections.abc import Iterable
from typing import Any

from opd.ports import ScoreAnswer


def singles(answers: Iterable[ScoreAnswer]) -> list[Any]:
    """The scores of answers to one kind each."""
    return [scores for (scores,) in answers]


def answered(scores: Iterable[Any]) -> list[ScoreAnswer]:
    """Scores as answers to one kind each."""
    return [(one,) for one in scores]
