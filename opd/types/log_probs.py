"""Validity of log-probabilities, from an engine (of generated tokens) or a teacher (of scored tokens)."""

import numpy as np
from jaxtyping import Float, Int

ROUNDING = 1e-3  # a log-probability may exceed 0 by this much (bfloat16 logits, float32 sums)
MASS = 1e-2  # the probabilities of distinct tokens may sum to 1 plus this


def are_logprobs(values: Float[np.ndarray, "*shape"]) -> bool:
    """Whether values are log-probabilities: no NaN, no infinity and, within rounding, nothing above 0."""
    # A NaN compares as false. `count_nonzero` costs a tenth of `all`.
    return bool(np.count_nonzero((values <= ROUNDING) & (values > -np.inf)) == values.size)


def contradiction(
    token_ids: Int[np.ndarray, " T"],
    logprobs: Float[np.ndarray, " T"],
    ids: Int[np.ndarray, "T k"],
    values: Float[np.ndarray, "T k"],
    *,
    likeliest: bool,
) -> str:
    """Contradiction between a support (`ids`, `values`) and the sampled tokens' own log-probabilities; "" if none.

    Rows shifted by one do. `likeliest`: the support is a top-k.
    """
    same = ids == token_ids[:, None]
    if (np.abs(values - logprobs[:, None])[same] > ROUNDING).any():
        return "a sampled token has one log-probability by itself and another in its support (shifted rows?)"
    if not likeliest:
        return ""
    if (logprobs > values.min(axis=1, initial=np.inf) + ROUNDING)[~same.any(axis=1)].any():
        return "a sampled token is likelier than the top-k that does not contain it (shifted rows?)"
    if (np.diff(np.sort(ids, axis=1), axis=1) == 0).any():
        return "a top-k names a token twice"
    if (np.exp(values.astype(np.float64)).sum(axis=1) > 1 + MASS).any():
        return "the probabilities of a top-k sum to more than 1"
    return ""


def support_mass(ids: Int[np.ndarray, "T k"], logprobs: Float[np.ndarray, "T k"]) -> Float[np.ndarray, " T"]:
    """The probability of each row's ids; an id that is named twice counts once."""
    order = ids.argsort(-1, kind="stable")
    ordered = np.take_along_axis(ids, order, -1)
    new = np.ones(ids.shape, dtype=bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return (np.exp(np.take_along_axis(logprobs, order, -1).astype(np.float64)) * new).sum(-1)
