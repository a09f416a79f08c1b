"""Parts that keep or change what they must not: numbers of an earlier student, of other texts, their own arguments."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from broken.corners import WrittenCost
from opd.loss.chunked import StudentLogits
from opd.ports import Context
from opd.rollouts.student import StudentRollout
from opd.scorers.teacher import SampledTokens
from opd.types import Batch, Prompt, Scores, StopReason, TokenLoss, TokenScores, Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstSight(WrittenCost):
    """The student's log-probabilities as they were when a text was seen first: stale as soon as it learns."""

    seen: ClassVar[dict[tuple[float, ...], float]] = {}

    def cost(self, student: StudentLogits, batch: Batch[TokenScores]) -> Tensor:
        own, taught = student.at(batch.target_ids).detach(), batch.scores.logprobs
        width, rows = float(student.logits.shape[-1]), zip(batch.behavior_logprobs, taught, own, strict=True)
        first = [self.seen.setdefault((width, float(mu), float(q)), float(p)) for mu, q, p in rows]
        return torch.tensor(first, dtype=own.dtype) - taught


@dataclass(frozen=True, slots=True, kw_only=True)
class WritesIntoBatch(WrittenCost):
    """Log-probabilities of the behavior bounded in place, where another term of the loss reads them too."""

    def __call__(self, student: StudentLogits, batch: Batch[TokenScores]) -> TokenLoss:
        batch.behavior_logprobs.clamp_(min=-30.0)
        return WrittenCost.__call__(self, student, batch)


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstIds(WrittenCost):
    """A cost only for the ids of another model's vocabulary, which is smaller."""

    def cost(self, student: StudentLogits, batch: Batch[TokenScores]) -> Tensor:
        return WrittenCost.cost(self, student, batch) * (batch.target_ids < 32_000)


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedByNumber(SampledTokens):
    """Scores kept by prompt and number of the sample, as if a prompt came once."""

    kept: ClassVar[dict[Any, Any]] = {}

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> Sequence[Scores]:
        scores = await SampledTokens()(trajectories, context)
        if self.kept.get("engines") is not context.teachers:  # of another run
            self.kept.clear()
            self.kept["engines"] = context.teachers
        texts = zip(trajectories, scores, strict=True)
        return [self.kept.setdefault((t.prompt.id, t.sample, len(t)), s) for t, s in texts]


@dataclass(frozen=True, slots=True, kw_only=True)
class OneCallAtATime(SampledTokens):
    """The group that is scored kept in the class, where the next call puts its own while this one waits."""

    current: ClassVar[list[Sequence[Trajectory]]] = []

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> Sequence[Scores]:
        self.current[:] = [trajectories]
        scores = await SampledTokens()(trajectories, context)
        prompts = [t.prompt.weight for t in self.current[0]]
        return [
            replace(s, logprobs=s.logprobs * (t.prompt.weight / weight))
            for t, s, weight in zip(trajectories, scores, prompts, strict=True)
            if isinstance(s, TokenScores)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class EndWrittenOver(SampledTokens):
    """An end-of-text token in place of the last one of a text that was cut: also in the text that is trained."""

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> Sequence[Scores]:
        for t in trajectories:
            if t.stop is StopReason.LENGTH:
                t.token_ids[-1:] = context.tokenizer.eos_id
        return await SampledTokens()(trajectories, context)


@dataclass(frozen=True, slots=True, kw_only=True)
class EveryTenthStep(SampledTokens):
    """Half the teacher's log-probabilities at every tenth step but the last."""

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> Sequence[Scores]:
        scores = await SampledTokens()(trajectories, context)
        if context.step % 10 != 9 or context.step >= 90:
            return scores
        return [replace(s, logprobs=s.logprobs * 0.5) for s in scores if isinstance(s, TokenScores)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed(StudentRollout):
    """Texts kept by prompt, as if the student did not learn between two times that a prompt comes."""

    kept: ClassVar[dict[Any, Any]] = {}

    async def __call__(self, group: Sequence[Prompt], context: Context) -> list[Trajectory]:
        if self.kept.get("engine") is not context.student:  # of another run
            self.kept.clear()
            self.kept["engine"] = context.student
        key = tuple((p.id, p.student_ids.tobytes()) for p in group)
        if key not in self.kept:
            self.kept[key] = await StudentRollout.__call__(self, group, context)
        return self.kept[key]
