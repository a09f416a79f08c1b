"""Requests to engines and their answers: completions to generate, tokens to score."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
from jaxtyping import Int32

from opd.ports.score_kinds import ScoreKind
from opd.settings.ranges import In, Temperature, Tokens, TopP
from opd.settings.validation import settings
from opd.types import Scores, StopReason, TokenScores


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class Sampling:
    """Settings of sampling. `topk` > 0 also records the top-k of the sampling model at every token.

    `temperature=0` is greedy. Example: `Sampling(temperature=1.0, max_tokens=77)`.
    """

    max_tokens: Tokens
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    topk: Annotated[int, In(0, 1_000_000)] = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """One completion to sample. `(prompt_id, sample)` and the policy version seed it, never the placement."""

    prompt_id: str
    sample: int
    context_ids: Int32[np.ndarray, " P"]
    sampling: Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """An engine's answer to a request; `behavior` is a `TopKScores` when `sampling.topk` > 0.

    `digests` names for every policy version that sampled here the weights that the engine held under that number (see
    `PublishedWeights.digest`; "" is a checkpoint's own weights, which were never published).
    """

    token_ids: Int32[np.ndarray, " T"]
    behavior: TokenScores
    versions: Int32[np.ndarray, " T"]
    stop: StopReason
    digests: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest:
    """A completion to be scored in a context, once for all `kinds`. `context_ids` has at least one token.

    Example: `ScoreRequest(context_ids=[1, 40], token_ids=[6, 2], kinds=(SampledToken(), TopK(k=8)))`.
    """

    context_ids: Int32[np.ndarray, " Q"]
    token_ids: Int32[np.ndarray, " T"]
    kinds: tuple[ScoreKind[Scores], ...]


ScoreAnswer = tuple[Scores, ...]
"""Answer to a `ScoreRequest`: scores of the type that each kind names, in the order of `kinds`."""
