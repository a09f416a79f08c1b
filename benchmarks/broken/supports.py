"""Scorers, rollouts and readings about other ids than they say, beside objectives that are right."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float
from torch import Tensor

from opd.loss.chunked import StudentLogits
from opd.loss.readings import StudentEntropy
from opd.ports import Context, Need, Role, ScoreKinds, TopK
from opd.rollouts.student import StudentRollout
from opd.scorers.teacher import StudentTopK, TeacherTopK, ask
from opd.types import Batch, Prompt, Scores, TargetScores, TokenScores, TopKScores, Trajectory, VocabularyScores


@dataclass(frozen=True, slots=True, kw_only=True)
class TwelveIds(TeacherTopK):
    """A support of at most 12 ids, whatever `k` is: the limit of a server that was not read."""

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> Sequence[Scores]:
        return await TeacherTopK(k=min(self.k, 12))(trajectories, context)


@dataclass(frozen=True, slots=True, kw_only=True)
class LikeliestLost(StudentTopK):
    """The student's top-k without the likeliest id: the first column was taken for the sampled token's."""

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> Sequence[Scores]:
        return await StudentTopK()([_cut(t) for t in trajectories], context)


def _cut(text: Trajectory) -> Trajectory:
    known: Any = text.behavior
    assert isinstance(known, TopKScores)
    return replace(
        text, behavior=replace(known, topk_ids=known.topk_ids[:, 1:], topk_logprobs=known.topk_logprobs[:, 1:])
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class HalfRecorded(StudentRollout):
    """Rollout that records half as many ids as it is set to."""

    async def __call__(self, group: Sequence[Prompt], context: Context) -> list[Trajectory]:
        fewer = StudentRollout(max_tokens=self.max_tokens, record_topk=-(-self.record_topk // 2))
        return await fewer(group, context)


@dataclass(frozen=True, slots=True, kw_only=True)
class LateLabels:
    """Soft labels of the teacher's four likeliest ids, each at the token after its own."""

    needs: ClassVar[type[Scores]] = TokenScores
    produces: ClassVar[type[Scores]] = TargetScores
    requires: ClassVar[ScoreKinds] = frozenset({TopK})
    needs_engines: ClassVar[frozenset[Need]] = frozenset({Need(Role.READER)})
    min_group: ClassVar[int] = 1

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> Sequence[Scores]:
        scores = await ask(trajectories, [TopK(k=4)] * len(trajectories), context)
        return [self._labels(np.roll(s.topk_ids, 1, axis=0), np.roll(s.topk_logprobs, 1, axis=0)) for s in scores]

    def _labels(self, ids: np.ndarray, logprobs: Float[np.ndarray, "T K"]) -> TargetScores:
        chances = np.exp(logprobs.astype(np.float64))
        chances = (chances / chances.sum(-1, keepdims=True)).astype(np.float32)
        return TargetScores(target_ids=ids, target_probs=chances, targets=np.ones(len(ids), dtype=np.float32))


@dataclass(frozen=True, slots=True, kw_only=True)
class TeachersEntropy(StudentEntropy):
    """The entropy of the wrong model: tokens are selected where the teacher is uncertain, not the student."""

    consumes: ClassVar[type[Scores]] = VocabularyScores

    def __call__(self, student: StudentLogits, batch: Batch[VocabularyScores]) -> Float[Tensor, " L"]:
        q = batch.scores.vocabulary_logprobs
        return -(q.exp() * q).sum(-1)
