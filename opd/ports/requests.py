"""Requests to engines and their answers: completions to generate, tokens to score."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
from jaxtyping import Int32

from opd.settings.ranges import In, Temperature, Tokens, TopP
from opd.settings.validation import settings
from opd.types import StopReason, TokenScores


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class Sampling:
    """How completions are written. `topk` > 0 also records the writer's top-k at every token.

    `temperature=0` is greedy. Example: `Sampling(temperature=1.0, max_tokens=77)`.
    """

    max_tokens: Tokens
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    topk: Annotated[int, In(0, 1_000_000)] = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """One completion to write. `(prompt_id, sample)` and the policy version seed it, never the placement."""

    prompt_id: str
    sample: int
    context_ids: Int32[np.ndarray, " P"]
    sampling: Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What an engine wrote for a request; `behavior` is a `TopKScores` when `sampling.topk` > 0.

    `digests` says for every policy version that wrote here which weights the engine held under that number (see
    `PublishedWeights.digest`; "" is a checkpoint's own weights, which nobody published).
    """

    token_ids: Int32[np.ndarray, " T"]
    behavior: TokenScores
    versions: Int32[np.ndarray, " T"]
    stop: StopReason
    digests: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledToken:
    """Ask for the log-probability of each written token: answered with `TokenScores`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TopK:
    """Ask for the teacher's own `k` likeliest ids and their full-softmax logprobs: `TopKScores`."""

    k: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AtIds:
    """Ask for full-softmax logprobs at ids the caller names per token: `TopKScores` with those ids."""

    ids: Int32[np.ndarray, "T K"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LastHidden:
    """Ask for the hidden states that predict each written token: `HiddenScores`."""


ScoreKind = SampledToken | TopK | AtIds | LastHidden


ScoreKinds = frozenset[type[SampledToken] | type[TopK] | type[AtIds] | type[LastHidden]]
"""Kinds of requests: what a scorer `requires`, what a teacher backend `answers`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest:
    """A completion to be read in a context. `context_ids` has at least one token."""

    context_ids: Int32[np.ndarray, " Q"]
    token_ids: Int32[np.ndarray, " T"]
    kind: ScoreKind
