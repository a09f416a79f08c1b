"""Evidence: one teacher's scores of the same tokens, with what it is shown and without."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from opd.ports import Context, SampledToken, ScoreKinds
from opd.scorers.ensemble import ContextIds
from opd.scorers.teacher import SampledTokens
from opd.types import EvidenceScores, Scores, TokenScores, Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """The teacher's log-probability of each sampled token in its own context, and in the student's (2605.23493 eq. 2).

    Their difference is how much likelier the token is because of what the teacher is shown.
    """

    needs: ClassVar[type[Scores]] = TokenScores
    produces: ClassVar[type[Scores]] = EvidenceScores
    requires: ClassVar[ScoreKinds] = frozenset({SampledToken})
    min_group: ClassVar[int] = 1
    reads: ClassVar[tuple[ContextIds, ...]] = (ContextIds.TEACHER, ContextIds.STUDENT)

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> Sequence[Scores]:
        plain = [replace(t, prompt=replace(t.prompt, teacher_ids=t.prompt.student_ids)) for t in trajectories]
        both = await asyncio.gather(*[SampledTokens()(texts, context) for texts in (trajectories, plain)])
        return [
            EvidenceScores(logprobs=np.asarray(shown.logprobs), plain=np.asarray(alone.logprobs))
            for shown, alone in zip(*both, strict=True)
            if isinstance(shown, TokenScores) and isinstance(alone, TokenScores)
        ]
