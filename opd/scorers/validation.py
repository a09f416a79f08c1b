"""Validation of scores: the checks that every answer of a teacher must pass before it is trained on."""

from collections.abc import Sequence

import numpy as np

from opd.errors import DataError
from opd.ports import ScoreAnswer, ScoreRequest
from opd.types import Scores, TopKScores


def validate_scores(requests: Sequence[ScoreRequest], answers: Sequence[ScoreAnswer]) -> None:
    """Raise `DataError` unless every request has an answer to each of its kinds (`ScoreKind.problem`)."""
    if len(answers) != len(requests):
        raise DataError(
            f"teacher answered {len(answers)} of {len(requests)} requests; its scores are refused, check the "
            "teacher's log"
        )
    for request, answer in zip(requests, answers, strict=True):
        problem = _problem(request, answer)
        if problem:
            raise DataError(f"teacher scores are refused: {problem}; check the teacher's checkpoint and log")


def check_support(scores: Scores, rows: int) -> None:
    """Raise `DataError` if scores name ids beyond the student's `rows` logits (a teacher padded further)."""
    if not isinstance(scores, TopKScores) or not np.size(scores.topk_ids):
        return
    largest = int(np.max(np.asarray(scores.topk_ids)))
    if largest >= rows:
        raise DataError(
            f"the teacher's top-k names id {largest}, but the student's output has {rows} rows (the teacher's is "
            "padded further, and at this k its padding is among the likeliest); lower scorer.k"
        )


def _problem(request: ScoreRequest, answer: ScoreAnswer) -> str:
    if len(answer) != len(request.kinds):
        return f"asked for {len(request.kinds)} kinds of scores, got {len(answer)}"
    problems = (k.problem(request.token_ids, scores) for k, scores in zip(request.kinds, answer, strict=True))
    return next(filter(None, problems), "")
