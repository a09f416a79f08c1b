"""No testimony is believed unread: the checks every answer of a teacher passes before it is trained on."""

from collections.abc import Sequence

import numpy as np

from opd.errors import DataError
from opd.ports import AtIds, LastHidden, ScoreRequest, TopK
from opd.types import HiddenScores, RemoteRows, Scores, TokenScores, TopKScores
from opd.types.log_probs import MASS, are_logprobs, contradiction


def verify(requests: Sequence[ScoreRequest], answers: Sequence[Scores]) -> None:
    """Raise `DataError` unless every answer has its request's type and length and is made of log-probabilities."""
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
    """Raise `DataError` if testimony names ids beyond the student's `rows` logits (a teacher padded further)."""
    if not isinstance(scores, TopKScores) or not np.size(scores.topk_ids):
        return
    largest = int(np.max(np.asarray(scores.topk_ids)))
    if largest >= rows:
        raise DataError(
            f"the teacher's top-k names id {largest}, but the student's output has {rows} rows (the teacher's is "
            "padded further, and at this k its padding is among the likeliest); lower scorer.k"
        )


def _problem(request: ScoreRequest, answer: Scores) -> str:
    tokens = len(request.token_ids)
    if not isinstance(answer, TokenScores):
        return f"asked for log-probabilities, got {type(answer).__name__}"
    arrays = {"logprobs": np.asarray(answer.logprobs)}
    match request.kind:
        case LastHidden():
            if not isinstance(answer, HiddenScores) or not isinstance(answer.hidden, RemoteRows):
                return f"asked for hidden states by reference, got {type(answer).__name__}"
            if len(answer.hidden) != tokens:
                return f"expected {tokens} hidden states, got {len(answer.hidden)}"
        case TopK() | AtIds():
            if not isinstance(answer, TopKScores):
                return f"asked for a top-k support, got {type(answer).__name__}"
            arrays["topk_logprobs"], arrays["rest"] = np.asarray(answer.topk_logprobs), np.asarray(answer.rest)
            if isinstance(request.kind, AtIds) and not np.array_equal(answer.topk_ids, request.kind.ids):
                return "the answer is about other token ids than were asked"
            if isinstance(request.kind, TopK) and arrays["topk_logprobs"].shape[-1] != request.kind.k:
                return f"asked for k={request.kind.k}, got k={arrays['topk_logprobs'].shape[-1]}"
            if np.shape(answer.topk_ids) != arrays["topk_logprobs"].shape:
                return f"{np.shape(answer.topk_ids)} ids have {arrays['topk_logprobs'].shape} log-probabilities"
    for name, values in arrays.items():
        if len(values) != tokens:
            return f"expected {tokens} rows of {name}, got {len(values)}"
        if not are_logprobs(values):
            return f"{name} contains NaN, an infinity or a value above 0"
    if not isinstance(answer, TopKScores):
        return ""
    values, rest = arrays["topk_logprobs"], arrays["rest"]
    problem = contradiction(
        np.asarray(request.token_ids),
        np.asarray(answer.logprobs),
        np.asarray(answer.topk_ids),
        values,
        likeliest=isinstance(request.kind, TopK),
    )
    whole = _mass(np.asarray(answer.topk_ids), values) + np.exp(rest.astype(np.float64))
    if not problem and (np.abs(whole - 1) > MASS).any():
        return "the probabilities of a support and of the rest of the vocabulary do not sum to 1"
    return problem


def _mass(ids: np.ndarray, logprobs: np.ndarray) -> np.ndarray:
    """Probability of each row's ids; an id that is named twice counts once."""
    order = ids.argsort(-1, kind="stable")
    ordered = np.take_along_axis(ids, order, -1)
    new = np.ones(ids.shape, dtype=bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return (np.exp(np.take_along_axis(logprobs, order, -1).astype(np.float64)) * new).sum(-1)
