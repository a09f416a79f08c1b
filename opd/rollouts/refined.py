"""Rollout of rewritten text: the student writes, and the teacher, or the student itself, rewrites what it wrote."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import ClassVar, Self

import numpy as np

from opd.method.slots import Rollout
from opd.method.templates import Ids
from opd.ports import Context, GenerateRequest, Need, Role, Sampling, needs_of
from opd.rollouts.contexts import PromptAlone, TeacherContext
from opd.rollouts.mixed import RolloutLimit
from opd.rollouts.selected import untrained
from opd.rollouts.student import TeacherRollout, trajectory
from opd.settings.ranges import Temperature, Tokens, TopP
from opd.settings.validation import settings
from opd.types import NO_VERSION, Prompt, TokenScores, Trajectory


class Refiner(Enum):
    """Model that rewrites."""

    TEACHER = "teacher"  # the prompt's own
    STUDENT = "student"  # the current student, which then should be shown more than its draft


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class RefinedRollout:
    """Trajectories that are rewritten drafts of the student (TRD, arXiv 2606.08432, algorithm 1).

    The student writes a draft from its own prompt, `shown` puts it into a context, and the refiner writes the text that
    is trained from that context, which stands in `Prompt.teacher_ids`: the teacher scores the text behind the draft,
    the student learns it behind its own prompt. Nothing of a draft is trained. Where there is nothing to show, the
    draft stands in the trajectory and is not trained.

    The paper itself makes drafts and rewritten texts once, with the student as it was at the start (single pass): with
    that student as the teacher, `student` is a `TeacherRollout`, and a fixed set of prompts gets the same texts again.
    """

    records: ClassVar[type[TokenScores]] = TokenScores
    on_policy: ClassVar[bool] = False

    # how drafts are written
    student: Rollout
    # what the refiner reads before it writes, and the teacher before it scores
    shown: TeacherContext
    # longest rewritten text
    max_tokens: Tokens
    # model that rewrites: the TEACHER, or the current STUDENT
    refiner: Refiner = Refiner.TEACHER
    # of the rewritten text: 1 samples the model's own distribution, 0 is greedy
    temperature: Temperature = 1.0
    # share of probability that is sampled from; 1 is all of it
    top_p: TopP = 1.0

    @property
    def needs_engines(self) -> frozenset[Need]:
        writes = Need(Role.WRITER if self.refiner is Refiner.TEACHER else Role.STUDENT)
        return needs_of(self.student) | self.shown.needs_engines | {writes}

    @property
    def min_group(self) -> int:
        return self.shown.min_group

    @property
    def truncated(self) -> bool:
        return self.top_p < 1 or self.temperature == 0

    @property
    def plain(self) -> Self:
        """The same with nothing shown."""
        return replace(self, shown=PromptAlone())

    @property
    def limits(self) -> tuple[RolloutLimit, ...]:
        own = TeacherRollout(max_tokens=self.max_tokens, temperature=self.temperature, top_p=self.top_p)
        alone = replace(self.plain, refiner=Refiner.TEACHER)
        return (RolloutLimit(name="a teacher that is shown no draft writes its own text", rollout=alone, equals=own),)

    async def __call__(self, group: Sequence[Prompt], context: Context) -> list[Trajectory]:
        drafts = await self.student(group, context)
        contexts = await self.shown(drafts, context)
        rewritten = iter(await self._rewritten(drafts, contexts, context))
        return [untrained(d) if ids is None else next(rewritten) for d, ids in zip(drafts, contexts, strict=True)]

    async def _rewritten(
        self, drafts: Sequence[Trajectory], contexts: "Sequence[Ids | None]", context: Context
    ) -> list[Trajectory]:
        sampling = Sampling(max_tokens=self.max_tokens, temperature=self.temperature, top_p=self.top_p)
        prompts = [
            (d.sample, replace(d.prompt, teacher_ids=ids))
            for d, ids in zip(drafts, contexts, strict=True)
            if ids is not None
        ]
        if not prompts:
            return []
        taught = self.refiner is Refiner.TEACHER
        engine = context.writers[prompts[0][1].teacher] if taught else context.student
        completions = await engine.generate(
            [
                GenerateRequest(prompt_id=p.id, sample=number, context_ids=p.teacher_ids, sampling=sampling)
                for number, p in prompts
            ]
        )
        made = [trajectory(p, number, c) for (number, p), c in zip(prompts, completions, strict=True)]
        if not taught:
            return made
        return [replace(t, digests={}, versions=np.full(len(t), NO_VERSION, dtype=np.int32)) for t in made]
