"""Blended rollouts: the student writes with its teacher's help, within a trust region around itself."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from opd.errors import ConfigurationError
from opd.method.promises import RolloutLimit
from opd.method.schedules import Schedule, value
from opd.ports import Context, Need, Role, TeacherBlend, needs_of
from opd.rollouts.student import StudentRollout, generate
from opd.settings.ranges import OptionalName, TrustRegion
from opd.settings.validation import settings
from opd.types import Prompt, TokenScores, Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class BlendedRollout:
    """Rollout whose tokens are drawn from blends of the student with its teacher (TRB, arXiv 2605.31159).

    At every token the blend is the distribution nearest to the teacher, in KL(blend||teacher), among those with
    KL(blend||student) at most `budget` (`opd.rollouts.trust_region`). The engine computes it exactly, from the logits
    of both models for the same context, which is the student's (a plan refuses prompts of which the teacher would be
    shown more). Early texts are thus better than the student's own, and what it learns from them is unchanged. Where
    the budget is 0, engines are asked for the student's own text, bit for bit.

    `budget` follows a schedule over steps, as `Term.coefficient` does; published is a linear one that ends at 0.
    `behavior` has the blend's log-probabilities, by which estimates from sampled tokens weight (p / behavior); the
    published loss needs none, since it sums over a support that the sampled token does not choose. That support
    is the learner's choice: what an engine could record here would be the blend's top-k.
    Example: `BlendedRollout(student=StudentRollout(max_tokens=77), budget=LinearSchedule(first=0.02, last=0))`.
    """

    records: ClassVar[type[TokenScores]] = TokenScores
    on_policy: ClassVar[bool] = True
    truncated: ClassVar[bool] = False

    # how the student generates
    student: StudentRollout
    # largest KL(blend||student) of a token's distribution in nats: a number, or a schedule over steps
    budget: TrustRegion | Schedule = 0.02
    # teacher of the blend; empty: the prompts' own, of which a run then has one
    teacher: OptionalName = ""

    def __post_init__(self) -> None:
        if self.student.truncated or self.student.record_topk:
            raise ConfigurationError(
                "rollout BlendedRollout needs a student that samples (a temperature above 0, top_p=1) and records no "
                f"top-k, since a trust region is one of whole distributions, but got {self.student}; set "
                "rollout.student.top_p=1, rollout.student.temperature=1 and rollout.student.record_topk=0, and choose "
                "an objective whose support the learner chooses (SupportDivergence with StudentTop)"
            )

    @property
    def needs_engines(self) -> frozenset[Need]:
        inside = frozenset({Need(Role.BLENDED, self.teacher)}) if self.budget else frozenset()
        return needs_of(self.student) | inside

    @property
    def limits(self) -> tuple[RolloutLimit, ...]:
        none = replace(self, budget=0.0)
        return (RolloutLimit(name="a budget of 0 is the student", rollout=none, equals=self.student),)

    def budget_at(self, context: Context) -> float:
        """Budget of every token at a step.

        Raises:
            ConfigurationError: the schedule gives less than 0.
        """
        budget = value(self.budget, context)
        if not budget >= 0:
            raise ConfigurationError(
                f"rollout BlendedRollout needs a budget of 0 or more, but its schedule gives {budget:g} at step "
                f"{context.step}; correct method.rollout.budget"
            )
        return budget

    async def __call__(self, group: Sequence[Prompt], context: Context) -> list[Trajectory]:
        budget = self.budget_at(context)
        if budget == 0:
            return await self.student(group, context)
        blend = TeacherBlend(teacher=self.teacher or group[0].teacher, budget=budget)
        return await generate(group, context.student, self.student.sampling, blend=blend)
