"""No completion is believed unread: the checks that everything an engine wrote passes before it goes on."""

from collections.abc import Sequence

import numpy as np

from opd.errors import DataError
from opd.ports import Completion, GenerateRequest
from opd.types import TopKScores


def verify(requests: Sequence[GenerateRequest], completions: Sequence[Completion]) -> None:
    """Raise `DataError` unless every completion has the shape of what was asked for, and numbers in it."""
    if len(completions) != len(requests):
        raise DataError(f"an engine wrote {len(completions)} completions for {len(requests)} requests; check its log")
    for request, completion in zip(requests, completions, strict=True):
        problem = _problem(request, completion)
        if problem:
            raise DataError(
                f"the completion of prompt {request.prompt_id!r} is refused: {problem}; check the engine's log"
            )


def _problem(request: GenerateRequest, completion: Completion) -> str:
    tokens = len(completion.token_ids)
    if not 0 < tokens <= request.sampling.max_tokens:
        return f"asked for 1 to {request.sampling.max_tokens} tokens, got {tokens}"
    if np.count_nonzero(np.asarray(completion.token_ids) < 0):
        return "a token id is negative"
    rows = {"logprobs": completion.behavior.logprobs, "versions": completion.versions}
    if request.sampling.topk:
        if not isinstance(completion.behavior, TopKScores):
            return f"asked for a top-{request.sampling.topk}, got none"
        rows["topk_logprobs"] = completion.behavior.topk_logprobs
    for name, values in rows.items():
        if len(values) != tokens:
            return f"expected {tokens} rows of {name}, got {len(values)}"
    if np.count_nonzero(np.isnan(completion.behavior.logprobs)):
        return "a log-probability is NaN"
    return ""
