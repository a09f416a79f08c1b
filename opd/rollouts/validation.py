"""Validation of completions: the checks that every answer of an engine must pass before it is used."""

from collections.abc import Sequence

import numpy as np

from opd.errors import DataError
from opd.ports import Completion, GenerateRequest
from opd.types import TopKScores
from opd.types.log_probs import are_logprobs, contradiction


def validate_completions(requests: Sequence[GenerateRequest], completions: Sequence[Completion], rows: int = 0) -> None:
    """Raise `DataError` unless every completion has the requested shape and is made of log-probabilities.

    `rows` > 0 is how many ids the engine's model has.
    """
    if len(completions) != len(requests):
        raise DataError(f"an engine gave {len(completions)} completions for {len(requests)} requests; check its log")
    for request, completion in zip(requests, completions, strict=True):
        problem = _problem(request, completion, rows)
        if problem:
            raise DataError(
                f"the completion of prompt {request.prompt_id!r} is refused: {problem}; check the engine's log"
            )


def _problem(request: GenerateRequest, completion: Completion, rows: int) -> str:
    ids, behavior = np.asarray(completion.token_ids), completion.behavior
    tokens = len(ids)
    if not 0 < tokens <= request.sampling.max_tokens:
        return f"asked for 1 to {request.sampling.max_tokens} tokens, got {tokens}"
    if wrong := _foreign(ids, rows):
        return f"a token id is {wrong}"
    lengths = {"logprobs": len(behavior.logprobs), "versions": len(completion.versions)}
    if request.sampling.topk:
        if not isinstance(behavior, TopKScores):
            return f"asked for a top-{request.sampling.topk}, got none"
        lengths["topk_logprobs"] = len(behavior.topk_logprobs)
    for name, length in lengths.items():
        if length != tokens:
            return f"expected {tokens} rows of {name}, got {length}"
    logprobs = np.asarray(behavior.logprobs)
    if not are_logprobs(logprobs):
        at = int(np.flatnonzero(~((logprobs <= 0) & (logprobs > -np.inf)))[0])
        return f"the log-probability of token {at} is {logprobs[at]:.4g}: NaN, an infinity or above 0"
    return _support(request, completion, behavior, rows) if isinstance(behavior, TopKScores) else ""


def _support(request: GenerateRequest, completion: Completion, behavior: TopKScores, rows: int) -> str:
    """Problem of the top-k that was recorded beside the sampled tokens; "" if there is none."""
    ids, values = np.asarray(behavior.topk_ids), np.asarray(behavior.topk_logprobs)
    k = request.sampling.topk
    if ids.shape != values.shape or ids.shape[1] < k:
        return f"asked for a top-{k}, got ids {ids.shape} with log-probabilities {values.shape}"
    if wrong := _foreign(ids, rows):
        return f"an id of a top-k is {wrong}"
    # Beyond the nucleus the distribution that was sampled from has no probability.
    within = values if request.sampling.top_p == 1 else values[values > -np.inf]
    if not are_logprobs(within):
        return "a log-probability of a top-k is NaN, an infinity or above 0"
    if np.count_nonzero(values[:, 1:] > values[:, :-1]):
        return "a top-k does not begin with the likeliest token"
    return contradiction(np.asarray(completion.token_ids), np.asarray(behavior.logprobs), ids, values, likeliest=True)


def _foreign(ids: np.ndarray, rows: int) -> str:
    if np.count_nonzero(ids < 0):
        return "negative"
    if rows and np.count_nonzero(ids >= rows):
        return f"{int(ids.max())}, but the model has {rows}"
    return ""
