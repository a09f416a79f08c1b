"""Weights that depend on where a token stands in its completion, and on how that ends."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from jaxtyping import Float

from opd.ports import Context
from opd.settings.ranges import In
from opd.settings.validation import settings
from opd.types import Scored, Scores, StopReason


@dataclass(frozen=True, slots=True, kw_only=True)
class SkipTruncated:
    """Weight 0 of completions that the token limit cut."""

    consumes: ClassVar[type[Scores]] = Scores
    reads_sampled_tokens: ClassVar[bool] = True

    def __call__(self, scored: Sequence[Scored[Any]], context: Context) -> list[Float[np.ndarray, " T"]]:
        return [np.full(len(s.trajectory), 0.0 if s.trajectory.stop is StopReason.LENGTH else 1.0) for s in scored]


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class SkipBeginning:
    """Weight 0 of the first `count` tokens of every completion.

    A teacher that was shown a demonstration likes to begin by referring to it, which a student without it should not
    learn (SDFT, arXiv 2601.19897; `num_loss_tokens_to_skip` in TRL, whose default is 0).
    """

    consumes: ClassVar[type[Scores]] = Scores
    reads_sampled_tokens: ClassVar[bool] = False

    # tokens at the beginning that are not trained
    count: Annotated[int, In(0, 100_000_000)] = 0

    def __call__(self, scored: Sequence[Scored[Any]], context: Context) -> list[Float[np.ndarray, " T"]]:
        return [(np.arange(len(s.trajectory)) >= self.count).astype(np.float64) for s in scored]
