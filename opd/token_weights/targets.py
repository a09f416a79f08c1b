"""Weights of tokens that have a target distribution."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float

from opd.ports import Context
from opd.types import Scored, Scores, TargetScores


@dataclass(frozen=True, slots=True, kw_only=True)
class PerTarget:
    """Weight of a token: the number of targets of which its own is the mean, 0 where it has none.

    With the normalizer `WeightMean` a loss is the mean over all targets of the step. How many targets a token has may
    depend on what was sampled, so it is not for estimates from sampled tokens.
    """

    consumes: ClassVar[type[Scores]] = TargetScores
    reads_sampled_tokens: ClassVar[bool] = True

    def __call__(self, scored: Sequence[Scored[TargetScores]], context: Context) -> list[Float[np.ndarray, " T"]]:
        return [np.asarray(s.scores.targets, dtype=np.float64) for s in scored]
