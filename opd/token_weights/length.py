"""Weights that depend on the end of a completion."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float

from opd.ports import Context
from opd.types import Scored, Scores, StopReason


@dataclass(frozen=True, slots=True, kw_only=True)
class SkipTruncated:
    """Weight 0 of completions that the token limit cut."""

    consumes: ClassVar[type[Scores]] = Scores
    reads_sampled_tokens: ClassVar[bool] = True

    def __call__(self, scored: Sequence[Scored[Any]], context: Context) -> list[Float[np.ndarray, " T"]]:
        return [np.full(len(s.trajectory), 0.0 if s.trajectory.stop is StopReason.LENGTH else 1.0) for s in scored]
