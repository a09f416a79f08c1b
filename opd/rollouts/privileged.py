"""Rollout whose teacher is shown what the group's own trajectories say."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from opd.method.slots import Rollout
from opd.ports import Context, Need, needs_of
from opd.rollouts.contexts import PromptAlone, TeacherContext
from opd.rollouts.mixed import RolloutLimit
from opd.settings.validation import settings
from opd.types import Prompt, TokenScores, Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class PrivilegedRollout:
    """The student's trajectories, each with a prompt of its own for the teacher, built from its whole group.

    `shown` is called once the group is written, and what it builds stands in `Prompt.teacher_ids` of the trajectory:
    every scorer of the method reads it there. The student and the learner keep the student's prompt. A trajectory for
    which there is nothing to show is not trained: its loss mask is False everywhere.
    Example: `PrivilegedRollout(student=StudentRollout(max_tokens=1024), shown=SuccessfulSibling())`.
    """

    # how the student generates
    student: Rollout
    # what the teacher reads before each trajectory
    shown: TeacherContext

    @property
    def records(self) -> type[TokenScores]:
        return self.student.records

    @property
    def needs_engines(self) -> frozenset[Need]:
        return needs_of(self.student) | self.shown.needs_engines

    @property
    def min_group(self) -> int:
        return self.shown.min_group

    @property
    def on_policy(self) -> bool:
        return getattr(self.student, "on_policy", False)

    @property
    def truncated(self) -> bool:
        return getattr(self.student, "truncated", False)

    @property
    def plain(self) -> Self:
        """The same with nothing shown."""
        return replace(self, shown=PromptAlone())

    @property
    def limits(self) -> tuple[RolloutLimit, ...]:
        return (RolloutLimit(name="nothing shown is the student", rollout=self.plain, equals=self.student),)

    async def __call__(self, group: Sequence[Prompt], context: Context) -> list[Trajectory]:
        written = await self.student(group, context)
        contexts = await self.shown(written, context)
        return [_shown(t, ids) for t, ids in zip(written, contexts, strict=True)]


def _shown(trajectory: Trajectory, ids: "np.ndarray | None") -> Trajectory:
    if ids is None:
        return replace(trajectory, loss_mask=np.zeros(len(trajectory), dtype=bool))
    return replace(trajectory, prompt=replace(trajectory.prompt, teacher_ids=ids))
