"""Log-linear mixture of teachers: between them, or beyond one and away from another (reward extrapolation)."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar

import numpy as np

from opd.errors import ConfigurationError
from opd.ports import Context, Need, Role, SampledToken, ScoreKinds
from opd.scorers.ensemble import ContextIds
from opd.scorers.teacher import ask
from opd.settings.ranges import In, Length
from opd.settings.validation import settings
from opd.types import Scores, TokenScores, Trajectory

Power = Annotated[float, In(-1e3, 1e3, because="below 0 a teacher is moved away from")]


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class Extrapolated:
    """Sampled tokens' `sum_m shares[m] log q_m`: a product of the teachers' distributions, with powers that add to 1.

    With `{default: c, start: 1 - c}` and `start` the student at its start, c = 1 is distillation and c > 1 goes
    beyond the teacher in the direction in which it differs from `start`: the dense reward `c (log q - log q_start)`
    beside a KL to `start` of factor 1 (G-OPD and ExOPD, arXiv 2602.12125). With the teacher's own base model in
    place of it, `{default: c, base: -c, start: 1}`, it is the paper's corrected reward.

    `shares` are divided by their sum, which must be above 0. A product is not normalized: a constant per state is
    missing, on which an objective must not depend; those that promise a reverse KL do not, and others are refused
    (`unnormalized`).
    """

    needs: ClassVar[type[Scores]] = TokenScores
    produces: ClassVar[type[Scores]] = TokenScores
    requires: ClassVar[ScoreKinds] = frozenset({SampledToken})
    min_group: ClassVar[int] = 1
    unnormalized: ClassVar[bool] = True

    # power of each teacher, by name; they are divided by their sum
    shares: Annotated[Mapping[str, Power], Length(1)]
    # prompt that a teacher reads, by name, where it is not the teacher's own: STUDENT for a copy of the student
    contexts: Mapping[str, ContextIds] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if sum(self.shares.values()) < 1e-6:
            raise ConfigurationError(
                f"scorer Extrapolated divides shares by their sum and needs one above 0, but got {dict(self.shares)}; "
                "give a teacher more, or the student at its start what is missing to 1"
            )
        if unknown := sorted(self.contexts.keys() - self.shares.keys()):
            raise ConfigurationError(
                f"scorer Extrapolated has the teachers {sorted(self.shares)}, but scorer.contexts names {unknown}; "
                "give them a share or leave them out of scorer.contexts"
            )

    @property
    def needs_engines(self) -> frozenset[Need]:
        return frozenset(Need(Role.READER, name) for name in self.shares)

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> Sequence[Scores]:
        kinds = [SampledToken()] * len(trajectories)

        def rerouted(name: str) -> list[Trajectory]:
            ids = self.contexts.get(name, ContextIds.TEACHER)
            return [
                replace(t, prompt=replace(t.prompt, teacher=name, teacher_ids=ids.of(t.prompt))) for t in trajectories
            ]

        members = await asyncio.gather(*[ask(rerouted(name), kinds, context) for name in self.shares])
        powers = np.asarray(list(self.shares.values()), dtype=np.float64)
        powers /= powers.sum()
        return [_product(each, powers) for each in zip(*members, strict=True)]


def _product(members: Sequence[TokenScores], powers: np.ndarray) -> TokenScores:
    """Scores of the product about one trajectory: in float64 inside, in the members' precision outside."""
    logprobs = [np.asarray(member.logprobs) for member in members]
    total = powers @ np.stack(logprobs).astype(np.float64)
    return TokenScores(logprobs=total.astype(logprobs[0].dtype))
