"""Delta of a teacher: its log-probabilities beside those of the model that it was tuned from."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from opd.ports import AtIds, Context, Need, Role, ScoreKinds
from opd.scorers.ensemble import ContextIds
from opd.scorers.teacher import StudentTopK
from opd.settings.ranges import Names
from opd.settings.validation import settings
from opd.types import DeltaScores, Scores, TopKScores, Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class TeacherDelta:
    """Scores of the prompt's teacher and of its base at the sampled tokens and the student's top-k (arXiv 2607.15161).

    The base is the checkpoint from which the teacher was tuned, a teacher of the run named `base`
    (`teachers.base.path=...`). Both score the same tokens.
    """

    needs: ClassVar[type[Scores]] = TopKScores
    produces: ClassVar[type[Scores]] = DeltaScores
    requires: ClassVar[ScoreKinds] = frozenset({AtIds})
    min_group: ClassVar[int] = 1

    # teacher of the run that is the base
    base: Names = "base"
    # prompt that the base reads: the TEACHER's own, or the STUDENT's
    base_reads: ContextIds = ContextIds.TEACHER

    @property
    def needs_engines(self) -> frozenset[Need]:
        return frozenset({Need(Role.READER), Need(Role.READER, self.base)})

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> Sequence[Scores]:
        def of_base(t: Trajectory) -> Trajectory:
            return replace(t, prompt=replace(t.prompt, teacher=self.base, teacher_ids=self.base_reads.of(t.prompt)))

        texts = (trajectories, [of_base(t) for t in trajectories])
        tuned, base = await asyncio.gather(*[StudentTopK()(each, context) for each in texts])
        return [
            DeltaScores(
                logprobs=a.logprobs,
                topk_ids=a.topk_ids,
                topk_logprobs=a.topk_logprobs,
                rest=a.rest,
                base=np.asarray(b.logprobs),
                topk_base=np.asarray(b.topk_logprobs),
            )
            for a, b in zip(tuned, base, strict=True)
            if isinstance(a, TopKScores) and isinstance(b, TopKScores)
        ]
