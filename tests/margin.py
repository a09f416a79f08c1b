"""A kind of scores that the project does not have, and what a method makes of it: one file, as a user writes it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float
from torch import Tensor

from opd.ports import Context, LogitRows, SampledToken, ScoreKind, ScoreKinds
from opd.scorers.teacher import ask_several
from opd.types import Array, Scored, Scores, TokenScores, Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class MarginScores(Scores):
    """How much likelier the likeliest token is than the next one, in nats."""

    margin: Float[Array, " T"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Margin(ScoreKind[MarginScores]):
    """The margin between the two likeliest log-probabilities."""

    answer: ClassVar[type[Scores]] = MarginScores
    asks: ClassVar[str] = "the margin of the two likeliest tokens"

    def read(self, rows: LogitRows) -> Mapping[str, Tensor]:
        """First minus second."""
        best, _ = rows.likeliest(2)
        return {"margin": best[:, 0] - best[:, 1]}


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledMarginScores(TokenScores):
    """What the written token has, and how sure the teacher is there."""

    margin: Float[Array, " T"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledMargin:
    """Both kinds from one forward of the teacher."""

    needs: ClassVar[type[Scores]] = TokenScores
    produces: ClassVar[type[Scores]] = SampledMarginScores
    requires: ClassVar[ScoreKinds] = frozenset({SampledToken, Margin})
    min_group: ClassVar[int] = 1

    async def __call__(self, trajectories: Sequence[Trajectory], engines: Context) -> Sequence[Scores]:
        """Scores per trajectory, in order."""
        kinds = [(SampledToken(), Margin())] * len(trajectories)
        return [_joined(*answer) for answer in await ask_several(trajectories, kinds, engines)]


def _joined(written: Any, sure: Any) -> SampledMarginScores:
    return SampledMarginScores(logprobs=written.logprobs, margin=sure.margin)


@dataclass(frozen=True, slots=True, kw_only=True)
class WhereSure:
    """Tokens at which the teacher's margin is at least `least` nats."""

    consumes: ClassVar[type[Scores]] = SampledMarginScores
    reads_sampled_tokens: ClassVar[bool] = False

    least: float = 0.1

    def __call__(self, scored: Sequence[Scored[Any]], context: Context) -> list[Float[np.ndarray, " _T"]]:
        """1 or 0 per token."""
        return [(np.asarray(item.scores.margin) >= self.least).astype(np.float64) for item in scored]
