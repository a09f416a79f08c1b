"""A control question that tells shifted answers from right ones, for testimony with nothing else to compare.

The log-probability of a token depends on the tokens before it and on itself. So when only the last token of a text
is replaced, exactly the last number must change: rows shifted to the left change one too early, rows shifted to the
right do not change at all.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

from opd.ports import SampledToken, ScoreRequest

LONGEST = 8
FLOOR = 1e-6  # nats; float32 noise between two forwards of one text can be smaller than this, two tokens hardly


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """`question` is request `about`, cut to its first tokens and with the last of them replaced."""

    about: int
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
            question = ScoreRequest(context_ids=request.context_ids, token_ids=tokens, kind=SampledToken())
            return Control(about=about, question=question)
    return None


def aligned(plain: Float32[np.ndarray, " n"], changed: Float32[np.ndarray, " n"], tolerance: float) -> bool:
    """Whether the last number changed and the others (within `tolerance` nats) did not."""
    gaps = np.abs(plain[: len(changed)].astype(np.float64) - changed)
    noise = gaps[:-1].max(initial=0.0)
    return bool(noise <= tolerance and gaps[-1] > max(3 * noise, FLOOR))
