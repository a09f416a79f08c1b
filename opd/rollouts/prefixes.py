"""Prefixes of trajectories: the student generates, and is trained on, only the first tokens of a completion."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from opd.errors import ConfigurationError
from opd.method.promises import RolloutLimit
from opd.method.schedules import Schedule, value
from opd.ports import Context, Need, needs_of
from opd.rollouts.student import StudentRollout
from opd.settings.ranges import Fraction
from opd.settings.validation import settings
from opd.types import Prompt, StopReason, TokenScores, Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class PrefixRollout:
    """Rollout of the first `share` of `max_tokens` tokens, at least one (reasoning prefixes, arXiv 2602.15260).

    A loss per token reads nothing after its token, so the gradient is that of whole completions whose later tokens are
    masked; generating, scoring and learning cost what the prefix costs. A completion that is cut there ends with
    `StopReason.PREFIX`: no end-of-text token is added, it does not count as cut by the token limit, and graders give it
    0. Evaluation generates whole completions. `share` follows a schedule over steps as in `Term.coefficient`; of
    the paper's own (a start and an increment per step) no numbers are published.
    Example: `PrefixRollout(student=StudentRollout(max_tokens=1024), share=LinearSchedule(first=0.1, last=1.0))`.
    """

    # rollout whose completions are cut short
    student: StudentRollout
    # share of the student's max_tokens that is generated: a number from 0 to 1, or a schedule over steps
    share: Fraction | Schedule = 0.1

    @property
    def records(self) -> type[TokenScores]:
        return self.student.records

    @property
    def needs_engines(self) -> frozenset[Need]:
        return needs_of(self.student)

    @property
    def on_policy(self) -> bool:
        return self.student.on_policy

    @property
    def truncated(self) -> bool:
        return self.student.truncated

    @property
    def limits(self) -> tuple[RolloutLimit, ...]:
        whole = replace(self, share=1.0)
        return (RolloutLimit(name="share = 1 is the student", rollout=whole, equals=self.student),)

    def tokens(self, context: Context) -> int:
        """Length of the prefix at a step, from 1 to the student's `max_tokens`."""
        share = value(self.share, context)
        if not 0 <= share <= 1:
            raise ConfigurationError(
                f"rollout PrefixRollout needs a share from 0 to 1, but its schedule gives {share:g} at step "
                f"{context.step}; correct method.rollout.share"
            )
        return max(1, round(share * self.student.max_tokens))

    async def __call__(self, group: Sequence[Prompt], context: Context) -> list[Trajectory]:
        tokens = self.tokens(context)
        trajectories = await replace(self.student, max_tokens=tokens)(group, context)
        if tokens == self.student.max_tokens:
            return trajectories
        return [replace(t, stop=StopReason.PREFIX) if t.stop is StopReason.LENGTH else t for t in trajectories]
