"""Rollouts of which a part is trained: texts that are good enough, and prompts that are worth it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Self

import numpy as np

from opd.loss.metrics import compression
from opd.method.promises import RolloutLimit
from opd.method.rewards import task_rewards
from opd.method.slots import Rollout
from opd.ports import Context, Need, Role, needs_of
from opd.settings.ranges import Fraction, In
from opd.settings.validation import settings
from opd.types import Prompt, StopReason, TokenScores, Trajectory


class _Selection:
    """Facts of a rollout that leaves out some of what another generates: those of the other, but not on-policy."""

    __slots__ = ()
    on_policy: ClassVar[bool] = False

    of: Rollout

    @property
    def records(self) -> type[TokenScores]:
        return self.of.records

    @property
    def min_group(self) -> int:
        return getattr(self.of, "min_group", 1)

    @property
    def truncated(self) -> bool:
        return self.of.truncated


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class GoodTexts(_Selection):
    """Trajectories of which those that are not good enough are left out: the filter of an off-policy cold start.

    Left out is what the token limit cut, what repeats itself, and what its grade says is wrong. Rethinking OPD (arXiv
    2604.13016) leaves out teacher texts that are cut or repetitive; its threshold is not published, and a grade is
    ours. A trajectory that is left out stands in the step, untrained: the ledger counts it as dropped,
    `sample/left_out` is the share of such, and with a grade `reward/mean` is that of all texts. What is trained depends
    on whole texts, so the part is not for estimates from sampled tokens, which would no longer be of what they say.
    """

    # rollout whose texts are looked at
    of: Rollout
    # least grade of a text that is trained; 0 asks no grader
    at_least: Annotated[float, In(0, 1e6, because="0 asks no grader")] = 0.0
    # also train what the token limit cut
    cut: bool = False
    # compression of the last 2,500 tokens above which a text counts as repetitive; 0 looks at none
    repetition: Annotated[float, In(1, 1e6, or_zero=True, because="0 looks at none")] = 0.0

    @property
    def needs_engines(self) -> frozenset[Need]:
        return needs_of(self.of) | ({Need(Role.GRADER)} if self.at_least else frozenset())

    @property
    def everything(self) -> Self:
        """The same with nothing left out."""
        return replace(self, at_least=0.0, cut=True, repetition=0.0)

    @property
    def limits(self) -> tuple[RolloutLimit, ...]:
        name = "without a filter it is what it looks at"
        return (RolloutLimit(name=name, rollout=self.everything, equals=self.of),)

    async def __call__(self, group: Sequence[Prompt], context: Context) -> list[Trajectory]:
        written = await self.of(group, context)
        if self.at_least:
            grades = await task_rewards(written, context)
            written = [replace(t, reward=grade) for t, grade in zip(written, grades, strict=True)]
        return [t if self._good(t) else untrained(t) for t in written]

    def _good(self, text: Trajectory) -> bool:
        whole = self.cut or text.stop is not StopReason.LENGTH
        fresh = not self.repetition or compression(text.token_ids) <= self.repetition
        return whole and fresh and (not self.at_least or (text.reward or 0.0) >= self.at_least)


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class OpenPrompts(_Selection):
    """Trajectories of prompts that the student does not solve yet and its teacher does; those of others are left out.

    A prompt counts as solved by the student if more than `solved_at_most` of its group have a grade of 1, and as solved
    by the teacher if the one text that it writes has. Prompts that all solve, or none, are what dynamic sampling leaves
    out in reinforcement learning (DAPO, arXiv 2503.14476); the choice here is ours. Rethinking OPD (arXiv 2604.13016)
    chooses prompts by where they come from, the teacher's own training set, which is a file and not a part. How what is
    left out is counted, and why no estimate from sampled tokens goes with it: see `GoodTexts`.
    """

    # rollout that is trained
    of: Rollout
    # largest share of a prompt's texts that are right; 1 leaves no prompt out
    solved_at_most: Fraction = 0.5
    # how the teacher tries the prompt; left out, it is not asked
    teacher: Rollout | None = None

    @property
    def needs_engines(self) -> frozenset[Need]:
        asked = needs_of(self.teacher) if self.teacher is not None else frozenset[Need]()
        return needs_of(self.of) | asked | {Need(Role.GRADER)}

    @property
    def everything(self) -> Self:
        """The same with nothing left out."""
        return replace(self, solved_at_most=1.0, teacher=None)

    @property
    def limits(self) -> tuple[RolloutLimit, ...]:
        name = "solved_at_most = 1 without a teacher is every prompt"
        return (RolloutLimit(name=name, rollout=self.everything, equals=self.of),)

    async def __call__(self, group: Sequence[Prompt], context: Context) -> list[Trajectory]:
        written = await self.of(group, context)
        grades = await task_rewards(written, context)
        written = [replace(t, reward=grade) for t, grade in zip(written, grades, strict=True)]
        if np.mean([grade >= 1 for grade in grades]) > self.solved_at_most or not await self._taught(group[0], context):
            return [untrained(t) for t in written]
        return written

    async def _taught(self, prompt: Prompt, context: Context) -> bool:
        """Success of the teacher at the prompt; True without a teacher."""
        if self.teacher is None:
            return True
        (grade,) = await task_rewards(await self.teacher([prompt], context), context)
        return grade >= 1


def untrained(text: Trajectory) -> Trajectory:
    """The trajectory with nothing in it to be learned."""
    return replace(text, loss_mask=np.zeros(len(text), dtype=bool))
