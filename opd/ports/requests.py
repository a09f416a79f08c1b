"""Requests to engines and their answers: completions to generate, tokens to score."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
from jaxtyping import Int32

from opd.ports.score_kinds import ScoreKind
from opd.settings.ranges import In, Names, Temperature, Tokens, TopP, TrustRegion
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
@settings
class TeacherBlend:
    """Blend of the student with a teacher that its engine holds, within a KL trust region at every token.

    Tokens are sampled from the distribution nearest to `teacher` among those at most `budget` nats away from the
    student, which reads the same context (`opd.rollouts.trust_region.blended`). Both distributions are those at the
    request's temperature; greedy writing and `top_p` < 1 leave no trust region and are refused.
    Example: `TeacherBlend(teacher="default", budget=0.02)`.
    """

    # name of the teacher, which the engine must hold
    teacher: Names
    # largest KL(blend||student) of a token's distribution; 0 is the student
    budget: TrustRegion


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """One completion to sample. `(prompt_id, sample)` and the policy version seed it, never the placement.

    With a `blend`, which only an engine of `opd.ports.Role.BLENDED` can sample from, the completion's `behavior` has
    log-probabilities of the blend; without, the request is the same as if no teacher were there.
    """

    prompt_id: str
    sample: int
    context_ids: Int32[np.ndarray, " P"]
    sampling: Sampling
    blend: TeacherBlend | None = None


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
