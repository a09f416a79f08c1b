"""A score kind of your own, the margin of the teacher's two likeliest tokens, and a method's parts that use it."""

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
    """Answer to `Margin`; its annotation is the wire form, one float32 per token."""

    margin: Float[Array, " T"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Margin(ScoreKind[MarginScores]):
    """Log-probability of the likeliest token less that of the next one, in nats."""

    answer: ClassVar[type[Scores]] = MarginScores
    asks: ClassVar[str] = "the margin of the two likeliest tokens"

    @property
    def depth(self) -> int:
        """Likeliest tokens that `read` looks at; one search serves all kinds of a request."""
        return 2

    def read(self, rows: LogitRows) -> Mapping[str, Tensor]:
        """The definition, in rows of logits."""
        best, _ = rows.likeliest(2)
        return {"margin": best[:, 0] - best[:, 1]}


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledMarginScores(TokenScores):
    """Log-probability of the sampled token, and the margin there."""

    margin: Float[Array, " T"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledMargin:
    """Scorer that asks for both kinds at once; one forward of the teacher answers them."""

    needs: ClassVar[type[Scores]] = TokenScores
    produces: ClassVar[type[Scores]] = SampledMarginScores
    requires: ClassVar[ScoreKinds] = frozenset({SampledToken, Margin})
    min_group: ClassVar[int] = 1

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> Sequence[Scores]:
        """Scores per trajectory, in order."""
        kinds = [(SampledToken(), Margin())] * len(trajectories)
        return [_joined(*answer) for answer in await ask_several(trajectories, kinds, context)]


def _joined(sampled: Any, margin: Any) -> SampledMarginScores:
    return SampledMarginScores(logprobs=sampled.logprobs, margin=margin.margin)


@dataclass(frozen=True, slots=True, kw_only=True)
class WhereSure:
    """Token weight: 1 where the teacher's margin is at least `least` nats, else 0."""

    consumes: ClassVar[type[Scores]] = SampledMarginScores
    reads_sampled_tokens: ClassVar[bool] = False  # a margin is the state's, whichever token was sampled there

    least: float = 0.1

    def __call__(self, scored: Sequence[Scored[Any]], context: Context) -> list[Float[np.ndarray, " _T"]]:
        """One weight per token."""
        return [(np.asarray(item.scores.margin) >= self.least).astype(np.float64) for item in scored]
