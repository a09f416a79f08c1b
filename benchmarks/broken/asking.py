"""Rollouts and scorers that send wrong requests to the engines, beside objectives that are right."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from opd.ports import Context
from opd.rollouts.selected import GoodTexts
from opd.rollouts.student import StudentRollout, TeacherRollout
from opd.scorers.teacher import SampledTokens, TeacherHidden, TeacherTopK
from opd.types import HiddenScores, Prompt, Scores, TopKScores, Trajectory


def _reading(trajectories: Sequence[Trajectory], last: int, *, own: bool) -> list[Trajectory]:
    """The same texts, after the last ids of the teacher's context or of the student's."""
    prompts = [t.prompt for t in trajectories]
    contexts = [(p.student_ids if own else p.teacher_ids)[-last:] for p in prompts]
    return [
        replace(t, prompt=replace(p, teacher_ids=context))
        for t, p, context in zip(trajectories, prompts, contexts, strict=True)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentsContext(SampledTokens):
    """Scorer that queries a privileged teacher in the student's context, which lacks the privileged part."""

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> Sequence[Scores]:
        return await SampledTokens()(_reading(trajectories, 10**9, own=True), context)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShortContext(SampledTokens):
    """Scorer that sends the teacher only the last 128 ids of a prompt."""

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> Sequence[Scores]:
        return await SampledTokens()(_reading(trajectories, 128, own=False), context)


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstMatrix(TeacherHidden):
    """Hidden states of every teacher, all read with the first one's output matrix."""

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> Sequence[Scores]:
        scores = await TeacherHidden()(trajectories, context)
        return [replace(s, head=np.zeros_like(s.head)) for s in scores if isinstance(s, HiddenScores)]


@dataclass(frozen=True, slots=True, kw_only=True)
class WithWritten(TeacherTopK):
    """The teacher's top-k, with the sampled token in place of its last id: the support depends on the draw."""

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> Sequence[Scores]:
        scores = await TeacherTopK(k=self.k)(trajectories, context)
        return [self._with(t, s) for t, s in zip(trajectories, scores, strict=True) if isinstance(s, TopKScores)]

    def _with(self, trajectory: Trajectory, scores: TopKScores) -> TopKScores:
        ids, logprobs = np.array(scores.topk_ids), np.array(scores.topk_logprobs)
        missing = (ids != trajectory.token_ids[:, None]).all(1)
        ids[missing, -1], logprobs[missing, -1] = trajectory.token_ids[missing], scores.logprobs[missing]
        return replace(scores, topk_ids=ids, topk_logprobs=logprobs)


@dataclass(frozen=True, slots=True, kw_only=True)
class TemperatureIgnored(StudentRollout):
    """Rollout that samples at temperature 1, whatever was set."""

    async def __call__(self, group: Sequence[Prompt], context: Context) -> list[Trajectory]:
        return await StudentRollout(max_tokens=self.max_tokens)(group, context)


@dataclass(frozen=True, slots=True, kw_only=True)
class TemperatureTwice(StudentRollout):
    """The behavior's log-probabilities divided by a temperature that they have already."""

    async def __call__(self, group: Sequence[Prompt], context: Context) -> list[Trajectory]:
        written = await StudentRollout.__call__(self, group, context)
        return [
            replace(t, behavior=replace(t.behavior, logprobs=t.behavior.logprobs / self.temperature)) for t in written
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class LastTokenMasked(StudentRollout):
    """Rollout that masks the last token of a text, which ends it."""

    async def __call__(self, group: Sequence[Prompt], context: Context) -> list[Trajectory]:
        written = await StudentRollout.__call__(self, group, context)
        return [replace(t, loss_mask=np.arange(len(t)) < max(1, len(t) - 1)) for t in written]


@dataclass(frozen=True, slots=True, kw_only=True)
class WriterForgotten(TeacherRollout):
    """The teacher's text as the student's own: of the policy version 7."""

    async def __call__(self, group: Sequence[Prompt], context: Context) -> list[Trajectory]:
        written = await TeacherRollout.__call__(self, group, context)
        return [replace(t, versions=np.full(len(t), 7, dtype=np.int32)) for t in written]


@dataclass(frozen=True, slots=True, kw_only=True)
class WrongTextsKept(GoodTexts):
    """A filter of answers that keeps the wrong ones."""

    def _good(self, text: Trajectory) -> bool:
        return not self.at_least or (text.reward or 0.0) < self.at_least


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundedInPlace(StudentRollout):
    """The behavior's log-probabilities bounded in the engine's own arrays."""

    async def __call__(self, group: Sequence[Prompt], context: Context) -> list[Trajectory]:
        written = await StudentRollout.__call__(self, group, context)
        for t in written:
            np.maximum(t.behavior.logprobs, -2.0, out=t.behavior.logprobs)
        return written
