"""Weights that depend on where a text comes from."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float

from opd.ports import Context
from opd.settings.validation import settings
from opd.types import NO_VERSION, Scored, Scores


class Source(Enum):
    """Author of a token."""

    STUDENT = "student"  # a policy of the run
    FIXED = "fixed"  # a data set, or another model


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class WrittenBy:
    """Weight 1 of the tokens that `source` wrote, 0 of all others.

    With `opd.rollouts.mixed.Mixed` it makes a term about one part of a step: distillation on the student's own texts,
    likelihood on references (golden data). Each term then divides by its own tokens.
    """

    consumes: ClassVar[type[Scores]] = Scores
    reads_sampled_tokens: ClassVar[bool] = False  # which source a group has is drawn before it is written

    # whose tokens count: the STUDENT's, or FIXED text
    source: Source

    def __call__(self, scored: Sequence[Scored[Any]], context: Context) -> list[Float[np.ndarray, " _T"]]:
        own = self.source is Source.STUDENT
        return [((s.trajectory.versions != NO_VERSION) == own).astype(np.float64) for s in scored]
