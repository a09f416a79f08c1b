"""Scores from ranked tokens: what `prompt_logprobs` can answer, without a row over the vocabulary."""

import numpy as np
from jaxtyping import Float32, Int32

from opd.ports import ScoreKind, ScoreRequest, TopK
from opd.types import Scores, TokenScores, TopKScores


def most_ids(request: ScoreRequest) -> int:
    """The likeliest ids per token that all kinds of `request` need together."""
    return max((kind.k for kind in request.kinds if isinstance(kind, TopK)), default=0)


def ranked(
    kind: ScoreKind[Scores],
    logprobs: Float32[np.ndarray, " T"],
    ids: Int32[np.ndarray, "T most"],
    values: Float32[np.ndarray, "T most"],
) -> Scores:
    """The answer to `SampledToken` or `TopK` from the sampled tokens' log-probabilities and the likeliest ids."""
    if not isinstance(kind, TopK):
        return TokenScores(logprobs=logprobs)
    return TopKScores(logprobs=logprobs, topk_ids=ids[:, : kind.k].copy(), topk_logprobs=values[:, : kind.k].copy())
