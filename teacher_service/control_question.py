"""Control question, whose answer shows whether rows are shifted, for scores with nothing else to compare.

The log-probability of a token depends on the tokens before it and on itself. So when only the last token of a text
is replaced, exactly the last number must change: rows shifted to the left change one too early, rows shifted to the
right do not change at all.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float32

from opd.ports import SampledToken, ScoreRequest
from opd.types import TokenScores

LONGEST = 8
FLOOR = 1e-6  # nats; float32 noise between two forwards of one text can be smaller than this, two tokens hardly


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """`question` is request `about`, cut to its first tokens and with the last of them replaced.

    Both are asked for log-probabilities of sampled tokens: `plain` is request `about`, with that kind after its own
    where none of its own has them. `place` is that of the kind which does.
    """

    about: int
    plain: ScoreRequest
    place: int
    question: ScoreRequest


def control(requests: Sequence[ScoreRequest], attempt: int) -> Control | None:
    """A control question about the shortest request; another one at each `attempt`. None if there is none to ask."""
    readable = [i for i, r in enumerate(requests) if len(r.token_ids) and len(r.context_ids)]
    for about in sorted(readable, key=lambda i: len(requests[i].context_ids) + len(requests[i].token_ids)):
        request = requests[about]
        tokens = request.token_ids[:LONGEST].copy()
        others = np.setdiff1d(np.concatenate([request.context_ids, request.token_ids]), tokens[-1:])
        if len(others):  # only tokens of the text itself: unused rows of a vocabulary may all be alike
            tokens[-1] = others[attempt % len(others)]
            question = ScoreRequest(context_ids=request.context_ids, token_ids=tokens, kinds=(SampledToken(),))
            plain, place = _with_written(request)
            return Control(about=about, plain=plain, place=place, question=question)
    return None


def _with_written(request: ScoreRequest) -> tuple[ScoreRequest, int]:
    """The request with a kind that has the sampled tokens' log-probabilities, and the place of that kind."""
    place = next((i for i, kind in enumerate(request.kinds) if issubclass(kind.answer, TokenScores)), None)
    if place is not None:
        return request, place
    return replace(request, kinds=(*request.kinds, SampledToken())), len(request.kinds)


def aligned(plain: Float32[np.ndarray, " n"], changed: Float32[np.ndarray, " n"], tolerance: float) -> bool:
    """Whether the last number changed and the others (within `tolerance` nats) did not."""
    gaps = np.abs(plain[: len(changed)].astype(np.float64) - changed)
    noise = gaps[:-1].max(initial=0.0)
    return bool(noise <= tolerance and gaps[-1] > max(3 * noise, FLOOR))
