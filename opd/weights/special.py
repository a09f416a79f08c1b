"""Weights that depend on which token was written."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float

from opd.types import Scored, Scores


@dataclass(frozen=True, slots=True, kw_only=True)
class SkipFirst:
    """The first occurrence of each of `token_ids` in a completion is not trained; later ones are.

    For tokens on which student and teacher differ by template rather than by skill (Revisiting OPD, arXiv 2603.25562,
    masks the first `<`, `think` and `<|im_end|>`). Ids are those of the run's tokenizer;
    without ids nothing is skipped.
    """

    consumes: ClassVar[type[Scores]] = Scores

    token_ids: Sequence[int] = ()

    def __call__(self, scored: Sequence[Scored[Any]]) -> list[Float[np.ndarray, " T"]]:
        return [self._weights(s.trajectory.token_ids) for s in scored]

    def _weights(self, written: np.ndarray) -> np.ndarray:
        weights = np.ones(len(written))
        for token in self.token_ids:
            weights[np.flatnonzero(written == token)[:1]] = 0.0
        return weights
